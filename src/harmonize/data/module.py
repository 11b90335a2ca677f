"""From data set and recipes to loaders of ``Batch``.

A batch is a function of (seed, epoch, indices) alone: the number of workers, the ranks, the order of work and the other
views that are built change no bit of it.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.utils.data
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from harmonize.data.datasets import Dataset, Split, SplitName
from harmonize.data.images import WrongData
from harmonize.data.sampler import EpochBatchSampler, ShardedBatchSampler, evenly
from harmonize.data.views import Evaluation
from harmonize.functional.seeding import mix, mix_int
from harmonize.types import Batch, ConfigError

Recipe = Callable[[Image.Image], tuple[Tensor, ...]]
_MOST_UNREADABLE_IN_A_ROW = 1000


class DataModule:
    """Makes the loaders of a run.

    Args:
        dataset: The data set.
        recipes: By name, what turns an image into the tensors of a view.
        required_views: View name -> recipe name, as the objective declares them; no other view is built.
        image_size: Side of the evaluation view, or (height, width), in px.
        batch_size: Images per optimiser step, over all ranks and micro-batches.
        num_workers: Worker processes per loader; 0 loads in the main process.
        seed: Seed of the run.
        eval_crop: Share of the resized side that the centre crop of the evaluation view keeps.
        accumulate: Micro-batches per optimiser step.
        world_size: Number of ranks.
        rank: This rank.
        eval_interpolation: Of the evaluation view, ``bicubic`` or ``bilinear``.
        labelled: Train on the labelled images, which is ``probe_split`` where the data set has one.
        train_indices: Positions of the images of the training split to train on; None: all. The others are not even
            stand-ins for unreadable ones, so they can be held out.

    Raises:
        ConfigError: The batch does not divide over ranks and micro-batches, the images to train on are fewer than it,
            there are no labels although they are needed, or ``train_indices`` are not different positions of the split.
    """

    def __init__(
        self,
        dataset: Dataset,
        recipes: Mapping[str, Recipe],
        required_views: Mapping[str, str],
        image_size: int | tuple[int, int],
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        eval_crop: float = 0.875,
        accumulate: int = 1,
        world_size: int = 1,
        rank: int = 0,
        eval_interpolation: str = "bicubic",
        labelled: bool = False,
        train_indices: Sequence[int] | None = None,
    ):
        for view, recipe in required_views.items():
            if recipe not in recipes:
                raise ConfigError(f"views.{recipe} is needed for the view {view!r}: views has {', '.join(recipes)}")
        check_num_workers(num_workers)
        self.dataset, self.batch_size, self.num_workers, self.seed = dataset, batch_size, num_workers, seed
        self.accumulate, self.world_size, self.rank = accumulate, world_size, rank
        self.micro_batch = micro_batch_size(batch_size, world_size, accumulate)
        self._recipes = {view: recipes[recipe] for view, recipe in required_views.items()}
        self._clean_view = partial(Evaluation, image_size, interpolation=eval_interpolation)
        self._clean = self._clean_view(eval_crop)
        self._sources: dict[tuple[str, SplitName], _Source] = {}
        if labelled and dataset.classes is None:
            raise ConfigError("data has no labels, or one class: training with labels needs two classes or more")
        self._method = self._labelled_method if labelled else "split"
        num_images = len(getattr(dataset, self._method)("train"))
        self._positions = None if train_indices is None else _sorted_positions(train_indices, num_images)
        self.num_train = num_images if self._positions is None else len(self._positions)
        check_whole_batch(batch_size, self.num_train)

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, None where there are no labels."""
        return self.dataset.classes

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch; images that do not fill a batch are left out of the epoch."""
        return self.num_train // self.batch_size

    def check_readable(self, probes: bool) -> None:
        """Read the first readable image of train, and of what the probes look at, without naming those before it.

        Raises:
            UnreadableData: There is none.
        """
        train = self._source("train", self._method)
        train.next_readable(0, train.split.load, self._positions)
        for name in ("train", "val") if probes else ():
            source = self._probe_source(name)
            source.next_readable(0, source.split.load)

    def train_loader(self, epoch: int = 0, start: int = 0) -> DataLoader:
        """Batches with the required views, shuffled anew in each epoch (``loader.batch_sampler.set_epoch``).

        Args:
            epoch: The epoch to begin with.
            start: Micro-batches of that epoch to leave out. ``len`` remains that of a whole epoch.
        """
        source = self._source("train", self._method)
        sampler = EpochBatchSampler(
            self.num_train,
            self.micro_batch,
            self.seed,
            self.rank,
            self.world_size,
            self.accumulate,
            epoch,
            start,
            self._positions,
        )
        images = _TrainingImages(source, self._recipes, self.seed, self._positions)
        return make_loader(images, sampler, images.collate, self.num_workers, persistent=True)

    def spread(self, split: SplitName, num_images: int | None = None) -> list[int]:
        """Positions of evenly spaced images of ``train`` or ``val``, the same list in every epoch and run.

        Args:
            split: ``train`` or ``val``.
            num_images: How many; None, or more than there are: all.
        """
        return evenly(len(self._probe_source(split).split), num_images)

    def names(self, split: SplitName, positions: Iterable[int]) -> list[str]:
        """What warnings call these images of ``train`` or ``val``: paths, or descriptions."""
        source = self._probe_source(split)
        return [source.split.name(position) for position in positions]

    def feature_loader(
        self, split: SplitName, images: int | Sequence[int] | None = None, batch_size: int | None = None
    ) -> DataLoader:
        """Clean views of a fixed list of images, shared out over the ranks.

        None is repeated to fill a batch. Unreadable images are left out, so a batch may be smaller, or even empty.

        Args:
            split: ``train`` or ``val``.
            images: How many over all ranks, evenly spaced (see :meth:`spread`), or their positions.
            batch_size: Images at a time on each rank; None: as many as in training.
        """
        indices = self.spread(split, images) if images is None or isinstance(images, int) else images
        return self._clean_loader(self._probe_source(split), self._clean, indices, batch_size)

    def loader_of(
        self,
        split: Split,
        batch_size: int | None = None,
        indices: Sequence[int] | None = None,
        eval_crop: float | None = None,
    ) -> DataLoader:
        """Clean views of any images, such as a robustness set, shared out over the ranks as in :meth:`feature_loader`.

        Args:
            split: The images.
            batch_size: Images at a time on each rank; None: as many as in training.
            indices: Positions of the images to look at; None: all.
            eval_crop: Share of the resized side that the centre crop keeps, where it should differ from the usual one.
        """
        clean = self._clean if eval_crop is None else self._clean_view(eval_crop)
        return self._clean_loader(_Source(split), clean, range(len(split)) if indices is None else indices, batch_size)

    def _clean_loader(
        self, source: _Source, clean: Evaluation, indices: Sequence[int], batch_size: int | None
    ) -> DataLoader:
        sampler = ShardedBatchSampler(indices, batch_size or self.micro_batch, self.rank, self.world_size)
        images = _EvaluationImages(source, clean, self.seed)
        return make_loader(images, sampler, images.collate, self.num_workers, persistent=False)

    def by_class(self, split: SplitName, num_classes: int, per_class: int, num_read: int = 256) -> list[int]:
        """Positions of the first images of the first classes, among evenly spaced ones; fewer if there are no more."""
        source = self._probe_source(split)
        found: dict[int, list[int]] = {}
        for index in self.spread(split, num_read):
            try:
                _, label = source.read(index)
            except OSError:
                continue
            if label >= 0:
                found.setdefault(label, []).append(index)
        full = sorted(label for label in found if len(found[label]) >= per_class)[:num_classes]
        return sorted(index for label in full for index in found[label][:per_class])

    @property
    def _labelled_method(self) -> str:
        return "probe_split" if hasattr(self.dataset, "probe_split") else "split"

    def _probe_source(self, name: SplitName) -> _Source:
        return self._source(name, self._labelled_method)

    def _source(self, name: SplitName, method: str) -> _Source:
        """One for all loaders of a split, so that they know which images have been named."""
        if (method, name) not in self._sources:
            self._sources[method, name] = _Source(getattr(self.dataset, method)(name))
        return self._sources[method, name]


def micro_batch_size(batch_size: int, world_size: int, accumulate: int) -> int:
    """Images per rank and micro-batch.

    Raises:
        ConfigError: The batch does not divide over ranks and micro-batches.
    """
    if batch_size < 1 or batch_size % (world_size * accumulate):
        raise ConfigError(
            f"data.batch_size={batch_size} is not possible: a multiple of {world_size * accumulate} is needed "
            f"({world_size} devices x trainer.accumulate={accumulate})"
        )
    return batch_size // (world_size * accumulate)


def check_num_workers(num_workers: int) -> None:
    """Raise a sentence if the number of workers is negative."""
    if num_workers < 0:
        raise ConfigError(f"data.num_workers={num_workers} is not possible: 0 or more is needed")


def check_whole_batch(batch_size: int, num_train: int) -> None:
    """Raise a sentence if there are fewer training images than a batch needs."""
    if num_train < batch_size:
        raise ConfigError(
            f"data.batch_size={batch_size} is too large: the training split has {num_train} images, and an "
            "epoch needs at least one whole batch"
        )


def make_loader(
    images: torch.utils.data.Dataset,
    sampler: torch.utils.data.Sampler,
    collate: Callable[[Any], Any],
    num_workers: int,
    persistent: bool,
) -> DataLoader:
    """A loader that draws no number from torch's global generator.

    Args:
        images: What the keys of the sampler are looked up in.
        sampler: Yields the keys of a batch.
        collate: Makes a batch of what was looked up.
        num_workers: Worker processes; 0 loads in the main process.
        persistent: Whether the workers outlive an epoch.
    """
    workers: dict[str, Any] = {}
    if num_workers:
        workers = {"num_workers": num_workers, "persistent_workers": persistent, "prefetch_factor": 2}
    return DataLoader(
        images,
        batch_sampler=sampler,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else every new iterator would draw from torch's global generator
        **workers,
    )


def _sorted_positions(indices: Sequence[int], num_images: int) -> Tensor:
    positions = torch.tensor(sorted(indices), dtype=torch.int64)
    if len(positions) == 0 or positions[0] < 0 or positions[-1] >= num_images or len(positions.unique()) < len(indices):
        raise ConfigError(
            f"train_indices is not possible: different positions from 0 to {num_images - 1} are needed, at least one"
        )
    return positions


class UnreadableData(WrongData):
    """No image can be read."""


class _Source:
    """A prepared split whose unreadable images are each named once in a run, by the first worker to meet them.

    Every validation starts new workers, hence the memory that all processes share.
    """

    def __init__(self, split: Split):
        if hasattr(split, "prepare"):  # in this process: workers may not start processes for it
            split.prepare()
        self.split = split
        self.named = torch.zeros(len(split), dtype=torch.bool).share_memory_()

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Image and label.

        Raises:
            OSError: The image is unreadable; the first time a warning says so.
        """
        try:
            return self.split.load(index)
        except OSError as error:
            if not self.named[index]:
                self.named[index] = True
                warnings.warn(f"skipped {self.split.name(index)}, which cannot be read: {error}", stacklevel=1)
            raise

    def next_readable(
        self,
        index: int,
        read: Callable[[int], tuple[Image.Image, int]] | None = None,
        positions: Tensor | None = None,
    ) -> tuple[int, Image.Image, int]:
        """Index, image and label of the first readable image from ``index`` on (after the last comes the first).

        Args:
            index: Where to begin.
            read: How to read; None: :meth:`read`.
            positions: Sorted; the only images to choose from. None: all.

        Raises:
            UnreadableData: There is none, or too many in a row are unreadable.
        """
        among = len(self.split) if positions is None else len(positions)
        first = index if positions is None else int(torch.searchsorted(positions, index))
        num = min(_MOST_UNREADABLE_IN_A_ROW, among)
        reason = ""
        for place in range(first, first + num):
            candidate = place % among if positions is None else int(positions[place % among])
            try:
                return candidate, *(read or self.read)(candidate)
            except OSError as error:
                reason = reason or f"{self.split.name(candidate)}: {error}".partition("\n")[0]
        raise UnreadableData(f"data.root holds no usable images: {num} in a row cannot be read, from {reason}")


