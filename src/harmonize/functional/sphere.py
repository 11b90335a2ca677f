"""Alignment and uniformity of embeddings on the unit sphere (Wang and Isola, arXiv:2005.10242)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def alignment(x: Tensor, y: Tensor) -> Tensor:
    """Squared distance (M,) between the normalised embeddings (M, D) of two views of the same images.

    >>> alignment(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item()
    2.0
    """
    return (F.normalize(x, dim=-1) - F.normalize(y, dim=-1)).square().sum(dim=-1)


def uniformity(x: Tensor, t: float = 2.0) -> Tensor:
    """Log of the mean Gaussian potential ``exp(-t |x_i - x_j|^2)`` over all pairs of normalised embeddings (..., M, D).

    Returns:
        (...): 0 if all are equal, about -2 t in many dimensions if they are spread evenly.

    >>> round(uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).item(), 4)
    -8.0
    """
    x = F.normalize(x.double(), dim=-1)
    num = x.shape[-2]
    squared = (2 - 2 * x @ x.mT).clamp_min(0)
    pairs = torch.triu_indices(num, num, offset=1, device=x.device)
    return (-t * squared[..., pairs[0], pairs[1]]).exp().mean(dim=-1).log()
