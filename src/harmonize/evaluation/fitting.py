"""Training a network for an evaluation: one loop for everything that does more than read frozen features.

Learning rate and random numbers are functions of the optimiser step alone. After an interruption training therefore
ends in the very weights that it would have ended in without.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from harmonize.evaluation.base import Bench
from harmonize.functional.distributed import average_, copy_from_rank_0_, rank, world_size
from harmonize.functional.schedules import learning_rate
from harmonize.functional.seeding import mix_int
from harmonize.functional.weight_decay import is_excluded
from harmonize.types import ConfigError, NonFiniteLossError

SAVE_EVERY = 1000
"""Optimiser steps after which the state is stored at the latest; it is at the end of every epoch anyway."""

_STEM = {"patch_embed", "pos_embed", "cls_token", "reg_token", "dist_token", "mask_token", "norm_pre"}


class TrainingData(Protocol):
    """What the loop needs of a data module."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch."""

    def train_loader(self, epoch: int = 0, start: int = 0) -> Any:
        """Loader of micro-batches that have ``apply``, from the ``start``-th of an epoch on."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a network is trained; the base of every protocol that trains one.

    Attributes:
        epochs: Times that the training images are seen.
        batch_size: Images per optimiser step, over all ranks and micro-batches.
        lr: Learning rate at the end of the warm-up, for ``lr_batch`` images per step.
        lr_batch: Denominator of the rule lr * batch_size / lr_batch; None: ``lr`` is taken as it is.
        layer_decay: Learning rates fall by this factor from layer to layer, from the head down; 1: they do not.
        weight_decay: AdamW's.
        betas: AdamW's.
        no_decay: What is spared from weight decay, see :func:`~harmonize.functional.weight_decay.is_excluded`.
        warmup_epochs: Length of the linear warm-up.
        warmup_lr: Where it starts, as a share of the peak.
        decay: What comes after it: ``cosine``, ``polynomial`` (a straight line) or ``constant``.
        min_lr: Where that ends, as a share of the peak.
        clip: Largest global gradient norm; None: no clipping.
        accumulate: Micro-batches per optimiser step and rank.
        precision: ``32``, ``bf16`` or ``auto`` (bf16 where a GPU offers it); weights are fp32 in any case.
        ema: Decay per step of a moving average of the weights, which is evaluated as well; None: there is none.

    Raises:
        ConfigError: A number is out of range.
    """

    epochs: int
    batch_size: int
    lr: float
    lr_batch: int | None = None
    layer_decay: float = 1.0
    weight_decay: float = 0.05
    betas: Sequence[float] = (0.9, 0.999)
    no_decay: Sequence[str] = ("1d",)
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0
    decay: str = "cosine"
    min_lr: float = 0.0
    clip: float | None = None
    accumulate: int = 1
    precision: str = "auto"
    ema: float | None = None

    def __post_init__(self) -> None:
        positive = "a number above 0 is needed"
        for key, passes, needed in (
            ("epochs", self.epochs >= 1, "a whole number from 1 up is needed"),
            ("batch_size", self.batch_size >= 1, "a whole number from 1 up is needed"),
            ("lr", self.lr > 0, positive),
            ("lr_batch", self.lr_batch is None or self.lr_batch > 0, f"{positive}, or null"),
            ("layer_decay", 0 < self.layer_decay <= 1, "a number above 0, up to 1, is needed"),
            ("weight_decay", self.weight_decay >= 0, "a number from 0 up is needed"),
            ("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1) are needed"),
            (
                "warmup_epochs",
                0 <= self.warmup_epochs < self.epochs,
                f"0 up to, but not, epochs={self.epochs} is needed",
            ),
            ("warmup_lr", 0 <= self.warmup_lr <= 1, "a share of the peak, from 0 to 1, is needed"),
            ("decay", self.decay in ("cosine", "polynomial", "constant"), "cosine, polynomial or constant is needed"),
            ("min_lr", 0 <= self.min_lr <= 1, "a share of the peak, from 0 to 1, is needed"),
            ("clip", self.clip is None or self.clip > 0, f"{positive}, or null"),
            ("accumulate", self.accumulate >= 1, "a whole number from 1 up is needed"),
            ("precision", str(self.precision) in ("32", "bf16", "auto"), "32, bf16 or auto is needed"),
            ("ema", self.ema is None or 0 <= self.ema < 1, "a number in [0, 1), or null, is needed"),
        ):
            if not passes:
                raise ConfigError(f"eval.{key}={getattr(self, key)} is not possible: {needed}")

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of the warm-up, after scaling with the batch."""
        return self.lr if self.lr_batch is None else self.lr * self.batch_size / self.lr_batch

    def lr_at(self, step: int, total_steps: int) -> float:
        """Learning rate of the step that follows ``step`` finished ones."""
        return learning_rate(
            step / total_steps,
            self.peak_lr,
            warmup=self.warmup_epochs / self.epochs,
            warmup_lr=self.warmup_lr,
            decay=self.decay,
            min_lr=self.min_lr,
        )

    def check_batch(self, num_train: int) -> None:
        """See to it that batches can be made.

        Args:
            num_train: Images to train on.

        Raises:
            ConfigError: There are fewer images than a batch has, or the batch does not divide over the ranks.
        """
        if self.batch_size > num_train:
            raise ConfigError(
                f"eval.batch_size={self.batch_size} is too large: there are {num_train} images to train on, and an "
                "epoch needs at least one whole batch"
            )
        if self.batch_size % (share := world_size() * self.accumulate):
            raise ConfigError(
                f"eval.batch_size={self.batch_size} is not possible: a multiple of {share} is needed "
                f"({world_size()} devices x eval.accumulate={self.accumulate})"
            )


@dataclass
class Fitted:
    """What training ends in.

    Attributes:
        network: With the last weights, in eval mode.
        average: The same with their moving average, in eval mode; None where none was asked for.
        losses: Mean training loss of every epoch.
    """

    network: nn.Module
    average: nn.Module | None
    losses: list[float]

    @property
    def versions(self) -> dict[str, nn.Module]:
        """What is to be evaluated: ``""`` and, if there is one, ``EMA``."""
        return {"": self.network} | ({} if self.average is None else {"EMA": self.average})


def layer_ids(network: nn.Module, depth: int) -> dict[str, int]:
    """Which layer each parameter belongs to, for layer-wise learning rates.

    0: patch embedding, tokens and positions. i: the i-th block, from 1. depth + 1: the rest, that is the final norm, a
    relative-position table that all blocks share, and whatever stands behind the encoder. (timm puts the final norm
    with the last block and BEiT's shared table with the patch embedding.)

    Args:
        network: An encoder, or a network that has one inside.
        depth: Number of blocks.

    Source: MAE ``util/lr_decay.py``; BEiT ``optim_factory.py``; SimMIM ``optimizer.py``.
    """

    def layer(parts: list[str]) -> int:
        if "blocks" in parts:
            return int(parts[parts.index("blocks") + 1]) + 1
        return 0 if _STEM.intersection(parts) else depth + 1

    return {name: layer(name.split(".")) for name, _ in network.named_parameters()}


def parameter_groups(network: nn.Module, training: Training, depth: int) -> list[dict[str, Any]]:
    """Groups for AdamW: ``params``, ``weight_decay`` and ``scale``, the factor of the learning rate.

    Args:
        network: What is trained in it has ``requires_grad``.
        training: How.
        depth: Blocks of its encoder.
    """
    ids = layer_ids(network, depth)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            key = (ids[name], is_excluded(name, parameter, training.no_decay))
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if excluded else training.weight_decay,
            "scale": training.layer_decay ** (depth + 1 - layer),
        }
        for (layer, excluded), parameters in groups.items()
    ]


def fit(
    bench: Bench,
    name: str,
    network: nn.Module,
    loss: Callable[[nn.Module, Any, int], Tensor],
    data: TrainingData,
    training: Training,
) -> Fitted:
    """Train a network, or go on where an interrupted evaluation stopped.

    Every rank calls it with equal weights. Gradients are averaged over ranks, so that, but for the statistics of a
    plain BatchNorm and for random numbers, the number of ranks and micro-batches does not matter.

    Args:
        bench: Where, with which seed; keeps the state.
        name: Of the state.
        network: Is trained in place.
        loss: ``loss(network, batch, seed)``: mean over a micro-batch that is on the device; called under autocast.
            ``seed`` is another one for every step, micro-batch and rank; torch is seeded with it as well.
        data: The batches.
        training: How.

    Raises:
        ConfigError: ``training.precision`` is bf16, and the GPU has none.
        NonFiniteLossError: The loss is NaN or infinite.
    """
    with torch.random.fork_rng(devices=[bench.device] if bench.device.type == "cuda" else []):
        loop = _Loop(bench, name, network.to(bench.device), loss, data, training)
        loop.resume()
        for micro_batches in bench.track(loop, f"{name}, {training.epochs} epochs"):
            loop.advance(micro_batches)
    return Fitted(network.eval(), None if loop.average is None else loop.average.eval(), loop.losses)


@dataclass
class _Loop:
    """State of a training; iterating gives the micro-batches of every step that remains."""

    bench: Bench
    name: str
    network: nn.Module
    loss: Callable[[nn.Module, Any, int], Tensor]
    data: TrainingData
    training: Training
    step: int = 0
    losses: list[float] = field(default_factory=list)
    loss_sum: float = 0.0  # over the steps of the epoch at hand

    def __post_init__(self) -> None:
        depth = self.bench.spec.depth
        groups = parameter_groups(self.network, self.training, depth)
        betas = (self.training.betas[0], self.training.betas[1])
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas)
        self.average = None
        if self.training.ema is not None:
            self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.dtype = _autocast_dtype(str(self.training.precision), self.bench.device)
        self.total_steps = self.training.epochs * self.data.steps_per_epoch
        self.settings = f"{self.training}, {self.total_steps} steps, seed {self.bench.seed}"

    def __len__(self) -> int:
        return self.total_steps - self.step

    def __iter__(self) -> Iterator[Iterable[Any]]:
        if self.step >= self.total_steps:
            return
        first, start = divmod(self.step, self.data.steps_per_epoch)
        loader = self.data.train_loader(first, start * self.training.accumulate)
        for epoch in range(first, self.training.epochs):
            loader.batch_sampler.set_epoch(epoch)
            batches = iter(loader)
            for _ in range(start if epoch == first else 0, self.data.steps_per_epoch):
                yield islice(batches, self.training.accumulate)

    def resume(self) -> None:
        """Take up what an interrupted evaluation has stored."""
        state = self.bench.load_state(self.name)
        if state is not None and state["settings"] != self.settings:
            self.bench.say(f"{self.name}: what is stored here was trained with other settings; starting anew.")
        elif state is not None:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.step, self.losses, self.loss_sum = state["step"], state["losses"], state["loss_sum"]
            self.bench.say(f"{self.name}: going on after step {self.step} of {self.total_steps}.")

    def store(self) -> None:
        """Make sure that what has been done need not be done again; statistics of BatchNorm become rank 0's."""
        copy_from_rank_0_(self.network.buffers())
        state = {
            "settings": self.settings,
            "step": self.step,
            "losses": self.losses,
            "loss_sum": self.loss_sum,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }
        self.bench.save_state(self.name, state)

    def advance(self, micro_batches: Iterable[Any]) -> None:
        """One optimiser step."""
        self.network.train()
        value = self._gradients(micro_batches)
        lr = self.training.lr_at(self.step, self.total_steps)
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"{self.name}: the loss is {value} at step {self.step + 1} of {self.total_steps} (learning rate "
                f"{lr:.3g}); a smaller eval.lr, a longer eval.warmup_epochs, eval.clip=1 or eval.precision=32 may help."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        if self.training.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.training.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._move_average()
        self.step += 1
        self.loss_sum += value
        if self.step % self.data.steps_per_epoch == 0:
            self.losses.append(self.loss_sum / self.data.steps_per_epoch)
            self.loss_sum = 0.0
        if self.step % self.data.steps_per_epoch == 0 or self.step % SAVE_EVERY == 0:
            self.store()

    def _gradients(self, micro_batches: Iterable[Any]) -> float:
        """Put the gradient of the mean loss over all micro-batches and ranks into the parameters; returns that loss."""
        device, parts = self.bench.device, []
        for micro, batch in enumerate(micro_batches):
            seed = mix_int(self.bench.seed, self.step, micro, rank())
            torch.manual_seed(seed)
            batch = batch.apply(lambda tensor: tensor.to(device, non_blocking=True))
            with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None):
                part = self.loss(self.network, batch, seed) / self.training.accumulate
            part.backward()
            parts.append(part.detach().float())
        mean = torch.stack(parts).sum().view(1)
        average_([mean, *(parameter.grad for parameter in self.parameters if parameter.grad is not None)])
        return mean.item()

    @torch.no_grad()
    def _move_average(self) -> None:
        if self.average is None:
            return
        assert self.training.ema is not None
        for average, now in zip(self.average.parameters(), self.network.parameters(), strict=True):
            average.lerp_(now, 1 - self.training.ema)
        for copied, buffer in zip(self.average.buffers(), self.network.buffers(), strict=True):
            copied.copy_(buffer)


def _autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What autocast computes in; None: no autocast."""
    offered = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported())
    if precision == "bf16" and not offered:
        raise ConfigError("eval.precision=bf16 is not possible: this GPU has no bf16; 32 or auto is needed")
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and offered else "32"
    return torch.bfloat16 if precision == "bf16" else None
