"""Linear-probe protocol: logistic regression on frozen, standardised features, fitted to convergence."""

from __future__ import annotations

from harmonize.evaluation.features import Features, labelled
from harmonize.functional.knn import topk_accuracy
from harmonize.functional.linear_probe import fit_linear_probe


def linear_probe_accuracy(train: Features, val: Features, num_classes: int, l2: float = 1e-3) -> float:
    """Top-1 accuracy in [0, 1] on ``val`` of a linear classifier fitted on ``train``.

    Images without a label (-1) take no part; for what is raised see :func:`~harmonize.evaluation.features.labelled`.
    """
    train, val = labelled(train, val)
    logits = fit_linear_probe(train.x, train.label, num_classes, l2).logits(val.x)
    return topk_accuracy(logits, val.label.to(logits.device))
