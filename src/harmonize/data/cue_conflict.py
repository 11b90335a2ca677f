"""Images whose shape says one class and whose texture another, and how a head's classes answer to theirs.

``CueConflict`` is a folder in the layout of model-vs-human, ``ConflictingShapes`` the embedded data set's own split.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harmonize.data.images import MAX_PIXELS, existing_folder, read_image, walk_images
from harmonize.data.shapes import SHAPES, TEXTURES, Shapes
from harmonize.types import ConfigError


@runtime_checkable
class ConflictImages(Protocol):
    """Images with two labels; also a ``Split``, whose label is the shape's.

    Attributes:
        shape_classes: Names of the shapes.
        texture_classes: Names of the textures.
        shape_labels: (n,) int64, positions in ``shape_classes``.
        texture_labels: (n,) int64, positions in ``texture_classes``.
        shared: Whether both are one set of classes, which one head can name. Otherwise two heads are needed, one for
            shapes and one for textures.
    """

    shape_classes: list[str]
    texture_classes: list[str]
    shape_labels: np.ndarray
    texture_labels: np.ndarray
    shared: bool

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image in mode RGB and the label of its shape.

        Raises:
            OSError: The image cannot be used.
        """

    def name(self, index: int) -> str:
        """What a warning calls the image."""


def _members(text: str) -> list[int]:
    """``8 10-12`` -> 8, 10, 11, 12."""
    ends = [part.split("-") for part in text.split()]
    return [number for end in ends for number in range(int(end[0]), int(end[-1]) + 1)]


CATEGORIES: dict[str, list[int]] = {
    name: _members(text)
    for name, text in {
        "airplane": "404",
        "bear": "294-297",
        "bicycle": "444 671",
        "bird": "8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145",
        "boat": "472 554 625 814 914",
        "bottle": "440 720 737 898-899 901 907",
        "car": "436 511 817",
        "cat": "281-286",
        "chair": "423 559 765 857",
        "clock": "409 530 892",
        "dog": "152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268",
        "elephant": "385-386",
        "keyboard": "508 878",
        "knife": "499",
        "oven": "766",
        "truck": "555 569 656 675 717 734 864 867",
    }.items()
}
"""The 16 classes of model-vs-human, and which of the 1,000 classes of ImageNet-1k, in WNID order, belong to each.

Source: Geirhos et al. 2018 (arXiv:1808.08750) and 2021 (arXiv:2106.07411); github.com/bethgelab/model-vs-human.
"""

_LAYOUT = "ROOT/SHAPE/SHAPE1-TEXTURE2.png, for example ROOT/airplane/airplane1-bicycle2.png, is needed"
_KEY = "eval.root"


def is_imagenet1k(classes: Sequence[str]) -> bool:
    """Whether these are the 1,000 classes of ImageNet-1k, named by WNID and in WNID order."""
    return (
        len(set(classes)) == 1000
        and all(re.fullmatch(r"n\d{8}", name) for name in classes)
        and list(classes) == sorted(classes)
        and (classes[0], classes[-1]) == ("n01440764", "n15075141")
    )


