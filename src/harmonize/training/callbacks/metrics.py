"""Training metrics: averaged over micro-batches and ranks, written every few steps; and the guard against NaN."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from harmonize.functional.distributed import world_size
from harmonize.training.loggers import record
from harmonize.training.module import PretrainModule
from harmonize.types import NonFiniteLossError


class StepMetrics(pl.Callback):
    """Logs the loss, its raw terms, the objective's statistics and the learning rate of optimiser steps.

    The values stay on the device until they are due: one reduction over the ranks and one transfer to the host per
    logged step. Every step is checked for a non-finite loss: on the CPU at once, elsewhere when the next row is due and
    before every checkpoint, always naming the first bad step.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._micro: list[dict[str, Tensor | float]] = []
        self._epoch: dict[str, tuple[Tensor, int]] = {}  # sum and number of the epoch's values: terms come and go
        self._bad: Tensor | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        """Collect a micro-batch; after the last one of an optimiser step log it, if it is due."""
        assert isinstance(module, PretrainModule)
        output = module.output
        assert output is not None
        losses = {"loss": output.loss, **{f"loss_{name}": term for name, term in output.terms.items()}}
        losses = {name: value.detach().float() for name, value in losses.items()}
        self._micro.append({**losses, **output.stats})
        is_last = not trainer.fit_loop._should_accumulate()
        step = trainer.global_step + (not is_last)  # counted when its last micro-batch is done
        self._watch(losses, step)
        if not is_last:
            return
        if trainer.strategy.root_device.type == "cpu" and world_size() == 1:
            self.check_finite()
        if module.is_logged(step) or any(name.startswith("grad_norm_") for name in module.extra):
            self.check_finite()
            metrics = _mean_over_ranks(_mean([{**micro, **module.extra} for micro in self._micro]), module.device)
            record(trainer, {f"train/{k}": v for k, v in metrics.items()} | {"train/lr": module.lr}, step)
        self._micro.clear()

    def _watch(self, losses: dict[str, Tensor], step: int) -> None:
        """Add to the epoch's means and remember the first non-finite loss, without waiting for the device."""
        for name, value in losses.items():
            total, count = self._epoch.get(name, (torch.zeros_like(value), 0))
            self._epoch[name] = total + value, count + 1
        names, values = list(losses), torch.stack(list(losses.values()))
        if names != self.names or self._bad is None:  # first step, or a term came or went
            self.check_finite()
            self.names = names
            self._bad = values.new_full((1 + len(values),), -1.0)
        found = torch.cat([values.new_full((1,), step), values])
        is_first = (self._bad[0] < 0) & ~values.isfinite().all()
        self._bad = torch.where(is_first, found, self._bad)

    def check_finite(self) -> None:
        """Stop a run whose loss is not finite; every rank must call it.

        Raises:
            NonFiniteLossError: Names the step and the terms.
        """
        if self._bad is None:
            return
        bad = self._bad.clone()
        if world_size() > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        step, *values = bad.tolist()
        if step >= 0:
            terms = ", ".join(f"{name} = {value:g}" for name, value in zip(self.names, values, strict=True))
            raise NonFiniteLossError(
                f"The loss is not finite at optimiser step {int(step)} ({terms}); nothing was saved since the last "
                "checkpoint. Try a smaller optimizer.lr, a longer schedule.warmup or trainer.precision=32."
            )

    def epoch_means(self) -> dict[str, float]:
        """Mean of the loss and of each term, where it took part, over the epoch so far and all ranks.

        Starts the next epoch's.
        """
        means: dict[str, Tensor | float] = {name: total / count for name, (total, count) in self._epoch.items()}
        device = next((total.device for total, _ in self._epoch.values()), torch.device("cpu"))
        self._epoch.clear()
        return _mean_over_ranks(means, device)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Check the last steps before a checkpoint is written and log the epoch's means."""
        self.check_finite()
        record(trainer, {f"epoch/{k}": v for k, v in self.epoch_means().items()}, trainer.global_step)


def _mean(rows: list[dict[str, Tensor | float]]) -> dict[str, Tensor | float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[-1]}


def _mean_over_ranks(values: dict[str, Tensor | float], device: torch.device) -> dict[str, float]:
    """Host values of scalars, in one reduction and one transfer; plain numbers are the same on every rank."""
    measured = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    if not measured:
        return {name: float(value) for name, value in values.items()}
    stacked = torch.stack([value.detach().to(device, torch.float32) for value in measured.values()])
    if world_size() > 1:
        dist.all_reduce(stacked)
        stacked /= world_size()
    host = dict(zip(measured, stacked.tolist(), strict=True))
    return {name: host[name] if name in host else float(value) for name, value in values.items()}
