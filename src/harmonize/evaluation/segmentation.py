"""Semantic segmentation: a head on patch tokens, of a frozen encoder or trained together with it.

Images of any size are seen in windows of the size that the encoder is made for; where windows overlap, their scores are
averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmonize.data.sampler import evenly
from harmonize.data.segmentation import IGNORE_INDEX, SegmentationSet, SegmentationSplit, ShapesMasks
from harmonize.data.segmentation_module import SegmentationBatch, SegmentationModule
from harmonize.data.segmentation_views import SegmentationTraining, label_map
from harmonize.evaluation.base import Bench, EvaluationProtocol
from harmonize.evaluation.features import resolve
from harmonize.evaluation.fitting import Training, fit
from harmonize.functional.distributed import gather_images, rank, world_size
from harmonize.functional.seeding import mix_int
from harmonize.functional.segmentation import intersection_over_union, mean_iou, pixel_accuracy, pixel_counts
from harmonize.functional.statistics import bootstrap_interval
from harmonize.types import ConfigError, EncoderSpec, FeatureSpec, Result

# ---- heads: maps (B, D, rows, columns) of some blocks -> class scores of any size, of which the first are scored -----


class LinearHead(nn.Module):
    """BatchNorm, dropout of whole channels and one linear layer on the concatenated tokens of a patch.

    Args:
        width: D.
        num_maps: Number of blocks.
        num_classes: C.
        dropout: Probability that a channel is dropped.

    Source: DINOv2's and DINOv3's linear segmentation. iBOT's has four blocks, no BatchNorm and no dropout.
    """

    weights = (1.0,)

    def __init__(self, width: int, num_maps: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width * num_maps)
        self.dropout = nn.Dropout2d(dropout)
        self.linear = nn.Conv2d(width * num_maps, num_classes, 1)
        nn.init.normal_(self.linear.weight, std=0.01)
        assert self.linear.bias is not None
        nn.init.zeros_(self.linear.bias)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Class scores (B, C, rows, columns)."""
        return (self.linear(self.dropout(self.norm(torch.cat(list(maps), dim=1)))),)


class UperNetHead(nn.Module):
    """UperNet on four blocks: a pyramid of sizes, pooling over regions at its top, fusion from the top down.

    A ViT's blocks all have the same size. Theirs become 4, 2, 1 and 1/2 times the grid by transposed convolutions and
    max-pooling. While training there are also the scores of a small convolutional head on the third block.

    Args:
        width: D.
        num_maps: Number of blocks, 4.
        num_classes: C.
        channels: Of the head; None: D.
        auxiliary: Weight of the auxiliary head's loss.
        auxiliary_channels: Of the auxiliary head.
        dropout: Probability that a channel is dropped before the last layer.
        pools: Regions per side of the pooling at the top.

    Source: Xiao et al. 2018 (UperNet, arXiv:1807.10221); the ADE20K configurations of BEiT and iBOT.
    """

    def __init__(
        self,
        width: int,
        num_maps: int,
        num_classes: int,
        channels: int | None = None,
        auxiliary: float = 0.4,
        auxiliary_channels: int = 256,
        dropout: float = 0.1,
        pools: Sequence[int] = (1, 2, 3, 6),
    ) -> None:
        super().__init__()
        if num_maps != 4:
            raise ConfigError(f"eval.layers names {num_maps} blocks: UperNet needs 4")
        channels = channels or width
        self.weights = (1.0, auxiliary)
        self.resize = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(width, width, 2, 2),
                    nn.BatchNorm2d(width),
                    nn.GELU(),
                    nn.ConvTranspose2d(width, width, 2, 2),
                ),
                nn.ConvTranspose2d(width, width, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),  # a grid of one patch stays one
            ]
        )
        self.lateral = nn.ModuleList([_conv(width, channels, 1) for _ in range(3)])
        self.pooled = nn.ModuleList(
            [nn.Sequential(nn.AdaptiveAvgPool2d(size), _conv(width, channels, 1)) for size in pools]
        )
        self.top = _conv(width + len(pools) * channels, channels, 3)
        self.smooth = nn.ModuleList([_conv(channels, channels, 3) for _ in range(3)])
        self.fuse = _conv(4 * channels, channels, 3)
        self.classify = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(channels, num_classes, 1))
        self.auxiliary = nn.Sequential(
            _conv(width, auxiliary_channels, 3), nn.Dropout2d(dropout), nn.Conv2d(auxiliary_channels, num_classes, 1)
        )

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Class scores (B, C, 4 rows, 4 columns) and, while training, the auxiliary head's (B, C, rows, columns)."""
        pyramid = [resize(x) for resize, x in zip(self.resize, maps, strict=True)]
        top = pyramid[3]
        regions = [_resized(pool(top), top) for pool in self.pooled]
        levels = [lateral(x) for lateral, x in zip(self.lateral, pyramid, strict=False)]
        levels.append(self.top(torch.cat([top, *regions], dim=1)))
        for i in (2, 1, 0):
            levels[i] = levels[i] + _resized(levels[i + 1], levels[i])
        levels = [*(smooth(x) for smooth, x in zip(self.smooth, levels, strict=False)), levels[3]]
        scores = self.classify(self.fuse(torch.cat([_resized(x, levels[0]) for x in levels], dim=1)))
        return (scores, self.auxiliary(maps[2])) if self.training else (scores,)


