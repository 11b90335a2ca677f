"""AdamW with each recipe's own exclusions from weight decay.

The published recipes differ here without saying so: MoCo v3 decays everything that is trained, MAE all but 1-D
parameters (its tokens are decayed), SimMIM also spares the class token but decays its mask token and its
relative-position tables; the denominator of the learning-rate rule is 256 for MoCo v3 and MAE, 512 for SimMIM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from harmonize.functional.weight_decay import is_excluded
from harmonize.types import ConfigError


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
    fused: bool = False,
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
        no_decay: Patterns of what is not decayed, see :func:`~harmonize.functional.weight_decay.is_excluded`.
        clip: Largest global gradient norm, or None.
        global_batch: Images of one optimiser step, over all ranks and micro-batches.
        fused: Update all parameters in one kernel; not with fp16, whose gradients lightning would clip while scaled.

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
        fused=fused,
    )
    return Optimization(optimizer, peak, clip)
