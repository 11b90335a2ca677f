"""What is where in a tar file of images, found by one scan of its headers, and the ``index.json`` that keeps it.

With the place of every image known, a shard is a list of images like any other: one seek and one read each.

A sample is the members of one key, the path up to the first dot of the file name (the WebDataset convention): the first
with the ending of an image, and ``.cls`` with the label as decimal digits, which may be missing. Members with other
endings are passed over.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from harmonize.types import ConfigError

INDEX = "index.json"
BLOCK = 512  # bytes of a tar header; data begin at a multiple of it
_FORMAT = "harmonize shards 1"  # to be raised when the file changes its meaning
_LONGEST_NAME = 4096  # bytes
_VAL = ("val", "valid", "validation", "test")  # what a validation split may be called, as in ``Folder``


@dataclass(frozen=True)
class Shard:
    """A tar file and the images in it.

    Attributes:
        name: Of the file.
        num_bytes: Its size.
        offsets: (n,) int64, where the bytes of each image begin.
        sizes: (n,) int64, how many bytes they are.
        labels: (n,) int64, -1 where there is none.
        packed_names: What warnings call the images, compressed: they are rarely asked for.
        split: ``train`` or ``val``; None: its name says so, see :func:`splits_by_name`.
        sha256: Of the whole file, in hexadecimal digits; None: unknown.
    """

    name: str
    num_bytes: int
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    packed_names: bytes
    split: str | None = None
    sha256: str | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def names(self) -> list[bytes]:
        """Names of the images: those of the files that they come from, or of the members of the tar file."""
        return zlib.decompress(self.packed_names).split(b"\0") if len(self) else []


def pack(names: Sequence[bytes]) -> bytes:
    """Names for ``Shard.packed_names``."""
    return zlib.compress(b"\0".join(names))


@dataclass(frozen=True)
class Index:
    """Some shards.

    Attributes:
        shards: In the order of their names.
        classes: Names of the classes by label; None: no labels.
        shuffled: Whether any one shard is a random sample of its split.
    """

    shards: tuple[Shard, ...]
    classes: list[str] | None
    shuffled: bool


def class_names(shards: Iterable[Shard]) -> list[str] | None:
    """The labels as names, where shards do not come with any; None: fewer than two classes."""
    highest = max((int(shard.labels.max(initial=-1)) for shard in shards), default=-1)
    return [str(label) for label in range(highest + 1)] if highest >= 1 else None


# Scanning -------------------------------------------------------------------------------------------------------------


def scan(path: Path) -> Shard:
    """Find the images of a tar file by its headers.

    Raises:
        ConfigError: It is damaged, cut off or compressed, or a label is no number.
    """
    images: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, int] = {}
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                key, is_image = f"{folder}/{stem}", bool(stem) and f".{ending.lower()}" in IMG_EXTENSIONS
                if is_image and not member.isfile():
                    raise ValueError(f"the image {member.name} is a link")
                if is_image:
                    images.setdefault(key, (member.offset_data, member.size, member.name))
                elif ending == "cls":
                    labels[key] = _label(tar, member)
            # The module takes a damaged header for the end; what ends a tar file are zeros.
            file.seek(tar.offset)
            rest = file.read(BLOCK)
            if rest.strip(b"\0") or len(rest) % BLOCK:
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
            num_bytes = file.seek(0, 2)
    except (OSError, tarfile.TarError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"data.root holds a shard that cannot be used, {path}: {reason}; it must be a whole, uncompressed tar file"
        ) from error
    places = np.array([place[:2] for place in images.values()], np.int64).reshape(-1, 2)
    return Shard(
        name=path.name,
        num_bytes=num_bytes,
        offsets=places[:, 0].copy(),
        sizes=places[:, 1].copy(),
        labels=np.array([labels.get(key, -1) for key in images], np.int64),
        packed_names=pack([name.encode("utf-8", "surrogateescape") for *_, name in images.values()]),
    )


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    content = tar.extractfile(member)
    text = content.read(100) if content else b""
    digits = re.fullmatch(rb"\s*(-1|\d{1,6})\s*", text)
    if digits is None:
        shown = text[:20].decode("utf-8", "replace")
        raise ValueError(f"the label {member.name} is {shown!r}, not a whole number from 0 to 999999")
    return int(digits[1])


def sha256_of(file: BinaryIO) -> str:
    """The SHA-256 of what is left of a file."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def read_member(file: BinaryIO, offset: int, size: int) -> bytes:
    """The bytes of an image.

    Args:
        file: The tar file.
        offset: Where they begin.
        size: How many there are.

    Raises:
        ValueError: There is no member of that size, so that an index would belong to another file.
    """
    file.seek(offset - BLOCK)
    block = file.read(BLOCK + size)
    digits = block[124:136].strip(b" \0")  # the size in a tar header
    if len(block) < BLOCK + size or not digits.isdigit() or int(digits, 8) != size:
        raise ValueError(f"there is no image of {size} bytes at byte {offset}")
    return block[BLOCK:]


# Names of shards ------------------------------------------------------------------------------------------------------


