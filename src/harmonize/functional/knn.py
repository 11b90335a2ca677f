"""Weighted k-nearest-neighbour classification on the unit sphere.

Source: DINO ``eval_knn.py`` (Caron et al. 2021): the vote of a neighbour is exp(cosine similarity / temperature).

One pass over the bank serves every number of neighbours and every temperature. It goes in tiles of queries x bank, so
that memory is bounded for any number of either. Which neighbours are found does not depend on the tiles, but for the
rounding of the similarities: among equal similarities those of lower position in the bank come first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

MAX_BYTES = 256 * 2**20
# With fewer queries at a time a matrix product reads the bank more often than it computes.
_FEWEST_QUERIES = 256


@torch.no_grad()
def nearest_neighbours(
    bank: Tensor, queries: Tensor, k: int, max_bytes: int = MAX_BYTES
) -> Iterator[tuple[Tensor, Tensor]]:
    """The k most similar bank features of every query, by cosine, some queries at a time and in their order.

    Args:
        bank: (N, F); need not be normalised.
        queries: (M, F); M may be 0.
        k: Number of neighbours K; more than N counts as N.
        max_bytes: Memory for similarities and what is made of them, beside one normalised copy of the bank.

    Yields:
        Cosine similarities (m, K), descending, fp32, or fp64 for fp64 features; and their positions in the bank (m, K)
        int64. Equal similarities are in the order of the bank, also those of which only some are among the first K.

    Raises:
        ValueError: k < 1, an empty bank, or features that are not finite.

    >>> bank = torch.tensor([[0.0, 2.0], [3.0, 4.0], [5.0, 0.0], [4.0, 0.0]])
    >>> [(s.tolist(), i.tolist()) for s, i in nearest_neighbours(bank, torch.tensor([[1.0, 0.0]]), 2)]
    [([[1.0, 1.0]], [[2, 3]])]
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1.")
    if not len(bank):
        raise ValueError("k-NN needs at least one feature in the bank.")
    bank = _unit_length(bank.to(torch.promote_types(bank.dtype, torch.float32)))
    k = min(k, len(bank))
    rows, columns = tile_shape(len(queries), len(bank), k, bank.element_size(), max_bytes)
    # One buffer for all tiles: pages that are touched for the first time cost as much as the product itself.
    buffer = bank.new_empty(rows * columns)
    for chunk in queries.split(rows):
        chunk = _unit_length(chunk.to(bank.dtype))
        best: tuple[Tensor, Tensor] | None = None
        for start in range(0, len(bank), columns):
            tile = bank[start : start + columns]
            similarity = buffer[: len(chunk) * len(tile)].view(len(chunk), len(tile))
            torch.mm(chunk, tile.T, out=similarity)
            values, position = _topk(similarity, min(k, len(tile)))
            position += start
            if best is not None:
                # Stable, and the earlier part of the bank first: equal similarities stay in order.
                values, order = torch.cat([best[0], values], 1).sort(dim=1, descending=True, stable=True)
                values, order = values[:, :k], order[:, :k]
                position = torch.cat([best[1], position], 1).gather(1, order)
            best = values, position
        assert best is not None
        yield best


