"""The data sets: where their images are, what their labels mean, and how they split into train and val.

A data set is anything with ``classes`` and ``split``; a split is anything with a length, ``load`` and ``name``. Making
one is cheap: it checks that the data are there, and opens no image.
"""

from __future__ import annotations

import os
import pickle
import warnings
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torchvision.datasets
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from harmonize.data.cache import DecodedCache, MappedBytes, cache_folder, exclusive
from harmonize.data.images import (
    MAX_PIXELS,
    UnreadableImage,
    existing_folder,
    has_image,
    read_image,
    subfolders,
    walk_images,
)
from harmonize.data.splits import LabelledImages
from harmonize.types import ConfigError

SplitName = Literal["train", "val"]


@runtime_checkable
class Split(Protocol):
    """The images of one split. It travels to the data-loader workers, so it must pickle.

    A split whose images need work before the first use (a cache) may also have ``prepare()``: the data module calls it
    in the main process before the workers start.

    One whose images are not all equally near may have ``epoch_order(generator)``, which returns all positions, (n,)
    int64, in the order of an epoch, a function of the generator alone; and ``spread(num_images)``, which returns the
    positions to look at where only so many are wanted (None: all), in place of evenly spaced ones.
    """

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image in mode RGB and its label (-1: none).

        Raises:
            OSError: The image cannot be used (``UnreadableImage`` is one); it is skipped with a warning.
        """

    def name(self, index: int) -> str:
        """What a warning calls the image: its path, or a description."""


@runtime_checkable
class ArraySplit(Split, Protocol):
    """A split whose images are all readable and of one size, so that many can be had at once, without Pillow.

    One that has to compute its images may also have ``in_memory``, which is then False (asked for after ``prepare()``):
    worker processes are used for it, which are of no use where images are only copied.

    """

    @property
    def labels(self) -> np.ndarray:
        """(n,) int64, the label of every image, -1 where there is none."""

    def pixels(self, indices: np.ndarray) -> np.ndarray:
        """The images at some positions, (B, height, width, 3) uint8, the same pixels as those of ``load``."""


@runtime_checkable
class Dataset(Protocol):
    """A data set.

    One whose training images have no labels, while others of the same classes do, may also have
    ``probe_split(name)``: probes then fit on it instead of ``split(name)``.

    Attributes:
        classes: Names of the classes by label; None where there are no labels, or one class: probes are then off.
    """

    classes: list[str] | None

    def split(self, name: SplitName) -> Split:
        """The images of a split."""


# Folders --------------------------------------------------------------------------------------------------------------


class ImageFiles(LabelledImages):
    """Images in files.

    Args:
        root: Folder that the names are relative to.
        files: Names of the files.
        labels: (n,) ints.
        max_pixels: Larger images are unreadable.
        cache_side: Read through a cache of images with this shorter side, in px; None: from the files.
    """

    def __init__(self, root: Path, files: Sequence[str], labels: np.ndarray, max_pixels: int, cache_side: int | None):
        super().__init__(labels)
        self.root, self.max_pixels = root, max_pixels
        # One flat block instead of a million str objects, whose reference counts would copy memory in every worker.
        self.files = np.array([os.fsencode(file) for file in files])
        self.cache = DecodedCache(root, self.files, cache_side, max_pixels) if cache_side else None

    def prepare(self) -> None:
        """Build or open the cache."""
        if self.cache:
            self.cache.prepare()

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image, RGB on white, and its label."""
        if self.cache:
            return self.cache.load(int(self.indices[index])), int(self.labels[index])
        return read_image(self.name(index), self.max_pixels), int(self.labels[index])

    def name(self, index: int) -> str:
        """Path of the file."""
        return os.path.join(self.root, os.fsdecode(self.files[self.indices[index]]))

    def _identity(self, index: int) -> int:
        return zlib.crc32(self.files[self.indices[index]])


