"""Twelve procedural textures as periodic tables of heights, for :mod:`harmonize.data.shapes`.

A texture is a height field on a torus. Its heights are replaced by their ranks, so that the histogram of EVERY texture
is the same, uniform on [0, 1]: after a threshold and two random colours nothing but the arrangement of the pixels
tells textures apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

PERIODS = 8
"""Periods of a texture along each side of its tile (even, since some patterns repeat after two)."""


def _wave(x: Array) -> Array:
    """Triangle wave of period 1 with values in [0, 1]: 0 at the integers, 1 half-way."""
    return 1 - np.abs(2 * (x - np.floor(x)) - 1)


def _noise(resolution: int, low: float, high: float, slope: float, seed: int) -> Array:
    """Periodic isotropic Gaussian noise (resolution, resolution) of ``low`` ... ``high`` cycles per period.

    The amplitude falls off as frequency ** -slope; the standard deviation is 1.
    """
    white = np.random.default_rng(seed).standard_normal((resolution, resolution))
    frequency = np.hypot(np.fft.fftfreq(resolution)[:, None], np.fft.rfftfreq(resolution)) * resolution / PERIODS
    gain = np.where((frequency >= low) & (frequency <= high), np.maximum(frequency, low) ** -slope, 0)
    noise = np.fft.irfft2(np.fft.rfft2(white) * gain, s=white.shape)
    return (noise / noise.std()).astype(np.float32)


def _stripes(u: Array, v: Array) -> Array:
    return _wave(u)


def _zigzag(u: Array, v: Array) -> Array:
    return _wave(u + _wave(v / 2))


def _waves(u: Array, v: Array) -> Array:
    return _wave(u + 0.3 * np.sin(np.pi * v) + 0.6 * _noise(len(u), 0.06, 0.3, 1, 1))


def _checks(u: Array, v: Array) -> Array:
    a, b = 2 * _wave(u / 2) - 1, 2 * _wave(v / 2) - 1
    return np.sign(a * b) * np.minimum(np.abs(a), np.abs(b))


def _parquet(u: Array, v: Array) -> Array:
    upright = (np.floor(u / 2) + np.floor(v / 2)) % 2 == 0
    return np.where(upright, _wave(u), _wave(v))


def _bricks(u: Array, v: Array) -> Array:
    row = np.floor(v)
    # Distances to the joints, in the same unit along both axes: a brick is two periods long and one high.
    return np.minimum(2 * _wave(u / 2 + row / 2), _wave(v))


def _dots(u: Array, v: Array) -> Array:
    return np.hypot(u % 1 - 0.5, v % 1 - 0.5)


def _scales(u: Array, v: Array) -> Array:
    height = np.zeros_like(u)
    row = np.floor(v)
    for below in (2, 1, 0):  # discs of radius 1 in rows one period apart, each row on top of the row below it
        centre = row + below
        radius = np.hypot((u + centre) % 2 - 1, v - centre)
        height = np.where(radius < 1, _wave(1.5 * radius), height)
    return height


def _grain(u: Array, v: Array) -> Array:
    return _noise(len(u), 1.6, 2.6, 0, 2)


def _clouds(u: Array, v: Array) -> Array:
    return _noise(len(u), 0.2, 4.0, 1.6, 3)


def _marble(u: Array, v: Array) -> Array:
    return np.abs(_noise(len(u), 0.15, 1.5, 1.2, 4))


def _cells(u: Array, v: Array) -> Array:
    jitter = np.random.default_rng(5).random((2, PERIODS, PERIODS), dtype=np.float32)
    row, column = np.floor(v).astype(int), np.floor(u).astype(int)
    first = np.full(u.shape, np.inf, np.float32)
    second = first.copy()
    for down in range(-2, 3):
        for right in range(-2, 3):
            y, x = row + down, column + right
            dy, dx = jitter[:, y % PERIODS, x % PERIODS]
            distance = np.hypot(x + dx - u, y + dy - v)
            second = np.minimum(second, np.maximum(first, distance))
            first = np.minimum(first, distance)
    return second - first


TEXTURES: dict[str, Callable[[Array, Array], Array]] = {
    "stripes": _stripes,
    "zigzag": _zigzag,
    "waves": _waves,
    "checks": _checks,
    "parquet": _parquet,
    "bricks": _bricks,
    "dots": _dots,
    "scales": _scales,
    "grain": _grain,
    "clouds": _clouds,
    "marble": _marble,
    "cells": _cells,
}
"""Name -> height as a function of (u, v), whose unit is one period, in the order of the labels."""


def ranks(height: Array, levels: int = 4096) -> Array:
    """Replace heights by their mid-ranks, scaled to (0, 1); heights of the same level stay equal.

    Args:
        height: Any shape.
        levels: Equal steps between the lowest and the highest value: heights that differ by rounding alone must tie,
            or their order would be that of their places in the tile.

    >>> ranks(np.float32([5, 1, 5, 9])).tolist()
    [0.5, 0.125, 0.5, 0.875]
    """
    level = ((height - height.min()) / np.ptp(height) * (levels - 1)).astype(np.intp)
    counts = np.bincount(level.ravel(), minlength=levels)
    middle = (np.cumsum(counts) - counts / 2) / height.size
    return middle.astype(np.float32)[level]


def height_tables(resolution: int) -> Array:
    """The height fields of all textures.

    Args:
        resolution: Samples per side of a tile.

    Returns:
        (textures, resolution, resolution) float32 in (0, 1), periodic in both directions, each uniformly distributed.
    """
    axis = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution * PERIODS
    u, v = np.meshgrid(axis, axis)
    return np.stack([ranks(height(u, v)) for height in TEXTURES.values()])


def blob_table(resolution: int) -> Array:
    """A smooth height field whose high places are blobs about one period wide, for clutter.

    Returns:
        (resolution, resolution) float32 in (0, 1), periodic in both directions, uniformly distributed.
    """
    return ranks(_noise(resolution, 0.3, 0.7, 0, 6))
