"""``harmonize shards``: from a folder of images to tar files (WebDataset shards), which ``data=shards`` reads."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import re
import signal
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from tarfile import BLOCKSIZE, RECORDSIZE, USTAR_FORMAT, TarInfo
from typing import Any, BinaryIO

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from harmonize.arguments import Parser
from harmonize.data.datasets import Folder, ImageFiles
from harmonize.data.images import MAX_PIXELS, UnreadableImage, read_image
from harmonize.data.shard_index import (
    INDEX,
    Index,
    Shard,
    class_names,
    index_to_bytes,
    pack,
    scan,
    sha256_of,
    splits_by_name,
    with_splits,
)
from harmonize.files import write_whole
from harmonize.functional.seeding import mix
from harmonize.types import ConfigError

HELP = """
Write the images of a folder into tar files (WebDataset shards), which are read with data=shards: for data of more files
than a file system bears, or that do not fit on the disk and come from a web server.

FOLDER holds what data=folder takes: class folders, train and val folders, or images without class folders. OUT gets
train-000000.tar, ..., val-000000.tar, ... and index.json. The files of the images are packed as they are, in a random
order; those that cannot be read are left out and named.
"""
EXAMPLES = """
examples
  harmonize shards my_images my_shards
  harmonize shards /data/imagenet /data/imagenet_shards --size-mb 512 --workers 16
  harmonize shards other_shards --index
  harmonize train loss=mim data=shards data.root=my_shards
"""

_MOST_NAMED = 5  # unreadable images
_CHUNK = 16  # images that a process reads at a time


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = Parser(
        "harmonize shards", description=HELP, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("folder", metavar="FOLDER", type=Path, help="the images; with --index: the shards")
    made.add_argument("out", metavar="OUT", type=Path, nargs="?", help="a folder that is new or empty")
    made.add_argument("--size-mb", type=float, default=256, help="most megabytes (10^6 bytes) of a shard: 256")
    made.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that read: the cores, 8 at most"
    )
    made.add_argument("--shuffle-seed", type=int, default=0, help="another seed is another order: 0")
    made.add_argument("--val-fraction", type=float, help="share of every class for val, without a val folder: 0.1")
    made.add_argument("--index", action="store_true", help="write the index.json of shards that exist already")
    return made


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: Those after ``harmonize shards``.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: A mistake of the user, in one sentence.
    """
    options = parser().parse_args(arguments)
    _check(options)
    folder = options.folder.expanduser()
    if options.index:
        print(index_shards(folder, options.workers))
    else:
        out = options.out.expanduser()
        print(write_shards(folder, out, options.size_mb, options.workers, options.shuffle_seed, options.val_fraction))
    return 0


def _check(options: argparse.Namespace) -> None:
    if options.index == (options.out is not None):
        raise ConfigError(
            "harmonize shards: --index goes without OUT: it writes into the folder of the shards"
            if options.index
            else "harmonize shards: OUT is missing, the folder for the shards"
        )
    if not 0 < options.size_mb < float("inf"):
        raise ConfigError(f"--size-mb {options.size_mb:g} is not possible: a number above 0 is needed")
    if options.workers < 1:
        raise ConfigError(f"--workers {options.workers} is not possible: a number of at least 1 is needed")
    if options.shuffle_seed < 0:
        raise ConfigError(f"--shuffle-seed {options.shuffle_seed} is not possible: a number of at least 0 is needed")
    if options.val_fraction is not None and not 0 < options.val_fraction < 1:
        raise ConfigError(f"--val-fraction {options.val_fraction:g} is not possible: a number in (0, 1) is needed")


# Writing --------------------------------------------------------------------------------------------------------------


@dataclass
class _Report:
    """What was done, in words."""

    out: Path
    images: dict[str, int] = field(default_factory=dict)
    shards: dict[str, int] = field(default_factory=dict)
    num_bytes: int = 0
    left_out: list[str] = field(default_factory=list)

    def add(self, split: str, shards: Sequence[Shard]) -> None:
        self.images[split], self.shards[split] = sum(map(len, shards)), len(shards)
        self.num_bytes += sum(shard.num_bytes for shard in shards)

    def __str__(self) -> str:
        parts = [
            f"{self.images[split]} images in {count} {split} shard{'s' if count > 1 else ''}"
            for split, count in self.shards.items()
        ]
        lines = [f"{self.out}: {', '.join(parts)}, {self.num_bytes / 1e6:.1f} MB"]
        if self.left_out:
            rest = len(self.left_out) - _MOST_NAMED
            lines.append(f"left out, because they cannot be read: {len(self.left_out)} images")
            lines += [f"  {reason}" for reason in self.left_out[:_MOST_NAMED]]
            lines += [f"  and {rest} more"] if rest > 0 else []
        return "\n".join([*lines, f"use them with: data=shards data.root={self.out}"])


