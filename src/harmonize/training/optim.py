"""AdamW with each recipe's own exclusions from weight decay, and the learning rate as a function of the optimiser step.

The published recipes differ here without saying so: MoCo v3 decays everything that is trained, MAE all but 1-D
parameters (its tokens are decayed), SimMIM also spares the class token but decays its mask token and its
relative-position tables; the denominator of the learning-rate rule is 256 for MoCo v3 and MAE, 512 for SimMIM.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from harmonize.types import ConfigError, Progress


@dataclass(frozen=True)
class Optimization:
    """What the training module needs of the optimiser.

    Attributes:
        optimizer: AdamW over the trained parameters, in a decayed and an undecayed group.
        peak_lr: Learning rate after scaling with the batch, at the end of the warm-up.
        clip: Largest global gradient norm; None: no clipping.
    """

    optimizer: torch.optim.Optimizer
    peak_lr: float
    clip: float | None


def trained_parameters(encoder: nn.Module, objective: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that receives a gradient, by its name in the checkpoint (``encoder.*``, ``objective.*``)."""
    parts = {"encoder": encoder, "objective": objective}
    return {
        f"{part}.{name}": parameter
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def is_excluded(name: str, parameter: Tensor, patterns: Sequence[str]) -> bool:
    """Whether a parameter is spared from weight decay.

    Args:
        name: Full name, for example ``encoder.cls_token``.
        parameter: The parameter.
        patterns: Shell patterns for the full name or its last parts (``cls_token`` matches ``encoder.cls_token``); the
            word ``1d`` stands for every parameter with at most one dimension.

    >>> is_excluded("encoder.norm.weight", torch.zeros(8), ["1d"])
    True
    >>> is_excluded("encoder.cls_token", torch.zeros(1, 1, 8), ["1d", "*.bias"])
    False
    """
    return any(
        parameter.dim() <= 1 if p == "1d" else fnmatchcase(name, p) or fnmatchcase(name, f"*.{p}") for p in patterns
    )


def build_optimizer(
    encoder: nn.Module,
    objective: nn.Module,
    *,
    lr: float,
    lr_batch: int | None,
    weight_decay: float,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    no_decay: Sequence[str] = (),
    clip: float | None = None,
    global_batch: int,
) -> Optimization:
    """AdamW as the recipe asks.

    Args:
        encoder: The shared backbone.
        objective: The objective, with its heads; neither's frozen parameters are touched (AdamW would decay them).
        lr: Base learning rate, for a global batch of ``lr_batch`` images.
        lr_batch: Denominator of the rule lr * global_batch / lr_batch; None: ``lr`` is used as it is.
        weight_decay: For the decayed group.
        betas: Of Adam.
        eps: Of Adam.
        no_decay: Patterns of what is not decayed, see :func:`is_excluded`.
        clip: Largest global gradient norm, or None.
        global_batch: Images of one optimiser step, over all ranks and micro-batches.

    Raises:
        ConfigError: No parameter is trained.
    """
    parameters = trained_parameters(encoder, objective)
    if not parameters:
        raise ConfigError("Nothing to train: every parameter of the backbone and of the loss is frozen.")
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in parameters.items():
        groups[is_excluded(name, parameter, no_decay)].append(parameter)
    peak = lr if lr_batch is None else lr * global_batch / lr_batch
    optimizer = torch.optim.AdamW(
        [
            {"params": members, "weight_decay": 0.0 if excluded else weight_decay}
            for excluded, members in groups.items()
            if members
        ],
        lr=peak,
        betas=(betas[0], betas[1]),
        eps=eps,
    )
    return Optimization(optimizer, peak, clip)


def learning_rate(
    progress: Progress,
    peak: float,
    *,
    warmup: float = 0.0,
    warmup_lr: float = 0.0,
    decay: Literal["cosine", "multistep", "constant"] = "cosine",
    min_lr: float = 0.0,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
) -> float:
    """Learning rate of the optimiser step that follows ``progress.step`` finished ones.

    Linear warm-up, then half a cosine from the peak to the minimum, or steps, or nothing. Everything is a share, so
    that a run of another length keeps its shape.

    Args:
        progress: Where training stands.
        peak: Learning rate at the end of the warm-up.
        warmup: Length of the warm-up, as a share of all steps.
        warmup_lr: Where the warm-up starts, as a share of the peak.
        decay: ``cosine``, ``multistep`` or ``constant``.
        min_lr: Where the cosine ends, as a share of the peak.
        milestones: Of ``multistep``, as shares of all steps.
        gamma: Factor at each milestone.

    Source:
        MoCo v3 ``main_moco.py`` and MAE ``util/lr_sched.py`` (cosine), SimMIM ``lr_scheduler.py`` (multistep).

    >>> learning_rate(Progress(1, 10), 1.0, warmup=0.2)
    0.5
    >>> round(learning_rate(Progress(6, 10), 1.0, warmup=0.2), 6)
    0.5
    """
    fraction = progress.fraction
    if fraction < warmup:
        return peak * (warmup_lr + (1 - warmup_lr) * fraction / warmup)
    if decay == "constant":
        return peak
    if decay == "multistep":
        return peak * gamma ** bisect_right(sorted(milestones), fraction)
    if decay == "cosine":
        done = (fraction - warmup) / (1 - warmup) if warmup < 1 else 1.0
        return peak * (min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * done)))
    raise ConfigError(f"schedule.decay={decay} must be cosine, multistep or constant.")
