"""The embedded data set: textured silhouettes on cluttered textured backgrounds, rendered rather than downloaded.

Each image has two independent labels, the silhouette and the texture of its object, and a segmentation mask. An image
is a pure function of (seed, split, index), and the same scene at every image size; the cache holds nothing but copies.
``docs/shapes.md`` shows it and measures what is and what is not learnable from it.
"""

from __future__ import annotations

import copy
import math
import zlib
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from harmonize.data import silhouettes, textures
from harmonize.data.cache import RenderedCache
from harmonize.types import ConfigError

Array = NDArray[np.float32]

SHAPES = list(silhouettes.SILHOUETTES)
TEXTURES = list(textures.TEXTURES)
NUM_KINDS = len(SHAPES)
"""Number of shapes, and of textures."""

LARGEST_CACHE = 4 * 2**30
"""Bytes of rendered images that a split keeps in a file unless it is told to keep more."""

HELD_OUT = (0, 1, 4)
"""Differences (texture - shape) mod NUM_KINDS that occur in the split ``conflict`` alone: 3 of 12 pairs per label."""

RESOLUTION = 256
"""Samples per side of every table, a power of two: coordinates wrap by a bit mask."""

DISTANCE_LIMIT = 0.25
"""Signed distances are stored up to this value, in units of the silhouette's plane."""


@lru_cache(maxsize=1)
def _atlas() -> NDArray[np.uint8]:
    """All tables in one, made once per process: textures, silhouettes, blobs; (25, RESOLUTION, RESOLUTION).

    Eight bits, because rendering is gathering, and what is gathered should stay in the processor's cache.
    """
    distance = silhouettes.distance_tables(RESOLUTION)
    inside = 0.5 - 0.5 * np.clip(distance / DISTANCE_LIMIT, -1, 1)
    tables = np.concatenate([textures.height_tables(RESOLUTION), inside, textures.blob_table(RESOLUTION)[None]])
    return np.round(255 * tables).astype(np.uint8)


@lru_cache(maxsize=8)
def _pixels(size: int) -> Array:
    """(x, y, 1) of the pixel centres of an image that covers [-1, 1] both ways, (3, size * size)."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(2 / size) - 1
    x, y = np.meshgrid(centres, centres)
    return np.stack([x.ravel(), y.ravel(), np.ones(size * size, np.float32)])


RANGES: dict[str, tuple[float, float, int]] = {
    "others": (0, 1, 2),  # which textures the background and the blobs have
    "centre": (-0.16, 0.16, 2),  # of the object; lengths are in half image sides
    "radius": (0.68, 0.9, 1),
    "roll": (-0.5, 0.5, 1),  # of the object in its plane, in radians
    "mirror": (-1, 1, 1),
    "tilt": (-0.3, 0.3, 2),  # of the object's plane: change of depth over half an image side
    "ground_tilt": (-0.2, 0.2, 2),
    "stretch": (0.85, 1.18, 5),
    "angle": (0, 2 * math.pi, 4),  # of each texture and of the blobs
    "period": (0.20, 0.34, 3),  # of each texture
    "blob_period": (0.3, 0.5, 1),
    "shift": (6 * RESOLUTION, 7 * RESOLUTION, 8),  # more tiles than needed: no coordinate in sight is negative
    "threshold": (0.35, 0.65, 3),  # share of each texture that has its first colour
    "sharpness": (0.6, 2.6, 3),  # log2
    "blob_share": (0.25, 0.45, 1),
    "occluder": (0.0, 0.5, 1),  # its radius in units of the object's
    "reach": (0.75, 1.0, 1),  # its distance from the object's centre, in the same unit
    "direction": (0, 2 * math.pi, 1),
    "light": (-0.2, 0.2, 2),
    "middle": (50, 205, 18),  # colours, of 255: see _colours
    "contrast": (60, 120, 3),
    "sign": (-1, 1, 3),
    "hue": (-40, 40, 9),
}
"""Everything that is random about a scene, but for its labels: lowest and highest value, and how many."""

CALM: dict[str, tuple[float, float]] = {
    "centre": (-0.1, 0.1),
    "radius": (0.75, 0.95),
    "roll": (-0.2, 0.2),
    "tilt": (-0.1, 0.1),
    "occluder": (0.0, 0.0),
    "middle": (128, 128),
    "contrast": (110, 110),
    "sign": (0.0, 1.0),
    "hue": (0, 0),
}
"""The ranges that are narrower without clutter: an upright, whole object in one tone, so that colour, by which a
contrastive network tells images apart first, tells it nothing."""

DARKNESS = 0.55
"""Without clutter the ground is this much darker and the object this much brighter, as shares of what is possible."""


@lru_cache(maxsize=8)
def _bounds(clutter: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lowest and highest value of every random number, between CALM (0) and RANGES (1)."""
    low, high = (
        np.repeat([r[i] + (1 - clutter) * (CALM.get(name, r)[i] - r[i]) for name, r in RANGES.items()], _COUNTS)
        for i in (0, 1)
    )
    return low, high


