"""Files behind a URL, kept on disk as long as there is room: what was used last stays.

Any number of processes may share the folder. A file is downloaded under another name and renamed when it is whole, by
one process while the others wait; it may be deleted at any time, even while it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, urlsplit, urlunsplit

from harmonize import __version__
from harmonize.data.cache import cache_folder, exclusive, temporary_beside
from harmonize.data.images import WrongData

_ATTEMPTS = 5
_PAUSE = 1.0  # seconds before the second attempt; twice as long before each further one
_TIMEOUT = 30.0  # seconds without a byte
_ABANDONED = 600.0  # seconds since the last byte, after which a download is taken for that of a process that is gone
_WAIT = 0.2  # seconds until the next look whether there is room
_CHUNK = 1 << 16  # bytes; a slow connection must fill one long before it is taken for abandoned


def is_url(root: str) -> bool:
    """Whether it has the form of a URL, of whatever kind.

    >>> is_url("https://host/shards"), is_url("/data/shards")
    (True, False)
    """
    return "://" in root


def beside(url: str, name: str) -> str:
    """The URL of a file in a folder; what follows a question mark stays.

    >>> beside("https://host/shards/?key=1", "a b.tar")
    'https://host/shards/a%20b.tar?key=1'
    """
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}", fragment=""))


def shown(url: str) -> str:
    """A URL as messages and logs may show it: without passwords and keys.

    >>> shown("https://me:secret@host/shards/a.tar?key=1")
    'https://host/shards/a.tar'
    """
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


class Unreachable(WrongData):
    """A file that cannot be downloaded.

    Attributes:
        status: What the server answered, as in HTTP; None: no answer.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class _Failure(Exception):  # noqa: N818
    """One failed attempt."""

    def __init__(self, reason: str, again: bool, status: int | None = None):
        super().__init__(" ".join(reason.split()))
        self.again, self.status = again, status


def download(url: str, file: BinaryIO, num_bytes: int | None = None, attempts: int = _ATTEMPTS) -> str:
    """Write what is behind a URL into a file.

    Args:
        url: http or https.
        file: Written from its beginning.
        num_bytes: What is longer or shorter is refused; None: any length.
        attempts: How often to try, with pauses that double.

    Returns:
        The SHA-256 of the content.

    Raises:
        Unreachable: Every attempt failed, or the first did for good (a file that is not there).
        OSError: The file cannot be written.
    """
    for attempt in range(1, attempts + 1):
        file.seek(0)
        digest, received = hashlib.sha256(), 0
        try:
            for chunk in _chunks(url):
                received += len(chunk)
                if num_bytes is not None and received > num_bytes:
                    break
                digest.update(chunk)
                file.write(chunk)
            if num_bytes is not None and num_bytes != received:
                again = received < num_bytes  # not every server says how much there is to come
                raise _Failure(f"it is not of {num_bytes} bytes, which index.json says", again)
            file.truncate()
            return digest.hexdigest()
        except _Failure as failure:
            if not failure.again or attempt == attempts:
                tried = f" after {attempt} attempts" if attempt > 1 else ""
                message = f"data.root: {shown(url)} cannot be downloaded{tried}: {failure}"
                raise Unreachable(message, failure.status) from failure
        time.sleep(_PAUSE * 2 ** (attempt - 1))
    raise AssertionError


def _chunks(url: str) -> Iterator[bytes]:
    received = 0
    try:
        request = urllib.request.Request(url, headers={"User-Agent": f"harmonize/{__version__}"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            length = response.headers.get("Content-Length")
            while chunk := response.read(_CHUNK):
                received += len(chunk)
                yield chunk
            if length is not None and received < int(length):
                raise _Failure(f"it ended after {received} of {length} bytes", again=True)
    except urllib.error.HTTPError as error:
        again = error.code >= 500 or error.code in (408, 429)
        raise _Failure(f"HTTP {error.code} {error.reason}", again, error.code) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise _Failure(
            f"{type(reason).__name__}: {reason}", again=not isinstance(error, http.client.InvalidURL)
        ) from error
    except ValueError as error:
        raise _Failure(str(error), again=False) from error


class ShardCache:
    """Downloaded files in ``cache_folder()/shards``.

    Args:
        limit: Bytes that the files in the folder may take, those that are on their way included.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.folder = cache_folder() / "shards"

    def open(self, url: str, num_bytes: int, sha256: str) -> BinaryIO:
        """A file for reading; downloaded first if it is not there.

        It remains readable when it is deleted, which makes room for others only once it is closed: do that soon.

        Args:
            url: Where it comes from.
            num_bytes: Its size.
            sha256: Of its content, in hexadecimal digits.

        Raises:
            WrongData: It cannot be downloaded or kept, or is not the right one.
        """
        path = self.folder / f"{sha256}.tar"  # not the URL: a shard that was written anew is another file
        if num_bytes > self.limit:
            raise WrongData(
                f"data.shard_cache_gb={self.limit / 1e9:g} is too small for {shown(url)} of {num_bytes / 1e9:g} GB"
            )
        try:
            with contextlib.suppress(FileNotFoundError):
                return _open_and_mark(path)
            self.folder.mkdir(parents=True, exist_ok=True)
            with exclusive(path.with_suffix(".lock")):
                with contextlib.suppress(FileNotFoundError):
                    return _open_and_mark(path)  # another process was faster
                return self._download(url, path, num_bytes, sha256)
        except OSError as error:
            raise WrongData(
                f"data.root: {shown(url)} cannot be kept in {self.folder}: {error.strerror or error}; set "
                "HARMONIZE_CACHE to a folder with room for data.shard_cache_gb"
            ) from error

    def _download(self, url: str, path: Path, num_bytes: int, sha256: str) -> BinaryIO:
        for rest in self.folder.glob(f"{path.name}.*.tmp"):  # of a process that was killed: the lock is ours now
            with contextlib.suppress(OSError):
                rest.unlink()
        with temporary_beside(path) as temporary:
            while not self._reserve(temporary, num_bytes):
                time.sleep(_WAIT)
            with open(temporary, "r+b") as file:
                found = download(url, file, num_bytes)
            if found != sha256:
                raise WrongData(
                    f"data.root: {shown(url)} is not the file that index.json describes: their SHA-256 differ"
                )
            opened = open(temporary, "rb")  # noqa: SIM115 (the caller's; opened here, since it can be evicted at once)
            os.replace(temporary, path)
            return opened

    def _reserve(self, temporary: Path, num_bytes: int) -> bool:
        """Make a file of the full size, after those that were not used for longest are deleted; False: no room yet."""
        with exclusive(self.folder / "room.lock"):
            files = []
            for path in self.folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if path.suffix in (".tar", ".tmp"):
                        stat = path.stat()
                        files.append((stat.st_mtime, stat.st_size, path))
            excess = sum(size for _, size, _ in files) + num_bytes - self.limit
            is_old = time.time() - _ABANDONED
            files = sorted(file for file in files if file[2].suffix == ".tar" or file[0] < is_old)
            if sum(size for _, size, _ in files) < excess:
                return False
            for _, size, path in files:
                if excess > 0:
                    path.unlink(missing_ok=True)
                    excess -= size
            with open(temporary, "wb") as file:
                file.truncate(num_bytes)  # takes no space on the disk yet, but counts
            return True


def _open_and_mark(path: Path) -> BinaryIO:
    """Open a file and note the time, in place of a time of access, which many file systems do not keep."""
    file = open(path, "rb")  # noqa: SIM115 (the caller's)
    with contextlib.suppress(FileNotFoundError):  # deleted since
        os.utime(path)
    return file
