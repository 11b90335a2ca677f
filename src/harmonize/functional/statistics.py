"""Means with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def mean_and_error(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the first dimension and its standard error, fp64.

    Args:
        rows: (M, ...), one row per image.

    Returns:
        Two (...); the error is NaN for fewer than two rows.

    >>> [x.item() for x in mean_and_error(torch.tensor([1.0, 3.0]))]
    [2.0, 1.0]
    """
    rows = rows.double()
    error = rows.std(dim=0) / math.sqrt(len(rows)) if len(rows) > 1 else torch.full_like(rows.sum(dim=0), math.nan)
    return rows.mean(dim=0), error


def jackknife(statistic: Callable[[Tensor], Tensor], num: int, max_groups: int = 16) -> tuple[Tensor, Tensor]:
    """A statistic of all images and its standard error, by leaving out one group of images after the other.

    For what is no mean over images, such as a rank or a correlation.

    Args:
        statistic: From positions of images (m,) int64 to a tensor.
        num: Number of images M.
        max_groups: Groups; with fewer images each is a group of its own. Image i is in group i modulo their number.

    Returns:
        The statistic of all, and its standard error (same shape).

    Source: the delete-a-group jackknife (Kott 2001).

    >>> x = torch.tensor([1.0, 2.0, 3.0, 6.0])
    >>> value, error = jackknife(lambda i: x[i].mean(), 4)
    >>> value.item(), round(error.item(), 4), round(mean_and_error(x)[1].item(), 4)
    (3.0, 1.0801, 1.0801)
    """
    everything = torch.arange(num)
    groups = min(max_groups, num)
    value = statistic(everything)
    parts = torch.stack([statistic(everything[everything % groups != g]) for g in range(groups)])
    spread = (parts - parts.mean(dim=0)).square().sum(dim=0)
    return value, (spread * (groups - 1) / groups).sqrt()
