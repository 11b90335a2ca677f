"""How far the run is: a bar on a terminal, a line per epoch elsewhere."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from harmonize.clock import duration
from harmonize.training.loggers import json_logger
from harmonize.training.module import PretrainModule

SHOWN = {
    "loss": "loss",
    "loss_contrastive": "contrastive",
    "loss_mim": "mim",
}


class ProgressDisplay(pl.Callback):
    """Shows losses, images/s and the time that is left; on rank 0 only.

    Args:
        bar: Whether to draw a bar; None: where the console is a terminal.
        console: Where to; default: standard output.
    """

    def __init__(self, bar: bool | None = None, console: Console | None = None) -> None:
        self.console = console or Console()
        self.bar = self.console.is_terminal if bar is None else bar
        self._progress: Progress | None = None
        self._started, self._first_step = time.perf_counter(), 0

    def on_sanity_check_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Say what the first wait is for."""
        if trainer.is_global_zero:
            self.console.print("Measuring the untrained network ...")

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock, and the bar."""
        assert isinstance(module, PretrainModule)
        self._started, self._first_step = time.perf_counter(), trainer.global_step
        if self.bar and trainer.is_global_zero:
            self._progress = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                console=self.console,
                expand=True,
            )
            self._progress.add_task("", total=module.total_steps, completed=trainer.global_step, epoch="", text="")
            self._progress.start()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        """Move the bar."""
        if self._progress is not None:
            assert isinstance(module, PretrainModule)
            parts = _losses(trainer, "train") + self._speed(trainer, module)
            self._progress.update(
                self._progress.task_ids[0],
                completed=trainer.global_step,
                epoch=_epoch(trainer, module),
                text="  ".join(parts),
            )

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Say what the bar waits for."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], text="validating ...")

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Sum the epoch up in a line."""
        if not trainer.is_global_zero:
            return
        assert isinstance(module, PretrainModule)
        logger = json_logger(trainer)
        now = logger.now if logger is not None else {}
        probes = [
            f"{label} {100 * now[key]:.1f} %"
            for key, label in (("val/knn_top1", "k-NN"), ("val/linear_top1", "linear"))
            if now.get(key) is not None
        ]
        line = [f"epoch {_epoch(trainer, module)}", *_losses(trainer, "epoch"), *probes, *self._speed(trainer, module)]
        self.console.print("  ".join(line), highlight=False, soft_wrap=True)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Leave the terminal as it was."""
        self._stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _speed(self, trainer: pl.Trainer, module: PretrainModule) -> list[str]:
        logger = json_logger(trainer)
        speed = logger.latest.get("train/images_per_second") if logger is not None else None
        done = trainer.global_step - self._first_step
        left = (time.perf_counter() - self._started) / max(1, done) * (module.total_steps - trainer.global_step)
        return [*([f"{speed:,.0f} images/s"] if speed else []), f"{duration(left)} left"]


def _epoch(trainer: pl.Trainer, module: PretrainModule) -> str:
    """Epochs begun (the one at hand included) of how many."""
    ceil = -(-trainer.global_step // module.steps_per_epoch), -(-module.total_steps // module.steps_per_epoch)
    return f"{ceil[0]}/{ceil[1]}"


def _losses(trainer: pl.Trainer, stage: str) -> list[str]:
    logger = json_logger(trainer)
    values = logger.latest if logger is not None else {}
    return [
        f"{label} {values[f'{stage}/{k}']:.4f}" for k, label in SHOWN.items() if values.get(f"{stage}/{k}") is not None
    ]
