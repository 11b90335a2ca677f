"""How fast the hardware is used: images per second, waiting for data, GPU memory."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch

from harmonize.training.module import PretrainModule


class Speed(pl.Callback):
    """Logs ``train/images_per_second``, ``train/data_wait``, ``train/augmentation`` and ``train/gpu_memory_gib``.

    ``data_wait`` is the share of the time until the loader hands out a batch; ``augmentation`` that in which it is
    moved and, with ``data.augment=device``, augmented. On a GPU the host only queues this work, and may wait there for
    its turn: a large share then says that the host runs ahead, as it should. Images are those of all ranks. Each value
    covers the training steps since the last logged one, without validation.
    """

    def __init__(self) -> None:
        self._start_over()
        self._mark = time.perf_counter()

    def _start_over(self) -> None:
        self._steps, self._busy, self._wait, self._augmentation = 0, 0.0, 0.0, 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Restart the clock after validation."""
        self._mark = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        """The batch is here: what went by was waiting for it, then making it ready."""
        assert isinstance(module, PretrainModule)
        now = time.perf_counter()
        self._wait += module.batch_came - self._mark
        self._augmentation += now - module.batch_came
        self._mark = now

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        """The micro-batch is done."""
        assert isinstance(module, PretrainModule)
        now = time.perf_counter()
        self._busy += now - self._mark
        self._mark = now
        if trainer.fit_loop._should_accumulate():
            return
        self._steps += 1
        if module.is_logged(trainer.global_step):
            total = self._busy + self._wait + self._augmentation
            module.extra["images_per_second"] = self._steps * module.global_batch / total
            module.extra["data_wait"] = self._wait / total
            module.extra["augmentation"] = self._augmentation / total
            if module.device.type == "cuda":
                module.extra["gpu_memory_gib"] = torch.cuda.max_memory_allocated(module.device) / 2**30
            self._start_over()
