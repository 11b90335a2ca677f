"""Weights of the contrastive loss for every block from the measured conflict of the two losses' gradients.

    python experiments/lambda_per_block/weights.py RUN ...

takes finished hybrid runs (several seeds) and prints a list for ``loss.lambda_by_depth``. In every block it is the
weight whose mixture of the two gradients is the shortest, which is the direction that makes both losses smaller
(multiple-gradient descent, Desideri 2012; Sener and Koltun, arXiv:1810.04650):

    lambda = (1 - c r) / (1 + r^2 - 2 c r)    with the cosine c and the ratio of norms r = |g_CL| / |g_MIM|
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path


def weight(cosine: float, ratio: float) -> float:
    """Weight of the contrastive gradient in the shortest mixture.

    >>> weight(0.0, 1.0), weight(0.0, 3.0), weight(0.9, 0.5)
    (0.5, 0.1, 1.0)
    """
    return min(1.0, max(0.0, (1 - cosine * ratio) / (1 + ratio**2 - 2 * cosine * ratio)))


def main() -> None:
    """Print the mean over runs for every block."""
    rows = []
    for run in map(Path, sys.argv[1:]):
        curves = json.loads(sorted((run / "diagnostics").glob("epoch_*.json"))[-1].read_text())["curves"]
        cosine, ratio = curves["gradient_cosine"], curves["gradient_ratio"]
        rows.append(
            [weight(c, r) for at, c, r in zip(cosine["layer"], cosine["value"], ratio["value"], strict=True) if at]
        )
        print(f"{run}: cosine {[round(c, 3) for c in cosine['value']]} ratio {[round(r, 2) for r in ratio['value']]}")
    print([round(statistics.fmean(column), 3) for column in zip(*rows, strict=True)])


if __name__ == "__main__":
    main()
