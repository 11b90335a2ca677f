"""Centred kernel alignment: how alike two representations of the same images are."""

from __future__ import annotations

from torch import Tensor


def linear_cka(features: Tensor) -> Tensor:
    """Linear CKA between every pair of layers, with the unbiased estimator of HSIC.

    The biased estimator is near 1 for any two representations with more dimensions than images.

    Args:
        features: (L, M, D): L layers, M >= 4 images.

    Returns:
        (L, L) fp64; 1 on the diagonal; may be slightly negative.

    Raises:
        ValueError: For fewer than 4 images.

    Source: Kornblith et al. 2019 (arXiv:1905.00414); unbiased HSIC of Song et al. 2012, as in Nguyen et al. 2021
    (arXiv:2010.15327, equation 3).

    >>> import torch
    >>> x = torch.randn(1, 8, 3)
    >>> linear_cka(torch.cat([x, 2 * x + 1])).round(decimals=5).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    num = features.shape[1]
    if num < 4:
        raise ValueError(f"CKA needs at least 4 images, not {num}")
    x = features.double()
    x = x - x.mean(dim=1, keepdim=True)  # changes nothing but the size of the rounding errors
    gram = x @ x.mT
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    rows, total = gram.sum(dim=-1), gram.sum(dim=(-2, -1))
    flat = gram.flatten(1)
    hsic = flat @ flat.T + total[:, None] * total[None] / ((num - 1) * (num - 2)) - 2 / (num - 2) * (rows @ rows.T)
    own = hsic.diagonal().clamp_min(0).sqrt()
    return hsic / (own[:, None] * own[None])