_COUNTS = [r[2] for r in RANGES.values()]
_ENDS = np.cumsum(_COUNTS).tolist()
_SLICES = {name: slice(end - RANGES[name][2], end) for name, end in zip(RANGES, _ENDS, strict=True)}
_PLANE = np.array([0, 0, 1, 0, 1])  # of the five lookups in `render`: 0 the background's, 1 the object's


def draw(*key: int, clutter: float = 1.0) -> dict[str, NDArray[np.float64]]:
    """The random numbers of one scene, by their names in RANGES, as a function of ``key`` and ``clutter`` alone."""
    low, high = _bounds(clutter)
    values = low + (high - low) * np.random.default_rng(key).random(len(low))
    return {name: values[where] for name, where in _SLICES.items()}


def render(
    scene: dict[str, NDArray[np.float64]], shape: int, texture: int, size: int, clutter: float = 1.0
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Render one scene.

    Args:
        scene: What :func:`draw` returns.
        shape: Index into SHAPES.
        texture: Index into TEXTURES.
        size: Side of the image, in px.
        clutter: How much there is behind the object, from 0 (a plain, dark ground) to 1.

    Returns:
        The image (size, size, 3) and the mask (size, size) of the pixels where the object is in sight.
    """
    pixels = _pixels(size)
    radius = scene["radius"].item()
    cx, cy = scene["centre"].tolist()

    # Five lookups per pixel: the textures of background, blobs and object, where the blobs are, and the silhouette.
    behind, blobs = (int(NUM_KINDS * u) for u in scene["others"])
    table = np.array([behind, blobs, texture, 2 * NUM_KINDS, NUM_KINDS + shape], np.int32)

    # The background and the object lie in two planes in perspective: (right, down, depth) as functions of (x, y, 1).
    (a, b), (c, d) = scene["ground_tilt"].tolist(), scene["tilt"].tolist()
    planes = np.array([[[1, 0, 0], [0, 1, 0], [a, b, 1]], [[1, 0, -cx], [0, 1, -cy], [c, d, 1 - c * cx - d * cy]]])

    # Where on its table each lookup falls: scaled and turned within its plane, then shifted.
    scale = np.empty(5)
    scale[:3] = scene["period"]
    scale[3] = scene["blob_period"].item()
    scale[:4] = RESOLUTION / textures.PERIODS / scale[:4]
    scale[4] = RESOLUTION / (2 * silhouettes.EXTENT) / radius
    angle = np.concatenate([scene["angle"], scene["roll"]])
    right, down = scale * scene["stretch"], scale / scene["stretch"]
    right[4] *= math.copysign(1, scene["mirror"].item())
    cos, sin = np.cos(angle), np.sin(angle)
    place = np.empty((5, 2, 3))
    place[:, 0, 0], place[:, 0, 1] = cos * right, sin * right
    place[:, 1, 0], place[:, 1, 1] = -sin * down, cos * down
    place[:4, :, 2] = scene["shift"].reshape(4, 2)
    place[4, :, 2] = RESOLUTION / 2

    # All coordinates of the scene are one matrix product and a division by depth; all lookups are one gather.
    rows = np.concatenate([(place @ planes[_PLANE]).reshape(10, 3), planes[:, 2]])
    maps = rows.astype(np.float32) @ pixels
    coordinates = maps[:10].reshape(5, 2, -1)
    coordinates /= maps[10:][_PLANE, None]
    coordinates[4].clip(0, RESOLUTION - 1, out=coordinates[4])
    cells = coordinates.astype(np.int32)
    cells &= RESOLUTION - 1
    index = cells[:, 1] * RESOLUTION
    index += cells[:, 0]
    index += table[:, None] * RESOLUTION**2
    height = _atlas().take(index, mode="wrap").astype(np.float32)  # no index is out of range: skip the check
    height *= 1 / 255

    # An occluder, bounded by a circle that the blob heights warp, hides a part of the object's rim.
    direction, reach = scene["direction"].item(), radius * scene["reach"].item()
    dx = pixels[0] - (cx + reach * math.cos(direction))
    dy = pixels[1] - (cy + reach * math.sin(direction))
    dx *= dx
    dy *= dy
    dx += dy
    occluder = np.sqrt(dx, out=dx)
    occluder += 0.3 * height[3]
    _ramp(occluder, radius * scene["occluder"].item(), -size / 2)

    # Each height becomes a tone by a random threshold and softness, never sharper than one pixel.
    threshold, slope = np.empty((5, 1)), np.empty((5, 1))
    threshold[:3, 0] = scene["threshold"]
    threshold[3:, 0] = 1 - scene["blob_share"].item(), 0.5
    slope[:3, 0] = np.minimum(2 ** scene["sharpness"], scene["period"] * (size / 4))
    slope[3:, 0] = size / 6, DISTANCE_LIMIT * radius * size
    _ramp(height, threshold, slope)
    visible = height[4] * (1 - occluder)
    blob = np.maximum(height[3], occluder, out=occluder)

    # Three layers, each a base colour and a colour difference times its tone, lit by one light.
    a, b = scene["light"].tolist()
    light = np.array([[a, b, 1]], np.float32) @ pixels
    layers = np.empty((2, 3, size * size), np.float32)
    np.multiply(visible, light[0], out=layers[0, 2])
    light -= layers[0, 2]
    np.multiply(light[0], blob, out=layers[0, 1])
    np.subtract(light[0], layers[0, 1], out=layers[0, 0])
    np.multiply(layers[0], height[:3], out=layers[1])
    image = layers.reshape(6, -1).T @ _colours(scene, clutter)
    image.clip(0, 255, out=image)
    return image.astype(np.uint8).reshape(size, size, 3), (visible > 0.5).reshape(size, size)


def _ramp(height: Array, threshold: float | NDArray[np.float64], slope: float | NDArray[np.float64]) -> None:
    """Turn heights, in place, into a step from 0 to 1 at ``threshold``."""
    height *= np.float32(slope)
    height += np.float32(0.5 - threshold * slope)
    height.clip(0, 1, out=height)


def _colours(scene: dict[str, NDArray[np.float64]], clutter: float) -> Array:
    """Base colours of background, blobs and object, then their colour differences, (6, 3) in [0, 255]."""
    middle = scene["middle"].reshape(6, 3)
    dim = 1 - DARKNESS * (1 - clutter)
    background, candidates = middle[0] * dim, 255 - (255 - middle[2:]) * dim
    blobs = background + (middle[1] * dim - background) * (clutter / 2)
    # The object takes the candidate that stands out most, and has twice the contrast of what lies behind it, or more.
    apart = np.minimum(np.abs(candidates - background).sum(1), np.abs(candidates - blobs).sum(1))
    colours = np.empty((6, 3), np.float32)
    colours[:3] = background, blobs, candidates[apart.argmax()]
    colours[3:] = np.copysign(scene["contrast"], scene["sign"])[:, None] + scene["hue"].reshape(3, 3)
    colours[3:5] *= 0.5 * clutter
    colours[:3] -= colours[3:] / 2
    return colours


class ShapesSplit:
    """One split of :class:`Shapes`.

    Attributes:
        shapes: (len,) int64, the shape of every image.
        textures: (len,) int64, the texture of every image.
    """

    def __init__(
        self,
        seed: int,
        name: str,
        num: int,
        differences: list[int],
        image_size: int,
        label: str,
        clutter: float,
        cache: bool,
    ) -> None:
        self._name, self._image_size, self._label, self._clutter = name, image_size, label, clutter
        self._key = (seed, zlib.crc32(name.encode()))
        # Every round of NUM_KINDS images has each shape and each texture once, and every cycle of rounds has each pair
        # once; so the labels of ANY first n images are balanced to within one. Both orders are random.
        rounds = math.ceil(num / NUM_KINDS)
        cycles = math.ceil(rounds / len(differences))
        order = np.random.default_rng((*self._key, 0, 1)).random((rounds, NUM_KINDS)).argsort(1)
        cycle = np.random.default_rng((*self._key, 0, 2)).random((cycles, len(differences))).argsort(1)
        difference = np.array(differences)[cycle.ravel()[:rounds], None]
        self.shapes = order.ravel()[:num]
        self.textures = ((order + difference) % NUM_KINDS).ravel()[:num]
        key, title = ("shapes", seed, name, image_size, clutter), f"shapes/{name}"
        shape = (image_size, image_size)
        self._cache = RenderedCache(copy.copy(self)._image, num, shape, key, title) if cache else None

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def labels(self) -> NDArray[np.int64]:
        """(len,) the label of every image."""
        return self.shapes if self._label == "shape" else self.textures

    def make_tables(self) -> None:
        """Make the tables now, so that worker processes that fork from this one share them."""
        _atlas()

    def prepare(self) -> None:
        """Open the cache, or build it; without one, make the tables."""
        self.make_tables()
        if self._cache:
            self._cache.prepare()

    @property
    def in_memory(self) -> bool:
        """Whether :meth:`pixels` copies from the cache: before :meth:`prepare`, and without a cache, it renders."""
        return self._cache is not None and self._cache.is_open

    def pixels(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Several images at once, (B, image_size, image_size, 3)."""
        if self._cache is not None and self._cache.is_open:
            return self._cache.array[indices]
        return np.stack([self._image(index) for index in indices.tolist()])

    def factors(self, index: int) -> tuple[int, int]:
        """(shape, texture) of an image, as indices into SHAPES and TEXTURES."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a split of {len(self)}")
        return int(self.shapes[index]), int(self.textures[index])

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The RGB image and its label."""
        self.factors(index)  # refuses an index out of range
        return Image.fromarray(self.pixels(np.array([index]))[0]), int(self.labels[index])

    def mask(self, index: int) -> Tensor:
        """The segmentation mask, (image_size, image_size) int64: 0 background or occluder, 1 + shape the object."""
        return self._labelled(index, self._render(index)[1])

    def load_with_mask(self, index: int) -> tuple[Image.Image, Tensor]:
        """The RGB image and its segmentation mask (see :meth:`mask`), rendered once for both."""
        image, visible = self._render(index)
        return Image.fromarray(image), self._labelled(index, visible)

    def name(self, index: int) -> str:
        """What the image shows."""
        shape, texture = self.factors(index)
        return f"shapes/{self._name}/{index} ({SHAPES[shape]}, {TEXTURES[texture]})"

    def _labelled(self, index: int, visible: NDArray[np.bool_]) -> Tensor:
        return torch.from_numpy(visible * np.int64(1 + self.factors(index)[0]))

    def _image(self, index: int) -> NDArray[np.uint8]:
        return self._render(index)[0]

    def _render(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        scene = draw(*self._key, index, clutter=self._clutter)
        return render(scene, *self.factors(index), self._image_size, self._clutter)


class Shapes:
    """The embedded data set.

    The splits ``train`` and ``val`` are disjoint random draws; ``conflict``, as long as ``val``, pairs shapes with
    textures that never occur together in the other two (HELD_OUT).

    Args:
        num_train: Images in ``train``.
        num_val: Images in ``val`` and in ``conflict``.
        image_size: Side of the rendered images, in px.
        label: Which factor is the label, ``shape`` or ``texture``.
        clutter: From 0 (a bright, upright, whole object on a plain dark ground) to 1 (turned, tilted, partly hidden, on
            textures and blobs of any colour).
        seed: The data set's own seed: runs of different seeds see the same images unless it is changed.
        cache: Keep the rendered images of a split in a file, see ``cache.py``; auto: if it takes at most 4 GiB.

    Attributes:
        classes: The names of the labels.

    Raises:
        ConfigError: If an argument is out of range.
    """

    def __init__(
        self,
        num_train: int = 20_000,
        num_val: int = 4_000,
        image_size: int = 64,
        label: str = "shape",
        clutter: float = 1.0,
        seed: int = 0,
        cache: bool | str = "auto",
    ) -> None:
        lowest = {"data.num_train": (num_train, 1), "data.num_val": (num_val, 1)}
        lowest |= {"data.image_size": (image_size, 16), "data.dataset.seed": (seed, 0)}
        for key, (value, least) in lowest.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{key}={value} must be a whole number of at least {least} for data=shapes.")
        if label not in ("shape", "texture"):
            raise ConfigError(f"data.label={label} must be shape or texture.")
        if isinstance(clutter, bool) or not isinstance(clutter, (int, float)) or not 0 <= clutter <= 1:
            raise ConfigError(f"data.clutter={clutter} must be a number between 0 and 1.")
        if cache != "auto" and not isinstance(cache, bool):
            raise ConfigError(f"data.cache={cache} must be auto, true or false.")
        self.classes = SHAPES if label == "shape" else TEXTURES
        self._image_size, self._label, self._clutter, self._seed = image_size, label, clutter, seed
        self._cache = cache
        together = [d for d in range(NUM_KINDS) if d not in HELD_OUT]
        self._splits = {"train": (num_train, together), "val": (num_val, together), "conflict": (num_val, [*HELD_OUT])}

    def split(self, name: str) -> ShapesSplit:
        """The split ``train``, ``val`` or ``conflict``.

        Raises:
            ValueError: If there is no such split.
        """
        if name not in self._splits:
            raise ValueError(f"data=shapes has no split {name!r}, only {', '.join(self._splits)}.")
        num, differences = self._splits[name]
        cache = 3 * num * self._image_size**2 <= LARGEST_CACHE if self._cache == "auto" else bool(self._cache)
        return ShapesSplit(self._seed, name, num, differences, self._image_size, self._label, self._clutter, cache)
