"""Image files on disk: finding them, and reading one as RGB on white."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from harmonize.types import ConfigError

MAX_PIXELS = 100_000_000


class UnreadableImage(OSError):  # noqa: N818 (named for what it is, like PIL's own UnidentifiedImageError)
    """An image that cannot be used; the message is the reason. Loaders name it in a warning and go on."""


class WrongData(ConfigError):  # noqa: N818 (as UnreadableImage)
    """Data that cannot be used, found while loading them.

    The data loader raises a worker's exception again with the worker's traceback in front of the message; only the last
    line, the sentence for the user, is kept.
    """

    def __init__(self, message: str):
        kind = f"{type(self).__module__}.{type(self).__qualname__}: "
        super().__init__(message.splitlines()[-1].removeprefix(kind))


def existing_folder(root: str | None, missing: str, key: str = "data.root") -> Path:
    """The folder that a key of the configuration names.

    Args:
        root: Its path; ``~`` is the home folder.
        missing: What the user should do if it is not there.
        key: The key.

    Raises:
        ConfigError: It is not given, or there is no such folder.
    """
    if root is None:
        raise ConfigError(f"{key}=null is not possible: {missing}")
    path = Path(root).expanduser()
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise ConfigError(f"{key}={root} {what}: {missing}")
    return path


def walk_images(root: Path, skip_links: bool = False) -> Iterator[str]:
    """Paths of the image files below a folder, relative to it, in no particular order.

    Hidden files and folders are left out; links are followed, each linked folder once. The ending alone decides what is
    an image (no file is opened), so a broken link is listed, and later named as unreadable.

    Args:
        root: The folder.
        skip_links: Leave out files that are symbolic links.
    """
    pending, seen = [""], {os.path.realpath(root)}
    while pending:
        folder = pending.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = os.path.join(folder, entry.name)
                if entry.is_dir():
                    if entry.is_symlink():
                        target = os.path.realpath(entry.path)
                        if target in seen:
                            continue
                        seen.add(target)
                    pending.append(path)
                elif entry.name.lower().endswith(IMG_EXTENSIONS) and not (skip_links and entry.is_symlink()):
                    yield path


def has_image(root: Path, skip_links: bool = False) -> bool:
    """Whether a folder exists and there is an image file below it; stops at the first."""
    return root.is_dir() and next(walk_images(root, skip_links), None) is not None


def subfolders(root: Path) -> list[str]:
    """Names of the visible sub-folders of a folder, sorted."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def read_image(
    path: str | Path | BinaryIO, max_pixels: int = MAX_PIXELS, shorter_side: int | None = None
) -> Image.Image:
    """Read an image file as RGB; what is transparent becomes white.

    Args:
        path: The file, or one that is open.
        max_pixels: Images with more pixels than this are refused before they are decoded.
        shorter_side: Reduce the shorter side to this many px (aspect ratio kept, the longer side at most 3 times
            this); smaller images stay as they are. None: keep the size.

    Returns:
        A PIL image in mode RGB.

    Raises:
        UnreadableImage: The file is missing, is no image, is damaged or too large.
    """
    try:
        with _open(path) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UnreadableImage(f"{width} x {height} px are more than data.max_pixels={max_pixels}")
            if shorter_side is None:
                return _rgb_on_white(image)
            scale = min(1.0, shorter_side / min(width, height), 3 * shorter_side / max(width, height))
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            image.draft("RGB", (2 * size[0], 2 * size[1]))  # JPEG only: decodes at a fraction of the full size
            # Reduced before the white is put in: a fraction of the memory; PIL weights colours by alpha.
            return _rgb_on_white(_direct_colour(image).resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0))
    except UnreadableImage:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, ... on damaged files
        reason = str(error).splitlines()[0] if str(error) else ""
        if not isinstance(path, (str, Path)):
            reason = reason.replace(repr(path), "it")  # an address in memory says nothing
        raise UnreadableImage(f"{type(error).__name__}: {reason}") from error


def _open(path: str | Path | BinaryIO) -> Image.Image:
    """``Image.open`` without PIL's own limit on the number of pixels: ours is checked instead."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(path)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _direct_colour(image: Image.Image) -> Image.Image:
    """The image in mode L, RGB or RGBA: no palette, no 16-bit, nothing that a filter would mix up."""
    if image.mode.startswith("I;16") or image.mode == "I":  # PIL would clip 16-bit grey at 255 instead of scaling it
        return image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        return image.convert("RGBA")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _rgb_on_white(image: Image.Image) -> Image.Image:
    image = _direct_colour(image)
    if image.mode != "RGBA":
        return image.convert("RGB")  # also decodes the file when the mode is RGB already
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white
