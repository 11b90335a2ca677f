"""Singular values of representations: how many directions they use."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def singular_values(x: Tensor) -> Tensor:
    """Singular values of each matrix (..., M, D) around the mean of its rows, descending, fp64.

    Computed from the smaller of the two Gram matrices; values below about 1e-8 of the largest are rounding.

    Returns:
        (..., min(M, D)). Of M centred rows the last value is 0 if M <= D. NaN for a matrix that is not finite.

    >>> singular_values(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.5], [0.0, -0.5]])).round(decimals=4).tolist()
    [1.4142, 0.7071]
    """
    x = x.double()
    x = x - x.mean(dim=-2, keepdim=True)
    gram = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x
    broken = ~gram.isfinite().all(dim=-1).all(dim=-1)[..., None]  # LAPACK would raise
    values = torch.linalg.eigvalsh(gram.masked_fill(broken[..., None], 0.0))
    return values.clamp_min(0).sqrt().flip(-1).masked_fill(broken, math.nan)


def effective_rank(values: Tensor) -> Tensor:
    """Exponential of the entropy of singular values (RankMe): k for k equal ones.

    Args:
        values: (..., K) singular values, not negative.

    Returns:
        (...), from 1 to K; NaN if all values are 0.

    Source: RankMe (arXiv:2210.02885), equation 1, there without centring; its 1e-7 is left out.

    >>> effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])).item()
    3.0
    """
    share = values / values.sum(dim=-1, keepdim=True)
    return torch.special.entr(share).sum(dim=-1).exp()


def alpha_req(values: Tensor, first: int = 11, last: int = 100) -> Tensor:
    """How fast the eigenvalues of the covariance fall: alpha in ``lambda_i ~ i ** -alpha``.

    Args:
        values: (..., K) singular values, descending; eigenvalues are their squares.
        first: First rank of the fit, from 1.
        last: Last rank of the fit; lower if there are fewer values above rounding.

    Returns:
        (...): weighted least squares of log eigenvalue over log rank, weights 1 / i. NaN with fewer than 3 ranks.

    Source: alpha-ReQ (NeurIPS 2022), with the range and weights of its authors' later code (reptrix).

    >>> round(alpha_req(torch.arange(1.0, 101.0) ** -0.75).item(), 4)
    1.5
    """
    above = values > 1e-6 * values[..., :1]
    last = min(last, values.shape[-1], int(above.sum(dim=-1).min()) if above.numel() else 0)
    if last - first < 2:
        return values.new_full(values.shape[:-1], math.nan)
    rank = torch.arange(first, last + 1, dtype=values.dtype, device=values.device)
    x, weight = rank.log(), 1 / rank
    weight = weight / weight.sum()
    y = 2 * values[..., first - 1 : last].log()
    x = x - (weight * x).sum()
    return -(weight * x * y).sum(dim=-1) / (weight * x.square()).sum()
