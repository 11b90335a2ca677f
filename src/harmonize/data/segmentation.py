"""Data sets with a class for every pixel: where images and masks are, and what the values in the masks mean.

A mask is an int64 tensor (H, W) of classes, ``IGNORE_INDEX`` where a pixel counts neither in training nor in scoring.
Making a data set checks its folders; a split checks that every image has a mask; a mask's values are checked when it is
loaded. Nothing is skipped: a set with a damaged file is not the set that others report on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from harmonize.data.datasets import SplitName
from harmonize.data.images import MAX_PIXELS, UnreadableImage, WrongData, existing_folder, read_image
from harmonize.data.shapes import SHAPES, Shapes, ShapesSplit
from harmonize.types import ConfigError

IGNORE_INDEX = 255
"""The value in a mask that stands for no class."""


@runtime_checkable
class SegmentationSplit(Protocol):
    """Images with masks. It travels to the data-loader workers, so it must pickle; ``prepare()`` as in ``Split``."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, Tensor]:
        """The image in mode RGB and its mask (H, W) int64, in the size of the image.

        Raises:
            WrongData: One of them cannot be used.
        """

    def name(self, index: int) -> str:
        """What an error calls the image."""


@runtime_checkable
class SegmentationSet(Protocol):
    """A data set with masks.

    Attributes:
        classes: Names of the classes, by their value in a mask.
        photographs: Whether its colours are those of photographs, which augmentation may then distort.
    """

    classes: list[str]
    photographs: bool

    def split(self, name: SplitName) -> SegmentationSplit:
        """The images of a split.

        Raises:
            ConfigError: Files are missing.
        """


class ShapesMasks:
    """The embedded data set with its masks: the background (and what hides the object), and one class per silhouette.

    Args:
        dataset: The data set of the run.

    Raises:
        ConfigError: It is another one.
    """

    photographs = False

    def __init__(self, dataset: object):
        if not isinstance(dataset, Shapes):
            raise ConfigError(
                "data has no masks: data=shapes has, or give a folder in the layout of ADE20K or Pascal VOC"
            )
        self.classes = ["background", *SHAPES]
        self._dataset = dataset

    def split(self, name: SplitName) -> SegmentationSplit:
        """The images of a split."""
        return _ShapesMasksSplit(self._dataset.split(name))


class _ShapesMasksSplit:
    def __init__(self, images: ShapesSplit):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def prepare(self) -> None:
        self.images.make_tables()

    def load(self, index: int) -> tuple[Image.Image, Tensor]:
        return self.images.load_with_mask(index)

    def name(self, index: int) -> str:
        return self.images.name(index)