def _conv(width: int, channels: int, side: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, channels, side, padding=side // 2, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
    )


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def token_maps(encoder: nn.Module, images: Tensor, layers: Sequence[int], norm: bool) -> list[Tensor]:
    """Patch tokens of some blocks as maps (B, D, rows, columns), in the order of ``layers``.

    Args:
        encoder: The encoder.
        images: (B, 3, h, w).
        layers: Blocks, from 1; one may be named twice.
        norm: Whether they go through the encoder's final norm.
    """
    spec: EncoderSpec = encoder.spec  # type: ignore[assignment]
    found = {}
    for layer, tokens in enumerate(encoder.iter_blocks(images), start=1):  # type: ignore[operator]
        if layer in layers:
            tokens = encoder.final_norm(tokens) if norm else tokens  # type: ignore[operator]
            found[layer] = tokens[:, spec.num_prefix_tokens :].transpose(1, 2).unflatten(2, spec.grid)
    return [found[layer] for layer in layers]


class TrainedTokens(nn.Module):
    """Maps of an encoder that is trained together with the head; see :func:`token_maps`."""

    def __init__(self, encoder: nn.Module, layers: Sequence[int], norm: bool) -> None:
        super().__init__()
        self.encoder, self.layers, self.norm = encoder, layers, norm

    def forward(self, images: Tensor) -> list[Tensor]:
        """The maps of images (B, 3, h, w)."""
        return token_maps(self.encoder, images, self.layers, self.norm)


@dataclass
class FrozenTokens:
    """The same of an encoder in eval mode, without gradients. No module: so it is neither trained nor stored."""

    encoder: nn.Module
    layers: Sequence[int]
    norm: bool

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        """The maps of images (B, 3, h, w)."""
        return token_maps(self.encoder, images, self.layers, self.norm)


