"""A linear classifier on features of an encoder: what a probe fits, fine-tuning trains and a checkpoint may bring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from harmonize.evaluation.base import Bench
from harmonize.evaluation.features import feature_width, pooled_features
from harmonize.functional.linear_probe import fit_linear_probe
from harmonize.types import ConfigError, EncoderSpec, FeatureSpec


class Head(nn.Module):
    """Features, concatenated -> class scores.

    Args:
        encoder: What the features are of.
        features: They are concatenated in this order.
        num_classes: C.
        norm: Whether a LayerNorm (eps 1e-6) of its own comes before the linear layer (``fc_norm`` of MAE and SimMIM).

    Attributes:
        features: The features.
        origin: Where it comes from, for the notes of results.
        classes: Names of the classes by position, None where they are not known.
    """

    def __init__(
        self, encoder: EncoderSpec, features: Sequence[FeatureSpec], num_classes: int, norm: bool = False
    ) -> None:
        super().__init__()
        self.features = list(features)
        width = sum(feature_width(spec, encoder) for spec in self.features)
        self.norm: nn.Module = nn.LayerNorm(width, eps=1e-6) if norm else nn.Identity()
        self.linear = nn.Linear(width, num_classes)
        self.origin = ""
        self.classes: list[str] | None = None

    @property
    def num_classes(self) -> int:
        """C."""
        return self.linear.out_features

    def forward(self, pooled: Tensor) -> Tensor:
        """Class scores (B, C) of concatenated features (B, F)."""
        return self.linear(self.norm(pooled))

    @torch.no_grad()
    def logits(self, encoder: nn.Module, images: Tensor) -> Tensor:
        """Class scores (B, C), fp32, of images (B, 3, h, w) through an encoder in eval mode."""
        return self(torch.cat(pooled_features(encoder, images, self.features), dim=1)).float()


def fit_head(
    bench: Bench, features: Sequence[FeatureSpec], l2: float = 1e-3, labels: Tensor | None = None, num_classes: int = 0
) -> Head:
    """A logistic regression on standardised features of the clean training images, fitted to convergence.

    Args:
        bench: The encoder and the data.
        features: Concatenated.
        l2: Penalty on the weights.
        labels: By position in the training split, (n,) int64, where the classes are not the data set's own.
        num_classes: Of these.
    """
    num_classes = num_classes or len(bench.classes)
    columns = bench.features("train", features)
    label = columns[0].label if labels is None else labels.to(bench.device)[columns[0].index]
    known = label >= 0
    if not known.any():
        raise ConfigError("data has no readable training image with a label.")
    x = torch.cat([column.x for column in columns], dim=1)[known]
    probe = fit_linear_probe(x, label[known], num_classes, l2)
    weight = (probe.weight / probe.std).to(bench.device)
    bias = (probe.bias - (probe.weight / probe.std) @ probe.mean).to(bench.device)
    return linear_head(bench.spec, features, weight.float(), bias.float(), f"linear probe on {len(x)} training images")


def classifier(bench: Bench, kind: str, features: Sequence[FeatureSpec], l2: float = 1e-3) -> Head:
    """The head that an evaluation of class predictions uses.

    Args:
        bench: The encoder and the data.
        kind: ``checkpoint`` (the head in the checkpoint), ``probe`` (see :func:`fit_head`) or ``auto``: the first if
            there is one for these classes.
        features: Of the probe.
        l2: Of the probe.

    Raises:
        ConfigError: ``checkpoint`` is asked for, and there is no head or one for another number of classes.
    """
    head = bench.head if isinstance(bench.head, Head) else None
    # Equally many classes in another order would be scored wrongly; other projects' files do not name theirs.
    fits = head is not None and len(bench.classes) == head.num_classes and head.classes in (None, bench.classes)
    if kind == "checkpoint" and not fits:
        has = f"one for {head.num_classes} classes, other or in another order" if head is not None else "none"
        raise ConfigError(
            f"eval.head=checkpoint needs a checkpoint with a head for the {len(bench.classes)} classes of the data; "
            f"this one has {has}: use eval.head=probe."
        )
    if kind != "probe" and fits:
        assert head is not None
        return head
    return fit_head(bench, features, l2)


def linear_head(
    encoder: EncoderSpec, features: Sequence[FeatureSpec], weight: Tensor, bias: Tensor, origin: str = ""
) -> Head:
    """A head with the given weights (C, F) and biases (C,), in eval mode on their device."""
    head = Head(encoder, features, len(weight)).to(weight.device)
    with torch.no_grad():
        head.linear.weight.copy_(weight)
        head.linear.bias.copy_(bias)
    head.origin = origin
    return head.requires_grad_(False).eval()
