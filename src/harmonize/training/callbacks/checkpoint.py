"""Checkpoints that survive a kill, a full disk and a newer torch."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from harmonize.training.loggers import json_logger


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
            reason = str(error).splitlines()[0]
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
    """``last.ckpt`` after every epoch and its validation, ``best.ckpt`` whenever the monitored metric improves.

    A ``Checkpoint`` of Lightning, hence called after all other callbacks: everything measured up to a checkpoint's step
    has been written before it.

    Args:
        folder: ``checkpoints/`` of the run folder.
        monitor: Metric for ``best.ckpt``, as in ``metrics.jsonl``.
        mode: ``max`` or ``min``.
    """

    def __init__(self, folder: Path, monitor: str = "val/knn_top1", mode: str = "max") -> None:
        self.folder, self.monitor, self.mode = folder, monitor, mode
        self.best: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"best": self.best, "monitor": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best value so far, if it is of the same metric."""
        if state_dict["monitor"] == self.monitor:
            self.best = state_dict["best"]

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save."""
        last, best = self.folder / "last.ckpt", self.folder / "best.ckpt"
        improved = trainer.strategy.broadcast(self._improved(trainer))
        trainer.save_checkpoint(best if improved else last)
        io = trainer.strategy.checkpoint_io
        if improved and trainer.is_global_zero and isinstance(io, AtomicCheckpointIO) and io.written:
            _link(best, last)
        trainer.strategy.barrier("checkpoint")

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


def _link(source: Path, target: Path) -> None:
    """Let ``target`` be the same file as ``source`` at once and whole; a copy where the file system has no links.

    Safe because checkpoints are only ever replaced, never written to.
    """
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    os.replace(temporary, target)