class Folder:
    """Any folder of images.

    Three layouts: ``root/CLASS/image``; ``root/train/CLASS/image`` with ``root/val`` (or valid, validation, test) of
    the same classes; or images without class folders. Images may lie deeper inside a class folder. Without a val
    folder, ``val_fraction`` of every class is held out, chosen by a hash of the file names.

    Args:
        root: The folder (``data.root``).
        val_fraction: Share held out for val.
        num_train: Use that many training images, classes in proportion; None: all.
        num_val: The same for val.
        max_pixels: Larger images are skipped with a warning.
        cache: Keep the decoded images, see ``cache.py``; auto: do not, because they are reduced, which changes pixels.
        cache_size: Shorter side of the images in the cache, px; None: twice ``image_size``.
        image_size: Side of the images that the network sees, px.

    Raises:
        ConfigError: The folder is missing or holds no image, or a number is out of range.
    """

    _missing = "give the folder with your images, as class folders (root/CLASS/image.png) or all in one folder"
    _skip_links = False

    def __init__(
        self,
        root: str | None,
        val_fraction: float = 0.1,
        num_train: int | None = None,
        num_val: int | None = None,
        max_pixels: int = MAX_PIXELS,
        cache: bool | str = False,
        cache_size: int | None = None,
        image_size: int = 224,
    ):
        if not 0 < val_fraction < 1:
            raise ConfigError(f"data.val_fraction={val_fraction} is not possible: a number between 0 and 1 is needed")
        for key, value in {"max_pixels": max_pixels, "cache_size": cache_size, "image_size": image_size}.items():
            if value is not None and value < 1:
                raise ConfigError(f"data.{key}={value} is not possible: a number of at least 1 is needed")
        if cache != "auto" and not isinstance(cache, bool):
            raise ConfigError(f"data.cache={cache} is not known: auto, true or false is needed")
        self.root = existing_folder(root, self._missing)
        self.val_fraction, self.num_train, self.num_val = val_fraction, num_train, num_val
        self.max_pixels = max_pixels
        self.cache_side = (cache_size or 2 * image_size) if cache is True else None
        try:
            self.train_root, self.val_root = self._layout()
            self._class_folders = self._find_classes()
        except OSError as error:
            raise ConfigError(f"data.root={root} cannot be read: {error}") from error
        self.classes: list[str] | None = self._class_folders if len(self._class_folders) > 1 else None

    def _layout(self) -> tuple[Path, Path | None]:
        folders = subfolders(self.root)
        if "train" in folders:
            for val in ("val", "valid", "validation", "test"):
                if val in folders:
                    return self.root / "train", self.root / val
            if folders == ["train"]:
                return self.root / "train", None
        return self.root, None

    def _find_classes(self) -> list[str]:
        """Class folders of the training images (perhaps none), after a check that both splits hold images."""
        for root in filter(None, (self.train_root, self.val_root)):
            if not has_image(root, self._skip_links):
                endings = " ".join(IMG_EXTENSIONS)
                raise ConfigError(f"data.root={self.root} holds no image in {root}: files ending in {endings} are read")
        classes = [name for name in subfolders(self.train_root) if has_image(self.train_root / name, self._skip_links)]
        if self.val_root and len(classes) > 1:
            val = [name for name in subfolders(self.val_root) if has_image(self.val_root / name, self._skip_links)]
            if not val or not set(val) <= set(classes):
                strange = f"has the class folder {min(set(val) - set(classes))}" if val else "has no class folders"
                raise ConfigError(
                    f"data.root={self.root} is not consistent: {self.val_root.name} {strange}, unlike train; give both "
                    f"the same classes, or set data.root={self.train_root} to hold out validation images of train"
                )
        return classes

    def _list(self, root: Path) -> ImageFiles:
        """All images of one of the two folders, by class, sorted."""
        classes = self._class_folders if self.classes else [""]
        files: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            if (root / name).is_dir():
                found = sorted(os.path.join(name, path) for path in walk_images(root / name, self._skip_links))
                files += found
                labels += [label if self.classes else -1] * len(found)
        if self.classes:
            loose = sum(entry.name.lower().endswith(IMG_EXTENSIONS) for entry in os.scandir(root) if entry.is_file())
            if loose:
                warnings.warn(f"{loose} images in {root} lie beside the class folders and are left out", stacklevel=2)
        return ImageFiles(root, files, np.array(labels), self.max_pixels, self.cache_side)

    @cached_property
    def _splits(self) -> dict[str, ImageFiles]:
        train = self._list(self.train_root)
        if self.val_root:
            val = self._list(self.val_root)
        elif len(train) > 1:
            train, val = train.hold_out(self.val_fraction)
        else:
            raise ConfigError(f"data.root={self.root} holds one image: at least two are needed, for train and for val")
        return {
            "train": train.subset(self.num_train, "data.num_train"),
            "val": val.subset(self.num_val, "data.num_val"),
        }

    def split(self, name: SplitName) -> ImageFiles:
        """The images of a split; the folder is listed at the first call."""
        return self._splits[name]


class OpenClipart(Folder):
    """Open Clip Art Library 0.18 as packed by Debian: 6,900 public-domain drawings in 22 classes (the top folders).

    The package's 1,221 links are left out: they are second names of the same drawings, often in another class, and
    would put one drawing into both train and val.
    """

    _missing = "install the drawings with `apt install openclipart-png`, or give the folder of an unpacked copy"
    _skip_links = True


