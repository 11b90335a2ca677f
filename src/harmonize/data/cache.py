"""A cache of decoded images: each image once, RGB on white and reduced, as uint8 in one memory-mapped file.

Decoding large PNG files costs far more than augmenting them; with the cache a data-loader worker only copies bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import uuid
import warnings
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path

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


class DecodedCache:
    """The images of a listing, decoded and reduced, from one flat file.

    The file's name is a hash of the listing (names, sizes, modification times) and of the parameters, so a changed
    folder makes a new cache. Unreadable images are recorded with the reason. Where the folder cannot be written, a
    warning says so and every image is decoded anew at each use: slower, the same pixels.

    Args:
        root: Folder that the file names are relative to.
        files: File names, bytes.
        shorter_side: Side that images are reduced to, in px; see ``read_image``.
        max_pixels: Larger images are unreadable.
    """

    def __init__(self, root: Path, files: np.ndarray, shorter_side: int, max_pixels: int):
        self.root, self.files, self.shorter_side, self.max_pixels = root, files, shorter_side, max_pixels
        self._pixels: MappedBytes | None = None
        self._prepared = False

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
            with np.load(path.with_suffix(".npz")) as index:
                self._start, self._height, self._width = index["start"], index["height"], index["width"]
                self._reasons = dict(zip(index["bad"].tolist(), index["reasons"].tolist(), strict=True))
            self._pixels = MappedBytes(path)
        except OSError as error:
            warnings.warn(
                f"no cache of decoded images in {cache_folder()} ({error}): images are decoded at each use; "
                "set HARMONIZE_CACHE to a folder that can be written, or data.cache=false",
                stacklevel=2,
            )
        self._prepared = True

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

    def _build(self, path: Path) -> None:
        from rich.console import Console
        from rich.progress import track

        count = len(self.files)
        height, width = np.zeros(count, np.int32), np.zeros(count, np.int32)
        reasons: dict[int, str] = {}
        decode = partial(_decode, max_pixels=self.max_pixels, shorter_side=self.shorter_side)
        paths = (self._path(index) for index in range(count))
        # A data-loader worker may not start processes. Eight at most: a large image takes its gigabyte in each.
        num_processes = 1 if multiprocessing.current_process().daemon else min(8, os.cpu_count() or 1, count // 32)
        with contextlib.ExitStack() as stack:
            tmp = stack.enter_context(_temporary(path))
            tmp_index = stack.enter_context(_temporary(path.with_suffix(".npz")))
            if num_processes > 1:
                pool = stack.enter_context(multiprocessing.Pool(num_processes))
                decoded: Iterator[np.ndarray | str] = pool.imap(decode, paths, chunksize=8)
            else:
                decoded = map(decode, paths)
            console = Console(stderr=True)
            text = f"decoding {count} images of {self.root} (once)"
            with open(tmp, "wb") as file:
                for index, image in enumerate(track(decoded, text, total=count, console=console, transient=True)):
                    if isinstance(image, str):
                        reasons[index] = image
                    else:
                        height[index], width[index] = image.shape[:2]
                        file.write(image.tobytes())
                file.flush()
                os.fsync(file.fileno())
            size = 3 * height.astype(np.int64) * width
            bad, why = np.array(list(reasons), np.int64), np.array(list(reasons.values()), np.str_)
            with open(tmp_index, "wb") as file:
                np.savez(file, start=np.cumsum(size) - size, height=height, width=width, bad=bad, reasons=why)
            os.replace(tmp_index, path.with_suffix(".npz"))
            os.replace(tmp, path)  # last: the cache is there when this file is


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
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
