"""Accuracy against the frequency of noise: the robustness figure of arXiv:2305.00729 (8 or 9: sources differ)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harmonize.evaluation.base import Bench, EvaluationProtocol
from harmonize.evaluation.classifier import classifier
from harmonize.evaluation.features import read_specs
from harmonize.functional.frequency_noise import band_noise, random_signs, ring_mask
from harmonize.functional.knn import topk_correct
from harmonize.functional.seeding import mix
from harmonize.functional.statistics import mean_and_error
from harmonize.types import Batch, ConfigError, Result

MODES = ("faithful", "matched")


@dataclass
class FrequencyNoise(EvaluationProtocol):
    """Accuracy when noise of one band of frequencies is added to the normalised images.

    ``faithful`` is the official code's: epsilon times random signs, of which a square ring of the spectrum is kept, so
    that noise of high frequencies carries more energy. ``matched`` scales every ring to the same root mean square, so
    that only the frequency differs.

    Attributes:
        head: ``checkpoint``, ``probe`` or ``auto``, see :func:`~harmonize.evaluation.classifier.classifier`.
        feature: Of the probe.
        l2: Of the probe.
        modes: Which of ``faithful`` and ``matched``.
        epsilon: Size of the signs, in units of the normalised image; which one the paper used is unknown.
        rms: Root mean square of the matched noise, in the same units.
        bandwidth: Half the width of the ring, in radians per pixel.
        num_frequencies: Evenly spaced from 0 to pi.
    """

    head: str = "auto"
    feature: dict[str, Any] = field(default_factory=lambda: {"layer": -1, "pool": "cls_patch_mean", "norm": True})
    l2: float = 1e-3
    modes: Sequence[str] = MODES
    epsilon: float = 1.0
    rms: float = 0.3
    bandwidth: float = 0.2
    num_frequencies: int = 11

    def run(self, bench: Bench) -> list[Result]:
        """Row ``top1`` of the clean images, then ``top1`` and ``accuracy_drop`` over frequencies for each mode.

        The standard error of a drop is that of the paired difference.

        Raises:
            ConfigError: The data have no labels, or there is no such head.
        """
        if not self.modes or not set(self.modes) <= set(MODES):
            raise ConfigError(f"eval.modes={list(self.modes)} must be some of {', '.join(MODES)}.")
        head = classifier(bench, self.head, read_specs([self.feature], bench.spec), self.l2)
        steps = [math.pi * i / max(1, self.num_frequencies - 1) for i in range(self.num_frequencies)]
        size = bench.spec.image_size
        if empty := [step for step in steps if not ring_mask(*size, step, self.bandwidth).any()]:
            places = ", ".join(f"{step:.3g}" for step in empty)
            bench.say(f"No noise at {places}: the band holds no frequency of images this small.")
        settings = [(mode, frequency) for mode in self.modes for frequency in steps]

        def correct(batch: Batch) -> Tensor:
            assert batch.image is not None
            signs = random_signs(mix(bench.seed, batch.index.cpu()), tuple(batch.image.shape[1:])).to(bench.device)
            label = batch.label.clamp_min(0)  # images without one are left out below
            columns = [topk_correct(head.logits(bench.encoder, batch.image), label)]
            for mode, frequency in settings:
                rms = self.rms if mode == "matched" else None
                noisy = batch.image + band_noise(self.epsilon * signs, frequency, self.bandwidth, rms)
                columns.append(topk_correct(head.logits(bench.encoder, noisy), label))
            return torch.stack(columns, dim=1).double()

        loader = bench.data.feature_loader("val", bench.data.spread("val", bench.num_val), bench.batch_size)
        table, labels, _ = bench.per_image(loader, correct, "noisy images")
        table = table[labels >= 0]
        if not len(table):
            raise ConfigError("data has no readable validation image with a label.")
        feature = " + ".join(map(str, head.features))

        def row(metric: str, images: Tensor, series: str, **place: Any) -> Result:
            value, error = (number.item() for number in mean_and_error(images))
            return Result(metric, value, len(images), error, feature=feature, series=series, note=head.origin, **place)

        results = [row("top1", table[:, 0], "clean")]
        for column, (mode, frequency) in enumerate(settings, start=1):
            results.append(row("top1", table[:, column], mode, axis="frequency", at=frequency))
        for column, (mode, frequency) in enumerate(settings, start=1):
            drop = table[:, 0] - table[:, column]
            results.append(row("accuracy_drop", drop, mode, axis="frequency", at=frequency))
        return results
