"""Twelve silhouettes as tables of signed distances, for :mod:`harmonize.data.shapes`.

A silhouette is drawn once, in its own plane, as polygons; what is stored is the signed distance to its outline on a
grid. Rendering looks the distance up at each pixel's place in that plane, which costs the same for a disc as for a
fish, and gives a smooth edge at any pose and size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

EXTENT = 1.5
"""The tables cover [-EXTENT, EXTENT] in both directions; every silhouette fits into a disc of radius 1.35."""

AREA = 1.6
"""Area of every silhouette: how much of an image has the object's colours must not tell which it is."""


def polygon_distance(x: Array, y: Array, corners: list[tuple[float, float]]) -> Array:
    """Signed distance to a closed polygon, negative inside.

    Args:
        x: Horizontal coordinates, any shape.
        y: Vertical coordinates (downwards), the same shape.
        corners: The polygon's corners in order; the last is joined to the first.

    Returns:
        Distances of the same shape and in the same unit.

    Source: Inigo Quilez, "2D distance functions", sdPolygon.

    >>> square = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    >>> polygon_distance(np.float32([0, 3]), np.float32([0.5, 0]), square).tolist()
    [-0.5, 2.0]
    """
    squared = np.full(x.shape, np.inf, np.float32)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        squared = np.minimum(squared, (px - ex * along) ** 2 + (py - ey * along) ** 2)
        # A ray to the right of the point crosses this edge: the inside is where the number of crossings is odd.
        inside ^= ((y < ay) != (y < by)) & (px * ey * np.sign(ey) < py * ex * np.sign(ey))
    return np.where(inside, -1, 1).astype(np.float32) * np.sqrt(squared)


def _curve(x: Callable[[Array], Array], y: Callable[[Array], Array], steps: int = 48) -> list[tuple[float, float]]:
    t = np.linspace(0, 2 * np.pi, steps, endpoint=False, dtype=np.float32)
    return list(zip(x(t).tolist(), y(t).tolist(), strict=True))


def _disc(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - np.float32(0.8)


def _triangle(x: Array, y: Array) -> Array:
    return polygon_distance(x, y, [(0, -0.95), (0.92, 0.65), (-0.92, 0.65)])


def _square(x: Array, y: Array) -> Array:
    return polygon_distance(x, y, [(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)])


def _star(x: Array, y: Array) -> Array:
    angle = np.arange(10) * np.pi / 5
    radius = np.where(np.arange(10) % 2 == 0, 1.08, 0.44)
    return polygon_distance(
        x, y, list(zip((radius * np.sin(angle)).tolist(), (-radius * np.cos(angle)).tolist(), strict=True))
    )


def _cross(x: Array, y: Array) -> Array:
    a, b = 0.29, 0.9
    return polygon_distance(
        x,
        y,
        [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)],
    )


def _heart(x: Array, y: Array) -> Array:
    outline = _curve(
        lambda t: np.sin(t) ** 3 * 0.93,
        lambda t: -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16 - 0.12,
    )
    return polygon_distance(x, y, outline)


def _crescent(x: Array, y: Array) -> Array:
    return np.maximum(np.hypot(x + 0.1, y) - np.float32(0.95), np.float32(0.75) - np.hypot(x - 0.48, y))


def _arrow(x: Array, y: Array) -> Array:
    return polygon_distance(
        x, y, [(1.05, 0), (0.1, -0.9), (0.1, -0.33), (-1.0, -0.33), (-1.0, 0.33), (0.1, 0.33), (0.1, 0.9)]
    )


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - np.float32(0.66)) - np.float32(0.24)


def _fish(x: Array, y: Array) -> Array:
    body = _curve(lambda t: 0.75 * np.cos(t) + 0.3, lambda t: 0.56 * np.sin(t))
    tail = polygon_distance(x, y, [(-0.1, 0), (-1.05, -0.7), (-0.85, 0), (-1.05, 0.7)])
    return np.minimum(polygon_distance(x, y, body), tail)


def _bolt(x: Array, y: Array) -> Array:
    return polygon_distance(
        x, y, [(0.62, -0.95), (-0.1, -0.95), (-0.72, 0.18), (-0.12, 0.18), (-0.5, 1.0), (0.72, -0.28), (0.2, -0.28)]
    )


def _mushroom(x: Array, y: Array) -> Array:
    cap = np.maximum(np.hypot(x, y - 0.1) - np.float32(0.95), y - np.float32(0.1))
    stem = polygon_distance(x, y, [(-0.27, 0), (0.27, 0), (0.36, 0.85), (-0.36, 0.85)])
    return np.minimum(cap, stem)


SILHOUETTES: dict[str, Callable[[Array, Array], Array]] = {
    "disc": _disc,
    "triangle": _triangle,
    "square": _square,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
    "crescent": _crescent,
    "arrow": _arrow,
    "ring": _ring,
    "fish": _fish,
    "bolt": _bolt,
    "mushroom": _mushroom,
}
"""Name -> signed distance as a function of (x, y), in the order of the labels."""


def distance_tables(resolution: int) -> Array:
    """The signed distances of all silhouettes, each scaled to the area AREA.

    Args:
        resolution: Samples per side of a table.

    Returns:
        (silhouettes, resolution, resolution) float32; row is y, column is x, in units of the silhouette's plane.
    """
    axis = ((np.arange(resolution, dtype=np.float32) + 0.5) / resolution * 2 - 1) * EXTENT
    x, y = np.meshgrid(axis, axis)
    tables = []
    for distance in SILHOUETTES.values():
        drawn = (distance(x, y) < 0).mean() * (2 * EXTENT) ** 2
        scale = np.float32(np.sqrt(AREA / drawn))
        tables.append(scale * distance(x / scale, y / scale))
    return np.stack(tables).astype(np.float32)