def write_shards(
    folder: Path,
    out: Path,
    size_mb: float = 256,
    workers: int = 1,
    shuffle_seed: int = 0,
    val_fraction: float | None = None,
) -> _Report:
    """Pack a folder of images. The same images make the same bytes, whatever the number of workers.

    Args:
        folder: What ``Folder`` takes.
        out: A folder that is new or empty; nothing is left in it if the work is interrupted.
        size_mb: A shard has at most so many megabytes, or one image.
        workers: Processes that read the images, to find those that cannot be read.
        shuffle_seed: Of the order of the images.
        val_fraction: Share of every class that becomes val where there is no val folder; None: 0.1.

    Returns:
        What was done.

    Raises:
        ConfigError: The folder holds no images that can be read, or the other one holds something.
    """
    with _words_of_the_command():
        images = Folder(str(folder), val_fraction or 0.1)
        if images.val_root and val_fraction is not None:
            raise ConfigError(
                f"--val-fraction {val_fraction:g} is not possible: FOLDER has images for val, {images.val_root}"
            )
        report, shards = _Report(out), []
        with _whole_or_nothing(out, folder):
            for split in ("train", "val"):
                files = images.split(split)
                made = _write_split(out, split, files, size_mb, workers, shuffle_seed, report.left_out)
                report.add(split, made)
                shards += made
            index = Index(tuple(shards), images.classes, shuffled=True)
            write_whole(out / INDEX, index_to_bytes(index))  # last: the shards are there when this file is
    return report