class ImageNet(Folder):
    """ImageNet-1k (ILSVRC 2012), ``root/train/WNID`` and ``root/val/WNID``.

    Arguments as in ``Folder``; ``val_fraction`` plays no part, because val is the official validation set.
    """

    _missing = (
        "give the folder that holds train/WNID and val/WNID, unpacked from ILSVRC2012_img_train.tar and "
        "ILSVRC2012_img_val.tar (image-net.org, after registration)"
    )

    def _layout(self) -> tuple[Path, Path | None]:
        if not {"train", "val"} <= set(subfolders(self.root)):
            raise ConfigError(f"data.root={self.root} has no folders train and val: {self._missing}")
        return self.root / "train", self.root / "val"


class ImageNet100(ImageNet):
    """100 (or any other number) of the classes of ImageNet-1k; papers differ in which, so the list must be given.

    Args:
        root: Folder that holds train and val of ImageNet-1k.
        class_list: File with one WNID per line; what follows a space, and lines that start with #, are ignored.
        **options: The other arguments of ``Folder``.
    """

    def __init__(self, root: str | None, class_list: str | None, **options: Any):
        self._class_list = class_list
        self._wanted = _read_class_list(class_list)
        super().__init__(root, **options)

    def _find_classes(self) -> list[str]:
        for part in ("train", "val"):
            absent = [name for name in self._wanted if not has_image(self.root / part / name)]
            if absent:
                raise ConfigError(
                    f"data.class_list={self._class_list} names {len(absent)} classes that have no images in "
                    f"{self.root / part}: {', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}"
                )
        return self._wanted


