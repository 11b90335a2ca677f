"""Linear probe and k-NN on the output of every block: Figure 10 of arXiv:2305.00729."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from harmonize.evaluation.base import Bench, EvaluationProtocol
from harmonize.evaluation.features import Features
from harmonize.evaluation.knn import knn_accuracy
from harmonize.evaluation.linear_probe import linear_probe_accuracy
from harmonize.types import Curve, EncoderSpec, FeatureSpec, Findings, Quantity, Result

LINEAR = (
    "Linear probe of every block",
    "Top-1 accuracy of a logistic regression on standardised, frozen features of the block's output, fitted to "
    "convergence",
)
KNN = (
    "k-NN on every block",
    "Top-1 accuracy of a weighted k-nearest-neighbour vote (DINO's) on frozen features of the block's output",
)
SOURCE = "arXiv:2305.00729, Figure 10 (there SGD for 50 epochs; pooling unknown)"


@dataclass(frozen=True)
class LayerProbe(EvaluationProtocol):
    """Probes every block: a diagnostic of training and of ``analyze``, and an evaluation.

    Attributes:
        pool: ``cls``, ``patch_mean`` or ``cls_patch_mean``.
        norm: Whether features go through the encoder's final norm before pooling.
        num_images: At most so many images to fit on and to score, evenly spaced; None: all that are given.
        every_n_epochs: During training, at every n-th epoch only.
        k: Neighbours that vote.
        temperature: Of their votes.
        l2: Penalty of the linear probe.
    """

    pool: str = "patch_mean"
    norm: bool = True
    num_images: int | None = 1024
    every_n_epochs: int = 1
    k: int = 20
    temperature: float = 0.07
    l2: float = 1e-3

    def specs(self, encoder: EncoderSpec) -> list[FeatureSpec]:
        """The feature of each block."""
        return [FeatureSpec(layer, self.pool, self.norm) for layer in range(1, encoder.depth + 1)]

    def run(self, bench: Bench) -> list[Result]:
        """Rows ``top1`` over blocks, of the linear probe and of k-NN.

        Raises:
            ConfigError: The data have no labels, or the encoder has no class token to pool.
        """
        num_classes, specs = len(bench.classes), self.specs(bench.spec)
        found = self.score(bench.features("train", specs), bench.features("val", specs), num_classes)
        feature = f"every block, pool={self.pool} norm={'final' if self.norm else 'none'} view=clean mode=eval"
        return [
            Result("top1", value, found.num_images, error, None, feature, series, "block", layer)
            for series, curve in ((name.removeprefix("layer_probe_"), curve) for name, curve in found.curves.items())
            for layer, value, error in zip(curve.layer, curve.value, curve.error, strict=True)
        ]

    def score(self, train: Sequence[Features], val: Sequence[Features], num_classes: int) -> Findings:
        """Curves ``layer_probe_linear`` and ``layer_probe_knn``.

        Args:
            train: One per block, to fit on.
            val: One per block, to score on.
            num_classes: C.

        Raises:
            ConfigError: Train or val has no image with a label.
        """
        if (num := self.num_images) is not None:
            train, val = ([features.spread(num) for features in side] for side in (train, val))
        accuracies: dict[str, list[float]] = {"linear": [], "knn": []}
        for fitted, scored in zip(train, val, strict=True):
            accuracies["linear"].append(linear_probe_accuracy(fitted, scored, num_classes, self.l2))
            accuracies["knn"].append(knn_accuracy(fitted, scored, num_classes, self.k, self.temperature))
        layers = [features.spec.layer for features in train]
        num_scored = int((val[0].label >= 0).sum())
        feature = f" ({train[0].spec.pool}, {'final norm' if self.norm else 'no norm'}, clean view)."
        return Findings(
            num_images=num_scored,
            curves={
                f"layer_probe_{name}": Curve(
                    Quantity(title, "", definition + feature, SOURCE, "Figure 10"),
                    layers,
                    accuracies[name],
                    [math.sqrt(p * (1 - p) / num_scored) for p in accuracies[name]],
                )
                for name, (title, definition) in (("linear", LINEAR), ("knn", KNN))
            },
        )
