"""Curves over depth, spectra and heat maps, of one network or of several in the same axes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from harmonize.reports.references import Reference, references_for
from harmonize.reports.style import (
    GREY,
    LARGE,
    MARKERS,
    SMALL,
    axis_title,
    block_axis,
    colors,
    legend_below,
    new_figure,
)
from harmonize.types import Curve, EncoderSpec, Findings, Surface

ATTENTION = "_attention"  # `X_attention` is `X` after the self-attention of each block, half a block before `X`
MAX_EARLIER_EPOCHS = 8


def depth_names(networks: Iterable[Findings]) -> list[str]:
    """Names of the curves that get a figure of their own, in the order in which they come.

    Curves whose values are all NaN are left out, and so is ``X_attention`` where there is ``X``, whose figure shows it.
    """
    networks = list(networks)
    names = dict.fromkeys(name for findings in networks for name in findings.curves)
    return [
        name
        for name in names
        if not (name.endswith(ATTENTION) and name.removesuffix(ATTENTION) in names)
        and any(depth_points(findings, name) for findings in networks)
    ]


def depth_points(findings: Findings | None, name: str) -> list[tuple[float, float, float]]:
    """(block, value, standard error) of a curve, by block; empty where no value is finite.

    The values of ``X_attention`` stand between those of ``X``, at block - 0.5.
    """
    curves = findings.curves if findings else {}
    points: list[tuple[float, float, float]] = []
    for key, shift in ((name, 0.0), (name + ATTENTION, -0.5)):
        if key in curves:
            curve = curves[key]
            numbers = zip(curve.layer, curve.value, curve.error, strict=True)
            points += [(layer + shift, _or_nan(value), _or_nan(error)) for layer, value, error in numbers]
    if all(math.isnan(value) for _, value, _ in points):
        return []
    return sorted(points, key=lambda point: point[0])


def depth_figure(
    name: str,
    networks: Mapping[str, Findings],
    untrained: Mapping[str, Findings] | None = None,
    references: Sequence[Reference] = (),
) -> Figure:
    """One curve over depth: a line per network with a band of one standard error.

    Dashed: uniform attention. Dotted: the untrained network. Grey: published curves. Faint dots: single heads, drawn
    when there is only one network. ``X_attention`` is drawn into the figure of ``X``, half a block earlier.

    Args:
        name: Name of the curve.
        networks: Findings by network name; their order gives the colours, so pass those that lack the curve as well.
        untrained: Findings of the untrained networks, by the same names.
        references: Published curves to draw.
    """
    figure = new_figure(3.0)
    axes = figure.add_subplot()
    _draw_depth(axes, name, networks, untrained or {}, references)
    axes.set_ylabel(axis_title(_first_curve(name, networks).quantity, 34), fontsize=LARGE)
    legend_below(figure)
    return figure


def epoch_sheet(
    findings: Findings,
    untrained: Findings | None,
    previous: Mapping[int, Findings],
    epoch: int,
    spec: EncoderSpec,
) -> Figure:
    """All curves of one epoch as small multiples; a few earlier epochs behind them, the paler the earlier.

    Args:
        findings: Of this epoch.
        untrained: Of the network before its first step.
        previous: Of earlier epochs, by epoch; at most eight of them are drawn, evenly spaced.
        epoch: This epoch.
        spec: The encoder, which decides what published curves may stand beside it.
    """
    names = depth_names([findings])
    columns = min(4, max(1, len(names)))
    rows = max(1, -(-len(names) // columns))
    width = 3.3 * columns
    figure = new_figure(2.5 * rows, width)
    figure.suptitle(f"epoch {epoch}, {findings.num_images} images", fontsize=LARGE + 2)
    label = f"epoch {epoch}"
    earlier = _evenly(sorted(e for e in previous if e < epoch), MAX_EARLIER_EPOCHS)
    shades = matplotlib.colormaps["Blues"]
    for i, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, i + 1)
        for k, e in enumerate(earlier):
            if points := depth_points(previous[e], name):
                shade = shades(0.25 + 0.4 * k / max(1, len(earlier) - 1))
                axes.plot(*_transposed(points)[:2], color=shade, linewidth=1, label=f"epoch {e}")
        before = {label: untrained} if untrained else {}
        _draw_depth(axes, name, {label: findings}, before, references_for(name, spec))
        axes.set_title(axis_title(findings.curves[name].quantity, 42), fontsize=LARGE)
        if i + columns < len(names):  # the panels below say it
            axes.set_xlabel("")
    legend_below(figure, width)
    return figure


def surface_figure(name: str, surfaces: Mapping[str, Surface]) -> Figure:
    """A quantity over depth and something else, a panel per network.

    Heat maps where the other axis is a layer too; otherwise one line per layer, coloured by depth, with a band of one
    standard error. Values between two blocks, after the self-attention, are thin lines without a band.

    Args:
        name: Name of the surface.
        surfaces: By network name.
    """
    columns = min(2, len(surfaces))
    rows = -(-len(surfaces) // columns)
    quantity = next(iter(surfaces.values())).quantity
    heat = is_heat_map(name, surfaces)
    figure = new_figure((4.0 if columns == 1 else 2.5) * rows if heat else 2.7 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=not heat).flatten().tolist()
    scale = Normalize(0, 1) if heat else Normalize(0, max(max(surface.layer) for surface in surfaces.values()))
    for axes in panels[len(surfaces) :]:
        axes.set_axis_off()
    for i, (label, surface) in enumerate(surfaces.items()):
        axes = panels[i]
        axes.tick_params(labelsize=SMALL)
        if len(surfaces) > 1:
            axes.set_title(textwrap.fill(label, 30), fontsize=LARGE)
        axes.set_xlabel("block" if heat else surface.column.replace("/ pi", "/ π"), fontsize=LARGE)
        if i % columns == 0:
            axes.set_ylabel("block" if heat else axis_title(quantity, 34), fontsize=LARGE)
        (_draw_heat_map if heat else _draw_spectra)(axes, surface, scale)
    bar = figure.colorbar(ScalarMappable(scale, "viridis"), ax=panels, fraction=0.05, pad=0.02)
    bar.set_label(axis_title(quantity) if heat else "block", fontsize=LARGE)
    bar.ax.tick_params(labelsize=SMALL)
    if not heat:
        bar.locator = MaxNLocator(integer=True)
    return figure


def is_heat_map(name: str, surfaces: Mapping[str, Surface]) -> bool:
    """Whether both axes of a surface are layers."""
    return name == "cka" or all(surface.column == "layer" for surface in surfaces.values())


def _draw_depth(
    axes: Axes,
    name: str,
    networks: Mapping[str, Findings],
    untrained: Mapping[str, Findings],
    references: Sequence[Reference],
) -> None:
    blocks = {point[0] for findings in networks.values() for point in depth_points(findings, name)}
    for k, (label, findings) in enumerate(networks.items()):
        color, marker = colors(len(networks))[k], MARKERS[k % len(MARKERS)]
        points = depth_points(findings, name)
        if not points:
            continue
        axes.plot([], [], color=color, linewidth=1.6, marker=marker, markersize=4, label=label)
        if len(networks) == 1:
            _draw_heads(axes, findings.curves.get(name), color)
        x, y, error = _transposed(points)
        low, high = (
            [v + sign * (0 if math.isnan(e) else e) for v, e in zip(y, error, strict=True)] for sign in (-1, 1)
        )
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(x, y, color=color, linewidth=1.6)
        # Half blocks get small dots, so that the blocks themselves stay countable.
        whole = [point for point in points if point[0] % 1 == 0]
        axes.plot(*_transposed(whole)[:2], color=color, marker=marker, markersize=4, linestyle="none")
        half = [point for point in points if point[0] % 1]
        axes.plot(*_transposed(half)[:2], color=color, marker=".", markersize=3, linestyle="none")
        if start := depth_points(untrained.get(label), name):
            text = "untrained" if len(networks) == 1 else f"{label}, untrained"
            axes.plot(*_transposed(start)[:2], color=color, linewidth=1.2, linestyle=":", label=text)
    _draw_uniform(axes, name, networks)
    for k, reference in enumerate(references):
        marker = MARKERS[k % len(MARKERS)]
        style: dict[str, Any] = {"color": GREY, "linewidth": 1, "marker": marker, "markersize": 3, "mfc": "white"}
        axes.plot(reference.layer, reference.value, **style, label=str(reference), zorder=1.5)
    for k, block in enumerate(b for b in sorted(blocks) if b % 1):
        axes.axvspan(block - 0.5, block, color="#f1f1f1", linewidth=0, label=None if k else "self-attention")
    block_axis(axes, [0.0, *blocks] if 0.5 in blocks else sorted(blocks) or [1])


def _draw_uniform(axes: Axes, name: str, networks: Mapping[str, Findings]) -> None:
    """Dashed lines for uniform attention: one where the networks agree, otherwise one each, in their colours."""
    lines: dict[tuple[tuple[float, float], ...], str] = {}
    for k, findings in enumerate(networks.values()):
        curve = findings.curves.get(name)
        if curve and curve.uniform and any(map(math.isfinite, curve.uniform)):
            line = tuple(
                (float(layer), round(value, 6)) for layer, value in zip(curve.layer, curve.uniform, strict=True)
            )
            lines.setdefault(line, colors(len(networks))[k])
    agree = len({value for line in lines for _, value in line}) == 1
    for k, (line, color) in enumerate(lines.items()):
        label = None if k else "uniform attention"
        axes.plot(*_transposed(line), "--", color="#333333" if agree else color, linewidth=1, label=label)


def _draw_heads(axes: Axes, curve: Curve | None, color: str) -> None:
    if curve is None or not curve.heads:
        return
    x = [layer for layer, heads in zip(curve.layer, curve.heads, strict=True) for _ in heads]
    y = [_or_nan(value) for heads in curve.heads for value in heads]
    axes.scatter(x, y, s=9, color=color, alpha=0.3, linewidth=0, label="single heads")


def _draw_heat_map(axes: Axes, surface: Surface, scale: Normalize) -> None:
    axes.imshow([[_or_nan(v) for v in row] for row in surface.value], origin="lower", cmap="viridis", norm=scale)
    for axis, names in ((axes.xaxis, surface.columns), (axes.yaxis, surface.layer)):
        ticks = range(0, len(names), max(1, len(names) // 6))
        axis.set_ticks(list(ticks), [f"{names[i]:g}" for i in ticks])


def _draw_spectra(axes: Axes, surface: Surface, scale: Normalize) -> None:
    shades = matplotlib.colormaps["viridis"]
    for i, (layer, row) in enumerate(zip(surface.layer, surface.value, strict=True)):
        values = [_or_nan(value) for value in row]
        color, thin = shades(scale(layer)), layer % 1 != 0
        axes.plot(surface.columns, values, color=color, linewidth=0.5 if thin else 1.2)
        if surface.error and not thin:
            errors = [_or_nan(error) for error in surface.error[i]]
            low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
            axes.fill_between(surface.columns, low, high, color=color, alpha=0.15, linewidth=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e8e8e8", linewidth=0.6)


def _first_curve(name: str, networks: Mapping[str, Findings]) -> Curve:
    return next(findings.curves[name] for findings in networks.values() if name in findings.curves)


def _evenly(items: list[int], count: int) -> list[int]:
    """At most ``count`` of them, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _transposed(points: Sequence[tuple[float, ...]]) -> list[list[float]]:
    """Points as one list per coordinate; three empty lists for no points."""
    return [list(column) for column in zip(*points, strict=True)] or [[], [], []]


def _or_nan(number: float) -> float:
    """An infinite value would take all of an axis; a gap shows as much."""
    return number if math.isfinite(number) else math.nan