class CueConflict:
    """A folder in the naming of model-vs-human's cue-conflict set: ``SHAPE/SHAPE1-TEXTURE2.png``.

    The classes are the 16 of model-vs-human for a head over ImageNet-1k, else those of the head itself. Images whose
    shape and texture are of one class, 80 of the official 1,280, are included: their two labels are equal.

    Args:
        root: The folder (``eval.root``); the class folders lie in it or in its sub-folder ``cue-conflict``.
        head_classes: Names of the head's classes, in its order.
        max_pixels: Larger images are skipped with a warning.

    Attributes:
        weights: (classes, classes of the head) fp32: times the head's probabilities, it gives those of the classes, as
            the mean over each one's members (not their sum or maximum).

    Raises:
        ConfigError: The folder is missing or in another layout, or its classes are not the head's.

    Source: Geirhos et al. 2019 (arXiv:1811.12231); model-vs-human ``cue-conflict``.
    """

    shared = True

    def __init__(self, root: str | None, head_classes: Sequence[str], max_pixels: int = MAX_PIXELS):
        missing = f"give the folder cue-conflict of model-vs-human, or your own: {_LAYOUT}"
        self.root = existing_folder(root, missing, _KEY)
        if (self.root / "cue-conflict").is_dir():
            self.root = self.root / "cue-conflict"
        self.max_pixels = max_pixels
        mapped = is_imagenet1k(head_classes)
        self.shape_classes = list(CATEGORIES) if mapped else list(head_classes)
        self.texture_classes = self.shape_classes
        self.weights = torch.zeros(len(self.shape_classes), len(head_classes))
        for row, name in enumerate(self.shape_classes):
            members = CATEGORIES[name] if mapped else [row]
            self.weights[row, members] = 1 / len(members)
        self.files = sorted(walk_images(self.root))
        if not self.files:
            raise ConfigError(f"{_KEY}={root} holds no image in {self.root}: {_LAYOUT}")
        labels = self._read_names(len(head_classes))
        self.shape_labels, self.texture_labels = labels[:, 0].copy(), labels[:, 1].copy()

    def _read_names(self, num_head_classes: int) -> np.ndarray:
        label = {name: position for position, name in enumerate(self.shape_classes)}
        # The classes themselves are looked for, the longest first: their names may contain digits and hyphens.
        one = "|".join(map(re.escape, sorted(label, key=len, reverse=True)))
        pattern = re.compile(rf"({one})\d+-({one})\d+")
        labels = []
        for file in self.files:
            path = Path(file)
            match = pattern.fullmatch(path.stem)
            if match is None or path.parent.name != match[1]:
                raise ConfigError(
                    f"{_KEY}={self.root} holds {file}, which is not SHAPE/SHAPE1-TEXTURE2 of classes of the head: the "
                    "classes of model-vs-human need one over the 1,000 classes of ImageNet-1k in WNID order, others "
                    f"must be named like its own {num_head_classes} classes"
                )
            labels.append([label[match[1]], label[match[2]]])
        return np.array(labels, np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image, RGB on white, and the label of its shape."""
        return read_image(self.name(index), self.max_pixels), int(self.shape_labels[index])

    def name(self, index: int) -> str:
        """Path of the file."""
        return os.path.join(self.root, self.files[index])


class ConflictingShapes:
    """The split ``conflict`` of the embedded data set: shapes with textures that they never have in training.

    Shapes and textures are different things there, so that no head can name both: shape bias takes two heads on the
    same features, fitted on the two labels of the same training images (:meth:`training_factors`).

    Args:
        dataset: The data set of the run.

    Raises:
        ConfigError: It is another one.
    """

    shared = False

    def __init__(self, dataset: object):
        if not isinstance(dataset, Shapes):
            raise ConfigError(
                f"data has no images with conflicting cues: data=shapes has, or {_KEY} names a folder: {_LAYOUT}"
            )
        self._dataset, self._images = dataset, dataset.split("conflict")
        self.shape_classes, self.texture_classes = list(SHAPES), list(TEXTURES)
        self.shape_labels, self.texture_labels = self._images.shapes, self._images.textures

    def training_factors(self, name: str = "train") -> tuple[Tensor, Tensor]:
        """Shapes and textures, (n,) int64 each, of the images of ``train`` or ``val``, by their position."""
        split = self._dataset.split(name)
        return torch.from_numpy(split.shapes.copy()), torch.from_numpy(split.textures.copy())

    def __len__(self) -> int:
        return len(self._images)

    def prepare(self) -> None:
        """Make the tables that rendering looks up."""
        self._images.prepare()

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The RGB image and its shape."""
        return self._images.load(index)[0], int(self.shape_labels[index])

    def name(self, index: int) -> str:
        """What the image shows."""
        return self._images.name(index)