@dataclass
class _Sample:
    key: tuple[int, int]  # (epoch, index) that was asked for: its seed comes from this
    views: dict[str, tuple[Tensor, ...]]
    image: Tensor | None
    label: int
    index: int


class _Images(torch.utils.data.Dataset):
    """A split as the data loader sees it."""

    def __init__(self, source: _Source, seed: int):
        self.source, self.seed = source, seed

    def collate(self, samples: Sequence[_Sample]) -> Batch:
        """Stack samples into a batch."""
        images = [sample.image for sample in samples if sample.image is not None]
        return Batch(
            views={
                name: tuple(torch.stack(view) for view in zip(*(sample.views[name] for sample in samples), strict=True))
                for name in samples[0].views
            },
            image=torch.stack(images) if images else None,
            label=torch.tensor([sample.label for sample in samples]),
            index=torch.tensor([sample.index for sample in samples]),
            seed=mix(self.seed, *torch.tensor([sample.key for sample in samples]).unbind(1)),
        )


class _TrainingImages(_Images):
    """(epoch, index) -> the required views. The next readable image stands in for one that is not."""

    def __init__(self, source: _Source, recipes: Mapping[str, Recipe], seed: int, positions: Tensor | None):
        super().__init__(source, seed)
        self.recipes, self.positions = dict(recipes), positions

    def __getitem__(self, key: tuple[int, int]) -> _Sample:
        epoch, index = key
        used, image, label = self.source.next_readable(index, positions=self.positions)
        views = {}
        with torch.random.fork_rng(devices=[]):
            for name, recipe in self.recipes.items():
                # Seeded by the index that was asked for: a stand-in gets its own augmentation, not a copy of one.
                torch.default_generator.manual_seed(mix_int(self.seed, epoch, index, zlib.crc32(name.encode())))
                views[name] = recipe(image)
        return _Sample(key, views, None, label, used)


class _EvaluationImages(_Images):
    """Index -> the clean view; an unreadable image is left out of its batch."""

    def __init__(self, source: _Source, clean: Evaluation, seed: int):
        super().__init__(source, seed)
        self.clean = clean

    def __getitem__(self, index: int) -> _Sample | None:
        try:
            image, label = self.source.read(index)
        except OSError:
            return None
        return _Sample((0, index), {}, self.clean(image), label, index)

    def collate(self, samples: Sequence[_Sample | None]) -> Batch:
        """Stack the readable samples; a batch without any is empty, unless that is so for all images."""
        readable = [sample for sample in samples if sample is not None]
        if readable:
            return super().collate(readable)
        self.source.next_readable(0)
        none = torch.empty(0, dtype=torch.int64)
        side = self.clean.crop.size
        return Batch(views={}, image=torch.empty(0, 3, *side), label=none, index=none, seed=none)
