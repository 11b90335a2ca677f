"""How well predicted classes of pixels agree with the true ones: sums over images first, ratios of the sums last."""

from __future__ import annotations

import torch
from torch import Tensor


def pixel_counts(predicted: Tensor, truth: Tensor, num_classes: int, ignore: int = 255) -> Tensor:
    """Pixels of each class in one image: rightly predicted, predicted, true. Ignored pixels count nowhere.

    Args:
        predicted: (H, W) int64 in [0, C).
        truth: (H, W) int64, classes or ``ignore``.
        num_classes: C.
        ignore: The value that stands for no class.

    Returns:
        (3, C) int64.

    >>> pixel_counts(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 255]]), 2).tolist()
    [[1, 1], [1, 2], [2, 1]]
    """
    counts = truth != ignore
    predicted, truth = predicted[counts], truth[counts]
    right = truth[predicted == truth]
    return torch.stack([torch.bincount(x, minlength=num_classes) for x in (right, predicted, truth)])


def intersection_over_union(counts: Tensor) -> Tensor:
    """Intersection over union of each class.

    Args:
        counts: (..., 3, C), :func:`pixel_counts` summed over images.

    Returns:
        (..., C) fp64; NaN for a class of which there is no true pixel.

    >>> intersection_over_union(torch.tensor([[1, 1, 0], [1, 2, 0], [2, 1, 0]])).tolist()
    [0.5, 0.5, nan]
    """
    right, predicted, truth = counts.double().unbind(-2)
    return torch.where(truth > 0, right / (predicted + truth - right), torch.nan)


def mean_iou(counts: Tensor) -> Tensor:
    """Mean of the intersection over union over the classes that have true pixels.

    Args:
        counts: (..., 3, C), :func:`pixel_counts` summed over images.

    Returns:
        (...) fp64.

    >>> mean_iou(torch.tensor([[1, 1, 0], [1, 2, 0], [2, 1, 0]])).item()
    0.5
    """
    return intersection_over_union(counts).nanmean(-1)


def pixel_accuracy(counts: Tensor) -> Tensor:
    """Share of the pixels, but for ignored ones, whose class is predicted.

    Args:
        counts: (..., 3, C), :func:`pixel_counts` summed over images.

    Returns:
        (...) fp64.

    >>> round(pixel_accuracy(torch.tensor([[1, 1], [1, 2], [2, 1]])).item(), 4)
    0.6667
    """
    right, _, truth = counts.double().unbind(-2)
    return right.sum(-1) / truth.sum(-1)
