"""One training step. Everything that changes over training is a pure function of the optimiser step."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from harmonize.data.batches import RawBatch
from harmonize.functional.distributed import whole
from harmonize.functional.schedules import learning_rate
from harmonize.functional.seeding import mix_int
from harmonize.training.loggers import json_logger
from harmonize.training.loops import loop_state
from harmonize.training.optim import Optimization, build_optimizer
from harmonize.types import Batch, ObjectiveOutput, Progress


class PretrainModule(pl.LightningModule):
    """Trains an encoder with an objective; knows neither data sets nor what the objective does.

    Learning rate, momentum, lambda and random numbers depend on the optimiser step alone, never on a scheduler's or a
    generator's state, so that a resumed run is the run that was never interrupted, in mid-epoch as well.

    A step whose loss or gradient is not finite is skipped: weights, moments and the momentum network stay as they are,
    on every rank, and without waiting for the device.

    Args:
        encoder: The shared backbone; ``encoder.*`` in the checkpoint.
        objective: The objective with its heads and momentum copies; ``objective.*`` in the checkpoint.
        optimizer: Keywords of :func:`~harmonize.training.optim.build_optimizer`.
        schedule: Keywords of :func:`~harmonize.functional.schedules.learning_rate`.
        global_batch: Images of one optimiser step, over all ranks and micro-batches.
        steps_per_epoch: Optimiser steps of one epoch.
        total_steps: Optimiser steps of the whole run.
        seed: Of the run.
        fused: Whether the optimiser updates all parameters in one kernel, see ``build_optimizer``.
        log_every_n_steps: Distance, in optimiser steps, between logged training metrics.
        config: The resolved configuration, kept in the checkpoint as plain containers.

    Attributes:
        output: What the objective returned for the micro-batch at hand; None outside of a step.
        batch_came: When the loader handed out the batch at hand, see ``time.perf_counter``.
        skipped: (2,) float, on the device: skipped optimiser steps, in a row up to now and in all.
        extra: Further scalars about the optimiser step at hand, which callbacks may add; logged under ``train/``.
    """

    def __init__(
        self,
        encoder: nn.Module,
        objective: nn.Module,
        *,
        optimizer: Mapping[str, Any],
        schedule: Mapping[str, Any],
        global_batch: int,
        steps_per_epoch: int,
        total_steps: int,
        seed: int = 0,
        fused: bool = False,
        log_every_n_steps: int = 10,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.objective = objective
        self.schedule = dict(schedule)
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = total_steps
        self.global_batch = global_batch
        self.seed = seed
        self.log_every_n_steps = log_every_n_steps
        self.config = dict(config or {})
        self.optimization: Optimization = build_optimizer(
            encoder, objective, **optimizer, global_batch=global_batch, fused=fused
        )
        self.lr = 0.0
        self.output: ObjectiveOutput | None = None
        self.extra: dict[str, Tensor | float] = {}
        self.batch_came = 0.0
        self.skipped = torch.zeros(2)
        self._val_every: int | None = None  # epochs between validations, as the trainer was made

    @property
    def progress(self) -> Progress:
        """Where training stands."""
        return Progress(self.trainer.global_step, self.total_steps)

    @property
    def epoch(self) -> int:
        """Epoch of the optimiser step at hand, from 0."""
        return self.trainer.global_step // self.steps_per_epoch

    def is_logged(self, step: int) -> bool:
        """Whether training metrics of the ``step``-th optimiser step (from 1) are logged."""
        return step % self.log_every_n_steps == 0 or step in (1, self.total_steps)

    def setup(self, stage: str) -> None:
        """Note how often the trainer validates, before the last epoch changes it."""
        self._val_every = self.trainer.check_val_every_n_epoch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; its learning rate is set before every step, so that there is no scheduler."""
        return self.optimization.optimizer

    def on_train_start(self) -> None:
        """Make sure that the last epoch is validated, also if the run resumes within it."""
        if self._in_last_epoch:
            self.trainer.check_val_every_n_epoch = 1

    def on_train_epoch_start(self) -> None:
        """Tell the batch sampler the epoch, counted in optimiser steps; make sure that the last epoch is validated."""
        set_epoch(self.trainer.train_dataloader, self.epoch)
        self.trainer.check_val_every_n_epoch = 1 if self._in_last_epoch else self._val_every

    @property
    def _in_last_epoch(self) -> bool:
        return (self.epoch + 1) * self.steps_per_epoch >= self.total_steps

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Note when the loader handed out the batch."""
        self.batch_came = time.perf_counter()
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment what the loader left to the device."""
        return batch.augment() if isinstance(batch, RawBatch) else batch

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed this micro-batch; before the first one of a step set the learning rate and move the momentum network."""
        progress = self.progress
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        torch.manual_seed(mix_int(self.seed, progress.step, micro_batch, self.global_rank))
        if micro_batch == 0:
            self.extra.clear()
            self.lr = learning_rate(progress.fraction, self.optimization.peak_lr, **self.schedule)
            for group in self.optimization.optimizer.param_groups:
                group["lr"] = self.lr
            self.objective.before_step(self.encoder, progress)  # type: ignore[operator]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one micro-batch."""
        self.output = self.objective(self.encoder, batch, self.progress)
        loss = self.output.loss
        # A loss that is not finite makes the gradient NaN, on whatever rank it is: the ranks' mean tells all of them.
        return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Clip the global norm of the (unscaled) gradient, note what it was before; skip a step that it spoils."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
        self.extra["grad_norm"] = norm
        bad = ~norm.isfinite()
        in_a_row, total = self.skipped.to(norm.device)
        self.skipped = torch.stack([(in_a_row + 1) * bad, total + bad])
        self.extra["skipped_steps"] = self.skipped[1]
        if self.optimization.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.optimization.clip, norm)
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        elif bad:
            optimizer.zero_grad()  # what has no gradient is left alone

    def on_train_batch_end(self, *_: Any) -> None:
        """Let go of the graph; after the last step stop, which validates and saves even in mid-epoch."""
        self.output = None
        self._stop_after_the_last_step()

    def on_train_epoch_end(self) -> None:
        """A run that resumes with the last validation has no step left to stop after."""
        self._stop_after_the_last_step()

    def _stop_after_the_last_step(self) -> None:
        if self.trainer.global_step >= self.total_steps:
            self.trainer.should_stop = True

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Nothing of its own: callbacks look at the clean view (``Batch.image``) in ``on_validation_batch_end``."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the run goes on with, and the resolved configuration: a checkpoint alone says what it is."""
        logger = json_logger(self.trainer)
        checkpoint["config"] = self.config
        checkpoint["validation_due"] = self.trainer.validating
        checkpoint["skipped_steps"] = self.skipped.tolist()
        checkpoint["num_rows"] = logger.num_rows if logger is not None else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the optimiser's options be those of the configuration: only its moments are state. Take up the epoch."""
        (state,) = checkpoint["optimizer_states"]
        for stored, own in zip(state["param_groups"], self.optimization.optimizer.param_groups, strict=True):
            stored.update((option, value) for option, value in own.items() if option != "params")
        self.skipped = torch.tensor(checkpoint.get("skipped_steps", [0.0, 0.0]))
        due, limit = checkpoint.get("validation_due", False), self.trainer.limit_train_batches
        if due:
            self.trainer.check_val_every_n_epoch = 1
        checkpoint["loops"]["fit_loop"] |= loop_state(
            checkpoint["global_step"],
            self.steps_per_epoch,
            self.trainer.accumulate_grad_batches,
            due,
            limit if isinstance(limit, int) else None,
        )


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell a data loader's batch sampler the epoch, where it wants to know."""
    announce = getattr(getattr(loader, "batch_sampler", None), "set_epoch", None)
    if announce is not None:
        announce(epoch)
