"""What all figures share: size, colours, legends, and how a figure becomes a file.

Figures are built from :class:`matplotlib.figure.Figure` and never through pyplot, so no global state remembers them
and a training process can draw them beside anything else.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator

from harmonize.types import Quantity

# Inches: on a phone's screen a point then comes out as about one px.
WIDTH = 4.8
LARGE, SMALL = 9.5, 8.5  # font sizes, pt
# Okabe and Ito's palette, which the common kinds of colour blindness can tell apart; its yellow is too pale for lines.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#8c8c8c"


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, in inches, whose parts make room for each other."""
    return Figure(figsize=(width, height), layout="constrained", dpi=100)


def colors(count: int) -> list[str]:
    """Colours for ``count`` things of equal rank: the palette while it lasts, then steps of a colour map."""
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    scale = matplotlib.colormaps["turbo"]
    return [matplotlib.colors.to_hex(scale(0.05 + 0.9 * i / (count - 1))) for i in range(count)]


def axis_title(quantity: Quantity, letters: int = 200) -> str:
    """Title and unit, as on an axis, in lines of at most so many letters."""
    return textwrap.fill(
        f"{quantity.title} ({quantity.unit})" if quantity.unit else quantity.title, letters, break_on_hyphens=False
    )


def block_axis(axes: Axes, layers: Sequence[float]) -> None:
    """Make x the block number: whole ticks, each of them where there is room."""
    first, last = min(layers), max(layers)
    axes.set_xlim(first - 0.04 * max(1, last - first), last + 0.04 * max(1, last - first))
    axes.set_xlabel("block (0: input of the first)" if first == 0 else "block", fontsize=LARGE)
    axes.xaxis.set_major_locator(MultipleLocator(1) if last <= 12 else MaxNLocator(nbins=9, integer=True))
    axes.tick_params(labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.6)
    axes.set_axisbelow(True)


def plain_axes(axes: Axes) -> None:
    """Small numbers, a pale grid, no frame above and on the right."""
    axes.tick_params(labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#e8e8e8", linewidth=0.6)
    axes.set_axisbelow(True)


def legend_below(figure: Figure, width: float = WIDTH) -> None:
    """One legend of all axes, below them, where it hides nothing; the figure grows by its height."""
    entries: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(textwrap.fill(label, 60), handle)
    if not entries:
        return
    # Half an inch for the line and its margins; a letter is about 0.07 inch wide.
    ncols = max(
        1,
        min(
            len(entries), int(width / (0.5 + 0.07 * max(len(line) for label in entries for line in label.split("\n"))))
        ),
    )
    rows = -(-sum(1 + label.count("\n") for label in entries) // ncols)
    figure.set_figheight(figure.get_figheight() + 0.1 + 0.175 * rows)
    figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=ncols, fontsize=SMALL, frameon=False
    )


def to_png(figure: Figure, dpi: int = 160) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def to_svg(figure: Figure) -> str:
    """The figure as SVG, with its words as text, the same bytes for the same figure."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "harmonize"}):
        figure.savefig(buffer, format="svg", dpi=160, metadata={"Date": None})
    return buffer.getvalue().decode()