def _unit_length(x: Tensor) -> Tensor:
    """Rows of (m, F) divided by their lengths; rows of zeros stay."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if not length.isfinite().all():  # far cheaper than to look at every number
        raise ValueError("k-NN needs finite features; those given contain NaN or infinity, or overflow when squared.")
    return x / length.clamp_min(1e-12)


def tile_shape(num_queries: int, num_bank: int, k: int, itemsize: int, max_bytes: int) -> tuple[int, int]:
    """Queries and bank features compared at a time: the whole bank if enough queries then still fit.

    Args:
        num_queries: M.
        num_bank: N.
        k: Neighbours, at most N.
        itemsize: Bytes of one similarity.
        max_bytes: Bound, kept unless it has no room for one query and k bank features.

    >>> tile_shape(50_000, 50_000, 200, 4, 2**28), tile_shape(50_000, 1_281_167, 200, 4, 2**28)
    ((1261, 50000), (256, 258944))
    """
    per_query = 64 * k  # what sorting the neighbours of one query takes
    fewest = max(1, min(num_queries, _FEWEST_QUERIES))
    rows = max(fewest, min(num_queries, max_bytes // (itemsize * num_bank + per_query)))
    columns = (max_bytes // rows - per_query) // itemsize
    if columns < min(k, num_bank):  # the bound leaves no room for that many queries
        columns = min(k, num_bank)
        rows = max(1, max_bytes // (itemsize * columns + per_query))
    return min(rows, max(1, num_queries)), min(columns, num_bank)


def _topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (m, n), equal values in the order of their columns; values and columns, (m, k)."""
    # topk alone leaves open which of several equal values it takes and how it orders them. One value more than wanted
    # tells whether some were left out that equal the last one; those rows, normally none, are then done by counting.
    values, columns = x.topk(min(k + 1, x.shape[1]), dim=1)
    if x.shape[1] > k:
        tied = (values[:, k - 1] == values[:, k]).nonzero()[:, 0]
        columns = columns[:, :k].contiguous()
        for some in tied.split(max(1, len(x) // 32)):  # few, since counting takes several times their memory
            candidates, last = x[some], values[some, k - 1 : k]
            above, equal = candidates > last, candidates == last
            room = k - above.sum(1, keepdim=True)
            taken = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))
            columns[some] = taken.nonzero()[:, 1].view(len(some), k)
    columns = columns.sort(dim=1).values
    values, order = x.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


@torch.no_grad()
def neighbour_votes(
    similarity: Tensor, classes: Tensor, num_classes: int, k: Sequence[int], temperatures: Sequence[float]
) -> dict[tuple[int, float], Tensor]:
    """Votes of the first k neighbours for each class, for every k and every temperature.

    The votes of one query are divided by that of its nearest neighbour, which leaves their order as it is and keeps
    small temperatures from overflowing.

    Args:
        similarity: (M, K), descending, see :func:`nearest_neighbours`.
        classes: Of the neighbours, (M, K) int64 in [0, num_classes).
        num_classes: C.
        k: Numbers of neighbours; more than K count as K.
        temperatures: Of the votes.

    Returns:
        Votes (M, C) for each (k, temperature), in the order given.

    Raises:
        ValueError: No k, k < 1, no temperature, or a temperature <= 0.

    Source:
        DINO ``eval_knn.py``, ``knn_classifier``.

    >>> votes = neighbour_votes(torch.tensor([[1.0, 0.8]]), torch.tensor([[0, 1]]), 2, k=(1, 2), temperatures=(0.2,))
    >>> votes[1, 0.2], votes[2, 0.2]
    (tensor([[1., 0.]]), tensor([[1.0000, 0.3679]]))
    """
    _check(k, temperatures)
    found: dict[tuple[int, float], Tensor] = {}
    for temperature in temperatures:
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(weight), num_classes)
        done = 0
        for number in sorted(set(k)):  # each k continues where the smaller one stopped
            votes = votes.scatter_add(1, classes[:, done:number], weight[:, done:number])
            found[number, temperature] = votes
            done = number
    return {(number, temperature): found[number, temperature] for number in k for temperature in temperatures}


def _check(k: Sequence[int], temperatures: Sequence[float]) -> None:
    if not k or min(k) < 1:
        raise ValueError(f"k={list(k)} must name numbers of neighbours of at least 1.")
    if not temperatures or min(temperatures) <= 0:
        raise ValueError(f"temperatures={list(temperatures)} must name temperatures above 0.")


def _votes(
    train_features: Tensor,
    train_labels: Tensor,
    queries: Tensor,
    num_classes: int,
    k: Sequence[int],
    temperatures: Sequence[float],
    max_bytes: int,
) -> Iterator[tuple[slice, dict[tuple[int, float], Tensor]]]:
    """Some queries at a time: which, and :func:`neighbour_votes` of them."""
    start = 0
    for similarity, neighbours in nearest_neighbours(train_features, queries, max(k), max_bytes):
        stop = start + len(similarity)
        yield slice(start, stop), neighbour_votes(similarity, train_labels[neighbours], num_classes, k, temperatures)
        start = stop


