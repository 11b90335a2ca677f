"""Weighted k-nearest-neighbour classification on the unit sphere.

Source: DINO ``eval_knn.py`` (Caron et al. 2021): the vote of a neighbour is exp(cosine similarity / temperature).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def knn_votes(
    train_features: Tensor,
    train_labels: Tensor,
    queries: Tensor,
    num_classes: int,
    k: Sequence[int] = (20,),
    temperature: float = 0.07,
    chunk_size: int = 1024,
) -> dict[int, Tensor]:
    """Votes of the k nearest training features for each class.

    The votes of one query are divided by that of its nearest neighbour, which leaves their order as it is and keeps
    small temperatures from overflowing.

    Args:
        train_features: (N, F); need not be normalised.
        train_labels: (N,) int64 in [0, num_classes).
        queries: (M, F).
        num_classes: C.
        k: Numbers of neighbours; one pass serves them all. More than N counts as N.
        temperature: Of the votes, > 0.
        chunk_size: Queries compared at a time, which bounds memory to chunk_size x N similarities.

    Returns:
        For each k the votes (M, C), fp32, or fp64 for fp64 features.

    Source:
        DINO ``eval_knn.py``, ``knn_classifier``.

    >>> bank, labels = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([0, 1, 1])
    >>> knn_votes(bank, labels, torch.tensor([[2.0, 0.0]]), 2, k=(1, 2), temperature=0.2)[2]
    tensor([[1.0000, 0.3679]])
    """
    bank = F.normalize(train_features.to(torch.promote_types(train_features.dtype, torch.float32)), dim=1)
    queries = F.normalize(queries.to(bank.dtype), dim=1)
    most = min(max(k), len(bank))
    votes: dict[int, list[Tensor]] = {number: [] for number in k}
    for chunk in queries.split(chunk_size):
        similarity, neighbours = (chunk @ bank.T).topk(most, dim=1)
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        classes = train_labels[neighbours]
        for number in votes:
            empty = weight.new_zeros(len(chunk), num_classes)
            votes[number].append(empty.scatter_add_(1, classes[:, :number], weight[:, :number]))
    return {number: torch.cat(parts) for number, parts in votes.items()}


def topk_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of rows whose label is among the k highest scores; equal scores go to the lower class.

    Args:
        scores: (M, C).
        labels: (M,) int64.
        k: How many classes may be named; more than C counts as C.

    Returns:
        Accuracy in [0, 1].

    >>> topk_accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    0.5
    """
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return (best == labels[:, None]).any(1).sum().item() / len(labels)
