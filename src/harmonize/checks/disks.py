"""Is there room where the run writes, and of what kind are the disks?"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from harmonize.checks.findings import Finding, Patient, in_bytes, ok, problem, warning

if TYPE_CHECKING:
    from torch import nn

NETWORK = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "glusterfs",
    "fuse.glusterfs", "fuse.sshfs", "9p", "afs", "panfs", "wekafs", "orangefs", "pvfs2", "ocfs2", "gfs2"
}  # fmt: skip
"""File systems whose disks are on other machines, as /proc/mounts calls them."""
COPIES = 4
"""Checkpoints of a run at any time: the last, the one before, the best, and the one that is being written."""


def disks(patient: Patient) -> Iterator[Finding]:
    """The places that the run writes to, and where the images lie."""
    from harmonize.data.cache import cache_folder

    cfg = patient.cfg
    root = Path(cfg.run.dir or cfg.run.root).expanduser().absolute()
    yield from _place("run.dir" if cfg.run.dir else "run.root", root, "checkpoints", _checkpoints(patient))
    if (cached := _cache_bytes(patient)) != 0:
        yield from _place("HARMONIZE_CACHE", cache_folder(), "images", cached)
    if cfg.data.get("root"):
        kind, _ = file_system(Path(cfg.data.root).expanduser())
        if kind in NETWORK:
            yield ok(
                f"data.root lies on a network file system ({kind}).", "If images come slowly, copy them to this disk."
            )


def _place(name: str, path: Path, what: str, needed: int | None) -> Iterator[Finding]:
    """One folder: can it be written, is there room for what goes there, and what kind of disk is it on?"""
    folder = _existing(path)
    try:
        left_out = try_writing(folder)
    except OSError as error:
        report = problem if what == "checkpoints" else warning
        yield report(
            f"{name}={path} cannot be written: {error.strerror or error}.", f"Choose another folder: {name}=..."
        )
        return
    free = shutil.disk_usage(folder).free
    if needed is None:
        yield ok(f"{name}={path} can be written, {in_bytes(free)} are free; how much the run needs is not known.")
    elif free < needed:
        report = problem if what == "checkpoints" else warning
        yield report(
            f"{name}={path} has {in_bytes(free)} free, but the {what} take {in_bytes(needed)}.",
            "Make room, or choose another disk. A full one costs checkpoints."
            if what == "checkpoints"
            else "Make room, or set HARMONIZE_CACHE to another disk; without a cache images are made at each use.",
        )
    else:
        yield ok(f"{name}={path} can be written, {in_bytes(free)} are free; the {what} take {in_bytes(needed)}.")
    yield from (warning(f"{name}={path}: {sentence}.", advice) for sentence, advice in left_out)
    kind, _ = file_system(folder)
    if what == "images" and kind in NETWORK:
        yield warning(
            f"{name}={path} lies on a network file system ({kind}), and the cache is read in random order.",
            "Set HARMONIZE_CACHE to a folder on this machine's own disk.",
        )
    elif kind in NETWORK:
        yield ok(f"{name} lies on a network file system ({kind}): a job can go on on another machine.")
    elif what == "checkpoints" and kind in ("tmpfs", "ramfs"):
        yield warning(f"{name}={path} lies in memory ({kind}): it is gone after a restart.", f"Set {name} to a disk.")


def try_writing(folder: Path) -> list[tuple[str, str]]:
    """Write a file as a checkpoint is written, and remove it.

    Returns:
        What the file system lacks, with advice.

    Raises:
        OSError: Nothing can be written.
    """
    lacks = []
    with tempfile.TemporaryDirectory(prefix=".harmonize-doctor-", dir=folder) as name:
        first, second = Path(name, "a"), Path(name, "b")
        with first.open("wb") as file:
            file.write(b"0" * 4096)
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError:
                sentence = "the file system cannot tell when a file has reached the disk (fsync)"
                lacks.append((sentence, "A crash of the machine may cost the last checkpoint."))
        try:
            os.link(first, second)
        except OSError:
            lacks.append(
                ("the file system has no hard links", "Checkpoints are copied instead: twice the time to write.")
            )
        os.replace(first, second)
    return lacks


def _checkpoints(patient: Patient) -> int | None:
    return COPIES * checkpoint_bytes(patient.setup.module) if patient.setup else None


def checkpoint_bytes(module: nn.Module) -> int:
    """Bytes of one checkpoint: weights, momentum network and statistics, and the two moments of what is trained."""
    held = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    return held + 2 * sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)


def _cache_bytes(patient: Patient) -> int | None:
    """Most that the cache of all images takes, in bytes; of files, whose sides are not known, at a ratio of 4 to 3."""
    from harmonize.data.shapes import LARGEST_CACHE

    data = patient.cfg.data
    if not data.get("cache") or ("cache_size" in data and data.cache == "auto"):
        return 0
    if patient.setup is None:
        return None
    is_files = "cache_size" in data
    each = 4 * (data.cache_size or 2 * data.image_size) ** 2 if is_files else 3 * data.image_size**2
    sizes = [each * len(patient.setup.data.dataset.split(name)) for name in ("train", "val")]
    return sum(size for size in sizes if data.cache is True or size <= LARGEST_CACHE)


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> tuple[str, str]:
    """Kind of the file system that a path lies on, and where it is mounted; empty where that is not known."""
    real = os.path.realpath(path)
    best = ("", "")
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        _, place, kind, *_ = line.split()
        place = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), place)  # a space is written \040
        if os.path.commonpath([real, place]) == place and len(place) >= len(best[1]):
            best = (kind, place)
    return best


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())
