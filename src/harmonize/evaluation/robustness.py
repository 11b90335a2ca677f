"""Accuracy on images of the training classes under other conditions: corrupted, rendered, sketched, stylised."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from harmonize.data.robustness import Robustness as RobustnessSet
from harmonize.data.sampler import evenly
from harmonize.evaluation.base import Bench, EvaluationProtocol
from harmonize.evaluation.classifier import classifier
from harmonize.evaluation.features import read_specs
from harmonize.functional.knn import topk_correct
from harmonize.functional.statistics import mean_and_error
from harmonize.types import Batch, ConfigError, Result


@dataclass
class Robustness(EvaluationProtocol):
    """Accuracy on each condition of a folder in the layout of ImageNet-C, -R, -A, -Sketch or Stylized-ImageNet.

    Where the folder has some of the classes only, as ImageNet-R and -A have, decisions are among these classes alone,
    for the clean images as well.

    Attributes:
        root: The folder; it has to be given.
        head: ``checkpoint``, ``probe`` or ``auto``, see :func:`~harmonize.evaluation.classifier.classifier`.
        feature: Of the probe.
        l2: Of the probe.

    Source: Hendrycks and Dietterich 2019 (arXiv:1903.12261); Hendrycks et al. 2021 (arXiv:2006.16241 and
        arXiv:1907.07174).
    """

    root: str | None = None
    head: str = "auto"
    feature: dict[str, Any] = field(default_factory=lambda: {"layer": -1, "pool": "cls_patch_mean", "norm": True})
    l2: float = 1e-3

    def run(self, bench: Bench) -> list[Result]:
        """Row ``top1`` of clean images, then of each condition, over severities where there are some, then of all.

        The last, ``all conditions``, is the plain mean over corruptions and severities; the mean corruption error of
        ImageNet-C, which is relative to AlexNet, is not computed.

        Raises:
            ConfigError: The folder is missing, in another layout or of other classes, or its images are unreadable.
        """
        images = RobustnessSet(self.root, bench.classes)
        head = classifier(bench, self.head, read_specs([self.feature], bench.spec), self.l2)
        present = torch.tensor(images.present, device=bench.device)
        position = torch.full((len(bench.classes),), -1, device=bench.device)
        position[present] = torch.arange(len(present), device=bench.device)
        some = len(present) < len(bench.classes)
        note = head.origin + (f"; among the {len(present)} classes that occur" if some else "")

        def correct(batch: Batch) -> Tensor:
            assert batch.image is not None
            label = torch.where(batch.label < 0, batch.label, position[batch.label])
            right = topk_correct(head.logits(bench.encoder, batch.image)[:, present], label.clamp_min(0))
            return torch.stack([right, label >= 0], dim=1).double()

        def top1(loader: DataLoader, what: str) -> Tensor:
            rows, _, _ = bench.per_image(loader, correct, what)
            rows = rows[rows[:, 1] > 0, 0]
            if not len(rows):
                raise ConfigError(f"eval.root={self.root}: no image of {what} can be read.")
            return rows

        def row(rows: Tensor, series: str, **place: Any) -> Result:
            value, error = (number.item() for number in mean_and_error(rows))
            feature = " + ".join(map(str, head.features))
            return Result("top1", value, len(rows), error, feature=feature, series=series, note=note, **place)

        clean = bench.data.feature_loader("val", bench.data.spread("val", bench.num_val), bench.batch_size)
        results, every = [row(top1(clean, "clean images"), "clean")], []
        for condition in images.conditions:
            split, severity = condition.split, condition.severity
            what = condition.name if severity is None else f"{condition.name}, severity {severity}"
            crop = 1.0 if images.corrupted else None
            loader = bench.data.loader_of(split, bench.batch_size, evenly(len(split), bench.num_val), crop)
            rows = top1(loader, what)
            every.append(rows)
            place = {} if severity is None else {"axis": "severity", "at": float(severity)}
            results.append(row(rows, condition.name, **place))
        if len(every) > 1:
            results.append(self._mean(every, images.corrupted, results[0]))
        return results

    @staticmethod
    def _mean(every: list[Tensor], same_images: bool, like: Result) -> Result:
        """The mean over conditions, each of the same weight.

        Conditions that show the same images are no independent samples: the error is then that of each image's mean
        over conditions. Without such images there is none.
        """
        value, error = sum(rows.mean().item() for rows in every) / len(every), None
        if same_images and len({len(rows) for rows in every}) == 1:
            error = mean_and_error(torch.stack(every).mean(dim=0))[1].item()
        return replace(like, value=value, error=error, num_images=sum(map(len, every)), series="all conditions")
