"""Means and other statistics with their standard errors and intervals."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_RESAMPLES = 100  # at a time, which bounds memory to 1.6 kB per image


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


def classification_error(correct: Tensor) -> tuple[float, float]:
    """Accuracy and its (binomial) standard error, sqrt(p (1 - p) / M).

    Args:
        correct: (M,) bool.

    Returns:
        Accuracy in [0, 1] and the error; both NaN without images.

    >>> classification_error(torch.tensor([True, True, True, False]))
    (0.75, 0.21650635094610965)
    """
    p = correct.double().mean().item()
    return p, math.sqrt(p * (1 - p) / len(correct)) if len(correct) else math.nan


def bootstrap_interval(
    statistic: Callable[[Tensor], Tensor], rows: Tensor, level: float = 0.95, num: int = 1000, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Percentile interval of a statistic under resampling of the images.

    The statistic is a function of sums over images, as a mean is, or a ratio of counts. A resample then is a matrix
    product of how often it holds each image with the rows of the images, and all resamples are one product.

    Args:
        statistic: From sums over the M images of each resample (R, ...) to values (R, ...), resample by resample.
        rows: (M, ...), one row per image.
        level: Share of the resamples inside the interval, in (0, 1).
        num: Number of resamples R.
        seed: Of the resamples; equal seeds and equal M give equal resamples.

    Returns:
        Lower and upper end, each of the shape of one value, fp64 on the CPU; NaN where a resample has no value.

    Raises:
        ValueError: No rows.

    Source: the percentile bootstrap (Efron 1979).

    >>> hits, union = torch.tensor([[1.0, 0.0], [2.0, 2.0]]), torch.tensor([[2.0, 2.0], [2.0, 4.0]])
    >>> low, high = bootstrap_interval(lambda s: (s[:, 0] / s[:, 1]).mean(1), torch.stack([hits, union], 1))
    >>> low.item(), high.item()  # twice the first image, twice the second
    (0.25, 0.75)
    """
    if not len(rows):
        raise ValueError("A bootstrap needs at least one row.")
    rows = rows.detach().cpu().double()
    generator = torch.Generator().manual_seed(seed)
    values = []
    for start in range(0, num, _RESAMPLES):
        drawn = torch.randint(len(rows), (min(_RESAMPLES, num - start), len(rows)), generator=generator)
        counts = rows.new_zeros(drawn.shape).scatter_add_(1, drawn, rows.new_ones(()).expand(drawn.shape))
        values.append(statistic((counts @ rows.flatten(1)).view(len(drawn), *rows.shape[1:])))
    tail = (1 - level) / 2
    low, high = torch.cat(values).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return low, high


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