def expand(pattern: str) -> list[str]:
    """The names that ``{first..last}`` stands for, with as many digits as the first has.

    >>> expand("val-{08..11}.tar")
    ['val-08.tar', 'val-09.tar', 'val-10.tar', 'val-11.tar']
    """
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    texts, firsts, lasts = parts[::3], parts[1::3], parts[2::3]
    ranges = [
        [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        for first, last in zip(firsts, lasts, strict=True)
    ]
    return ["".join(itertools.chain(*zip(texts, [*chosen, ""], strict=True))) for chosen in itertools.product(*ranges)]


def splits_by_name(names: Sequence[str]) -> dict[str, str]:
    """Name -> ``train`` or ``val``, by the first word of the name that says so; without any such word, all are train.

    Of the words for a validation split the first of val, valid, validation and test that occurs is taken; shards of
    the others are left out.

    Raises:
        ConfigError: Only some of the names say to which split they belong, or none is for training.

    >>> splits_by_name(["train-0.tar", "validation-0.tar", "test-0.tar"])
    {'train-0.tar': 'train', 'validation-0.tar': 'val'}
    """
    words = {
        name: next(filter(("train", *_VAL).__contains__, re.split(r"[^a-z]+", name.lower())), "") for name in names
    }
    found = set(words.values())
    if found <= {""}:
        return dict.fromkeys(names, "train")
    if "train" not in found:
        raise ConfigError(f"data.root holds no shard to train on, but {names[0]}: call them train-000000.tar and so on")
    if "" in found:
        strange = next(name for name in names if not words[name])
        raise ConfigError(
            f"data.root holds a shard whose split is unclear, {strange}: either all names must begin with train or "
            "val, or none of them"
        )
    val = next((word for word in _VAL if word in found), "")
    return {name: "train" if word == "train" else "val" for name, word in words.items() if word in ("train", val)}


# The file -------------------------------------------------------------------------------------------------------------


def shard_to_plain(shard: Shard) -> dict[str, Any]:
    """A shard as values for JSON; a number for every image would make a file of gigabytes, so they are compressed."""
    table = np.stack([np.diff(shard.offsets, prepend=0), shard.sizes, shard.labels]).astype("<i8")
    return {
        "name": shard.name,
        "split": shard.split,
        "bytes": shard.num_bytes,
        "sha256": shard.sha256,
        "samples": len(shard),
        "table": base64.b64encode(zlib.compress(table.tobytes())).decode(),
        "names": base64.b64encode(shard.packed_names).decode(),
    }


def shard_from_plain(plain: Mapping[str, Any]) -> Shard:
    """The reverse of :func:`shard_to_plain`.

    Raises:
        KeyError, TypeError, ValueError, zlib.error: It is nothing of the kind.
    """
    name, num_bytes, samples = plain["name"], plain["bytes"], plain["samples"]
    if not re.fullmatch(r"[^/\\\0]+\.tar", name) or not 0 <= samples <= num_bytes // BLOCK:
        raise ValueError(f"{name!r} of {num_bytes} bytes cannot hold {samples} images")
    if plain["sha256"] is not None and not re.fullmatch(r"[0-9a-f]{64}", plain["sha256"]):
        raise ValueError(f"the SHA-256 of {name} is {plain['sha256']!r}")
    table = np.frombuffer(_inflate(base64.b64decode(plain["table"]), 24 * samples), "<i8").reshape(3, samples)
    shard = Shard(
        name=name,
        num_bytes=num_bytes,
        offsets=np.cumsum(table[0]),
        sizes=table[1].astype(np.int64),
        labels=table[2].astype(np.int64),
        packed_names=base64.b64decode(plain["names"]),
        split=plain["split"],
        sha256=plain["sha256"],
    )
    _inflate(shard.packed_names, (_LONGEST_NAME + 1) * samples)
    fits = (shard.offsets >= BLOCK) & (shard.sizes >= 0) & (shard.offsets + shard.sizes <= num_bytes)
    if not fits.all() or len(shard.names) != samples or shard.split not in ("train", "val", None):
        raise ValueError(f"{name} does not hold what is said of it")
    return shard


def _inflate(data: bytes, most: int) -> bytes:
    """What was compressed; never more than it can honestly be."""
    stream = zlib.decompressobj()
    content = stream.decompress(data, most + 1)
    if len(content) > most or (data and not stream.eof):
        raise ValueError("compressed data of a wrong length")
    return content


def index_to_bytes(index: Index) -> bytes:
    """The content of ``index.json``."""
    plain = {
        "format": _FORMAT,
        "shuffled": index.shuffled,
        "classes": index.classes,
        "shards": [shard_to_plain(shard) for shard in index.shards],
    }
    return (json.dumps(plain, indent=1) + "\n").encode()


def index_from_bytes(content: bytes, where: str) -> Index:
    """The reverse of :func:`index_to_bytes`.

    Args:
        content: The content of the file.
        where: What a message calls the file.

    Raises:
        ConfigError: It is nothing of the kind.
    """
    try:
        plain = json.loads(content)
        if plain["format"] != _FORMAT:
            raise ValueError(f"its format is {plain['format']!r}, not {_FORMAT!r}")
        classes = plain["classes"]
        if classes is not None:
            classes = [str(name) for name in classes]
        shards = tuple(map(shard_from_plain, plain["shards"]))
        for shard in shards:
            if not ((shard.labels >= -1) & (shard.labels < max(len(classes or ()), 1))).all():
                raise ValueError(f"{shard.name} has labels without a class")
        if len({shard.name for shard in shards}) < len(shards):
            raise ValueError("a shard is named twice")
        return Index(shards, classes, bool(plain["shuffled"]))
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"data.root: {where} is not one that `harmonize shards` writes ({reason})") from error


def with_splits(shards: Iterable[Shard]) -> tuple[Shard, ...]:
    """The shards with the split that their names say, without those of no split, in the order of their names."""
    found = sorted(shards, key=lambda shard: shard.name)
    splits = splits_by_name([shard.name for shard in found])
    return tuple(replace(shard, split=splits[shard.name]) for shard in found if shard.name in splits)
