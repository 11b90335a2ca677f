"""Pixels as patches, and the losses of masked image modelling on them."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, 3, h, w) into patches (B, N, p * p * 3), ordered (row in patch, column in patch, colour)."""
    return rearrange(images, "b c (h i) (w j) -> b (h w) (i j c)", i=patch_size, j=patch_size)


def unpatchify(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`patchify`.

    >>> x = torch.randn(2, 3, 4, 8)
    >>> bool((unpatchify(patchify(x, 2), (2, 4)) == x).all())
    True
    """
    side = round((patches.shape[-1] / 3) ** 0.5)
    return rearrange(patches, "b (h w) (i j c) -> b c (h i) (w j)", h=grid[0], i=side, j=side)


def masked_l1(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """SimMIM's loss: absolute error per masked pixel and colour, over the whole batch.

    Args:
        prediction: (B, N, p * p * 3).
        target: (B, N, p * p * 3), pixels of the mean/std-normalised image.
        mask: (B, N) bool, True = masked.

    Returns:
        Scalar: sum of absolute errors / (masked pixels + 1e-5) / 3.

    Source: SimMIM ``models/simmim.py``.

    >>> target = torch.tensor([1.0, 5.0])[None, :, None].expand(1, 2, 12)
    >>> round(masked_l1(torch.zeros(1, 2, 12), target, torch.tensor([[True, False]])).item(), 4)
    1.0
    """
    error = (prediction - target).abs() * mask.unsqueeze(-1)
    pixels = mask.sum() * (target.shape[-1] // 3)
    return error.sum() / (pixels + 1e-5) / 3


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """MAE's loss: squared error averaged within each patch, then over the hidden patches of the batch.

    Args:
        prediction: (B, N, p * p * 3).
        target: (B, N, p * p * 3), see :func:`normalize_patches`.
        mask: (B, N) bool, True = hidden.

    Returns:
        Scalar.

    Source: MAE ``models_mae.py`` (``forward_loss``).

    >>> target = torch.tensor([2.0, 5.0])[None, :, None].expand(1, 2, 3)
    >>> masked_mse(torch.zeros(1, 2, 3), target, torch.tensor([[True, False]])).item()
    4.0
    """
    error = (prediction - target).square().mean(dim=-1)
    return (error * mask).sum() / mask.sum()


def normalize_patches(patches: Tensor) -> Tensor:
    """MAE's ``norm_pix_loss`` target: each patch minus its mean, over its standard deviation (unbiased, + 1e-6).

    >>> normalize_patches(torch.tensor([[[1.0, 2.0, 3.0]]])).round(decimals=3).tolist()
    [[[-1.0, 0.0, 1.0]]]
    """
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()
