"""The pictures: attention maps, tokens as colours, tokens before and after self-attention, t-SNE.

Shapes use these letters beside the usual ones: L layers shown, Q query patches, I images, T tokens, P points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from harmonize.reports.style import SMALL, WIDTH, colors, legend_below, new_figure
from harmonize.types import Picture

PER_ROW = 4  # layers beside an image
QUERY_COLOR = "#00E5FF"  # stands out from the plasma colour map and from most photographs


def draw(picture: Picture) -> Figure:
    """The figure of a picture.

    Raises:
        ValueError: If there is no drawing for its kind.
    """
    if picture.kind not in KINDS:
        raise ValueError(f"picture.kind={picture.kind!r}: one of {', '.join(KINDS)}")
    return KINDS[picture.kind](picture)


def attention_maps(picture: Picture) -> Figure:
    """Per query patch the image with the patch marked, and beside it every layer's attention from that patch.

    Each map has a colour scale of its own, from 0 to its largest value; how many times uniform attention that is stands
    below it, so that a flat map cannot pass for a sharp one.

    Arrays: ``image`` (h, w, 3) in [0, 1]; ``maps`` (L, Q, rows, cols); ``queries`` (Q, 2), row and column of the patch;
    ``layers`` (L,).
    """
    image, maps, queries, layers = _arrays(picture, "image", "maps", "queries", "layers")
    rows, cols = maps.shape[-2:]
    patch = image.shape[0] / rows, image.shape[1] / cols
    figure, strips = _strips(len(queries), layers, image.shape[0] / image.shape[1], below=0.12)
    for strip in strips:
        row, col = queries[strip.item].tolist()
        strip.left.imshow(_numpy(image.clamp(0, 1)))
        strip.left.set_xlabel(f"query {strip.item + 1}", fontsize=SMALL - 1, labelpad=2)
        mark(strip.left, row, col, *patch)
        for axes, i in zip(strip.panels, strip.layers, strict=True):
            weights = maps[i, strip.item]
            axes.imshow(_numpy(weights), cmap="plasma", vmin=0, vmax=max(float(weights.max()), 1e-12))
            axes.set_xlabel(f"max {float(weights.max() / weights.mean()):.3g} ×", fontsize=SMALL - 1, labelpad=2)
            mark(axes, row, col)
    figure.supxlabel("max: the map's largest value, in multiples of uniform attention", fontsize=SMALL)
    return figure


def mark(axes: Axes, row: int, col: int, height: float = 1, width: float = 1) -> None:
    """Draw a rectangle exactly on a patch; ``imshow`` centres its first pixel on 0, so the image begins at -0.5."""
    corner = (col * width - 0.5, row * height - 0.5)
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=QUERY_COLOR, linewidth=1.2))


def token_colors(picture: Picture) -> Figure:
    """Per image every layer's tokens as colours.

    Arrays: ``images`` (I, h, w, 3) in [0, 1]; ``colors`` (I, L, rows, cols, 3) in [0, 1]; ``layers`` (L,).
    """
    images, shades, layers = _arrays(picture, "images", "colors", "layers")
    figure, strips = _strips(len(images), layers, images.shape[1] / images.shape[2], below=0)
    for strip in strips:
        strip.left.imshow(_numpy(images[strip.item].clamp(0, 1)))
        for axes, i in zip(strip.panels, strip.layers, strict=True):
            axes.imshow(_numpy(shades[strip.item, i].clamp(0, 1)), interpolation="nearest")
    return figure


def token_moves(picture: Picture) -> Figure:
    """Per layer the tokens before (hollow) and after (filled) self-attention, in one colour per image.

    An arrow leads from the mean of an image's tokens before to their mean after: long where the cloud moves as a whole.

    Arrays: ``before`` (L, T, 2); ``after`` (L, T, 2); ``image`` (T,), number of the image; ``layers`` (L,).
    """
    before, after, image, layers = _arrays(picture, "before", "after", "image", "layers")
    figure, panels = _grid(len(layers))
    numbers = image.unique().tolist()
    for i, axes in enumerate(panels):
        for number, color in zip(numbers, colors(len(numbers)), strict=True):
            start, end = before[i, image == number], after[i, image == number]
            x, y = start.T.tolist()
            axes.scatter(x, y, s=8, facecolors="none", edgecolors=color, linewidths=0.4, rasterized=True)
            x, y = end.T.tolist()
            axes.scatter(x, y, s=6, color=color, linewidths=0, rasterized=True)
            arrow = {"arrowstyle": "-|>", "color": "black", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", tuple(end.mean(0).tolist()), tuple(start.mean(0).tolist()), arrowprops=arrow)
        axes.set_title(f"block {layers[i]:g}", fontsize=SMALL)
    panels[0].scatter([], [], s=14, facecolors="none", edgecolors="#555555", label="before self-attention")
    panels[0].scatter([], [], s=14, color="#555555", label="after")
    panels[0].plot([], [], color="black", linewidth=0.8, label="from mean to mean, per image")
    legend_below(figure)
    return figure


def token_scatter(picture: Picture) -> Figure:
    """Per layer the tokens in the plane of a t-SNE, coloured by class.

    Arrays: ``points`` (L, P, 2); ``label`` (P,), class of each point's image; ``layers`` (L,).
    """
    points, label, layers = _arrays(picture, "points", "label", "layers")
    figure, panels = _grid(len(layers))
    classes = label.unique().tolist()
    for i, axes in enumerate(panels):
        for number, color in zip(classes, colors(len(classes)), strict=True):
            x, y = points[i, label == number].T.tolist()
            axes.scatter(x, y, s=4, color=color, linewidths=0, rasterized=True)
        axes.set_title(f"block {layers[i]:g}", fontsize=SMALL)
    for number, color in zip(classes, colors(len(classes)), strict=True):
        panels[0].scatter(
            [], [], s=16, color=color, linewidths=0, label=f"class {number}" if number >= 0 else "no label"
        )
    legend_below(figure)
    return figure


KINDS: dict[str, Callable[[Picture], Figure]] = {
    "attention_maps": attention_maps,
    "token_colors": token_colors,
    "token_moves": token_moves,
    "token_scatter": token_scatter,
}


def _arrays(picture: Picture, *names: str) -> list[Tensor]:
    return [torch.as_tensor(picture.arrays[name]).detach().cpu() for name in names]


def _numpy(array: Tensor) -> Any:
    return array.float().numpy()


@dataclass
class Strip:
    """One row of panels: an image on the left, some layers beside it."""

    item: int  # which of the images or queries
    layers: list[int]  # positions of the layers shown
    left: Axes
    panels: list[Axes]


def _strips(count: int, layers: Tensor, aspect: float, below: float) -> tuple[Figure, list[Strip]]:
    """A figure with a row per item and ``PER_ROW`` layers; the block numbers stand above the first item's row.

    Args:
        count: Number of items, images or queries.
        layers: Block numbers (L,).
        aspect: Height of an image over its width.
        below: Room for words below a panel, in inches.
    """
    chunks = [list(range(len(layers)))[i : i + PER_ROW] for i in range(0, len(layers), PER_ROW)]
    content = [(item, chunk) for chunk in chunks for item in range(count)]
    columns = 1 + min(PER_ROW, len(layers))
    height = (WIDTH / columns - 0.06) * aspect + 0.04 + below
    figure = new_figure(len(content) * height + 0.17 * len(chunks) + below)
    grid = figure.subplots(len(content), columns, squeeze=False).tolist()
    for row in grid:
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
    strips = []
    for (item, chunk), (left, *panels) in zip(content, grid, strict=True):
        for axes in panels[len(chunk) :]:
            axes.set_axis_off()
        for axes, i in zip(panels, chunk if item == 0 else (), strict=False):
            axes.set_title(f"block {layers[i]:g}", fontsize=SMALL, pad=3)
        strips.append(Strip(item, chunk, left, panels[: len(chunk)]))
    return figure, strips


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` square panels without ticks."""
    columns = 2 if count == 4 else min(3, count)
    rows = -(-count // columns)
    figure = new_figure(0.1 + rows * WIDTH / max(columns, 2))
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes in panels:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_aspect("equal", adjustable="datalim")
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]
