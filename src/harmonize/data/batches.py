"""What the data loader looks up: keys of a batch in, the whole batch out, in a worker process or in the main one."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.utils.data
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from harmonize.data.augmentation import Augmentation
from harmonize.data.batched import augment
from harmonize.data.datasets import ArraySplit, Split
from harmonize.data.images import WrongData
from harmonize.data.views import Evaluation, augment_image, crop_image, normalise
from harmonize.functional.seeding import mix, mix_int
from harmonize.types import Batch

_MOST_UNREADABLE_IN_A_ROW = 1000
_PIXELS_AT_ONCE = 32_000_000  # decoded images that a worker holds at any time, beside the largest one


@runtime_checkable
class DrawnRecipe(Protocol):
    """A recipe whose parameters are drawn for a batch at a time; see ``views.py``."""

    def draw(self, seed: Tensor, height: Tensor, width: Tensor) -> tuple[Augmentation, ...]:
        """Parameters of each view, a function of each image's seed (B,) and size (B,) in px alone."""


Recipe = DrawnRecipe | Callable[[Image.Image], tuple[Tensor, ...]]
"""What makes views: parameters that are drawn, or any function of the image and torch's global generator."""


class RawBatch:
    """A training batch whose views are still to be made, on the device.

    It is no dataclass and no container on purpose: Lightning moves it by its :meth:`to`.

    Attributes:
        pixels: (B, 3, h, w) uint8, the images that all views are cropped from; or by view name what has been cropped
            for each, (B, 3, S, S) uint8.
        augmentations: By view name the parameters of each view, on the CPU.
        label: (B,) int64, as in ``Batch``.
        index: (B,) int64, as in ``Batch``.
        seed: (B,) int64, as in ``Batch``.
    """

    def __init__(
        self,
        pixels: Tensor | Mapping[str, tuple[Tensor, ...]],
        augmentations: Mapping[str, tuple[Augmentation, ...]],
        label: Tensor,
        index: Tensor,
        seed: Tensor,
    ):
        self.pixels, self.augmentations = pixels, augmentations
        self.label, self.index, self.seed = label, index, seed

    def __len__(self) -> int:
        return len(self.index)

    def apply(self, function: Callable[[Tensor], Tensor]) -> RawBatch:
        """The batch with ``function`` applied to every tensor but the parameters of the views."""
        if isinstance(self.pixels, Tensor):
            pixels: Tensor | Mapping[str, tuple[Tensor, ...]] = function(self.pixels)
        else:
            pixels = {name: tuple(map(function, views)) for name, views in self.pixels.items()}
        rest = (function(tensor) for tensor in (self.label, self.index, self.seed))
        return RawBatch(pixels, self.augmentations, *rest)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> RawBatch:
        """The batch on a device."""
        return self.apply(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> RawBatch:
        """Called by the data loader when it pins memory."""
        return self.apply(lambda tensor: tensor.pin_memory())

    def augment(self) -> Batch:
        """The batch that objectives work with, on the device of the pixels."""
        views = {}
        for name, augmentations in self.augmentations.items():
            pixels = self.pixels
            sources = [pixels] * len(augmentations) if isinstance(pixels, Tensor) else pixels[name]
            views[name] = tuple(map(augment, sources, augmentations))
        return Batch(views=views, label=self.label, index=self.index, seed=self.seed)


class UnreadableData(WrongData):
    """No image can be read."""


class Source:
    """A prepared split whose unreadable images are each named once in a run, by the first worker to meet them.

    Every validation starts new workers, hence the memory that all processes share.
    """

    def __init__(self, split: Split):
        if hasattr(split, "prepare"):  # in this process: workers may not start processes for it
            split.prepare()
        self.split = split
        self.named = torch.zeros(len(split), dtype=torch.bool).share_memory_()

    @property
    def array(self) -> ArraySplit | None:
        """The split, if many of its images can be copied at once."""
        split = self.split
        return split if isinstance(split, ArraySplit) and getattr(split, "in_memory", True) else None

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


class TrainingImages(torch.utils.data.Dataset):
    """(epoch, index) of each image of a batch -> the batch. The next readable image stands in for one that is not.

    Args:
        source: The images.
        recipes: View name -> recipe.
        seed: Seed of the run.
        positions: The only images that may stand in; None: all.
        raw: Only crop here, and leave the rest to the device; all recipes must be drawn.
    """

    def __init__(
        self, source: Source, recipes: Mapping[str, Recipe], seed: int, positions: Tensor | None, raw: bool = False
    ):
        self.source, self.recipes, self.seed, self.positions, self.raw = source, dict(recipes), seed, positions, raw

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch | RawBatch:
        parts, used, labels = [], [], []
        images: list[Image.Image] = []
        for _, asked in keys:
            index, image, label = self.source.next_readable(asked, positions=self.positions)
            images.append(image)
            used.append(index)
            labels.append(label)
            # A batch of large photographs would not fit into memory; rows do not depend on how they are cut.
            done = len(used) == len(keys)
            if done or sum(image.width * image.height for image in images) >= _PIXELS_AT_ONCE:
                parts.append(self._views(keys[len(used) - len(images) : len(used)], images))
                images = []
        pixels = {name: _join(torch.cat, [part[0][name] for part in parts]) for name in self.recipes}
        rest = torch.tensor(labels), torch.tensor(used), image_seeds(self.seed, keys)
        if not self.raw:
            return Batch(pixels, *rest)
        drawn = {name: _join(Augmentation.join, [part[1][name] for part in parts]) for name in self.recipes}
        return RawBatch(pixels, drawn, *rest)

    def _views(
        self, keys: Sequence[tuple[int, int]], images: Sequence[Image.Image]
    ) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, tuple[Augmentation, ...]]]:
        height, width = torch.tensor([(image.height, image.width) for image in images]).unbind(1)
        views, left = {}, {}
        for name, recipe in self.recipes.items():
            if not isinstance(recipe, DrawnRecipe):
                views[name] = self._seeded(name, recipe, keys, images)
                continue
            make = _cut if self.raw else augment_image
            # Seeded by the index that was asked for: a stand-in gets its own augmentation, not a copy of one.
            augmentations = recipe.draw(image_seeds(self.seed, keys, name), height, width)
            views[name] = tuple(
                torch.stack([make(image, augmentation, row) for row, image in enumerate(images)])
                for augmentation in augmentations
            )
            left[name] = tuple(augmentation.without_crop() for augmentation in augmentations)
        return views, left

    def _seeded(
        self,
        name: str,
        recipe: Callable[[Image.Image], tuple[Tensor, ...]],
        keys: Sequence[tuple[int, int]],
        images: Sequence[Image.Image],
    ) -> tuple[Tensor, ...]:
        """The views of a recipe that draws from torch's global generator."""
        views = []
        with torch.random.fork_rng(devices=[]):
            for key, image in zip(keys, images, strict=True):
                torch.default_generator.manual_seed(mix_int(self.seed, *key, zlib.crc32(name.encode())))
                views.append(recipe(image))
        return _join(torch.stack, views)


