"""k-NN protocol: weighted neighbours among the features of labelled training images (DINO ``eval_knn.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from harmonize.evaluation.base import Bench, EvaluationProtocol
from harmonize.evaluation.features import Features, labelled, read_specs
from harmonize.functional.knn import MAX_BYTES, knn_correct, knn_votes, topk_accuracy
from harmonize.functional.statistics import classification_error
from harmonize.types import ConfigError, Result


def knn_accuracy(train: Features, val: Features, num_classes: int, k: int = 20, temperature: float = 0.07) -> float:
    """Top-1 accuracy in [0, 1] on ``val`` of the k nearest neighbours in ``train``.

    Images without a label (-1) take no part; for what is raised see :func:`~harmonize.evaluation.features.labelled`.
    """
    train, val = labelled(train, val)
    votes = knn_votes(train.x, train.label, val.x, num_classes, (k,), (temperature,))[k, temperature]
    return topk_accuracy(votes, val.label)


@dataclass
class KNN(EvaluationProtocol):
    """Accuracy of the weighted vote of neighbours, for every number of them and every temperature, in one pass.

    Attributes:
        feature: ``layer``, ``pool`` and ``norm`` of the feature.
        k: Numbers of neighbours, or one; the first is the headline.
        temperature: Of the votes, several or one; the first is the headline.
        memory: Bound of the memory for similarities, in MiB.
    """

    feature: dict[str, object] = field(default_factory=lambda: {"layer": -1, "pool": "cls", "norm": True})
    k: int | Sequence[int] = (20, 10, 100, 200)
    temperature: float | Sequence[float] = (0.07,)
    memory: int = MAX_BYTES >> 20

    def run(self, bench: Bench) -> list[Result]:
        """Rows ``top1`` and ``top5``, each ``k`` and ``temperature`` a series.

        Raises:
            ConfigError: There are fewer training images than the smallest ``k``, or no labels.
        """
        classes = bench.classes
        (spec,) = read_specs([self.feature], bench.spec)
        train, val = labelled(bench.features("train", [spec])[0], bench.features("val", [spec])[0])
        numbers = [self.k] if isinstance(self.k, int) else list(self.k)
        temperatures = self.temperature if isinstance(self.temperature, Sequence) else [self.temperature]
        possible = [k for k in numbers if k <= len(train.x)]
        if not possible:
            raise ConfigError(f"eval.k={numbers} must be at most {len(train.x)}, the number of training images.")
        top = (1, 5) if len(classes) > 10 else (1,)
        correct = knn_correct(
            train.x,
            train.label,
            val.x,
            val.label,
            len(classes),
            possible,
            temperatures,
            top,
            self.memory << 20,
        )
        if left_out := set(numbers) - set(possible):
            bench.say(f"k = {', '.join(map(str, sorted(left_out)))} is left out: there are {len(train.x)} images.")
        results = []
        for (k, temperature), rows in correct.items():
            for number, right in zip(top, rows, strict=True):
                value, error = classification_error(right)
                series = f"k={k}, temperature={temperature:g}"
                results.append(Result(f"top{number}", value, len(right), error, feature=str(spec), series=series))
        return results