def knn_votes(
    train_features: Tensor,
    train_labels: Tensor,
    queries: Tensor,
    num_classes: int,
    k: Sequence[int] = (20,),
    temperatures: Sequence[float] = (0.07,),
    max_bytes: int = MAX_BYTES,
) -> dict[tuple[int, float], Tensor]:
    """Votes of the k nearest training features for each class, for every k and every temperature in one pass.

    The result holds M x C numbers for each pair; :func:`knn_correct` needs no such room.

    Args:
        train_features: (N, F); need not be normalised.
        train_labels: (N,) int64 in [0, num_classes).
        queries: (M, F).
        num_classes: C.
        k: Numbers of neighbours; more than N count as N.
        temperatures: Of the votes, > 0.
        max_bytes: Bound of the memory beside the result, see :func:`nearest_neighbours`.

    Returns:
        For each (k, temperature) the votes (M, C), see :func:`neighbour_votes`.

    Raises:
        ValueError: See :func:`nearest_neighbours` and :func:`neighbour_votes`.

    Source:
        DINO ``eval_knn.py``, ``knn_classifier``.

    >>> bank, labels = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([0, 1, 1])
    >>> knn_votes(bank, labels, torch.tensor([[2.0, 0.0]]), 2, k=(1, 2), temperatures=(0.2,))[2, 0.2]
    tensor([[1.0000, 0.3679]])
    """
    _check(k, temperatures)
    dtype = torch.promote_types(train_features.dtype, torch.float32)
    found = {
        (number, t): torch.empty(len(queries), num_classes, dtype=dtype, device=queries.device)
        for number in k
        for t in temperatures
    }
    for rows, votes in _votes(train_features, train_labels, queries, num_classes, k, temperatures, max_bytes):
        for setting, part in votes.items():
            found[setting][rows] = part
    return found


def knn_correct(
    train_features: Tensor,
    train_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    num_classes: int,
    k: Sequence[int] = (20,),
    temperatures: Sequence[float] = (0.07,),
    top: Sequence[int] = (1,),
    max_bytes: int = MAX_BYTES,
) -> dict[tuple[int, float], Tensor]:
    """Which queries the k-NN vote gets right, for every k and every temperature in one pass.

    Args:
        train_features: (N, F); need not be normalised.
        train_labels: (N,) int64 in [0, num_classes).
        queries: (M, F).
        labels: Of the queries, (M,) int64.
        num_classes: C.
        k: Numbers of neighbours; more than N count as N.
        temperatures: Of the votes, > 0.
        top: How many classes may be named, see :func:`topk_correct`.
        max_bytes: Bound of the memory, see :func:`nearest_neighbours`.

    Returns:
        For each (k, temperature) a (len(top), M) bool.

    Raises:
        ValueError: See :func:`nearest_neighbours` and :func:`neighbour_votes`.

    >>> bank, classes = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([0, 1, 1])
    >>> queries, labels = torch.tensor([[2.0, 0.1], [0.1, 2.0]]), torch.tensor([1, 1])
    >>> knn_correct(bank, classes, queries, labels, 2, k=(1,), top=(1, 2))[1, 0.07].tolist()
    [[False, True], [True, True]]
    """
    _check(k, temperatures)
    found = {
        (number, t): torch.empty(len(top), len(queries), dtype=torch.bool, device=queries.device)
        for number in k
        for t in temperatures
    }
    for rows, votes in _votes(train_features, train_labels, queries, num_classes, k, temperatures, max_bytes):
        for setting, part in votes.items():
            rank = _rank(part, labels[rows])
            for i, number in enumerate(top):
                found[setting][i, rows] = rank < number
    return found


def topk_correct(scores: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Rows whose label is among the k highest scores; of equal scores the lower class counts as the higher.

    Args:
        scores: (M, C).
        labels: (M,) int64.
        k: How many classes may be named; more than C counts as C.

    Returns:
        (M,) bool.

    >>> topk_correct(torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.5, 0.5]]), torch.tensor([1, 1, 0])).tolist()
    [True, False, True]
    """
    return _rank(scores, labels) < k


def topk_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of rows that :func:`topk_correct` finds right.

    Args:
        scores: (M, C).
        labels: (M,) int64.
        k: How many classes may be named; more than C counts as C.

    Returns:
        Accuracy in [0, 1].

    >>> topk_accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    0.5
    """
    return topk_correct(scores, labels, k).sum().item() / len(labels)


def _rank(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the label (M,): those not known to score less, so that NaN never counts as right."""
    own = scores.gather(1, labels[:, None])
    later = torch.arange(scores.shape[1], device=scores.device) > labels[:, None]
    behind = (scores < own) | ((scores == own) & later)
    return scores.shape[1] - 1 - behind.sum(1)