def _read_class_list(path: str | None) -> list[str]:
    if path is None:
        raise ConfigError("data.class_list=null is not possible: give a file with one WNID per line")
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.class_list={path} cannot be read: {error}") from error
    names = [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
    if len(names) < 2 or len(set(names)) < len(names):
        found = f"{len(names)} names, {len(set(names))} of them different"
        raise ConfigError(f"data.class_list={path} holds {found}: it needs at least two WNIDs, each once, one per line")
    return sorted(names)


# Sets that come as arrays ---------------------------------------------------------------------------------------------


class ArrayImages(LabelledImages):
    """Images of one size in an array.

    Args:
        images: (n, height, width, 3) uint8.
        labels: (n,) ints.
        title: What a warning calls the array.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, title: str):
        super().__init__(labels)
        self.images, self.title = images, title

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image and its label."""
        return Image.fromarray(np.ascontiguousarray(self.pixels(np.array([index]))[0])), int(self.labels[index])

    def pixels(self, indices: np.ndarray) -> np.ndarray:
        """Several images at once, (B, height, width, 3) uint8."""
        return self._gather(self.indices[indices])

    def name(self, index: int) -> str:
        """Title and number of the image."""
        return f"image {self.indices[index]} of {self.title}"

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        return self.images[rows]


class _Downloadable:
    """What the sets that torchvision can download have in common: they check their files without opening them."""

    _source: ClassVar[Any]  # torchvision's class: names of the files, their address, and the download
    _title: ClassVar[str]

    def __init__(self, root: str | None, download: bool, num_train: int | None, num_val: int | None):
        how = f"unpack {self._source.filename} ({self._source.url}) there, or add data.download=true"
        if root is None:
            raise ConfigError(f"data.root=null is not possible: give the folder for {self._title}; {how}")
        self.root = Path(root).expanduser()
        self.num_train, self.num_val = num_train, num_val
        self.folder = self.root / self._source.base_folder
        files = [file for file, *_ in self._source.train_list + self._source.test_list]
        absent = [file for file in files if not (self.folder / file).is_file()]
        if absent and not download:
            raise ConfigError(
                f"data.root={root} does not hold {self._title}, {self.folder / absent[0]} is missing: {how}"
            )
        self._download = bool(absent)

    def _fetch(self) -> None:
        """Download the set, one process at a time, if that was asked for and is needed."""
        if self._download:
            cache_folder().mkdir(parents=True, exist_ok=True)
            with exclusive(cache_folder() / f"{self._source.__name__}.lock"):
                self._source(str(self.root), download=True)
            self._download = False


class CIFAR10(_Downloadable):
    """CIFAR-10 (Krizhevsky 2009): 50,000 training images of 32 px in 10 classes; val is the official test set.

    Args:
        root: Folder that holds ``cifar-10-batches-py``.
        download: Fetch the archive if it is missing.
        num_train: Use that many training images, classes in proportion; None: all.
        num_val: The same for val.

    Raises:
        ConfigError: The files are missing and ``download`` is false.
    """

    _source: ClassVar[Any] = torchvision.datasets.CIFAR10
    _title = "CIFAR-10"

    def __init__(
        self, root: str | None, download: bool = False, num_train: int | None = None, num_val: int | None = None
    ):
        super().__init__(root, download, num_train, num_val)

    def _part(self, train: bool) -> Any:
        self._fetch()
        try:
            return self._source(str(self.root), train=train)
        except (RuntimeError, OSError, pickle.UnpicklingError) as error:
            raise ConfigError(f"data.root={self.root} holds damaged files of {self._title}: {error}") from error

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return list(self._part(train=False).classes)

    @cached_property
    def _splits(self) -> dict[str, ArrayImages]:
        splits = {}
        for name, num in {"train": self.num_train, "val": self.num_val}.items():
            part = self._part(train=name == "train")
            images = ArrayImages(part.data, part.targets, f"{self._title} {name}")
            splits[name] = images.subset(num, f"data.num_{name}")
        return splits

    def split(self, name: SplitName) -> ArrayImages:
        """The images of a split, which are read into memory at the first call."""
        return self._splits[name]


class CIFAR100(CIFAR10):
    """CIFAR-100 (Krizhevsky 2009): 50,000 training images of 32 px in 100 classes; val is the official test set."""

    _source: ClassVar[Any] = torchvision.datasets.CIFAR100
    _title = "CIFAR-100"


class _STL10Images(ArrayImages):
    """A file of STL-10, mapped into memory: (n, 3, 96, 96) uint8 with the pixels column by column."""

    _SHAPE = (3, 96, 96)

    def __init__(self, path: Path, labels: np.ndarray | None, title: str):
        num, rest = divmod(path.stat().st_size, int(np.prod(self._SHAPE)))
        labels = np.full(num, -1) if labels is None else labels
        if rest or len(labels) != num:
            raise ConfigError(
                f"data.root={path.parent.parent} holds a damaged {path}: it is not whole; unpack it again"
            )
        self._bytes = MappedBytes(path)
        super().__init__(np.empty(0), labels, title)

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        return self._bytes.array.reshape(-1, *self._SHAPE)[rows].transpose(0, 3, 2, 1)


class STL10(_Downloadable):
    """STL-10 (Coates et al. 2011): 96 px, 100,000 unlabelled images, 5,000 for training in 10 classes.

    val is the official test set (8,000 images). Probes fit on the labelled training images, whatever is trained on.

    Args:
        root: Folder that holds ``stl10_binary``.
        split: What to pre-train on, ``unlabeled`` or ``train``.
        download: Fetch the archive if it is missing.
        num_train: Use that many training images; None: all.
        num_val: The same for val.

    Raises:
        ConfigError: The files are missing and ``download`` is false, or ``split`` is something else.
    """

    _source: ClassVar[Any] = torchvision.datasets.STL10
    _title = "STL-10"

    def __init__(
        self,
        root: str | None,
        split: str = "unlabeled",
        download: bool = False,
        num_train: int | None = None,
        num_val: int | None = None,
    ):
        if split not in ("unlabeled", "train"):
            raise ConfigError(f"data.split={split} is not known: unlabeled or train is needed")
        self._pretraining = split
        super().__init__(root, download, num_train, num_val)

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes."""
        self._fetch()
        return (self.folder / self._source.class_names_file).read_text().split()

    def _part(self, name: str) -> _STL10Images:
        self._fetch()
        labels = None
        if name != "unlabeled":
            labels = np.fromfile(self.folder / f"{name}_y.bin", np.uint8).astype(np.int64) - 1  # from 1 in the file
        return _STL10Images(self.folder / f"{name}_X.bin", labels, f"{self._title} {name}")

    @cached_property
    def _splits(self) -> dict[str, ArrayImages]:
        return {
            "train": self._part(self._pretraining).subset(self.num_train, "data.num_train"),
            "val": self._part("test").subset(self.num_val, "data.num_val"),
        }

    def split(self, name: SplitName) -> ArrayImages:
        """The images of a split."""
        return self._splits[name]

    def probe_split(self, name: SplitName) -> ArrayImages:
        """The labelled images: what ``split`` gives, except that train is the labelled training set."""
        return self._part("train") if name == "train" else self.split("val")


__all__ = [
    "CIFAR10",
    "CIFAR100",
    "STL10",
    "ArrayImages",
    "ArraySplit",
    "Dataset",
    "Folder",
    "ImageFiles",
    "ImageNet",
    "ImageNet100",
    "OpenClipart",
    "Split",
    "UnreadableImage",
    "read_image",
]
