"""Linear-probe protocols: a linear classifier on frozen features.

``ConvergedProbe`` solves a convex problem, so that no learning rate, length or seed can change its answer; the probe of
training and the heads of ``shape_bias``, ``frequency_noise`` and ``robustness`` are fitted this way. ``LinearProbe`` is
what the papers do: SGD or LARS on mini-batches for a number of epochs, one head or a grid of heads in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from harmonize.data.module import DataModule
from harmonize.data.supervised import CropFlip
from harmonize.evaluation.base import Bench, EvaluationProtocol
from harmonize.evaluation.classifier import fit_head
from harmonize.evaluation.features import (
    Features,
    feature_width,
    labelled,
    pooled_features,
    read_specs,
)
from harmonize.functional.distributed import all_reduce_sum, rank, world_size
from harmonize.functional.knn import topk_accuracy, topk_correct
from harmonize.functional.linear_probe import fit_linear_probe
from harmonize.functional.probe_heads import HeadStack
from harmonize.functional.seeding import mix_int
from harmonize.functional.statistics import classification_error
from harmonize.types import ConfigError, FeatureSpec, Result


def linear_probe_accuracy(train: Features, val: Features, num_classes: int, l2: float = 1e-3) -> float:
    """Top-1 accuracy in [0, 1] on ``val`` of a linear classifier fitted on ``train``.

    Images without a label (-1) take no part; for what is raised see :func:`~harmonize.evaluation.features.labelled`.
    """
    train, val = labelled(train, val)
    logits = fit_linear_probe(train.x, train.label, num_classes, l2).logits(val.x)
    return topk_accuracy(logits, val.label.to(logits.device))


def top_results(scores: Tensor, labels: Tensor, **row: Any) -> list[Result]:
    """Rows ``top1`` and, where there are more than 10 classes, ``top5``."""
    results = []
    for number in (1, 5) if scores.shape[1] > 10 else (1,):
        value, error = classification_error(topk_correct(scores, labels, number))
        results.append(Result(f"top{number}", value, len(labels), error, **row))
    return results


@dataclass
class ConvergedProbe(EvaluationProtocol):
    """Logistic regression on standardised features, fitted to convergence (L-BFGS, fp64).

    Attributes:
        feature: ``layer``, ``pool`` and ``norm`` of the feature.
        l2: Penalty on the weights.
    """

    feature: dict[str, Any] = field(default_factory=lambda: {"layer": -1, "pool": "cls_patch_mean", "norm": True})
    l2: float = 1e-3

    def run(self, bench: Bench) -> list[Result]:
        """Rows ``top1`` and ``top5``.

        Raises:
            ConfigError: The data have no labels, or the encoder has no such feature.
        """
        (spec,) = read_specs([self.feature], bench.spec)
        head, val = fit_head(bench, [spec], self.l2), bench.features("val", [spec])[0]
        val = labelled(val, val)[1]
        with torch.no_grad():
            return top_results(head(val.x), val.label, feature=str(spec))


ROWS = 4096
"""Images whose scores by all heads are held at a time."""


@dataclass(frozen=True)
class Columns:
    """Features of labelled images.

    Attributes:
        x: By feature (M, F).
        label: (M,).
        index: (M,), positions in their split.
    """

    x: Mapping[FeatureSpec, Tensor]
    label: Tensor
    index: Tensor

    def take(self, rows: Tensor) -> Columns:
        """Those of some images, chosen by (M,) bool."""
        rows = rows.to(self.label.device)
        return Columns({spec: x[rows] for spec, x in self.x.items()}, self.label[rows], self.index[rows])


@dataclass
class Grid:
    """Heads on one feature: what :class:`LinearProbe` trains together.

    Attributes:
        specs: Of the feature; concatenated in this order.
        stack: The heads.
    """

    specs: list[FeatureSpec]
    stack: HeadStack

    @property
    def name(self) -> str:
        """Of the feature, in short, for series and notes."""
        return " + ".join(f"{spec.pool}@{spec.layer}{'' if spec.norm else ' without norm'}" for spec in self.specs)

    def join(self, columns: Mapping[FeatureSpec, Tensor]) -> Tensor:
        """The feature (B, F) from its parts."""
        parts = [columns[spec] for spec in self.specs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def correct(self, columns: Columns) -> Tensor:
        """Which images each head gets right, (L, M) bool; some images at a time, for scores of many heads are large."""
        x, label = self.join(columns.x).split(ROWS), columns.label.split(ROWS)
        parts = [[topk_correct(one, y) for one in self.stack.logits(rows)] for rows, y in zip(x, label, strict=True)]
        return torch.cat([torch.stack(part) for part in parts], dim=1)


@dataclass
class LinearProbe(EvaluationProtocol):
    """A linear head, or a grid of heads that share one pass over the data, as the papers train them.

    With several heads the one that is reported is chosen on training images that were held out, never on the
    validation images. Without augmentation the features are computed once and cached; ranks then train the same heads.

    Attributes:
        features: Each a list of ``{layer, pool, norm}`` that are concatenated.
        lrs: Learning rates, for a batch of ``lr_batch``.
        lr_batch: Denominator of the rule lr * batch / lr_batch; None: ``lrs`` are used as they are.
        epochs: Passes over the training images.
        batch_size: Images per step over all ranks; at most as many as there are.
        optimizer: ``sgd`` or ``lars``.
        momentum: Of the optimiser.
        weight_decay: Of the optimiser.
        batch_norm: A BatchNorm without affine parameters in front of the heads.
        warmup_epochs: Of linear warm-up from 0.
        schedule: Half a cosine to 0, stepping per ``iteration`` or per ``epoch``.
        augment: Arguments of :class:`~harmonize.data.supervised.CropFlip` besides the size; None: clean images.
        eval_interpolation: Of the clean view, ``bicubic`` or ``bilinear``.
        holdout: Share of the training images on which the head is chosen; used with several heads alone.
        init_std: Standard deviation of the initial weights.
    """

    features: Sequence[Sequence[dict[str, Any]]]
    lrs: Sequence[float]
    lr_batch: int | None = 256
    epochs: int = 100
    batch_size: int = 1024
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_norm: bool = False
    warmup_epochs: float = 0
    schedule: str = "iteration"
    augment: dict[str, Any] | None = None
    eval_interpolation: str = "bicubic"
    holdout: float = 0.1
    init_std: float = 0.01

    def __post_init__(self) -> None:
        if not self.warmup_epochs < self.epochs:
            raise ConfigError(f"eval.warmup_epochs={self.warmup_epochs} must be below eval.epochs ({self.epochs}).")
        try:
            CropFlip(32, **(self.augment or {}))  # its arguments are checked before anything is read
        except (TypeError, ValueError) as error:
            raise ConfigError(f"eval.augment={dict(self.augment or {})} is not possible: {error}.") from error

    def run(self, bench: Bench) -> list[Result]:
        """Rows ``top1`` and ``top5`` of the reported head; with several heads ``grid_top1`` of each.

        Raises:
            ConfigError: The data have no labels, the encoder has no such feature, or there are too few images.
        """
        num_classes = len(bench.classes)
        features = [read_specs(parts, bench.spec, "eval.features") for parts in self.features]
        specs = list(dict.fromkeys(spec for parts in features for spec in parts))
        several = len(features) * len(self.lrs) > 1
        data = bench.make_data(eval_interpolation=self.eval_interpolation)
        train: Columns | None = None
        if self.augment is None or several:
            train = self._columns(bench, data, "train", specs)
        index = torch.tensor(data.spread("train", bench.num_train)) if train is None else train.index.cpu()
        held = self._held_out(len(index)) if several else torch.zeros(len(index), dtype=torch.bool)
        batch = min(self.batch_size, int((~held).sum()))
        scale = 1.0 if self.lr_batch is None else batch / self.lr_batch
        grids = [Grid(parts, self._stack(bench, parts, num_classes, scale)) for parts in features]
        if self.augment is not None:
            self._fit_augmented(bench, grids, specs, index[~held].tolist(), batch)
        else:
            assert train is not None
            self._fit_cached(bench, grids, train.take(~held), batch)

        grid, head, note = grids[0], 0, ""
        if several:
            assert train is not None
            grid, head, note = self._choose(grids, train.take(held))
        val = self._columns(bench, data, "val", specs)
        weight, bias = grid.stack.fold(head)
        results = top_results(
            grid.join(val.x) @ weight.T + bias, val.label, feature=" + ".join(map(str, grid.specs)), note=note
        )
        return results + (self._every_head(grids, val) if several else [])

    def _columns(self, bench: Bench, data: DataModule, split: str, specs: Sequence[FeatureSpec]) -> Columns:
        """Features of the labelled images of a split, clean, from the cache."""
        key = "" if self.eval_interpolation == "bicubic" else self.eval_interpolation
        columns = bench.features(split, specs, data, key)
        known = columns[0].label >= 0
        if not known.any():
            raise ConfigError(f"data has no readable image with a label among the {split} images.")
        return Columns(
            {column.spec: column.x[known] for column in columns}, columns[0].label[known], columns[0].index[known]
        )

    def _held_out(self, num: int) -> Tensor:
        """Every so many-th image, (num,) bool: of every class the same share where images are sorted by class."""
        step = max(2, round(1 / self.holdout))
        if num < step:
            raise ConfigError(
                f"eval.holdout={self.holdout} holds out none of {num} training images, and one of several heads is "
                f"chosen on such: {step} labelled images or more are needed, or a single head."
            )
        return torch.arange(num) % step == step - 1

    def _choose(self, grids: Sequence[Grid], held: Columns) -> tuple[Grid, int, str]:
        """The head with the highest accuracy on held-out training images, and a note that says so."""
        accuracy = {
            (g, h): right.double().mean().item()
            for g, grid in enumerate(grids)
            for h, right in enumerate(grid.correct(held))
        }
        g, h = max(accuracy, key=lambda place: accuracy[place])
        return (
            grids[g],
            h,
            f"{grids[g].name}, lr={self.lrs[h]:g}: chosen among {len(accuracy)} heads on {len(held.label)} held-out "
            f"training images ({100 * accuracy[g, h]:.1f} % there)",
        )

    def _every_head(self, grids: Sequence[Grid], val: Columns) -> list[Result]:
        results = []
        for grid in grids:
            for lr, right in zip(self.lrs, grid.correct(val), strict=True):
                value, error = classification_error(right)
                feature = " + ".join(map(str, grid.specs))
                row = Result("grid_top1", value, len(val.label), error, feature=feature, series=grid.name)
                results.append(replace(row, axis="learning_rate", at=lr))
        return results

    def _stack(self, bench: Bench, parts: Sequence[FeatureSpec], num_classes: int, scale: float) -> HeadStack:
        return HeadStack(
            sum(feature_width(spec, bench.spec) for spec in parts),
            num_classes,
            [lr * scale for lr in self.lrs],
            self.weight_decay,
            self.optimizer,
            self.momentum,
            self.batch_norm,
            self.init_std,
            torch.Generator().manual_seed(mix_int(bench.seed)),
            device=bench.device,
        )

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step as a share of the highest.

        >>> probe = LinearProbe([], [1.0], epochs=10, warmup_epochs=2)
        >>> [round(probe.factor(step, 5), 3) for step in (0, 5, 10, 30)]
        [0.0, 0.5, 1.0, 0.5]
        """
        epoch = step / steps_per_epoch if self.schedule == "iteration" else float(step // steps_per_epoch)
        if epoch < self.warmup_epochs:
            return epoch / self.warmup_epochs
        done = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-9)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def _epochs(self, bench: Bench, grids: Sequence[Grid]) -> Iterator[int]:
        """The epochs that are left; the heads are stored after each, on cached features after every tenth."""
        state = bench.load_state("heads")
        settings = f"{self}, seed {bench.seed}, {bench.num_train} images"
        done = 0
        if state is not None and state["settings"] != settings:
            bench.say("heads: what is stored here was trained with other settings; starting anew.")
        elif state is not None:
            done = int(state["epoch"])
            for i, grid in enumerate(grids):
                grid.stack.load_state_dict(state[str(i)])
        for epoch in bench.track(range(done, self.epochs), "linear heads"):
            yield epoch
            if self.augment is not None or (epoch + 1) % 10 == 0 or epoch + 1 == self.epochs:
                heads = {str(i): grid.stack.state_dict() for i, grid in enumerate(grids)}
                bench.save_state("heads", {"settings": settings, "epoch": epoch + 1, **heads})

    def _fit_cached(self, bench: Bench, grids: Sequence[Grid], train: Columns, batch: int) -> None:
        """Heads on features that are computed already; the images of an epoch that fill no batch are left out."""
        joined = [grid.join(train.x) for grid in grids]
        per_epoch = len(train.label) // batch
        for epoch in self._epochs(bench, grids):
            generator = torch.Generator().manual_seed(mix_int(bench.seed, epoch))
            order = torch.randperm(len(train.label), generator=generator).to(bench.device)
            for i in range(per_epoch):
                taken = order[i * batch : (i + 1) * batch]
                factor = self.factor(epoch * per_epoch + i, per_epoch)
                for grid, features in zip(grids, joined, strict=True):
                    grid.stack.step(features[taken], train.label[taken], factor)

    def _fit_augmented(
        self, bench: Bench, grids: Sequence[Grid], specs: Sequence[FeatureSpec], rows: Sequence[int], batch: int
    ) -> None:
        """Heads on augmented images, which go through the encoder anew in every epoch."""
        recipe = CropFlip(bench.spec.image_size, **(self.augment or {}))
        data = bench.make_data(
            recipes={"probe": recipe},
            required_views={"probe": "probe"},
            batch_size=batch - batch % world_size(),
            labelled=True,
            train_indices=rows,
            world_size=world_size(),
            rank=rank(),
        )

        def mean_over_ranks(gradient: Tensor) -> Tensor:
            return all_reduce_sum(gradient) / world_size()

        per_epoch = data.steps_per_epoch
        loader = data.train_loader()
        for epoch in self._epochs(bench, grids):
            loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
            for i, images in enumerate(bench.track(loader, f"epoch {epoch + 1} of {self.epochs}")):
                images = images.apply(lambda tensor: tensor.to(bench.device))
                pooled = pooled_features(bench.encoder, images.views["probe"][0], specs)
                columns = dict(zip(specs, pooled, strict=True))
                factor = self.factor(epoch * per_epoch + i, per_epoch)
                for grid in grids:
                    grid.stack.step(grid.join(columns), images.label, factor, mean_over_ranks)
