"""k-NN protocol: weighted neighbours among the features of labelled training images (DINO ``eval_knn.py``)."""

from __future__ import annotations

from harmonize.evaluation.features import Features
from harmonize.functional.knn import knn_votes, topk_accuracy


def knn_accuracy(train: Features, val: Features, num_classes: int, k: int = 20, temperature: float = 0.07) -> float:
    """Top-1 accuracy in [0, 1] on ``val`` of the k nearest neighbours in ``train``.

    Images without a label (-1) take no part.

    Raises:
        ValueError: ``train`` and ``val`` are not the same feature.
    """
    if train.spec != val.spec:
        raise ValueError(f"k-NN fitted on [{train.spec}] cannot be scored on [{val.spec}].")
    known, scored = train.label >= 0, val.label >= 0
    votes = knn_votes(train.x[known], train.label[known], val.x[scored], num_classes, (k,), temperature)[k]
    return topk_accuracy(votes, val.label[scored])
