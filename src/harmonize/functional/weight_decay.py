"""Which parameters a recipe spares from weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import Tensor


def is_excluded(name: str, parameter: Tensor, patterns: Sequence[str]) -> bool:
    """Whether a parameter is spared from weight decay.

    Args:
        name: Full name, for example ``encoder.cls_token``.
        parameter: The parameter.
        patterns: Shell patterns for the full name or its last parts (``cls_token`` matches ``encoder.cls_token``); the
            word ``1d`` stands for every parameter with at most one dimension.

    >>> import torch
    >>> is_excluded("encoder.norm.weight", torch.zeros(8), ["1d"])
    True
    >>> is_excluded("encoder.cls_token", torch.zeros(1, 1, 8), ["1d", "*.bias"])
    False
    """
    return any(
        parameter.dim() <= 1 if p == "1d" else fnmatchcase(name, p) or fnmatchcase(name, f"*.{p}") for p in patterns
    )
