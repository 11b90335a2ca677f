"""Shape bias: whether a network decides for the shape or for the texture where the two disagree."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harmonize.data.cue_conflict import ConflictingShapes, CueConflict
from harmonize.data.sampler import evenly
from harmonize.evaluation.base import Bench, EvaluationProtocol
from harmonize.evaluation.classifier import Head, classifier, fit_head
from harmonize.evaluation.features import read_specs
from harmonize.functional.statistics import bootstrap_interval, mean_and_error
from harmonize.types import Batch, ConfigError, Result


@dataclass
class ShapeBias(EvaluationProtocol):
    """Decisions on images with conflicting cues: n(shape) / (n(shape) + n(texture)).

    With a folder, one head names both: its probabilities are averaged over the members of each class (model-vs-human).
    On ``data=shapes`` shapes and textures are different things; there two heads on the same features are fitted to the
    two labels of the same training images, and each answers for its own cue.

    Attributes:
        root: A folder ``SHAPE/SHAPE1-TEXTURE2.png``, as model-vs-human's cue-conflict; None: the split ``conflict`` of
            ``data=shapes``.
        head: ``checkpoint``, ``probe`` or ``auto``, see :func:`~harmonize.evaluation.classifier.classifier`; on
            ``data=shapes`` always probes.
        feature: Of the probe.
        l2: Of the probe.

    Source: Geirhos et al. 2019 (arXiv:1811.12231); model-vs-human ``analyses.py``.
    """

    root: str | None = None
    head: str = "auto"
    feature: dict[str, Any] = field(default_factory=lambda: {"layer": -1, "pool": "cls_patch_mean", "norm": True})
    l2: float = 1e-3

    def run(self, bench: Bench) -> list[Result]:
        """Rows ``shape_bias`` (95 % bootstrap interval over images), ``shape_accuracy`` and ``texture_accuracy``.

        All three are on images whose two cues differ, as the bias is in the official analysis (whose accuracies are
        shares of all images, those with equal cues among them).

        Raises:
            ConfigError: There are no such images, the head knows other classes, or no decision is for either cue.
        """
        specs = read_specs([self.feature], bench.spec)
        images = CueConflict(self.root, bench.classes) if self.root is not None else ConflictingShapes(bench.dataset)
        shape, texture = (
            torch.from_numpy(labels).to(bench.device) for labels in (images.shape_labels, images.texture_labels)
        )
        if isinstance(images, CueConflict):
            head = classifier(bench, self.head, specs, self.l2)
            weights = images.weights.to(bench.device)
            note, heads = head.origin, [head]

            def decide(logits: list[Tensor]) -> list[Tensor]:
                decision = (logits[0].softmax(dim=1) @ weights.T).argmax(dim=1)
                return [decision, decision]
        else:
            heads = self._two_heads(bench, images)
            note = "two linear probes on the same features, one for shapes and one for textures"

            def decide(logits: list[Tensor]) -> list[Tensor]:
                return [one.argmax(dim=1) for one in logits]

        def cues(batch: Batch) -> Tensor:
            assert batch.image is not None
            for_shape, for_texture = decide([head.logits(bench.encoder, batch.image) for head in heads])
            at = batch.index
            return torch.stack([for_shape == shape[at], for_texture == texture[at]], dim=1).double()

        differ = torch.arange(len(images)).to(shape)
        differ = differ[shape != texture] if images.shared else differ
        if not len(differ):
            raise ConfigError(f"eval.root={self.root} holds no image whose shape and texture are of different classes.")
        places = differ.tolist()
        chosen = [places[i] for i in evenly(len(places), bench.num_val)]
        loader = bench.data.loader_of(images, bench.batch_size, chosen, eval_crop=1.0)
        rows, _, _ = bench.per_image(loader, cues, "conflicting cues")
        decided = rows.sum(dim=0)
        if not decided.sum():
            raise ConfigError("No decision is for the shape or the texture of an image: the head knows neither.")
        low, high = bootstrap_interval(lambda sums: sums[:, 0] / sums.sum(dim=1), rows, seed=bench.seed)
        words: dict[str, Any] = {"feature": " + ".join(map(str, heads[0].features)), "note": note}
        bias = (decided[0] / decided.sum()).item()
        results = [Result("shape_bias", bias, len(rows), interval=(low.item(), high.item()), **words)]
        for column, metric in enumerate(("shape_accuracy", "texture_accuracy")):
            value, error = mean_and_error(rows[:, column])
            results.append(Result(metric, value.item(), len(rows), error.item(), **words))
        return results

    def _two_heads(self, bench: Bench, images: ConflictingShapes) -> list[Head]:
        specs = read_specs([self.feature], bench.spec)
        classes = (images.shape_classes, images.texture_classes)
        return [
            fit_head(bench, specs, self.l2, labels, len(names))
            for labels, names in zip(images.training_factors(), classes, strict=True)
        ]
