"""Self-attention maps as numbers: how far, how sharp, how alike they are.

Maps are (..., N, N), post-softmax, rows (queries) summing to 1. The formulas of arXiv:2305.00729 look at patches only:
see :func:`patch_attention`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPSILON = 1e-8
"""What the official code adds to attention before it takes a logarithm (cl-vs-mim, ``attention_analysis.ipynb``)."""


def patch_attention(attention: Tensor, num_prefix_tokens: int, epsilon: float = 0.0) -> Tensor:
    """Attention among patches: prefix tokens dropped as queries and as keys, rows renormalised.

    Args:
        attention: (..., P + N, P + N).
        num_prefix_tokens: P.
        epsilon: Added before renormalising; :data:`EPSILON` for what takes a logarithm.

    Returns:
        (..., N, N). A row without any mass on patches becomes uniform.

    Source: cl-vs-mim, ``attention_analysis.ipynb`` (class token dropped, rows renormalised).

    >>> patch_attention(torch.tensor([[0.2, 0.4, 0.4], [0.5, 0.5, 0.0], [0.5, 0.25, 0.25]]), 1).tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """
    patches = attention[..., num_prefix_tokens:, num_prefix_tokens:]
    if num_prefix_tokens == 0 and not epsilon:
        return patches
    mass = patches.sum(dim=-1, keepdim=True)
    if epsilon:
        return (patches + epsilon) / (mass + epsilon * patches.shape[-1])
    tiny = torch.finfo(attention.dtype).tiny
    return torch.where(mass > tiny, patches / mass.clamp_min(tiny), 1 / patches.shape[-1])


def patch_distances(grid: tuple[int, int], patch_size: float) -> Tensor:
    """Euclidean distances (N, N) in px between the centres of patches, row-major.

    >>> patch_distances((1, 3), 16).tolist()
    [[0.0, 16.0, 32.0], [16.0, 0.0, 16.0], [32.0, 16.0, 0.0]]
    """
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in grid)
    position = torch.cartesian_prod(rows, columns).view(-1, 2)
    return (patch_size * (position[:, None] - position[None]).norm(dim=-1)).float()


def attention_distance(attention: Tensor, distances: Tensor) -> Tensor:
    """Mean distance between a query patch and what it attends to, weighted by attention.

    Args:
        attention: (..., N, N), see :func:`patch_attention`.
        distances: (N, N), see :func:`patch_distances`.

    Returns:
        (...), in the unit of ``distances``, mean over queries.

    Source: arXiv:2305.00729, Figure 3; cl-vs-mim, ``attention_analysis.ipynb``.

    >>> attention_distance(torch.full((3, 3), 1 / 3), patch_distances((1, 3), 16)).item()
    14.222222328186035
    """
    # Query by query: a single fp32 sum over all pairs of a large grid loses digits.
    return (attention * distances.to(attention)).sum(dim=-1).mean(dim=-1)


def mean_log_products(attention: Tensor, log_attention: Tensor) -> Tensor:
    """For every pair of heads (g, h) the mean over queries of ``sum_k A_g[q, k] log A_h[q, k]``.

    The negative diagonal is the entropy of each head's rows, in nats, mean over queries.

    Args:
        attention: (..., H, N, N), positive, see ``epsilon`` of :func:`patch_attention`.
        log_attention: Its logarithm.

    Returns:
        (..., H, H).
    """
    # Query by query: a single fp32 sum over all pairs of a 37 x 37 grid puts its NMI off by 1e-3.
    per_query = attention.transpose(-3, -2) @ log_attention.movedim(-3, -1)  # (..., N, H, N) @ (..., N, N, H)
    return per_query.mean(dim=-3)


def attention_entropy(log_products: Tensor) -> Tensor:
    """Entropy of the rows of attention, mean over queries, as a share of the largest possible is ``/ log N``.

    Args:
        log_products: (..., H, H), see :func:`mean_log_products`.

    Returns:
        (..., H) in nats: log N for uniform attention, 0 for attention to a single patch.

    >>> a = torch.full((1, 4, 4), 0.25)
    >>> round(attention_entropy(mean_log_products(a, a.log())).item() / math.log(4), 6)
    1.0
    """
    return -log_products.diagonal(dim1=-2, dim2=-1)


def normalized_mutual_information(attention: Tensor, entropy: Tensor) -> Tensor:
    """Mutual information of query and key positions over the root of the product of their entropies.

    Queries are uniform, so that ``I = H(key) - mean_q H(key | q)``: 0 if all queries attend alike (sharply or not), 1
    if each attends to a patch of its own.

    Args:
        attention: (..., H, N, N), positive, see ``epsilon`` of :func:`patch_attention`.
        entropy: (..., H), mean entropy of its rows, see :func:`attention_entropy`.

    Returns:
        (..., H).

    Source: arXiv:2305.00729, Figure 4; cl-vs-mim, ``attention_analysis.ipynb``.

    >>> a = torch.full((1, 4, 4), 1e-9).masked_fill(torch.eye(4, dtype=torch.bool), 1.0)
    >>> round(normalized_mutual_information(a, attention_entropy(mean_log_products(a, a.log()))).item(), 4)
    1.0
    """
    key = attention.mean(dim=-2)
    if attention.device.type != "mps":  # which has no fp64
        key = key.double()  # the difference of two numbers that are nearly equal where attention is near uniform
    key_entropy = -(key * key.clamp_min(torch.finfo(key.dtype).tiny).log()).sum(dim=-1)
    information = (key_entropy - entropy.to(key_entropy)).clamp_min(0)
    return information / (math.log(attention.shape[-1]) * key_entropy).sqrt()


def prefix_mass(attention: Tensor, num_prefix_tokens: int) -> Tensor:
    """Share of the patches' attention that goes to prefix tokens (class token and registers), mean over patches.

    Args:
        attention: (..., P + N, P + N).
        num_prefix_tokens: P.

    Returns:
        (...); 0 without prefix tokens.

    >>> prefix_mass(torch.tensor([[0.2, 0.4, 0.4], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]), 1).item()
    0.75
    """
    return attention[..., num_prefix_tokens:, :num_prefix_tokens].sum(dim=-1).mean(dim=-1)


def head_divergence(log_products: Tensor) -> Tensor:
    """Kullback-Leibler divergence from each head's attention to the other heads', mean over queries and other heads.

    Args:
        log_products: (..., H, H), see :func:`mean_log_products`.

    Returns:
        (..., H) in nats; NaN for a single head.

    Source: arXiv:2205.13543 ("Dark Secrets of MIM"), the KL divergence between heads.

    >>> a = torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[0.9, 0.1], [0.9, 0.1]]])
    >>> head_divergence(mean_log_products(a, a.log())).round(decimals=3).tolist()
    [0.5109999775886536, 0.36800000071525574]
    """
    num_heads = log_products.shape[-1]
    own = log_products.diagonal(dim1=-2, dim2=-1)
    others = log_products.sum(dim=-1) - own
    return own - others / (num_heads - 1) if num_heads > 1 else torch.full_like(own, math.nan)


def head_map_similarity(attention: Tensor) -> Tensor:
    """Cosine between the attention of each head and of the other heads for the same query, mean over both.

    Args:
        attention: (..., H, N, N).

    Returns:
        (..., H); 1 if all heads attend alike; NaN for a single head.

    >>> head_map_similarity(torch.eye(2).expand(3, 2, 2)).tolist()
    [1.0, 1.0, 1.0]
    """
    num_heads = attention.shape[-3]
    if num_heads == 1:
        return torch.full_like(attention[..., 0, 0], math.nan)
    by_query = attention.transpose(-3, -2)
    products = by_query @ by_query.transpose(-2, -1)  # (..., N, H, H)
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt().clamp_min(1e-12)
    cosines = (products / (norms.unsqueeze(-1) * norms.unsqueeze(-2))).mean(dim=-3)
    return (cosines.sum(dim=-1) - cosines.diagonal(dim1=-2, dim2=-1)) / (num_heads - 1)
