"""Which patches are hidden: SimMIM's block masks and MAE's random subsets, as functions of uniform noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def block_mask(noise: Tensor, unit_grid: tuple[int, int], patches_per_unit: int, ratio: float) -> Tensor:
    """SimMIM's mask: whole square units are hidden, ``ceil(units * ratio)`` of them in every image.

    Args:
        noise: (B, units) uniform numbers; the units with the smallest ones are hidden.
        unit_grid: (rows, columns) of units.
        patches_per_unit: Patches along the side of a unit.
        ratio: Share of units to hide.

    Returns:
        (B, N) bool on the patch grid, row-major, True = masked.

    Source: SimMIM ``data/data_simmim.py`` (``MaskGenerator``).

    >>> block_mask(torch.tensor([[0.2, 0.1, 0.9, 0.8]]), (2, 2), 1, 0.5).tolist()
    [[True, True, False, False]]
    """
    num_masked = math.ceil(noise.shape[1] * ratio)
    hidden = noise.argsort(dim=1, stable=True)[:, :num_masked]
    units = torch.zeros_like(noise, dtype=torch.bool).scatter_(1, hidden, True)
    units = units.view(-1, *unit_grid)
    patches = units.repeat_interleave(patches_per_unit, dim=1).repeat_interleave(patches_per_unit, dim=2)
    return patches.flatten(1)


def random_mask(noise: Tensor, ratio: float) -> Tensor:
    """MAE's mask: the ``int(N * (1 - ratio))`` patches with the smallest noise stay visible.

    Args:
        noise: (B, N) uniform numbers.
        ratio: Share of patches to hide.

    Returns:
        (B, N) bool, True = masked.

    Source: MAE ``models_mae.py`` (``random_masking``); ``int`` truncates, so a ratio of .6 keeps 78 of 196.

    >>> random_mask(torch.tensor([[0.2, 0.1, 0.9, 0.8]]), 0.5).tolist()
    [[False, False, True, True]]
    """
    num_kept = int(noise.shape[1] * (1 - ratio))
    keep = noise.argsort(dim=1, stable=True)[:, :num_kept]
    return torch.ones_like(noise, dtype=torch.bool).scatter_(1, keep, False)


def visible(mask: Tensor, num_visible: int) -> Tensor:
    """Indices (B, K) of the patches that a mask (B, N) leaves visible, ascending; every image has K of them.

    >>> visible(torch.tensor([[True, False, False]]), 2).tolist()
    [[1, 2]]
    """
    return mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :num_visible]
