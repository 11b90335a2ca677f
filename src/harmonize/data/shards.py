"""Images in tar files (WebDataset shards), on disk or behind a URL: data that outgrow a file system or a disk.

They are read like images in files, each by its position: an index says in which shard it is, and where. So all that
holds for other data sets holds here: workers, ranks and resumption change nothing. Only the order of an epoch differs:
it takes a few shards at a time, so that a batch touches few of them.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import multiprocessing
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harmonize.data.cache import cache_folder, exclusive, temporary_beside
from harmonize.data.datasets import SplitName
from harmonize.data.images import MAX_PIXELS, WrongData, existing_folder, read_image
from harmonize.data.sampler import evenly, grouped_order
from harmonize.data.shard_cache import ShardCache, Unreachable, beside, download, is_url, shown
from harmonize.data.shard_index import (
    INDEX,
    Index,
    Shard,
    class_names,
    expand,
    index_from_bytes,
    read_member,
    scan,
    shard_from_plain,
    shard_to_plain,
    splits_by_name,
    with_splits,
)
from harmonize.data.splits import LabelledImages
from harmonize.types import ConfigError

_MISSING = (
    "give the folder or the URL that holds the shards, or their names as in PATH/train-{000000..000099}.tar; "
    "`harmonize shards FOLDER OUT` writes shards from a folder of images"
)
_SCAN_FORMAT = 1  # to be raised when scanning finds something else than before


class Store(Protocol):
    """Where the shards are. It travels to the data-loader workers, so it must pickle."""

    def open(self, shard: Shard) -> BinaryIO:
        """A shard for reading."""

    def where(self, name: str) -> str:
        """What a message calls a shard."""


class OnDisk:
    """Shards in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def open(self, shard: Shard) -> BinaryIO:
        """A shard for reading."""
        # Opened for every image, as an image file would be: nothing is left open for long, or shared with a fork.
        return open(self.folder / shard.name, "rb")

    def where(self, name: str) -> str:
        """Path of a shard."""
        return str(self.folder / name)


class BehindURL:
    """Shards behind a URL, with a cache on disk."""

    def __init__(self, url: str, cache: ShardCache):
        self.url, self.cache = url, cache

    def open(self, shard: Shard) -> BinaryIO:
        """A shard for reading; downloaded first if it is not there."""
        assert shard.sha256 is not None
        return self.cache.open(beside(self.url, shard.name), shard.num_bytes, shard.sha256)

    def where(self, name: str) -> str:
        """URL of a shard."""
        return shown(beside(self.url, name))


