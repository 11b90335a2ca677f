"""The frozen feature: one function makes it, for fitting and for scoring alike.

Probes that are fitted on one feature (say patch means of masked images in train mode) and scored on another are a
common fault of this field; here a feature has one name, :class:`~harmonize.types.FeatureSpec`, and one way to be
computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from harmonize.functional.distributed import gather_images
from harmonize.types import Batch, ConfigError, EncoderSpec, FeatureSpec

POOLS = ("cls", "patch_mean", "cls_patch_mean")


@dataclass(frozen=True)
class Features:
    """Features of a list of images, in the order of their indices, each image once.

    Attributes:
        x: (M, F) fp32.
        label: (M,) int64, -1 where there is none.
        index: (M,) int64, ascending.
        spec: What ``x`` is.
    """

    x: Tensor
    label: Tensor
    index: Tensor
    spec: FeatureSpec

    def spread(self, num: int) -> Features:
        """At most ``num`` of the images, evenly spaced."""
        if num >= len(self.x):
            return self
        keep = torch.arange(num, device=self.x.device) * len(self.x) // num
        return Features(self.x[keep], self.label[keep], self.index[keep], self.spec)


def read_specs(
    nodes: Sequence[Mapping[str, Any]], encoder: EncoderSpec, key: str = "eval.feature"
) -> list[FeatureSpec]:
    """The features that configuration nodes with ``layer``, ``pool`` and ``norm`` mean for this encoder.

    Raises:
        ConfigError: A node has another key, or see :func:`resolve`.
    """
    try:
        return [resolve(FeatureSpec(**node), encoder) for node in nodes]
    except TypeError as error:
        raise ConfigError(f"{key} has the keys layer, pool and norm, not {list(nodes)}.") from error


def resolve(spec: FeatureSpec, encoder: EncoderSpec) -> FeatureSpec:
    """The feature that ``spec`` means for this encoder: layer counted from 1, pooling that the encoder offers.

    Without a class token ``cls_patch_mean`` is ``patch_mean``.

    Raises:
        ConfigError: No such layer, no such pooling, or ``cls`` asked of an encoder without a class token.

    >>> encoder = EncoderSpec(8, 4, 2, (32, 32), 8, (4, 4), num_prefix_tokens=0, has_class_token=False)
    >>> resolve(FeatureSpec(), encoder)
    FeatureSpec(layer=4, pool='patch_mean', norm=True)
    """
    layer = spec.layer if spec.layer > 0 else encoder.depth + 1 + spec.layer
    if spec.layer == 0 or not 1 <= layer <= encoder.depth:
        raise ConfigError(
            f"feature.layer={spec.layer} must be a block in 1 ... {encoder.depth}, or -1 (last) ... -{encoder.depth}."
        )
    if spec.pool not in POOLS:
        raise ConfigError(f"feature.pool={spec.pool} must be one of {', '.join(POOLS)}.")
    pool = spec.pool
    if not encoder.has_class_token:
        if pool == "cls":
            raise ConfigError("feature.pool=cls needs an encoder with a class token; this one offers patch_mean.")
        pool = "patch_mean"
    return replace(spec, layer=layer, pool=pool)


def labelled(train: Features, val: Features) -> tuple[Features, Features]:
    """What a protocol fits on and what it scores, without the images that have no label (-1).

    Raises:
        ValueError: ``train`` and ``val`` are not the same feature.
        ConfigError: One of them has no labelled image.
    """
    if train.spec != val.spec:
        raise ValueError(f"A probe fitted on [{train.spec}] cannot be scored on [{val.spec}].")
    sides = []
    for name, side in (("train", train), ("val", val)):
        known = side.label >= 0
        if not known.any():
            raise ConfigError(
                f"data.root has no readable image with a label among the {name} images of the probes; "
                "callbacks.probe=null leaves the probes out."
            )
        sides.append(Features(side.x[known], side.label[known], side.index[known], side.spec))
    return sides[0], sides[1]


def feature_width(spec: FeatureSpec, encoder: EncoderSpec) -> int:
    """F, the length of a feature of this encoder.

    >>> encoder = EncoderSpec(8, 4, 2, (32, 32), 8, (4, 4), num_prefix_tokens=1, has_class_token=True)
    >>> feature_width(FeatureSpec(), encoder)
    16
    """
    return encoder.width * (2 if resolve(spec, encoder).pool == "cls_patch_mean" else 1)


@torch.no_grad()
def pooled_features(encoder: nn.Module, images: Tensor, specs: Sequence[FeatureSpec]) -> list[Tensor]:
    """Features (B, F) fp32 of images (B, 3, h, w), one per spec, from one pass in eval mode without autocast.

    Raises:
        ConfigError: See :func:`resolve`.
        RuntimeError: Some part of the encoder is in train mode.
    """
    if any(module.training for module in encoder.modules()):
        raise RuntimeError("Features are read in eval mode: call encoder.eval() first.")
    shape: EncoderSpec = encoder.spec  # type: ignore[assignment]
    specs = [resolve(spec, shape) for spec in specs]
    features: dict[FeatureSpec, Tensor] = {}
    with torch.autocast(images.device.type, enabled=False):
        last = max(spec.layer for spec in specs)
        for layer, tokens in enumerate(islice(encoder.iter_blocks(images.float()), last), start=1):  # type: ignore[operator]
            for norm in {spec.norm for spec in specs if spec.layer == layer}:
                normed = encoder.final_norm(tokens) if norm else tokens  # type: ignore[operator]
                for spec in specs:
                    if (spec.layer, spec.norm) == (layer, norm):
                        features[spec] = pool_tokens(normed, spec.pool, shape.num_prefix_tokens).float()
    return [features[spec] for spec in specs]


def pool_tokens(tokens: Tensor, pool: str, num_prefix_tokens: int) -> Tensor:
    """Tokens (B, P + N, D) -> (B, F), by one of :data:`POOLS`."""
    parts = []
    if pool != "patch_mean":
        parts.append(tokens[:, 0])
    if pool != "cls":
        parts.append(tokens[:, num_prefix_tokens:].mean(1))
    return torch.cat(parts, dim=1)


class FeatureCollector:
    """Features of a list of images, batch by batch and rank by rank.

    Args:
        encoder: In eval mode.
        specs: The features; one pass makes them all.
    """

    def __init__(self, encoder: nn.Module, specs: Sequence[FeatureSpec]) -> None:
        self.encoder, self.specs = encoder, [resolve(spec, encoder.spec) for spec in specs]  # type: ignore[arg-type]
        self._parts: list[tuple[Tensor, ...]] = []

    def update(self, batch: Batch) -> None:
        """Add the clean view of one batch."""
        if batch.image is None:
            raise ValueError("Features are read from Batch.image, the clean view, which this batch lacks.")
        self._parts.append((batch.label, batch.index, *pooled_features(self.encoder, batch.image, self.specs)))

    def compute(self) -> list[Features]:
        """All features of all ranks, one per spec; every rank must call it and receives the same."""
        if self._parts:
            columns = [torch.cat(column) for column in zip(*self._parts, strict=True)]
        else:  # more ranks than batches: this one has nothing to add but must take part
            device = next(self.encoder.parameters()).device
            shape: EncoderSpec = self.encoder.spec  # type: ignore[assignment]
            none = torch.zeros(0, dtype=torch.int64, device=device)
            widths = [feature_width(spec, shape) for spec in self.specs]
            columns = [none, none, *(torch.zeros(0, width, device=device) for width in widths)]
        label, index, *features = columns
        index, label, *features = gather_images(index, label, *features)
        return [Features(x, label, index, spec) for x, spec in zip(features, self.specs, strict=True)]


def extract(
    encoder: nn.Module, loader: Iterable[Batch], specs: Sequence[FeatureSpec], device: torch.device | str
) -> list[Features]:
    """Features of every image of a loader, one per spec.

    Args:
        encoder: In eval mode, on ``device``.
        loader: Batches with a clean view; each rank its own share (shares may differ in length).
        specs: The features; one pass makes them all.
        device: Where to compute; the result stays there.

    Raises:
        ConfigError: See :func:`resolve`.
        RuntimeError: The encoder is in train mode.
    """
    collector = FeatureCollector(encoder, specs)
    for batch in loader:
        collector.update(batch.apply(lambda tensor: tensor.to(device)))
    return collector.compute()