class MaskFiles:
    """Images and masks in files.

    Args:
        root: What ``eval.data.root`` says, for errors.
        pairs: Paths of image and mask.
        values: (256,) int64: the class that a value in a file stands for, ``IGNORE_INDEX``, or -1 for none.
        allowed: The allowed values in words, for errors.
        max_pixels: Larger images are refused.

    Raises:
        ConfigError: A mask is missing.
    """

    def __init__(self, root: Path, pairs: list[tuple[Path, Path]], values: Tensor, allowed: str, max_pixels: int):
        absent = [(image, mask) for image, mask in pairs if not mask.is_file()]
        if absent:
            image, mask = absent[0]
            raise ConfigError(
                f"eval.data.root={root} holds {len(absent)} images without a mask: {mask} is needed for {image.name}"
            )
        self.root, self.pairs, self.values, self.allowed, self.max_pixels = root, pairs, values, allowed, max_pixels

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, index: int) -> tuple[Image.Image, Tensor]:
        """The image, RGB on white, and its mask.

        Raises:
            WrongData: One of them cannot be read, they differ in size, or the mask has a value that is no class.
        """
        path, mask_path = self.pairs[index]
        try:
            image = read_image(path, self.max_pixels)
        except UnreadableImage as error:
            raise WrongData(f"eval.data.root={self.root} holds {path}, which cannot be read: {error}") from error
        stored = self._read_mask(mask_path)
        if stored.shape != (image.height, image.width):
            height, width = stored.shape
            raise WrongData(
                f"eval.data.root={self.root} holds {mask_path} of {width} x {height} px for an image of "
                f"{image.width} x {image.height} px"
            )
        mask = self.values[torch.from_numpy(stored).long()]
        if mask.min() < 0:
            value = int(stored.ravel()[int(mask.argmin())])
            raise WrongData(
                f"eval.data.root={self.root} holds a mask with the value {value}, {mask_path}: {self.allowed} are "
                "allowed"
            )
        return image, mask

    def _read_mask(self, path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                if image.mode in ("L", "P"):  # P: the numbers are the classes, the palette is for the eye
                    return np.array(image)
                what = f"is in mode {image.mode}"
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, ... on damaged files
            what = f"cannot be read ({type(error).__name__})"
        raise WrongData(
            f"eval.data.root={self.root} holds the mask {path}, which {what}: one 8-bit number per pixel is needed"
        )

    def name(self, index: int) -> str:
        """Path of the image."""
        return str(self.pairs[index][0])


class _MaskFolder(ABC):
    """What the sets of files have in common.

    Args:
        root: The folder (``eval.data.root``).
        max_pixels: Larger images are refused.
        places: Where below it the set may begin.
        part: The folder by which one knows.
    """

    photographs = True
    _missing: ClassVar[str]

    def __init__(self, root: str | None, max_pixels: int, places: list[str], part: str):
        self.root, self.max_pixels = existing_folder(root, self._missing, "eval.data.root"), max_pixels
        self.folder = next((self.root / at for at in places if (self.root / at / part).is_dir()), self.root)
        self._splits: dict[str, MaskFiles] = {}

    @abstractmethod
    def _list(self, name: SplitName) -> MaskFiles:
        """The images of a split."""

    def split(self, name: SplitName) -> MaskFiles:
        """The images of a split, which are listed at the first call."""
        if name not in self._splits:
            self._splits[name] = self._list(name)
        return self._splits[name]


class ADE20K(_MaskFolder):
    """ADE20K as in the scene-parsing challenge of 2016: 20,210 training and 2,000 validation images, 150 classes.

    ``root/images/{training,validation}/*.jpg`` and ``root/annotations/{training,validation}/*.png``, also inside
    ``root/ADEChallengeData2016``. In the files 0 is "other" and ignored, and 1 ... 150 are the classes.

    Args:
        root: The folder (``eval.data.root``).
        max_pixels: Larger images are refused.

    Raises:
        ConfigError: The folder or one of the four is missing.

    Source: Zhou et al. 2017, "Scene parsing through ADE20K dataset"; github.com/CSAILVision/sceneparsing.
    """

    _NUM_CLASSES = 150
    _missing = (
        "give the unpacked ADEChallengeData2016.zip (sceneparsing.csail.mit.edu), which holds "
        "images/training/*.jpg, images/validation, annotations/training/*.png and annotations/validation"
    )

    def __init__(self, root: str | None, max_pixels: int = MAX_PIXELS):
        super().__init__(root, max_pixels, ["", "ADEChallengeData2016"], "images")
        for part in ("images", "annotations"):
            for name in ("training", "validation"):
                if not (self.folder / part / name).is_dir():
                    raise ConfigError(f"eval.data.root={root} has no folder {part}/{name}: {self._missing}")
        self.classes = self._names()
        classes = range(self._NUM_CLASSES)
        self._values = _class_of_value({0: IGNORE_INDEX} | {number + 1: number for number in classes})

    def _names(self) -> list[str]:
        """From the archive's own table, whose last column they are; numbers where it is missing."""
        table = self.folder / "objectInfo150.txt"
        rows = table.read_text(encoding="utf-8").splitlines()[1:] if table.is_file() else []
        names = [row.split("\t")[-1].strip() for row in rows if row.strip()]
        if len(names) == self._NUM_CLASSES:
            return names
        return [f"class {number}" for number in range(1, self._NUM_CLASSES + 1)]

    def _list(self, name: SplitName) -> MaskFiles:
        part = {"train": "training", "val": "validation"}[name]
        images = _image_files(self.root, self.folder / "images" / part, self._missing)
        pairs = [(image, self.folder / "annotations" / part / f"{image.stem}.png") for image in images]
        return MaskFiles(self.root, pairs, self._values, f"0 to {self._NUM_CLASSES}", self.max_pixels)


VOC_CLASSES = ["background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"]
VOC_CLASSES += ["diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"]
VOC_CLASSES += ["tvmonitor"]


class PascalVOC(_MaskFolder):
    """Pascal VOC 2012 segmentation: 1,464 training and 1,449 validation images, 20 classes and the background.

    ``root/JPEGImages/*.jpg``, ``root/SegmentationClass/*.png`` (with a palette; 255 is the border of the objects, and
    ignored) and ``root/ImageSets/Segmentation/{train,val}.txt``, also inside ``root/VOCdevkit/VOC2012``.

    Args:
        root: The folder (``eval.data.root``).
        max_pixels: Larger images are refused.

    Raises:
        ConfigError: The folder or a part of it is missing.

    Source: Everingham et al. 2015, "The Pascal visual object classes challenge: a retrospective".
    """

    _missing = (
        "give the unpacked VOCtrainval_11-May-2012.tar (host.robots.ox.ac.uk/pascal/VOC), which holds JPEGImages, "
        "SegmentationClass and ImageSets/Segmentation/train.txt and val.txt in VOCdevkit/VOC2012"
    )

    def __init__(self, root: str | None, max_pixels: int = MAX_PIXELS):
        super().__init__(root, max_pixels, ["", "VOCdevkit/VOC2012", "VOC2012"], "JPEGImages")
        for part in ("JPEGImages", "SegmentationClass"):
            if not (self.folder / part).is_dir():
                raise ConfigError(f"eval.data.root={root} has no folder {part}: {self._missing}")
        for name in ("train", "val"):
            if not self._names_file(name).is_file():
                raise ConfigError(f"eval.data.root={root} has no ImageSets/Segmentation/{name}.txt: {self._missing}")
        self.classes = list(VOC_CLASSES)
        self._values = _class_of_value({IGNORE_INDEX: IGNORE_INDEX} | {number: number for number in range(21)})

    def _names_file(self, name: str) -> Path:
        return self.folder / "ImageSets" / "Segmentation" / f"{name}.txt"

    def _list(self, name: SplitName) -> MaskFiles:
        names = self._names_file(name).read_text(encoding="utf-8").split()
        if not names:
            raise ConfigError(f"eval.data.root={self.root} holds an empty {self._names_file(name)}: {self._missing}")
        images = [self.folder / "JPEGImages" / f"{image}.jpg" for image in names]
        absent = [image for image in images if not image.is_file()]
        if absent:
            raise ConfigError(
                f"eval.data.root={self.root} lacks {len(absent)} images of {self._names_file(name)}: {absent[0]} is "
                "needed"
            )
        pairs = [(image, self.folder / "SegmentationClass" / f"{image.stem}.png") for image in images]
        return MaskFiles(self.root, pairs, self._values, "0 to 20, and 255 for borders,", self.max_pixels)


def _image_files(root: Path, folder: Path, missing: str) -> list[Path]:
    images = sorted(path for path in folder.iterdir() if path.name.lower().endswith(IMG_EXTENSIONS))
    images = [path for path in images if not path.name.startswith(".")]
    if not images:
        raise ConfigError(f"eval.data.root={root} holds no image in {folder}: {missing}")
    return images


def _class_of_value(classes: dict[int, int]) -> Tensor:
    values = torch.full((256,), -1)
    values[list(classes)] = torch.tensor(list(classes.values()))
    return values