class ShardImages(LabelledImages):
    """The images of some shards.

    Args:
        shards: The shards.
        store: Where they are.
        has_labels: Whether their labels mean anything.
        shuffled: Whether any one shard is a random sample.
        at_once: How many shards an epoch takes at a time.
        max_pixels: Larger images are unreadable.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        store: Store,
        has_labels: bool,
        shuffled: bool,
        at_once: int,
        max_pixels: int,
    ):
        labels = np.concatenate([shard.labels for shard in shards])
        super().__init__(labels if has_labels else np.full(len(labels), -1))
        self.shards, self.store = tuple(shards), store
        self.shuffled, self.at_once, self.max_pixels = shuffled, at_once, max_pixels
        self._starts = np.cumsum([0] + [len(shard) for shard in shards])

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image, RGB on white, and its label.

        Raises:
            UnreadableImage: The image is damaged or too large.
            WrongData: The shard cannot be read, or is another one than that of the index.
        """
        shard, row = self._find(index)
        try:
            with self.store.open(shard) as file:
                content = io.BytesIO(read_member(file, int(shard.offsets[row]), int(shard.sizes[row])))
        except WrongData:
            raise
        except (OSError, ValueError) as error:  # not one image, but a shard of them: it is not skipped
            reason = " ".join(str(error).split())
            raise WrongData(f"data.root: {self.store.where(shard.name)} cannot be read: {reason}") from error
        return read_image(content, self.max_pixels), int(self.labels[index])

    def name(self, index: int) -> str:
        """The shard, and the image's name in it."""
        shard, row = self._find(index)
        return f"{self.store.where(shard.name)}: {os.fsdecode(shard.names[row])}"

    def epoch_order(self, generator: torch.Generator) -> Tensor:
        """The images of an epoch in their order, (n,) int64, nearly shard by shard: see ``grouped_order``."""
        return grouped_order(torch.from_numpy(self._shard_of(self.indices)), self.at_once, generator)

    def spread(self, num_images: int | None) -> list[int]:
        """At most ``num_images`` positions, evenly spaced; None: all.

        Where each shard is a random sample, they are from as few shards as hold that many, also evenly spaced: else
        what is measured between the epochs would need every shard.
        """
        if num_images is None or num_images >= len(self) or not self.shuffled:
            return evenly(len(self), num_images)
        shard_of = self._shard_of(self.indices)
        shards, sizes = np.unique(shard_of, return_counts=True)
        for num in range(1, len(shards) + 1):
            chosen = evenly(len(shards), num)
            if sizes[chosen].sum() >= num_images:
                break
        positions = np.flatnonzero(np.isin(shard_of, shards[chosen]))
        return positions[evenly(len(positions), num_images)].tolist()

    def _find(self, index: int) -> tuple[Shard, int]:
        """The shard of an image, and which of its images it is."""
        place = self.indices[index]
        number = int(self._shard_of(place))
        return self.shards[number], int(place - self._starts[number])

    def _shard_of(self, places: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, places, side="right") - 1

    @cached_property
    def _identities(self) -> np.ndarray:
        """Of all images of the shards; shards from elsewhere may each count their images from 0."""
        found = []
        for shard in self.shards:
            seed = 0 if self.shuffled else zlib.crc32(f"{shard.name}/".encode())
            found += [zlib.crc32(name, seed) for name in shard.names]
        return np.array(found, np.int64)

    def _identity(self, index: int) -> int:
        return int(self._identities[self.indices[index]])


