"""From data set and recipes to loaders of ``Batch``, or of ``RawBatch``, which becomes one on the device.

A batch is a function of (seed, epoch, indices) alone: the number of workers, the ranks, the order of work and the other
views that are built change no bit of it, nor does it matter where it is augmented.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.utils.data
from torch import Tensor
from torch.utils.data import DataLoader

from harmonize.data.batches import (
    DrawnRecipe,
    EvaluationArrays,
    EvaluationImages,
    RawBatch,
    Recipe,
    Source,
    TrainingArrays,
    TrainingImages,
)
from harmonize.data.datasets import Dataset, Split, SplitName
from harmonize.data.sampler import EpochBatchSampler, ShardedBatchSampler, evenly
from harmonize.data.views import Evaluation
from harmonize.types import Batch, ConfigError


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
        augment: Where training images are augmented: by Pillow in the ``workers``, by tensor operations on the
            ``device`` (loaders then yield ``RawBatch``), or ``auto``: on the device if that is a GPU, or if whole
            batches can be copied without Pillow; in the workers if a recipe does not say what it draws.
        on_gpu: Whether the device is a GPU.

    Raises:
        ConfigError: The batch does not divide over ranks and micro-batches, the images to train on are fewer than it,
            there are no labels although they are needed, ``train_indices`` are not different positions of the split,
            or a recipe cannot be applied where ``augment`` says.
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
        augment: str = "auto",
        on_gpu: bool = False,
    ):
        for view, recipe in required_views.items():
            if recipe not in recipes:
                raise ConfigError(f"views.{recipe} is needed for the view {view!r}: views has {', '.join(recipes)}")
        check_num_workers(num_workers)
        self.dataset, self.batch_size, self.num_workers, self.seed = dataset, batch_size, num_workers, seed
        self.accumulate, self.world_size, self.rank = accumulate, world_size, rank
        self.micro_batch = micro_batch_size(batch_size, world_size, accumulate)
        self._recipes = {view: recipes[recipe] for view, recipe in required_views.items()}
        self._drawn = {view: recipe for view, recipe in self._recipes.items() if isinstance(recipe, DrawnRecipe)}
        self._augment, self._on_gpu = _check_augment(augment, recipes, required_views), on_gpu
        self._clean_view = partial(Evaluation, image_size, interpolation=eval_interpolation)
        self._clean = self._clean_view(eval_crop)
        self._sources: dict[tuple[str, SplitName], Source] = {}
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

    @property
    def augments_on_device(self) -> bool:
        """Whether training images are augmented as tensors on the device, rather than by Pillow in the workers."""
        if len(self._drawn) < len(self._recipes):
            return False
        in_array = self._source("train", self._method).array is not None
        return self._augment == "device" or (self._augment == "auto" and (self._on_gpu or in_array))

    def train_loader(self, epoch: int = 0, start: int = 0) -> DataLoader:
        """Batches with the required views, shuffled anew in each epoch (``loader.batch_sampler.set_epoch``).

        They are ``RawBatch``es where the device augments. There are no workers where images need only be copied.

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
            getattr(source.split, "epoch_order", None),
        )
        if self.augments_on_device and source.array is not None:
            arrays = TrainingArrays(source.array, self._drawn, self.seed)
            return make_loader(arrays, sampler, _whole, 0, persistent=False)
        images = TrainingImages(source, self._recipes, self.seed, self._positions, raw=self.augments_on_device)
        return make_loader(images, sampler, _whole, self.num_workers, persistent=True)

    def spread(self, split: SplitName, num_images: int | None = None) -> list[int]:
        """Positions of evenly spaced images of ``train`` or ``val``, the same list in every epoch and run.

        Args:
            split: ``train`` or ``val``.
            num_images: How many; None, or more than there are: all.
        """
        images = self._probe_source(split).split
        return images.spread(num_images) if hasattr(images, "spread") else evenly(len(images), num_images)

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
        return self._clean_loader(Source(split), clean, range(len(split)) if indices is None else indices, batch_size)

    def _clean_loader(
        self, source: Source, clean: Evaluation, indices: Sequence[int], batch_size: int | None
    ) -> DataLoader:
        sampler = ShardedBatchSampler(indices, batch_size or self.micro_batch, self.rank, self.world_size)
        if source.array is not None and len(source.split):
            height, width = source.array.pixels(np.array([0])).shape[1:3]
            if clean.is_whole(height, width):
                return make_loader(EvaluationArrays(source.array, self.seed), sampler, _whole, 0, persistent=False)
        images = EvaluationImages(source, clean, self.seed)
        return make_loader(images, sampler, _whole, self.num_workers, persistent=False)

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

    def _probe_source(self, name: SplitName) -> Source:
        return self._source(name, self._labelled_method)

    def _source(self, name: SplitName, method: str) -> Source:
        """One for all loaders of a split, so that they know which images have been named."""
        if (method, name) not in self._sources:
            self._sources[method, name] = Source(getattr(self.dataset, method)(name))
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


def _whole(batch: Batch | RawBatch) -> Batch | RawBatch:
    """Stands for ``collate_fn``: what is looked up is a batch already."""
    return batch


def _check_augment(augment: str, recipes: Mapping[str, Recipe], required_views: Mapping[str, str]) -> str:
    if augment not in ("auto", "workers", "device"):
        raise ConfigError(f"data.augment={augment} is not known: auto, workers or device is needed")
    not_drawn = [recipe for recipe in required_views.values() if not isinstance(recipes[recipe], DrawnRecipe)]
    if augment == "device" and not_drawn:
        raise ConfigError(
            f"data.augment=device is not possible: the recipe {not_drawn[0]} does not say what it draws (it has no "
            "method draw); auto or workers is needed"
        )
    return augment


def _sorted_positions(indices: Sequence[int], num_images: int) -> Tensor:
    positions = torch.tensor(sorted(indices), dtype=torch.int64)
    if len(positions) == 0 or positions[0] < 0 or positions[-1] >= num_images or len(positions.unique()) < len(indices):
        raise ConfigError(
            f"train_indices is not possible: different positions from 0 to {num_images - 1} are needed, at least one"
        )
    return positions
