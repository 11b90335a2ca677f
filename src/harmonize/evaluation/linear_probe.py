"""Linear-probe protocol: logistic regression on frozen, standardised features, fitted to convergence."""

from __future__ import annotations

from harmonize.evaluation.features import Features
from harmonize.functional.knn import topk_accuracy
from harmonize.functional.linear_probe import fit_linear_probe


def linear_probe_accuracy(train: Features, val: Features, num_classes: int, l2: float = 1e-3) -> float:
    """Top-1 accuracy in [0, 1] on ``val`` of a linear classifier fitted on ``train``.

    Images without a label (-1) take no part.

    Raises:
        ValueError: ``train`` and ``val`` are not the same feature.
    """
    if train.spec != val.spec:
        raise ValueError(f"A linear probe fitted on [{train.spec}] cannot be scored on [{val.spec}].")
    known, scored = train.label >= 0, val.label >= 0
    probe = fit_linear_probe(train.x[known], train.label[known], num_classes, l2)
    logits = probe.logits(val.x[scored])
    return topk_accuracy(logits, val.label[scored].to(logits.device))