class Shards:
    """Images in uncompressed tar files, as WebDataset has them: ``KEY.jpg`` and perhaps ``KEY.cls``, the label.

    With an ``index.json`` beside them, as ``harmonize shards`` writes it, nothing has to be searched, and the classes
    have names. Without, the headers of the shards are read once; what was found is kept in ``cache_folder()``.

    The split of a shard is in the index, or in its name (``train-000000.tar``, ``val-000000.tar``). Without val,
    ``val_fraction`` of every class is held out, chosen by a hash of the names of the images.

    Args:
        root: Folder or URL (http, https) of the shards, with or without their names: ``PATH/{000000..000099}.tar``.
        val_fraction: Share held out for val.
        num_train: Use that many training images, classes in proportion; None: all.
        num_val: The same for val.
        max_pixels: Larger images are skipped with a warning.
        shards_at_once: How many shards an epoch takes at a time.
        shard_cache_gb: What shards from a URL may take on this disk, in GB (10^9 bytes).

    Raises:
        ConfigError: The shards are missing, are not those of the index, or a number is out of range.
    """

    def __init__(
        self,
        root: str | None,
        val_fraction: float = 0.1,
        num_train: int | None = None,
        num_val: int | None = None,
        max_pixels: int = MAX_PIXELS,
        shards_at_once: int = 8,
        shard_cache_gb: float = 50,
    ):
        if not 0 < val_fraction < 1:
            raise ConfigError(f"data.val_fraction={val_fraction} is not possible: a number between 0 and 1 is needed")
        for key, value in {"max_pixels": max_pixels, "shards_at_once": shards_at_once}.items():
            if value < 1:
                raise ConfigError(f"data.{key}={value} is not possible: a number of at least 1 is needed")
        if not 0 < shard_cache_gb < math.inf:
            raise ConfigError(f"data.shard_cache_gb={shard_cache_gb} is not possible: a number above 0 is needed")
        if root is None:
            raise ConfigError(f"data.root=null is not possible: {_MISSING}")
        self.val_fraction, self.num_train, self.num_val = val_fraction, num_train, num_val
        self.max_pixels, self.shards_at_once = max_pixels, shards_at_once
        # The last part may be names of shards; that of a URL ends before the question mark.
        address, mark, query = root.partition("?") if is_url(root) else (root, "", "")
        folder, _, last = address.rpartition("/")
        names = expand(last) if last.endswith(".tar") else None
        place = (folder or ("/" if address.startswith("/") else ".")) + mark + query if names is not None else root
        self.store: Store
        self._index: Index | None
        self._names: list[str] = []
        if is_url(root):
            self._index = _pick(_fetch_index(place), names, shown(place))
            self.store = BehindURL(place, ShardCache(round(shard_cache_gb * 1e9)))
            self._check_room(shard_cache_gb)
        else:
            found = existing_folder(place, _MISSING)
            self.store = OnDisk(found)
            self._index, self._names = _look(found, names)

    def _check_room(self, shard_cache_gb: float) -> None:
        """Raise a sentence if the shards that are read at once do not fit into the cache."""
        assert self._index is not None
        sizes = sorted((shard.num_bytes for shard in self._index.shards), reverse=True)[: self.shards_at_once]
        if sum(sizes) > round(shard_cache_gb * 1e9):
            raise ConfigError(
                f"data.shard_cache_gb={shard_cache_gb:g} is too small: the {len(sizes)} largest shards take "
                f"{sum(sizes) / 1e9:.3g} GB, and data.shards_at_once={self.shards_at_once} are read at once"
            )

    @cached_property
    def _shards(self) -> Index:
        """The index: read already, or found by scanning."""
        if self._index is not None:
            return self._index
        assert isinstance(self.store, OnDisk)
        shards = with_splits(_scan_once(self.store.folder, self._names))
        return Index(shards, class_names(shards), shuffled=False)

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes; None: there are no labels, or one class."""
        classes = self._shards.classes
        return classes if classes is not None and len(classes) > 1 else None

    @cached_property
    def _splits(self) -> dict[str, ShardImages]:
        parts: dict[str, list[Shard]] = {"train": [], "val": []}
        for shard in self._shards.shards:
            parts[shard.split or "train"].append(shard)
        images = {name: self._images(shards) for name, shards in parts.items() if any(map(len, shards))}
        if len(images.get("train", ())) < (1 if "val" in images else 2):
            raise ConfigError(
                f"data.root holds {len(images.get('train', ()))} images to train on: the members of its shards must be "
                "KEY.jpg, .jpeg, .png or .webp, and KEY.cls for the label, and at least two images are needed"
            )
        if "val" not in images:
            images["train"], images["val"] = images["train"].hold_out(self.val_fraction)
        return {
            "train": images["train"].subset(self.num_train, "data.num_train"),
            "val": images["val"].subset(self.num_val, "data.num_val"),
        }

    def _images(self, shards: Sequence[Shard]) -> ShardImages:
        has_labels, shuffled = self.classes is not None, self._shards.shuffled
        return ShardImages(shards, self.store, has_labels, shuffled, self.shards_at_once, self.max_pixels)

    def split(self, name: SplitName) -> ShardImages:
        """The images of a split; shards without an index are scanned at the first call."""
        return self._splits[name]


def _fetch_index(url: str) -> Index:
    scheme = url.partition("://")[0].lower()
    if scheme not in ("http", "https"):
        raise ConfigError(f"data.root={shown(url)} is not possible: http, https or a folder is needed, not {scheme}")
    where, content = beside(url, INDEX), io.BytesIO()
    try:
        download(where, content, attempts=3)
    except Unreachable as error:
        if error.status not in (403, 404, 410):
            raise
        raise ConfigError(
            f"data.root={shown(url)} has no {INDEX} (HTTP {error.status}), which shards behind a URL need: "
            f"`harmonize shards FOLDER OUT` writes it beside the shards, and `harmonize shards FOLDER --index` for "
            "shards that exist"
        ) from error
    index = index_from_bytes(content.getvalue(), shown(where))
    if not all(shard.split and shard.sha256 for shard in index.shards):
        raise ConfigError(f"data.root: {shown(where)} lacks the splits or the SHA-256 of its shards")
    return index


def _pick(index: Index, names: Sequence[str] | None, where: str) -> Index:
    """The shards of some names."""
    if names is None:
        return index
    shards = {shard.name: shard for shard in index.shards}
    absent = [name for name in names if name not in shards]
    if absent or not names:
        raise ConfigError(f"data.root: {where} does not hold {absent[0] if absent else 'a shard of that pattern'}")
    return Index(tuple(shards[name] for name in sorted(set(names))), index.classes, index.shuffled)


def _look(folder: Path, names: Sequence[str] | None) -> tuple[Index | None, list[str]]:
    """The index of a folder, or the names of the shards that are to be scanned."""
    index, present = folder / INDEX, sorted(path.name for path in folder.glob("*.tar") if path.name[0] != ".")
    absent = sorted(set(names if names is not None else ()) - set(present))
    if absent or names == []:
        raise ConfigError(f"data.root: {folder} does not hold {absent[0] if absent else 'a shard of that pattern'}")
    if not index.is_file():
        chosen = list(splits_by_name(sorted(set(names or present))))
        if not chosen:
            raise ConfigError(f"data.root={folder} holds no shard (*.tar, not compressed): {_MISSING}")
        return None, chosen
    try:
        content = index.read_bytes()
    except OSError as error:
        raise ConfigError(f"data.root: {index} cannot be read: {error.strerror}") from error
    found = _pick(index_from_bytes(content, str(index)), names, str(index))
    for shard in found.shards:
        path = folder / shard.name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.num_bytes:
            raise ConfigError(
                f"data.root: {path} {'is missing' if size is None else f'has {size} bytes'}, where {INDEX} says "
                f"{shard.num_bytes} bytes: copy it again, or delete an {INDEX} that belongs to other shards"
            )
    if names is None and (others := set(present) - {shard.name for shard in found.shards}):
        warnings.warn(f"{len(others)} shards in {folder} are not in its {INDEX} and are left out", stacklevel=3)
    return found, []


# Scanning, once -------------------------------------------------------------------------------------------------------


def _scan_once(folder: Path, names: Sequence[str]) -> list[Shard]:
    """What the shards of a folder hold; each is read once as long as its size and time of modification stay."""
    keep = cache_folder() / "shard_indices"
    keys = {name: _key(folder / name) for name in names}
    try:
        keep.mkdir(parents=True, exist_ok=True)
        with exclusive(keep / f"{hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:24]}.lock"):
            found = {name: shard for name in names if (shard := _kept(keep / keys[name])) is not None}
            for shard in _scanned(folder, [name for name in names if name not in found]):
                found[shard.name] = shard
                path = keep / keys[shard.name]
                with temporary_beside(path) as temporary:
                    temporary.write_text(json.dumps(shard_to_plain(shard)))
                    os.replace(temporary, path)
    except OSError as error:
        warnings.warn(
            f"what the shards in {folder} hold cannot be kept in {keep} ({error}): they are scanned in every run; "
            "set HARMONIZE_CACHE to a folder that can be written",
            stacklevel=2,
        )
        return list(_scanned(folder, names))
    return [found[name] for name in names]


def _key(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError as error:
        raise ConfigError(f"data.root: {path} cannot be read: {error.strerror}") from error
    text = f"{_SCAN_FORMAT} {stat.st_size} {stat.st_mtime_ns} {os.path.realpath(path)}"
    return f"{hashlib.sha256(os.fsencode(text)).hexdigest()[:24]}.json"


def _kept(path: Path) -> Shard | None:
    try:
        return shard_from_plain(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError, zlib.error):  # damaged: made anew
        return None


def _scanned(folder: Path, names: Sequence[str]) -> Iterator[Shard]:
    from rich.console import Console
    from rich.progress import track

    if not names:
        return
    title, console = f"reading the headers of {len(names)} shards of {folder} (once)", Console(stderr=True)
    paths = [folder / name for name in names]
    # A data-loader worker may not start processes.
    num_processes = 1 if multiprocessing.current_process().daemon else min(8, os.cpu_count() or 1, len(names) // 4)
    if num_processes <= 1:
        yield from track(map(scan, paths), title, len(paths), console=console, transient=True)
        return
    with multiprocessing.Pool(num_processes) as pool:
        yield from track(pool.imap(scan, paths), title, len(paths), console=console, transient=True)
