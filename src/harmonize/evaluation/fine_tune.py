"""End-to-end fine-tuning: the encoder and a linear head are trained together on labelled images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmonize.data.module import DataModule
from harmonize.data.supervised import FineTuning, Mixing
from harmonize.evaluation.base import Bench, EvaluationProtocol
from harmonize.evaluation.classifier import Head
from harmonize.evaluation.features import pool_tokens, resolve
from harmonize.evaluation.fitting import Training, fit
from harmonize.evaluation.linear_probe import top_results
from harmonize.functional.seeding import mix_int
from harmonize.types import Batch, ConfigError, EncoderSpec, FeatureSpec, Result

POOLS = ("patch_mean", "cls")


class Classifier(nn.Module):
    """An encoder and a head on one feature of its last block, trained together.

    Args:
        encoder: The encoder.
        head: The head.
    """

    def __init__(self, encoder: nn.Module, head: Head) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (B, C) of images (B, 3, h, w)."""
        (spec,) = self.head.features
        *_, tokens = self.encoder.iter_blocks(images)  # type: ignore[operator]
        if spec.norm:
            tokens = self.encoder.final_norm(tokens)  # type: ignore[operator]
        shape: EncoderSpec = self.encoder.spec  # type: ignore[assignment]
        return self.head(pool_tokens(tokens, spec.pool, shape.num_prefix_tokens))


@dataclass(frozen=True, kw_only=True)
class FineTune(Training, EvaluationProtocol):
    """Fine-tunes a copy of the encoder and scores it, at its last epoch, on the clean validation images.

    Attributes:
        drop_path: Stochastic-depth rate of the last block, rising linearly from 0 at the first.
        pool: ``patch_mean``: mean over patch tokens, through a LayerNorm of its own and not the encoder's final norm;
            ``cls``: the class token after the final norm.
        head_init_std: Of the linear layer's initial weights (normal, cut at +-2); its bias starts at 0.
        per_block: Whether a relative-position table that all blocks share becomes one for each block.
        randaugment: timm's description; None: off.
        color_jitter: Strength of colour jitter in the place of RandAugment.
        erasing_prob: Probability that a rectangle is filled with noise.
        crop_scale: Range of the random crop's share of the image.
        interpolation: ``bicubic`` or ``bilinear``, of the random crop and of the clean view.
        eval_crop: Share of the resized side that the clean view's centre crop keeps; None: the data's own.
        mixup: Parameter of mixup's Beta distribution; 0: no mixup.
        cutmix: The same for CutMix.
        mix_prob: Probability that a batch is mixed.
        switch_prob: Probability of CutMix where both are possible.
        smoothing: Label smoothing.

    Raises:
        ConfigError: A number is out of range.

    Source: MAE ``main_finetune.py``, SimMIM ``main_finetune.py``, BEiT ``run_class_finetuning.py``, DeiT ``main.py``.
    """

    drop_path: float = 0.1
    pool: str = "patch_mean"
    head_init_std: float = 2e-5
    per_block: bool = False
    randaugment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.0
    erasing_prob: float = 0.25
    crop_scale: Sequence[float] = (0.08, 1.0)
    interpolation: str = "bicubic"
    eval_crop: float | None = None
    mixup: float = 0.8
    cutmix: float = 1.0
    mix_prob: float = 1.0
    switch_prob: float = 0.5
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool not in POOLS:
            raise ConfigError(f"eval.pool={self.pool} is not known: {' or '.join(POOLS)} is needed")
        if not self.head_init_std > 0:
            raise ConfigError(f"eval.head_init_std={self.head_init_std} is not possible: a number above 0 is needed")

    def run(self, bench: Bench) -> list[Result]:
        """Rows ``top1`` and ``top5``, and a series ``EMA`` of them where there is a moving average.

        Raises:
            ConfigError: The data have no labels or fewer images than a batch, or the encoder has no such feature.
            NonFiniteLossError: Training diverged.
        """
        loss = self._loss(len(bench.classes))
        data, network = self._data(bench), self._network(bench)
        fitted = fit(bench, "fine_tune", network, loss, data, self)
        results = []
        feature = f"fine-tuned {network.head.features[0]}"
        note = f"last of {self.epochs} epochs; training loss there {fitted.losses[-1]:.3f}"
        for series, version in fitted.versions.items():
            scores, labels = class_scores(bench, version.encoder, version.head, data)  # type: ignore[arg-type]
            results += top_results(scores, labels, feature=feature, series=series, note=note)
        bench.keep(network.encoder, network.head)
        return results

    def _network(self, bench: Bench) -> Classifier:
        """The copy that is trained, with a new head."""
        assert bench.trainable is not None
        spec = resolve(FeatureSpec(-1, self.pool, norm=self.pool == "cls"), bench.spec)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_int(bench.seed))
            head = Head(bench.spec, [spec], len(bench.classes), norm=not spec.norm)
            nn.init.trunc_normal_(head.linear.weight, std=self.head_init_std)
        nn.init.zeros_(head.linear.bias)
        head.origin, head.classes = f"fine-tuned for {self.epochs} epochs", list(bench.classes)
        return Classifier(bench.trainable(self.drop_path, per_block=self.per_block), head)

    def _data(self, bench: Bench) -> DataModule:
        """Augmented training images, and clean ones."""
        indices = bench.data.spread("train", bench.num_train)
        self.check_batch(len(indices))
        recipe = FineTuning(
            bench.spec.image_size,
            randaugment=self.randaugment,
            interpolation=self.interpolation,
            crop_scale=self.crop_scale,
            color_jitter=self.color_jitter,
            erasing_prob=self.erasing_prob,
        )
        clean: dict[str, Any] = {} if self.eval_crop is None else {"eval_crop": self.eval_crop}
        return bench.make_data(
            recipes={"fine_tune": recipe},
            required_views={"fine_tune": "fine_tune"},
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            labelled=True,
            train_indices=indices,
            eval_interpolation=self.interpolation,
            **clean,
        )

    def _loss(self, num_classes: int) -> Callable[[nn.Module, Batch, int], Tensor]:
        """Cross-entropy with soft targets: label smoothing sits in them, mixed images or not."""
        mixing = Mixing(num_classes, self.mixup, self.cutmix, self.mix_prob, self.switch_prob, self.smoothing)

        def loss(network: nn.Module, batch: Batch, seed: int) -> Tensor:
            images, targets = mixing(batch.views["fine_tune"][0], batch.label, seed)
            return F.cross_entropy(network(images).float(), targets)

        return loss


def class_scores(bench: Bench, encoder: nn.Module, head: Head, data: DataModule) -> tuple[Tensor, Tensor]:
    """Class scores of the clean validation images by a network in eval mode, each image once.

    Every rank takes part and receives all.

    Args:
        bench: How many images, and where.
        encoder: In eval mode.
        head: In eval mode.
        data: Its clean view is shown.

    Returns:
        Scores (M, C) fp32 and labels (M,), in the order of the images; those without a label are left out.

    Raises:
        ConfigError: No readable image has a label.
    """
    loader = data.feature_loader("val", data.spread("val", bench.num_val), bench.batch_size)

    def scores(batch: Batch) -> Tensor:
        assert batch.image is not None
        return head.logits(encoder, batch.image)

    rows, label, _ = bench.per_image(loader, scores, "fine-tuned, val")
    if not (label >= 0).any():
        raise ConfigError("data has no readable validation image with a label.")
    return rows[label >= 0].float(), label[label >= 0]
