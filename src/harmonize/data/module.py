"""From data set and recipes to loaders of ``Batch``.

A batch is a function of (seed, epoch, indices) alone: the number of workers, the ranks, the order of work and the other
views that are built change no bit of it.
"""

from __future__ import annotations

import functools
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.utils.data
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from harmonize.data.datasets import Dataset, Split, SplitName
from harmonize.data.sampler import EpochBatchSampler, ShardedBatchSampler
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
        image_size: Side of the evaluation view, in px.
        batch_size: Images per optimiser step, over all ranks and micro-batches.
        num_workers: Worker processes per loader; 0 loads in the main process.
        seed: Seed of the run.
        eval_crop: Share of the resized side that the centre crop of the evaluation view keeps.
        accumulate: Micro-batches per optimiser step.
        world_size: Number of ranks.
        rank: This rank.

    Raises:
        ConfigError: The batch does not divide over ranks and micro-batches, or the training split is smaller than it.
    """

    def __init__(
        self,
        dataset: Dataset,
        recipes: Mapping[str, Recipe],
        required_views: Mapping[str, str],
        image_size: int,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        eval_crop: float = 0.875,
        accumulate: int = 1,
        world_size: int = 1,
        rank: int = 0,
    ):
        for view, recipe in required_views.items():
            if recipe not in recipes:
                raise ConfigError(f"views.{recipe} is needed for the view {view!r}: views has {', '.join(recipes)}")
        if batch_size < 1 or batch_size % (world_size * accumulate):
            raise ConfigError(
                f"data.batch_size={batch_size} is not possible: a multiple of {world_size * accumulate} is needed "
                f"({world_size} devices x trainer.accumulate={accumulate})"
            )
        if num_workers < 0:
            raise ConfigError(f"data.num_workers={num_workers} is not possible: 0 or more is needed")
        self.dataset, self.batch_size, self.num_workers, self.seed = dataset, batch_size, num_workers, seed
        self.accumulate, self.world_size, self.rank = accumulate, world_size, rank
        self.micro_batch = batch_size // (world_size * accumulate)
        self._recipes = {view: recipes[recipe] for view, recipe in required_views.items()}
        self._clean = Evaluation(image_size, eval_crop)
        self.num_train = len(dataset.split("train"))
        if self.num_train < batch_size:
            raise ConfigError(
                f"data.batch_size={batch_size} is too large: the training split has {self.num_train} images, and an "
                "epoch needs at least one whole batch"
            )

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, None where there are no labels."""
        return self.dataset.classes

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch; images that do not fill a batch are left out of the epoch."""
        return self.num_train // self.batch_size

    def train_loader(self, epoch: int = 0, start: int = 0) -> DataLoader:
        """Batches with the required views, shuffled anew in each epoch (``loader.batch_sampler.set_epoch``).

        Args:
            epoch: The epoch to begin with.
            start: Micro-batches of that epoch to leave out. ``len`` remains that of a whole epoch.
        """
        split = _prepared(self.dataset.split("train"))
        sampler = EpochBatchSampler(
            len(split), self.micro_batch, self.seed, self.rank, self.world_size, self.accumulate, epoch, start
        )
        return self._loader(_TrainingImages(split, self._recipes, self.seed), sampler, persistent=True)

    def val_loader(self) -> DataLoader:
        """The whole validation split as clean views, shared out over the ranks without padding.

        Unreadable images are left out, so a batch may be smaller, or even empty.
        """
        return self._evaluation_loader(self.dataset.split("val"), None, persistent=True)

    def feature_loader(self, split: SplitName, num_images: int | None = None) -> DataLoader:
        """Clean views of evenly spaced images, the same list in every epoch and run, shared out over the ranks.

        Args:
            split: ``train`` or ``val``.
            num_images: How many over all ranks; None, or more than there are: all.
        """
        source = getattr(self.dataset, "probe_split", self.dataset.split)(split)
        return self._evaluation_loader(source, num_images, persistent=False)

    def _evaluation_loader(self, split: Split, num_images: int | None, persistent: bool) -> DataLoader:
        num = len(split) if num_images is None else min(num_images, len(split))
        indices = [len(split) * i // num for i in range(num)]
        sampler = ShardedBatchSampler(indices, self.micro_batch, self.rank, self.world_size)
        return self._loader(_EvaluationImages(_prepared(split), self._clean, self.seed), sampler, persistent)

    def _loader(self, images: _Images, sampler: torch.utils.data.Sampler, persistent: bool) -> DataLoader:
        workers: dict[str, Any] = {}
        if self.num_workers:
            workers = {"num_workers": self.num_workers, "persistent_workers": persistent, "prefetch_factor": 2}
        return DataLoader(
            images,
            batch_sampler=sampler,
            collate_fn=images.collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else every new iterator would draw from torch's global generator
            **workers,
        )


class UnreadableData(ConfigError):  # noqa: N818 (as UnreadableImage)
    """No image can be read.

    The data loader raises a worker's exception again with the worker's traceback in front of the message; only the last
    line, the sentence for the user, is kept.
    """

    def __init__(self, message: str):
        super().__init__(message.splitlines()[-1].removeprefix(f"{__name__}.{type(self).__qualname__}: "))


@dataclass
class _Sample:
    key: tuple[int, int]  # (epoch, index) that was asked for: its seed comes from this
    views: dict[str, tuple[Tensor, ...]]
    image: Tensor | None
    label: int
    index: int


class _Images(torch.utils.data.Dataset):
    """A split as the data loader sees it: unreadable images are named once and skipped."""

    def __init__(self, split: Split, seed: int):
        self.split, self.seed = split, seed

    def read(self, index: int) -> tuple[Image.Image, int] | None:
        """Image and label, None if the image is unreadable."""
        try:
            return self.split.load(index)
        except OSError as error:
            _warn_once(f"skipped {self.split.name(index)}, which cannot be read: {error}")
            return None

    def read_next(self, index: int) -> tuple[int, Image.Image, int]:
        """Index, image and label of the first readable image from ``index`` on (after the last comes the first).

        Raises:
            UnreadableData: There is none, or too many in a row are unreadable.
        """
        num = min(_MOST_UNREADABLE_IN_A_ROW, len(self.split))
        for candidate in range(index, index + num):
            candidate %= len(self.split)
            if (found := self.read(candidate)) is not None:
                return candidate, *found
        _raise_unreadable(num, self.split.name(index))

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

    def __init__(self, split: Split, recipes: Mapping[str, Recipe], seed: int):
        super().__init__(split, seed)
        self.recipes = dict(recipes)

    def __getitem__(self, key: tuple[int, int]) -> _Sample:
        epoch, index = key
        used, image, label = self.read_next(index)
        views = {}
        with torch.random.fork_rng(devices=[]):
            for name, recipe in self.recipes.items():
                # Seeded by the index that was asked for: a stand-in gets its own augmentation, not a copy of one.
                torch.default_generator.manual_seed(mix_int(self.seed, epoch, index, zlib.crc32(name.encode())))
                views[name] = recipe(image)
        return _Sample(key, views, None, label, used)


class _EvaluationImages(_Images):
    """Index -> the clean view; an unreadable image is left out of its batch."""

    def __init__(self, split: Split, clean: Evaluation, seed: int):
        super().__init__(split, seed)
        self.clean = clean

    def __getitem__(self, index: int) -> _Sample | None:
        if (found := self.read(index)) is None:
            return None
        image, label = found
        return _Sample((0, index), {}, self.clean(image), label, index)

    def collate(self, samples: Sequence[_Sample | None]) -> Batch:
        """Stack the readable samples; a batch without any is empty, unless that is so for all images."""
        readable = [sample for sample in samples if sample is not None]
        if readable:
            return super().collate(readable)
        self.read_next(0)
        none = torch.empty(0, dtype=torch.int64)
        side = self.clean.crop.size
        return Batch(views={}, image=torch.empty(0, 3, *side), label=none, index=none, seed=none)


def _prepared(split: Split) -> Split:
    """The split, after its own preparations (in this process: workers may not start processes for it)."""
    if hasattr(split, "prepare"):
        split.prepare()
    return split


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _raise_unreadable(num: int, first: str) -> NoReturn:
    raise UnreadableData(
        f"data.root holds no usable images: {num} in a row, from {first} on, cannot be read (the warnings say why)"
    )
