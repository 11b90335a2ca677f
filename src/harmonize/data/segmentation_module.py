"""From a data set with masks to loaders of ``SegmentationBatch`` and ``WindowBatch``.

As in ``module.py``, a batch is a function of (seed, epoch, indices) alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.utils.data
from torch import Tensor
from torch.utils.data import DataLoader

from harmonize.data.datasets import SplitName
from harmonize.data.module import check_num_workers, check_whole_batch, make_loader, micro_batch_size
from harmonize.data.sampler import EpochBatchSampler, ShardedBatchSampler
from harmonize.data.segmentation import SegmentationSet, SegmentationSplit
from harmonize.data.segmentation_views import SegmentationTraining, SlidingWindows, Windows
from harmonize.functional.seeding import mix, mix_int

_PURPOSE = zlib.crc32(b"segmentation")


@dataclass
class SegmentationBatch:
    """A training batch.

    Attributes:
        image: (B, 3, h, w), normalised.
        mask: (B, h, w) int64, classes or ``IGNORE_INDEX``.
        index: (B,) int64, position of each image in its split.
        seed: (B,) int64, one number per image, a function of (run seed, epoch, index) alone.
    """

    image: Tensor
    mask: Tensor
    index: Tensor
    seed: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def apply(self, function: Callable[[Tensor], Tensor]) -> SegmentationBatch:
        """The batch with ``function`` applied to every tensor."""
        return SegmentationBatch(*map(function, (self.image, self.mask, self.index, self.seed)))

    def pin_memory(self) -> SegmentationBatch:
        """Called by the data loader when it pins memory."""
        return self.apply(lambda tensor: tensor.pin_memory())


@dataclass
class WindowBatch:
    """Whole images for scoring, in windows.

    Attributes:
        image: (n, 3, h, w), the windows of all images, one image after the other.
        windows: Where they belong, one entry per image.
        mask: Masks (H, W) int64 in the images' own sizes.
        index: (B,) int64, position of each image in its split.
    """

    image: Tensor
    windows: list[Windows]
    mask: list[Tensor]
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def merge(self, logits: Tensor) -> list[Tensor]:
        """Logits (n, C, h, w) of the windows -> per image (C, height, width), the mean where windows overlap."""
        parts = logits.split([len(windows) for windows in self.windows])
        return [windows.merge(part) for windows, part in zip(self.windows, parts, strict=True)]

    def apply(self, function: Callable[[Tensor], Tensor]) -> WindowBatch:
        """The batch with ``function`` applied to images, masks and positions."""
        return replace(
            self, image=function(self.image), mask=[function(mask) for mask in self.mask], index=function(self.index)
        )

    def pin_memory(self) -> WindowBatch:
        """Called by the data loader when it pins memory."""
        return self.apply(lambda tensor: tensor.pin_memory())


class SegmentationModule:
    """Makes the loaders of a segmentation run.

    Args:
        dataset: The data set.
        image_size: Side of what the network sees, or (height, width), in px.
        batch_size: Images per optimiser step, over all ranks and micro-batches.
        num_workers: Worker processes per loader; 0 loads in the main process.
        seed: Seed of the run.
        augment: What makes views of training images; None: the official augmentation in this size, with colour
            distortion for photographs only.
        windows: What cuts images for scoring; None: the official windows in this size.
        accumulate: Micro-batches per optimiser step.
        world_size: Number of ranks.
        rank: This rank.

    Raises:
        ConfigError: The batch does not divide over ranks and micro-batches, the training split is smaller than it, or
            files of the training split are missing.
    """

    def __init__(
        self,
        dataset: SegmentationSet,
        image_size: int | tuple[int, int],
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        augment: SegmentationTraining | None = None,
        windows: SlidingWindows | None = None,
        accumulate: int = 1,
        world_size: int = 1,
        rank: int = 0,
    ):
        check_num_workers(num_workers)
        self.dataset, self.batch_size, self.num_workers, self.seed = dataset, batch_size, num_workers, seed
        self.accumulate, self.world_size, self.rank = accumulate, world_size, rank
        self.micro_batch = micro_batch_size(batch_size, world_size, accumulate)
        self._augment = augment or SegmentationTraining(image_size, photometric=dataset.photographs)
        self._windows = windows or SlidingWindows(image_size)
        self.num_train = len(dataset.split("train"))
        check_whole_batch(batch_size, self.num_train)

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return self.dataset.classes

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch; images that do not fill a batch are left out of the epoch."""
        return self.num_train // self.batch_size

    def train_loader(self, epoch: int = 0, start: int = 0) -> DataLoader:
        """``SegmentationBatch``es, shuffled anew in each epoch (``loader.batch_sampler.set_epoch``).

        Args:
            epoch: The epoch to begin with.
            start: Micro-batches of that epoch to leave out. ``len`` remains that of a whole epoch.
        """
        sampler = EpochBatchSampler(
            self.num_train, self.micro_batch, self.seed, self.rank, self.world_size, self.accumulate, epoch, start
        )
        images = _TrainingMasks(self._split("train"), self._augment, self.seed)
        return make_loader(images, sampler, images.collate, self.num_workers, persistent=True)

    def window_loader(
        self, split: SplitName = "val", indices: Sequence[int] | None = None, batch_size: int = 1
    ) -> DataLoader:
        """``WindowBatch``es, shared out over the ranks: no image is repeated, none is left out.

        Args:
            split: ``train`` or ``val``.
            indices: Positions of the images; None: all.
            batch_size: Images at a time on each rank; each brings one window or more.
        """
        images = _Cut(self._split(split), self._windows)
        sampler = ShardedBatchSampler(
            range(len(images.split)) if indices is None else indices, batch_size, self.rank, self.world_size
        )
        return make_loader(images, sampler, images.collate, self.num_workers, persistent=False)

    def _split(self, name: SplitName) -> SegmentationSplit:
        split = self.dataset.split(name)
        if hasattr(split, "prepare"):  # in this process: workers may not start processes for it
            split.prepare()
        return split


class _TrainingMasks(torch.utils.data.Dataset):
    """(epoch, index) -> view and mask."""

    def __init__(self, split: SegmentationSplit, augment: SegmentationTraining, seed: int):
        self.split, self.augment, self.seed = split, augment, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[tuple[int, int], Tensor, Tensor]:
        image, mask = self.split.load(key[1])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_int(self.seed, *key, _PURPOSE))
            return key, *self.augment(image, mask)

    def collate(self, samples: Sequence[tuple[tuple[int, int], Tensor, Tensor]]) -> SegmentationBatch:
        keys, images, masks = zip(*samples, strict=True)
        epoch, index = torch.tensor(keys).unbind(1)
        return SegmentationBatch(torch.stack(images), torch.stack(masks), index, mix(self.seed, epoch, index))


class _Cut(torch.utils.data.Dataset):
    """Index -> windows and mask."""

    def __init__(self, split: SegmentationSplit, windows: SlidingWindows):
        self.split, self.windows = split, windows

    def __getitem__(self, index: int) -> tuple[int, Windows, Tensor]:
        image, mask = self.split.load(index)
        return index, self.windows(image), mask

    def collate(self, samples: Sequence[tuple[int, Windows, Tensor]]) -> WindowBatch:
        indices, windows, masks = zip(*samples, strict=True)
        image = torch.cat([cut.image for cut in windows])
        return WindowBatch(image, [cut.without_images() for cut in windows], list(masks), torch.tensor(indices))
