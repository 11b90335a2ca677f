"""Caches of images: each image made once, as uint8 in one memory-mapped file.

Decoding large PNG files costs far more than augmenting them, and so does rendering; with a cache only bytes are copied.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import uuid
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from harmonize.data.images import UnreadableImage, read_image

_FORMAT = b"1"  # to be raised when the files or the pixels in them change their meaning


def cache_folder() -> Path:
    """``$HARMONIZE_CACHE``, else ``~/.cache/harmonize``."""
    return Path(os.environ.get("HARMONIZE_CACHE") or os.path.expanduser("~/.cache/harmonize"))


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Let one process at a time (of one machine) into the block: the others wait. ``path`` is the lock file."""
    try:
        import fcntl
    except ImportError:  # not on Windows: there, two processes may do the same work twice
        yield
        return
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class MappedBytes:
    """A file as a read-only uint8 array: mapped once in each process, pickled as its path."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def array(self) -> np.ndarray:
        """The bytes of the file, (size,) uint8."""
        return np.memmap(self.path, np.uint8, mode="r")

    def __getstate__(self) -> dict:
        return {"path": self.path}


class PixelCache(ABC):
    """Images that are made once and kept as uint8 pixels, one after the other, in one file.

    The file's name is a hash of everything that determines the pixels. Where the folder cannot be written, a warning
    says so and every image is made anew at each use: slower, the same pixels.

    Args:
        count: How many images.
    """

    _made: ClassVar[str]  # what happens to an image, in the texts for the user
    _per_process: ClassVar[int]  # fewer images than this are not worth another process

    def __init__(self, count: int):
        self.count = count
        self._pixels: MappedBytes | None = None
        self._prepared = False

    @property
    def is_open(self) -> bool:
        """Whether the images come from the file."""
        return self._pixels is not None

    def prepare(self) -> None:
        """Open the cache; build it first, with a progress bar, if it is not there."""
        if self._prepared:
            return
        try:
            path = cache_folder() / f"{self._key()}.pixels"
            path.parent.mkdir(parents=True, exist_ok=True)
            with exclusive(path.with_suffix(".lock")):
                if not path.exists():
                    self._build(path)
            self._open(path)
            self._pixels = MappedBytes(path)
        except OSError as error:
            warnings.warn(
                f"no cache of {self._made} images in {cache_folder()} ({error}): images are {self._made} at each use; "
                "set HARMONIZE_CACHE to a folder that can be written, or data.cache=false",
                stacklevel=2,
            )
        self._prepared = True

    @abstractmethod
    def _key(self) -> str:
        """A hash of everything that determines the pixels."""

    @abstractmethod
    def _maker(self) -> tuple[Callable[[Any], np.ndarray | str], Iterable[Any]]:
        """A function that can be sent to other processes, and what to call it with for each image.

        It returns the image (height, width, 3) uint8, or the reason why there is none.
        """

    @abstractmethod
    def _title(self) -> str:
        """What the progress bar says."""

    def _open(self, path: Path) -> None:  # noqa: B027 (nothing to do, unless there is an index)
        """Read what lies beside the file of pixels."""

    def _write_index(self, path: Path, sizes: np.ndarray, reasons: dict[int, str]) -> None:  # noqa: B027
        """Write what is to lie beside the file of pixels.

        Args:
            path: The file of pixels.
            sizes: (count, 2) height and width of every image; 0: there is none.
            reasons: Why not, by position.
        """

    def _build(self, path: Path) -> None:
        from rich.console import Console
        from rich.progress import track

        sizes, reasons = np.zeros((self.count, 2), np.int32), {}
        make, items = self._maker()
        # A data-loader worker may not start processes. Eight at most: a large image takes its gigabyte in each.
        most = 1 if multiprocessing.current_process().daemon else min(8, os.cpu_count() or 1)
        num_processes = min(most, self.count // self._per_process)
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(temporary_beside(path))
            if num_processes > 1:
                pool = stack.enter_context(multiprocessing.Pool(num_processes))
                made: Iterator[np.ndarray | str] = pool.imap(make, items, chunksize=max(1, self._per_process // 4))
            else:
                made = map(make, items)
            console = Console(stderr=True)
            with open(temporary, "wb") as file:
                bar = track(made, self._title(), total=self.count, console=console, transient=True)
                for index, image in enumerate(bar):
                    if isinstance(image, str):
                        reasons[index] = image
                    else:
                        sizes[index] = image.shape[:2]
                        file.write(image.tobytes())
                file.flush()
                os.fsync(file.fileno())
            self._write_index(path, sizes, reasons)
            os.replace(temporary, path)  # last: the cache is there when this file is


class DecodedCache(PixelCache):
    """The images of a listing, decoded and reduced.

    The key is a hash of the listing (names, sizes, modification times) and of the parameters, so a changed folder makes
    a new cache. Unreadable images are recorded with the reason.

    Args:
        root: Folder that the file names are relative to.
        files: File names, bytes.
        shorter_side: Side that images are reduced to, in px; see ``read_image``.
        max_pixels: Larger images are unreadable.
    """

    _made, _per_process = "decoded", 32

    def __init__(self, root: Path, files: np.ndarray, shorter_side: int, max_pixels: int):
        super().__init__(len(files))
        self.root, self.files, self.shorter_side, self.max_pixels = root, files, shorter_side, max_pixels

    def load(self, index: int) -> Image.Image:
        """The image in mode RGB.

        Raises:
            UnreadableImage: The image could not be decoded when the cache was built.
        """
        self.prepare()
        if self._pixels is None:
            return read_image(self._path(index), self.max_pixels, self.shorter_side)
        height, width = int(self._height[index]), int(self._width[index])
        if height == 0:
            raise UnreadableImage(self._reasons[index])
        start = int(self._start[index])
        return Image.fromarray(self._pixels.array[start : start + 3 * height * width].reshape(height, width, 3))

    def _path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.files[index]))

    def _key(self) -> str:
        digest = hashlib.sha256(_FORMAT)
        digest.update(f"{os.path.realpath(self.root)} {self.shorter_side} {self.max_pixels}".encode())
        for index, name in enumerate(self.files):
            try:
                stat = os.stat(self._path(index))
                digest.update(b"\0%s\0%d %d" % (name, stat.st_size, stat.st_mtime_ns))
            except OSError:  # a broken link: part of the listing all the same
                digest.update(b"\0%s\0missing" % name)
        return digest.hexdigest()[:24]

    def _maker(self) -> tuple[Callable[[Any], np.ndarray | str], Iterable[Any]]:
        decode = partial(_decode, max_pixels=self.max_pixels, shorter_side=self.shorter_side)
        return decode, (self._path(index) for index in range(self.count))

    def _title(self) -> str:
        return f"decoding {self.count} images of {self.root} (once)"

    def _write_index(self, path: Path, sizes: np.ndarray, reasons: dict[int, str]) -> None:
        height, width = sizes.T
        size = 3 * height.astype(np.int64) * width
        bad, why = np.array(list(reasons), np.int64), np.array(list(reasons.values()), np.str_)
        with temporary_beside(path.with_suffix(".npz")) as temporary:
            with open(temporary, "wb") as file:
                np.savez(file, start=np.cumsum(size) - size, height=height, width=width, bad=bad, reasons=why)
            os.replace(temporary, path.with_suffix(".npz"))

    def _open(self, path: Path) -> None:
        with np.load(path.with_suffix(".npz")) as index:
            self._start, self._height, self._width = index["start"], index["height"], index["width"]
            self._reasons = dict(zip(index["bad"].tolist(), index["reasons"].tolist(), strict=True))


class RenderedCache(PixelCache):
    """Computed images of one size, as one array.

    Args:
        render: Index -> image (height, width, 3) uint8; a function of the index alone that can be pickled.
        count: How many images.
        shape: Their height and width, in px.
        key: Everything that determines the pixels, but for the code: the first images stand for that.
        title: What they are called.
    """

    _made, _per_process = "rendered", 512

    def __init__(
        self, render: Callable[[int], np.ndarray], count: int, shape: tuple[int, int], key: Sequence[Any], title: str
    ):
        super().__init__(count)
        self.render, self.shape, self.key, self.title = render, shape, tuple(key), title

    @property
    def array(self) -> np.ndarray:
        """All images, (count, height, width, 3) uint8, mapped into memory; only while ``is_open``."""
        assert self._pixels is not None
        return self._pixels.array.reshape(self.count, *self.shape, 3)

    def _key(self) -> str:
        digest = hashlib.sha256(_FORMAT)
        digest.update(repr((self.key, self.count, self.shape)).encode())
        for index in range(min(_NUM_PROOFS, self.count)):  # a changed renderer makes a new cache
            digest.update(self.render(index).tobytes())
        return digest.hexdigest()[:24]

    def _maker(self) -> tuple[Callable[[Any], np.ndarray | str], Iterable[Any]]:
        return self.render, range(self.count)

    def _title(self) -> str:
        return f"rendering {self.count} images of {self.title} (once)"


_NUM_PROOFS = 8


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Name of a new file beside ``path``, removed at the end unless it was renamed."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _decode(path: str, max_pixels: int, shorter_side: int) -> np.ndarray | str:
    """One image (height, width, 3) uint8, or the reason why not (runs in the pool)."""
    try:
        return np.asarray(read_image(path, max_pixels, shorter_side))
    except UnreadableImage as error:
        return str(error)