class Segmenter(nn.Module):
    """Maps and a head on them.

    Args:
        tokens: :class:`TrainedTokens` or :class:`FrozenTokens`.
        head: Makes class scores of the maps.
    """

    def __init__(self, tokens: Callable[[Tensor], list[Tensor]], head: nn.Module) -> None:
        super().__init__()
        self.tokens, self.head = tokens, head

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Class scores of images (B, 3, h, w), as the head gives them."""
        return self.head(self.tokens(images))


# ---- the protocol ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Segmentation(Training, EvaluationProtocol):
    """Trains a head on masks, with or without the encoder, and scores it at its last epoch.

    Scores are sums over all validation images first: the intersection over union of a class is that of all its pixels,
    ignored ones left out; the mean is over the classes that have true pixels. Intervals come from resampling images.

    With several processes on GPUs BatchNorm sees the batch of all of them, on CPUs each its own share.

    Attributes:
        decode_head: ``decode_head(width, num_maps, num_classes)`` makes the head.
        layers: Blocks that it reads, from 1, -1 the last one; None: four of them, after 1/3, 1/2, 2/3 and the whole of
            the depth (in BEiT and iBOT blocks 4, 6, 8 and 12 of ViT-B).
        norm: Whether they go through the encoder's final norm.
        frozen: Whether the encoder stays as it is.
        drop_path: Stochastic-depth rate of an encoder that is trained.
        per_block: See :class:`~harmonize.evaluation.fine_tune.FineTune`.
        scale: Range of the size of training images, where 1 is the smallest that covers the encoder's.
        data: The images and masks; None: those of the bench.
    """

    decode_head: Callable[[int, int, int], nn.Module] = LinearHead
    layers: Sequence[int] | None = (-1,)
    norm: bool = True
    frozen: bool = True
    drop_path: float = 0.0
    per_block: bool = False
    scale: Sequence[float] = (0.5, 2.0)
    data: Any = field(default=None, repr=False)

    def run(self, bench: Bench) -> list[Result]:
        """Rows ``miou``, ``pixel_accuracy`` and, for every class that occurs, ``iou``.

        Raises:
            ConfigError: The data have no masks or fewer images than a batch, or the encoder has no such block.
            NonFiniteLossError: Training diverged.
        """
        masks = self._masks(bench)
        data, network = self._module(bench, masks), self._network(bench, len(masks.classes))
        fitted = fit(bench, "segmentation", network, segmentation_loss, data, self)
        layers = ", ".join(map(str, self._layers(bench.spec)))
        feature = f"layers {layers} pool=none norm={'final' if self.norm else 'none'}"
        feature = f"{'frozen' if self.frozen else 'fine-tuned'} {feature}"
        note = f"last of {self.epochs} epochs; training loss there {fitted.losses[-1]:.3f}"
        results = []
        for series, version in fitted.versions.items():
            counts = image_counts(bench, version, data, len(masks.classes))
            results += _rows(counts, masks.classes, series, feature=feature, note=note)
        return results

    def _masks(self, bench: Bench) -> SegmentationSet:
        data = self.data if self.data is not None else bench.dataset
        return data if isinstance(data, SegmentationSet) else ShapesMasks(data)

    def _module(self, bench: Bench, masks: SegmentationSet) -> SegmentationModule:
        size = bench.spec.image_size
        if bench.num_train is not None:
            masks = _Evenly(masks, bench.num_train)
        self.check_batch(len(masks.split("train")))
        if self.batch_size == world_size() * self.accumulate:
            raise ConfigError(
                f"eval.batch_size={self.batch_size} is too small: BatchNorm needs two images or more on each of "
                f"{world_size()} devices and in each of eval.accumulate={self.accumulate} micro-batches"
            )
        return SegmentationModule(
            masks,
            size,
            self.batch_size,
            num_workers=bench.data.num_workers,
            seed=bench.seed,
            augment=SegmentationTraining(size, scale=self.scale, photometric=masks.photographs),
            accumulate=self.accumulate,
            world_size=world_size(),
            rank=rank(),
        )

    def _layers(self, encoder: EncoderSpec) -> list[int]:
        """Blocks from 1."""
        if self.layers is None:
            return [max(1, round(share * encoder.depth)) for share in (1 / 3, 1 / 2, 2 / 3, 1)]
        return [resolve(FeatureSpec(layer, "patch_mean"), encoder).layer for layer in self.layers]

    def _network(self, bench: Bench, num_classes: int) -> Segmenter:
        layers = self._layers(bench.spec)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_int(bench.seed))
            head = self.decode_head(bench.spec.width, len(layers), num_classes)
        if world_size() > 1 and bench.device.type == "cuda":
            head = nn.SyncBatchNorm.convert_sync_batchnorm(head)
        if self.frozen:
            return Segmenter(FrozenTokens(bench.encoder, layers, self.norm), head)
        assert bench.trainable is not None
        encoder = bench.trainable(self.drop_path, per_block=self.per_block)
        return Segmenter(TrainedTokens(encoder, layers, self.norm), head)


def segmentation_loss(network: nn.Module, batch: SegmentationBatch, seed: int) -> Tensor:
    """Cross-entropy in the size of the mask, weighted over the heads.

    It is a mean over all pixels, of which ignored ones add nothing, as mmsegmentation's: so micro-batches and ranks,
    which ignore different numbers of them, add up to the whole batch.
    """
    total = batch.image.new_zeros(())
    for weight, scores in zip(network.head.weights, network(batch.image), strict=True):  # type: ignore[union-attr, arg-type]
        scores = F.interpolate(scores.float(), batch.mask.shape[-2:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(scores, batch.mask, ignore_index=IGNORE_INDEX, reduction="sum")
        total = total + weight * loss / batch.mask.numel()
    return total


_MOST_SCORES = 1 << 25
"""Class scores of pixels that are in memory at a time, if an image has one window; 128 MiB."""


@torch.no_grad()
def image_counts(bench: Bench, network: nn.Module, data: SegmentationModule, num_classes: int) -> Tensor:
    """Counts of pixels (M, 3, C) of the validation images, see :func:`~harmonize.functional.segmentation.pixel_counts`.

    Every rank takes part and receives all.

    Args:
        bench: How many images, and where.
        network: In eval mode.
        data: The images.
        num_classes: C.
    """
    height, width = bench.spec.image_size
    at_a_time = min(bench.batch_size, max(1, _MOST_SCORES // (num_classes * height * width)))
    loader = data.window_loader("val", evenly(len(data.dataset.split("val")), bench.num_val), at_a_time)
    counts = [torch.empty(0, 3, num_classes, dtype=torch.int64, device=bench.device)]
    index = [torch.empty(0, dtype=torch.int64, device=bench.device)]
    for batch in bench.track(loader, "segmentation, val"):
        batch = batch.apply(lambda tensor: tensor.to(bench.device))
        size = batch.image.shape[-2:]
        parts = [network(images)[0].float() for images in batch.image.split(bench.batch_size)]
        scores = F.interpolate(torch.cat(parts), size, mode="bilinear", align_corners=False)
        for merged, mask in zip(batch.merge(scores), batch.mask, strict=True):
            predicted = label_map(merged, (mask.shape[0], mask.shape[1]))
            counts.append(pixel_counts(predicted, mask, num_classes, IGNORE_INDEX)[None])
        index.append(batch.index)
    return gather_images(torch.cat(index), torch.cat(counts))[1]


def _rows(counts: Tensor, classes: Sequence[str], series: str, **row: Any) -> list[Result]:
    """The results from the counts (M, 3, C) of every image."""
    total, num = counts.sum(0).cpu(), len(counts)
    results = []
    for metric, statistic in (("miou", mean_iou), ("pixel_accuracy", pixel_accuracy)):
        low, high = bootstrap_interval(statistic, counts)
        interval = (low.item(), high.item())
        results.append(Result(metric, statistic(total).item(), num, interval=interval, series=series, **row))
    for name, value in zip(classes, intersection_over_union(total).tolist(), strict=True):
        if value == value:  # the class occurs
            results.append(Result("iou", value, num, series=", ".join(filter(None, [series, name])), **row))
    return results


@dataclass
class _Evenly:
    """A data set with at most so many training images, evenly spaced."""

    dataset: SegmentationSet
    num_train: int

    def __post_init__(self) -> None:
        self.classes, self.photographs = self.dataset.classes, self.dataset.photographs

    def split(self, name: Any) -> SegmentationSplit:
        split = self.dataset.split(name)
        return split if name != "train" or len(split) <= self.num_train else _Some(split, self.num_train)


@dataclass
class _Some:
    split: SegmentationSplit
    num: int

    def __len__(self) -> int:
        return self.num

    def prepare(self) -> None:
        if hasattr(self.split, "prepare"):
            self.split.prepare()

    def load(self, index: int) -> Any:
        return self.split.load(len(self.split) * index // self.num)

    def name(self, index: int) -> str:
        return self.split.name(len(self.split) * index // self.num)