class TrainingArrays(torch.utils.data.Dataset):
    """(epoch, index) of each image of a batch -> the batch, which is copied as it is and cropped on the device.

    Args:
        split: The images.
        recipes: View name -> recipe.
        seed: Seed of the run.
    """

    def __init__(self, split: ArraySplit, recipes: Mapping[str, DrawnRecipe], seed: int):
        self.split, self.recipes, self.seed = split, dict(recipes), seed

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> RawBatch:
        indices = np.array([index for _, index in keys])
        pixels = _gather(self.split, indices)
        height, width = (torch.full((len(keys),), side) for side in pixels.shape[2:])
        drawn = {
            name: recipe.draw(image_seeds(self.seed, keys, name), height, width)
            for name, recipe in self.recipes.items()
        }
        label = torch.from_numpy(self.split.labels[indices])
        return RawBatch(pixels, drawn, label, torch.from_numpy(indices), image_seeds(self.seed, keys))


class EvaluationImages(torch.utils.data.Dataset):
    """Positions of the images of a batch -> their clean views; unreadable images are left out.

    Args:
        source: The images.
        clean: What makes the views.
        seed: Seed of the run.
    """

    def __init__(self, source: Source, clean: Evaluation, seed: int):
        self.source, self.clean, self.seed = source, clean, seed

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        views, labels, used = [], [], []
        for index in indices:
            try:
                image, label = self.source.read(index)
            except OSError:
                continue
            views.append(self.clean(image))
            labels.append(label)
            used.append(index)
        if not used:
            self.source.next_readable(0)  # a batch without any is empty, unless that is so for all images
        stacked = torch.stack(views) if views else torch.empty(0, 3, *self.clean.crop.size)
        return _clean_batch(self.seed, stacked, torch.tensor(labels, dtype=torch.int64), used)


class EvaluationArrays(torch.utils.data.Dataset):
    """Positions of the images of a batch -> the images, normalised; they have the size of the clean view already.

    Args:
        split: The images.
        seed: Seed of the run.
    """

    def __init__(self, split: ArraySplit, seed: int):
        self.split, self.seed = split, seed

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = np.array(indices)
        image, label = normalise(_gather(self.split, chosen)), torch.from_numpy(self.split.labels[chosen])
        return _clean_batch(self.seed, image, label, indices)


def image_seeds(seed: int, keys: Sequence[tuple[int, int]], view: str | None = None) -> Tensor:
    """(B,) int64, one number per (epoch, index), and per view if its name is given."""
    words = () if view is None else (zlib.crc32(view.encode()),)
    return mix(seed, *torch.tensor(keys, dtype=torch.int64).reshape(-1, 2).unbind(1), *words)


def _clean_batch(seed: int, image: Tensor, label: Tensor, indices: Sequence[int]) -> Batch:
    keys = [(0, index) for index in indices]
    index = torch.tensor(indices, dtype=torch.int64)
    return Batch(views={}, image=image, label=label, index=index, seed=image_seeds(seed, keys))


def _gather(split: ArraySplit, indices: np.ndarray) -> Tensor:
    """(B, 3, h, w) uint8, the colour channels still last in memory."""
    return torch.from_numpy(np.require(split.pixels(indices), np.uint8, "W")).permute(0, 3, 1, 2)


def _cut(image: Image.Image, augmentation: Augmentation, row: int) -> Tensor:
    return F.pil_to_tensor(crop_image(image, augmentation, row))


def _join(how: Callable[[Any], Any], parts: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """One of each view from the views of several parts."""
    return tuple(how(view) for view in zip(*parts, strict=True))
