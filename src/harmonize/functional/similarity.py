"""How alike vectors are: across heads, across tokens, across depth."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors (..., C) normalised, and their squared norm then: 1, or 0 for a vector of zeros."""
    norm = x.norm(dim=-1, keepdim=True)
    return x / norm.clamp_min(1e-12), (norm.squeeze(-1) > 1e-12).to(x.dtype)


def mean_cosine_to_others(x: Tensor, dim: int) -> Tensor:
    """Cosine of each vector with each of the others along ``dim``, mean over the others.

    Args:
        x: (..., M, ..., C) with M vectors along ``dim``; C last.
        dim: Where the vectors are counted.

    Returns:
        ``x``'s shape without C; NaN if M is 1.

    >>> mean_cosine_to_others(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]), 0).tolist()
    [0.5, 0.0, 0.5]
    """
    num = x.shape[dim]
    if num == 1:
        return torch.full_like(x[..., 0], math.nan)
    unit, is_there = _unit(x)
    total = unit.sum(dim=dim, keepdim=True)
    return ((unit * total).sum(dim=-1) - is_there) / (num - 1)


def head_similarity(outputs: Tensor) -> Tensor:
    """Cosine between the outputs of the heads for the same token, mean over tokens.

    Args:
        outputs: (B, H, N, d), attention times values, before the output projection.

    Returns:
        (B, H), each head against the others.

    Source: arXiv:2305.00729, Figure 5 (left); there is no official code, the definition is ours.

    >>> head_similarity(torch.ones(1, 2, 3, 4)).round(decimals=5).tolist()
    [[1.0, 1.0]]
    """
    return mean_cosine_to_others(outputs, 1).mean(dim=-1)


def token_similarity(tokens: Tensor) -> Tensor:
    """Mean cosine over all pairs of different patch tokens of an image.

    Args:
        tokens: (B, N, D).

    Returns:
        (B,); 1 if all tokens point the same way.

    Source: arXiv:2305.00729, Figure 5 (right); there is no official code, the definition is ours.

    >>> token_similarity(torch.eye(3)[None]).tolist()
    [0.0]
    """
    num = tokens.shape[1]
    if num == 1:
        return tokens.new_full((len(tokens),), math.nan)
    # |sum of unit vectors|^2 counts each with itself once and every pair twice
    unit, is_there = _unit(tokens)
    return (unit.sum(dim=1).square().sum(dim=-1) - is_there.sum(dim=1)) / (num * (num - 1))


def depth_similarity(before: Tensor, after: Tensor) -> Tensor:
    """Cosine between each token before and after a layer, mean over tokens.

    Args:
        before: (B, N, D).
        after: (B, N, D).

    Returns:
        (B,); 1 if the layer changes no direction.

    Source: arXiv:2305.00729, Figure 5 (middle); there is no official code, the definition is ours.

    >>> depth_similarity(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]])).round(decimals=4).tolist()
    [0.707099974155426]
    """
    # As torch's cosine_similarity, in half as many passes over the tokens.
    norms = before.norm(dim=-1) * after.norm(dim=-1)
    return ((before * after).sum(dim=-1) / norms.clamp_min(1e-24)).mean(dim=-1)


def translation_share(before: Tensor, after: Tensor) -> Tensor:
    """How much of what a layer does to the tokens of an image is one common translation of all of them.

    Args:
        before: (B, N, D).
        after: (B, N, D).

    Returns:
        (B,): ``N |mean displacement|^2 / sum |displacement|^2``. 1 if all tokens move by the same vector, about 1 / N
        if each moves on its own; NaN if none moves.

    Source: a number for arXiv:2305.00729, Figure 6 ("CL translates all tokens in unison"); the definition is ours.

    >>> x = torch.randn(1, 5, 3)
    >>> translation_share(x, x + torch.tensor([1.0, 2.0, 3.0])).round(decimals=5).tolist()
    [1.0]
    """
    moved = after - before
    return moved.mean(dim=1).square().sum(dim=-1) * moved.shape[1] / moved.square().sum(dim=(1, 2))


def common_projection(before: Tensor, after: Tensor, num_components: int = 2) -> tuple[Tensor, Tensor]:
    """Tokens before and after a layer in the same few dimensions: the leading ones of a singular value decomposition.

    Args:
        before: (N, D).
        after: (N, D).
        num_components: Dimensions to keep.

    Returns:
        Two (N, num_components), both around the mean of all 2 N tokens. Each component's largest loading is positive.

    Source: arXiv:2305.00729, Figure 6; there is no official code.
    """
    both = torch.cat([before, after]).double().nan_to_num(0.0, 0.0, 0.0)  # a picture; LAPACK would raise
    centred = both - both.mean(dim=0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:num_components]
    axes = axes * axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()  # the sign of an axis means nothing
    projected = (centred @ axes.T).float()
    return projected[: len(before)], projected[len(before) :]


def principal_colors(tokens: Tensor) -> Tensor:
    """The three leading principal components of all tokens together, each stretched over [0, 1].

    Args:
        tokens: (B, N, D), D >= 3.

    Returns:
        (B, N, 3); the 2 % of tokens at either end of a component are clipped.
    """
    flat = tokens.flatten(0, 1).double().nan_to_num(0.0, 0.0, 0.0)  # a picture; LAPACK would raise
    flat = flat - flat.mean(dim=0)
    _, axes = torch.linalg.eigh(flat.T @ flat)
    axes = axes[:, -3:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    projected = flat @ axes
    low, high = torch.quantile(projected, projected.new_tensor([0.02, 0.98]), dim=0)
    return ((projected - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).view(*tokens.shape[:2], 3).float()
