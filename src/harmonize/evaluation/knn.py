"""k-NN protocol: weighted neighbours among the features of labelled training images (DINO ``eval_knn.py``)."""

from __future__ import annotations

from harmonize.evaluation.features import Features, labelled
from harmonize.functional.knn import knn_votes, topk_accuracy


def knn_accuracy(train: Features, val: Features, num_classes: int, k: int = 20, temperature: float = 0.07) -> float:
    """Top-1 accuracy in [0, 1] on ``val`` of the k nearest neighbours in ``train``.

    Images without a label (-1) take no part; for what is raised see :func:`~harmonize.evaluation.features.labelled`.
    """
    train, val = labelled(train, val)
    votes = knn_votes(train.x, train.label, val.x, num_classes, (k,), temperature)[k]
    return topk_accuracy(votes, val.label)
