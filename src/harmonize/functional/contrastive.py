"""InfoNCE as MoCo v3 defines it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(queries: Tensor, keys: Tensor, temperature: float, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Cross-entropy of finding each query's own key among all keys, times ``2 * temperature``.

    Args:
        queries: (B, C), this rank's; normalised here.
        keys: (world * B, C), of all ranks; normalised here, no gradient expected.
        temperature: tau > 0.
        offset: Row of ``keys`` that belongs to the first query (rank * B).

    Returns:
        The loss (mean over the queries) and the share of queries whose nearest key is their own.

    Source: MoCo v3 ``moco/builder.py`` (``contrastive_loss``).

    >>> loss, accuracy = info_nce(torch.eye(2), torch.eye(2), temperature=0.5)
    >>> round(loss.item(), 4), accuracy.item()
    (0.1269, 1.0)
    """
    # normalisation and logits in fp32: half precision overflows here first
    queries, keys = F.normalize(queries.float(), dim=1), F.normalize(keys.float(), dim=1)
    logits = queries @ keys.T / temperature
    target = torch.arange(len(queries), device=queries.device) + offset
    loss = F.cross_entropy(logits, target) * (2 * temperature)
    return loss, (logits.argmax(dim=1) == target).float().mean()


def chance_level(temperature: float, num_keys: int) -> float:
    """The symmetric loss of a network that cannot tell its key from the others: 2 * 2 tau ln(keys).

    >>> round(chance_level(0.2, 4096), 2)
    6.65
    """
    return 4 * temperature * math.log(num_keys)


def embedding_std(x: Tensor) -> Tensor:
    """Mean over channels of the standard deviation over the batch of normalised embeddings, times sqrt(C).

    1 for embeddings spread evenly over the sphere, 0 for collapsed ones (all equal).

    Args:
        x: (B, C).

    Source: the collapse check of SimSiam (arXiv:2011.10566, section 4.1).

    >>> embedding_std(torch.ones(4, 8)).item()
    0.0
    """
    return F.normalize(x.float(), dim=1).std(dim=0, correction=0).mean() * x.shape[1] ** 0.5
