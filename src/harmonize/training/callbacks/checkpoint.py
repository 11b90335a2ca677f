"""Checkpoints that survive a kill, a full disk and a newer torch."""

from __future__ import annotations

import math
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from harmonize.training.loggers import json_logger
from harmonize.training.module import PretrainModule
from harmonize.training.signals import Agreement, Interrupted, StopSignals


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target, waits for the disk, then renames: the target is the old file or the new one, whole.

    A checkpoint that cannot be written (a full disk) costs a warning, not the run and not the previous checkpoint.

    Attributes:
        written: Whether the latest ``save_checkpoint`` reached the disk.
    """

    def __init__(self) -> None:
        self.written = False

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write one checkpoint; see the class for failures."""
        target = Path(path)
        temporary = target.with_name(target.name + ".tmp")
        self.written = False
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            self.written = True
        except (OSError, RuntimeError) as error:  # torch reports a short write as a RuntimeError
            temporary.unlink(missing_ok=True)
            kept = "the previous one is untouched" if target.exists() else "there is no earlier one"
            reason = f"{str(error).splitlines()[0]}; {_room(target.parent)}"
            # stacklevel 1: as a warning of lightning's, which calls this, it would be silenced.
            warnings.warn(f"{target} could not be written ({reason}); {kept}; training goes on.", stacklevel=1)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint; it holds plain containers and tensors only."""
        return torch.load(path, map_location="cpu", weights_only=True)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete a checkpoint, if it is there."""
        Path(path).unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """``last.ckpt`` at the end of every epoch, before and after its validation, and ``best.ckpt`` when that improves.

    Within an epoch it is saved after so many minutes, and when the run is asked to stop. The one before it is kept as
    ``previous.ckpt``. A ``Checkpoint`` of Lightning, hence called after all other callbacks: everything measured up to
    a checkpoint's step has been written before it.

    Args:
        folder: ``checkpoints/`` of the run folder.
        monitor: Metric for ``best.ckpt``, as in ``metrics.jsonl``.
        mode: ``max`` or ``min``.
        minutes: Time between checkpoints within an epoch; None: none.

    Raises:
        Interrupted: (from a hook) A signal asked the run to stop; what was done is saved.
    """

    def __init__(
        self, folder: Path, monitor: str = "val/knn_top1", mode: str = "max", minutes: float | None = None
    ) -> None:
        self.folder, self.monitor, self.mode = folder, monitor, mode
        self.best: float | None = None
        self._seconds = math.inf if minutes is None else 60 * minutes
        self._saved = time.monotonic()
        self._agreement = Agreement()
        self._signals = StopSignals()

    @property
    def last(self) -> Path:
        """The checkpoint that a run resumes from."""
        return self.folder / "last.ckpt"

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"best": self.best, "monitor": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best value so far, if it is of the same metric."""
        if state_dict["monitor"] == self.monitor:
            self.best = state_dict["best"]

    def on_sanity_check_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Listen to signals, now that lightning has put up its own handlers."""
        self._listen(trainer)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Listen to signals, also where there is no sanity check; start the clock."""
        self._listen(trainer)
        self._signals.between_steps = False
        self._saved = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        """Save if it is time, or if a rank was asked to stop."""
        if trainer.fit_loop._should_accumulate():
            return
        received = self._signals.received
        due = trainer.is_global_zero and time.monotonic() - self._saved > self._seconds
        wanted = self._agreement.largest(1 + received if received else int(due))
        assert isinstance(module, PretrainModule)
        if trainer.fit_loop.epoch_loop._num_ready_batches_reached() or trainer.global_step >= module.total_steps:
            return  # validation, or the end of the epoch, comes next, and a checkpoint with it
        if wanted:
            self._save(trainer, self.last)
        if wanted > 1:
            raise Interrupted(wanted - 1)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save the epoch: validation may take long, and fail."""
        if trainer.sanity_checking:
            return
        self._save(trainer, self.last)
        self._signals.between_steps = True
        self._stop_if_asked()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The end of the epoch is saved as a whole."""
        if not trainer.sanity_checking:
            self._signals.between_steps = False

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save the epoch with its validation."""
        best = self.folder / "best.ckpt"
        improved = trainer.strategy.broadcast(self._improved(trainer))
        self._save(trainer, best if improved else self.last)
        io = trainer.strategy.checkpoint_io
        if improved and trainer.is_global_zero and isinstance(io, AtomicCheckpointIO) and io.written:
            self._keep_previous()
            _link(best, self.last)
        trainer.strategy.barrier("checkpoint")
        self._stop_if_asked()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back; other ranks may be gone."""
        self._signals.restore()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Give the signals back, before lightning gives back its own."""
        self._agreement.finish()
        self._signals.restore()

    def _save(self, trainer: pl.Trainer, path: Path) -> None:
        if path == self.last and trainer.is_global_zero:
            self._keep_previous()
        trainer.save_checkpoint(path)
        self._saved = time.monotonic()

    def _keep_previous(self) -> None:
        """The checkpoint that is about to be replaced becomes ``previous.ckpt``: a disk may damage the newest."""
        if self.last.exists():
            _link(self.last, self.last.with_name("previous.ckpt"))

    def _listen(self, trainer: pl.Trainer) -> None:
        self._signals.forward = getattr(trainer.strategy.launcher, "kill", None)
        self._signals.install()

    def _stop_if_asked(self) -> None:
        """Stop if a signal has come, now that everything is saved."""
        if self._signals.received:
            raise Interrupted(self._signals.received)

    def _improved(self, trainer: pl.Trainer) -> bool:
        """Whether the monitored metric has a new value in this epoch, and the best one so far (known on rank 0)."""
        logger = json_logger(trainer)
        value = logger.now.get(self.monitor) if logger is not None else None
        if value is None:
            return False
        improved = self.best is None or (value > self.best if self.mode == "max" else value < self.best)
        if improved:
            self.best = value
        return improved


def _room(folder: Path) -> str:
    """How full the disk of a folder is, in words."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return f"{folder} is not there"
    return f"{usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MiB are free on its disk"


def _link(source: Path, target: Path) -> None:
    """Let ``target`` be the same file as ``source`` at once and whole; a copy where the file system has no links.

    Safe because checkpoints are only ever replaced, never written to.
    """
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        text = f"{target} could not be written ({error.strerror}; {_room(target.parent)}); training goes on."
        warnings.warn(text, stacklevel=1)
