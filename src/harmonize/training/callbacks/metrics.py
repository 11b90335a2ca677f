"""Training metrics: averaged over micro-batches and ranks, written every few steps; and the guard against NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from harmonize.functional.distributed import average_, gather, rank, world_size
from harmonize.training.loggers import record
from harmonize.training.module import PretrainModule
from harmonize.types import Batch, NonFiniteLossError


class StepMetrics(pl.Callback):
    """Logs the loss, its raw terms, the objective's statistics and the learning rate of optimiser steps.

    The values stay on the device until they are due: one reduction over the ranks and one transfer to the host per
    logged step. The module skips steps whose loss or gradient is not finite; too many of them in a row end the run: on
    the CPU at once, elsewhere when the next row is due and before every checkpoint, always naming the first of them.

    Args:
        max_skipped: Skipped steps in a row that end the run.
        folder: The run folder, which keeps the last batch and the network then; None: nothing is kept.
    """

    def __init__(self, max_skipped: int = 1, folder: Path | None = None) -> None:
        self.max_skipped, self.folder = max_skipped, folder
        self._names: list[str] = []
        self._micro: list[dict[str, Tensor | float]] = []
        self._epoch: dict[str, tuple[Tensor, Tensor]] = {}  # sum and number of the epoch's values: terms come and go
        self._first: Tensor | None = None  # of the skipped steps in a row: its number, its losses
        self._batch: Batch | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Collect a micro-batch; after the last one of an optimiser step log it, if it is due."""
        assert isinstance(module, PretrainModule)
        output = module.output
        assert output is not None
        losses = {"loss": output.loss, **{f"loss_{name}": term for name, term in output.terms.items()}}
        losses = {name: value.detach().float() for name, value in losses.items()}
        self._add(losses)
        self._micro.append({**losses, **output.stats})
        if trainer.fit_loop._should_accumulate():
            return
        self._batch, step = batch, trainer.global_step
        self._watch(module.skipped[0], _mean([{name: row[name] for name in losses} for row in self._micro]), step)
        if trainer.strategy.root_device.type == "cpu" and world_size() == 1:
            self.check_finite(module)
        if module.is_logged(step) or any(name.startswith("grad_norm_") for name in module.extra):
            self.check_finite(module)
            metrics = _mean_over_ranks(_mean([{**micro, **module.extra} for micro in self._micro]), module.device)
            record(trainer, {f"train/{k}": v for k, v in metrics.items()} | {"train/lr": module.lr}, step)
        self._micro.clear()

    def _add(self, losses: dict[str, Tensor]) -> None:
        """Add to the epoch's means what is finite."""
        for name, value in losses.items():
            total, count = self._epoch.get(name, (torch.zeros_like(value), torch.zeros_like(value)))
            is_finite = value.isfinite()
            self._epoch[name] = total + value.where(is_finite, 0), count + is_finite

    def _watch(self, in_a_row: Tensor, losses: Mapping[str, Tensor | float], step: int) -> None:
        """Remember the first of the skipped steps in a row, without waiting for the device."""
        values = torch.stack([torch.as_tensor(value, device=in_a_row.device) for value in losses.values()])
        found = torch.cat([values.new_full((1,), step), values])
        if self._first is None or len(self._first) != len(found):  # first step, or a term came or went
            self._first = found
        self._names = list(losses)
        self._first = torch.where(in_a_row > 1, self._first, found)

    def check_finite(self, module: PretrainModule) -> None:
        """Stop a run whose loss or gradient has not been finite for too long; every rank must call it.

        Raises:
            NonFiniteLossError: Names the first of the steps in a row and its terms.
        """
        in_a_row = int(module.skipped[0])  # the same on every rank
        if in_a_row < self.max_skipped or self._first is None:
            return
        first = self._first.clone()
        average_([first])  # NaN on any rank is NaN
        step, *values = first.tolist()
        terms = ", ".join(f"{name} = {value:g}" for name, value in zip(self._names, values, strict=True))
        steps = f"step {int(step)}" if in_a_row == 1 else f"{in_a_row} steps in a row, from step {int(step)} on"
        kept = self._keep(module)
        raise NonFiniteLossError(
            f"The loss or its gradient is not finite at {steps} ({terms}); these steps were skipped, nothing was saved "
            "since the last checkpoint. Try a smaller optimizer.lr, a longer schedule.warmup or trainer.precision=32."
            + (f"\nThe batch and the network are kept: harmonize replay {kept} shows where it happens." if kept else "")
        )

    def _keep(self, module: PretrainModule) -> Path | None:
        """Write the last batch and the network, for ``harmonize replay``; None if that cannot be done."""
        if self.folder is None or self._batch is None:
            return None
        path = self.folder / f"nonfinite_rank{module.global_rank}.pt"
        state = {
            "batch": vars(self._batch),
            "state_dict": module.trainer.strategy.lightning_module_state_dict(),
            "config": module.config,
            "step": module.trainer.global_step - 1,  # steps done before the one that failed
            "total_steps": module.total_steps,
            "micro_batch": module.trainer.accumulate_grad_batches - 1,
            "rank": module.global_rank,
        }
        try:
            torch.save(state, path)
        except (OSError, RuntimeError):
            path.unlink(missing_ok=True)
            return None
        return path

    def state_dict(self) -> dict[str, Any]:
        """The epoch's sums of every rank, for a run that is interrupted within it."""
        names = list(self._epoch)
        if not names:
            return {"epoch": {}}
        rows = torch.stack([torch.stack(self._epoch[name]).double() for name in names])
        ranks = gather(rows.unsqueeze(0)).cpu()
        return {"epoch": {name: ranks[:, i].clone() for i, name in enumerate(names)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the epoch's sums; of another number of ranks each takes the mean, so that a step counts as one."""
        for name, ranks in state_dict["epoch"].items():
            own = ranks[rank()] if len(ranks) == world_size() else ranks.mean(0)
            self._epoch[name] = own[0].float(), own[1].float()

    def epoch_means(self) -> dict[str, float]:
        """Mean of the loss and of each term, where it took part and was finite, over the epoch so far and all ranks.

        Starts the next epoch's.
        """
        sums: dict[str, Tensor | float] = {f"{i}{name}": pair[i] for name, pair in self._epoch.items() for i in (0, 1)}
        device = next((total.device for total, _ in self._epoch.values()), torch.device("cpu"))
        found = _mean_over_ranks(sums, device)  # of sum and number: their ratio is that of the totals
        names = list(self._epoch)
        self._epoch.clear()
        return {name: found[f"0{name}"] / found[f"1{name}"] if found[f"1{name}"] else math.nan for name in names}

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin new sums."""
        self._epoch.clear()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Check the last steps before a checkpoint is written and log the epoch's means."""
        assert isinstance(module, PretrainModule)
        self.check_finite(module)
        record(trainer, {f"epoch/{k}": v for k, v in self.epoch_means().items()}, trainer.global_step)


def _mean(rows: list[dict[str, Tensor | float]]) -> dict[str, Tensor | float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[-1]}


def _mean_over_ranks(values: dict[str, Tensor | float], device: torch.device) -> dict[str, float]:
    """Host values of scalars, in one reduction and one transfer; plain numbers are the same on every rank."""
    measured = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    if not measured:
        return {name: float(value) for name, value in values.items()}
    stacked = torch.stack([value.detach().to(device, torch.float32) for value in measured.values()])
    average_([stacked])
    host = dict(zip(measured, stacked.tolist(), strict=True))
    return {name: host[name] if name in host else float(value) for name, value in values.items()}