@contextlib.contextmanager
def _words_of_the_command() -> Iterator[None]:
    """Sentences of the data sets name a key of the configuration; here it is an argument."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(re.sub(r"data\.root(=|: | )", "FOLDER ", str(error))) from error


@contextlib.contextmanager
def _whole_or_nothing(out: Path, folder: Path) -> Iterator[None]:
    """Make the folder; it must be empty and not among the images. What was written into it goes if anything fails."""
    if out.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"OUT {out} is not possible: it must not lie in FOLDER, whose images it is made of")
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise ConfigError(f"OUT {out} is not empty: give a new folder, or delete what is in it")
    except OSError as error:
        raise ConfigError(f"OUT {out} cannot be written: {error.strerror}") from error
    try:
        yield
    except BaseException as error:
        for path in out.iterdir():
            path.unlink()
        if is_new:
            out.rmdir()
        if isinstance(error, OSError):
            raise ConfigError(f"OUT {out} cannot be written: {error.strerror or error}") from error
        raise


def _write_split(
    out: Path, split: str, files: ImageFiles, size_mb: float, workers: int, shuffle_seed: int, left_out: list[str]
) -> list[Shard]:
    names = [files.files[place] for place in files.indices]
    keys = mix(shuffle_seed, torch.tensor([zlib.crc32(name) for name in names])).numpy()
    order = np.lexsort((np.arange(len(names)), keys))
    writer = _Writer(out, split, int(size_mb * 1e6))
    paths = [files.name(int(index)) for index in order]
    contents = track(
        _in_order(paths, workers),
        f"packing {len(paths)} {split} images",
        len(paths),
        console=Console(stderr=True),
        transient=True,
    )
    with contextlib.closing(writer):
        for index, path, content in zip(order, paths, contents, strict=True):
            if isinstance(content, str):
                left_out.append(f"{path}: {content}")
            else:
                writer.add(content, names[index], int(files.labels[index]))
        writer.finish()
    if not writer.shards:
        raise ConfigError(f"FOLDER holds no image for {split} that can be read, from {left_out[-1]}")
    return writer.shards


class _Writer:
    """Writes images into one shard after the other, each under another name until it is whole."""

    def __init__(self, folder: Path, split: str, most_bytes: int):
        self.folder, self.split, self.most_bytes = folder, split, most_bytes
        self.shards: list[Shard] = []
        self._file: BinaryIO | None = None
        self._count = self._size = 0

    def add(self, content: bytes, name: bytes, label: int) -> None:
        """Add an image.

        Args:
            content: Its file.
            name: Of that file.
            label: -1: none.
        """
        ending = os.path.splitext(os.fsdecode(name))[1].lower()
        sample = member(f"{self._count:09d}{ending}", content)
        if label >= 0:
            sample += member(f"{self._count:09d}.cls", str(label).encode())
        if self._file is not None and _whole_records(self._size + len(sample)) > self.most_bytes:
            self.finish()
        if self._file is None:
            self._path = self.folder / f"{self.split}-{len(self.shards):06d}.tar"
            self._file = open(f"{self._path}.tmp", "wb")  # noqa: SIM115 (closed by finish)
            self._digest, self._size = hashlib.sha256(), 0
            self._rows: list[tuple[int, int, int]] = []
            self._names: list[bytes] = []
        self._rows.append((self._size + BLOCKSIZE, len(content), label))
        self._names.append(name)
        self._write(sample)
        self._count += 1

    def _write(self, content: bytes) -> None:
        assert self._file is not None
        self._file.write(content)
        self._digest.update(content)
        self._size += len(content)

    def finish(self) -> None:
        """End the shard, if one was begun."""
        if self._file is None:
            return
        self._write(bytes(_whole_records(self._size) - self._size))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        os.replace(f"{self._path}.tmp", self._path)
        offsets, sizes, labels = np.array(self._rows, np.int64).T
        shard = Shard(self._path.name, self._size, offsets, sizes, labels, pack(self._names))
        self.shards.append(replace(shard, split=self.split, sha256=self._digest.hexdigest()))

    def close(self) -> None:
        """Leave a shard that was begun as it is."""
        if self._file is not None:
            self._file.close()


def _whole_records(size: int) -> int:
    """Bytes of a tar file: members, at least two blocks of zeros, and more until it is a number of whole records.

    >>> _whole_records(9216), _whole_records(9728)
    (10240, 20480)
    """
    return -(-(size + 2 * BLOCKSIZE) // RECORDSIZE) * RECORDSIZE


def member(name: str, content: bytes) -> bytes:
    """A file in a tar file: header, content and zeros up to a whole block.

    The header has no time, owner or group: the same files make the same bytes.

    >>> len(member("a.jpg", b"123"))
    1024
    """
    header = TarInfo(name)
    header.size = len(content)
    return header.tobuf(USTAR_FORMAT) + content + bytes(-len(content) % BLOCKSIZE)


# Reading --------------------------------------------------------------------------------------------------------------


def _read(paths: Sequence[str]) -> list[bytes | str]:
    """The content of files, or why it is no image."""
    found: list[bytes | str] = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                content = file.read()
            read_image(io.BytesIO(content), MAX_PIXELS)
            found.append(content)
        except UnreadableImage as error:
            found.append(str(error))
        except OSError as error:
            found.append(f"{type(error).__name__}: {error.strerror}")
    return found


def _in_order(paths: Sequence[str], workers: int) -> Iterator[bytes | str]:
    """The content of files, read by several processes; only a few are in memory at any time."""
    return chain.from_iterable(_mapped(_read, [paths[i : i + _CHUNK] for i in range(0, len(paths), _CHUNK)], workers))


def _mapped(function: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Iterator[Any]:
    """The results in order. The processes start at once, before a progress bar has its thread."""
    if workers == 1 or len(items) < 2:
        return map(function, items)
    executor = ProcessPoolExecutor(min(workers, len(items)), initializer=_leave_interrupts_to_the_main_process)
    ahead = 2 * workers
    waiting = deque(executor.submit(function, item) for item in items[:ahead])

    def results() -> Iterator[Any]:
        try:
            for item in items[ahead:]:
                yield waiting.popleft().result()
                waiting.append(executor.submit(function, item))
            while waiting:
                yield waiting.popleft().result()
        finally:
            executor.shutdown(cancel_futures=True)

    return results()


def _leave_interrupts_to_the_main_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# Shards that exist ----------------------------------------------------------------------------------------------------


def index_shards(folder: Path, workers: int = 1) -> _Report:
    """Write the ``index.json`` of shards that come from elsewhere; they are read once, whole.

    Args:
        folder: Where they are, called ``*.tar``.
        workers: Processes that read them.

    Returns:
        What was done.

    Raises:
        ConfigError: There are none, one is damaged, or there is an index already.
    """
    if not folder.is_dir():
        raise ConfigError(f"FOLDER {folder} is not a folder of shards")
    if (folder / INDEX).exists():
        raise ConfigError(f"FOLDER {folder} has its {INDEX} already: delete it if it belongs to other shards")
    paths = sorted(path for path in folder.glob("*.tar") if path.name[0] != ".")
    if not paths:
        raise ConfigError(f"FOLDER {folder} holds no shard (*.tar, not compressed)")
    with _words_of_the_command():
        paths = [folder / name for name in splits_by_name([path.name for path in paths])]
        found: Iterable[Shard] = track(
            _mapped(_scan_whole, paths, workers),
            f"reading {len(paths)} shards",
            len(paths),
            console=Console(stderr=True),
            transient=True,
        )
        shards = with_splits(found)
        if not any(map(len, shards)):
            raise ConfigError(f"FOLDER {folder} holds shards without any image")
        try:
            write_whole(folder / INDEX, index_to_bytes(Index(shards, class_names(shards), shuffled=False)))
        except OSError as error:
            raise ConfigError(f"FOLDER {folder} cannot be written: {error.strerror or error}") from error
    report = _Report(folder)
    for split in ("train", "val"):
        if chosen := [shard for shard in shards if shard.split == split]:
            report.add(split, chosen)
    return report


def _scan_whole(path: Path) -> Shard:
    shard = scan(path)
    with open(path, "rb") as file:
        return replace(shard, sha256=sha256_of(file))
