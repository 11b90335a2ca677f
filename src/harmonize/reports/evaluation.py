"""Results of evaluations as files (JSON, CSV) and as one figure per protocol."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harmonize.files import write_json, write_whole
from harmonize.reports.style import (
    GREY,
    LARGE,
    MARKERS,
    SMALL,
    block_axis,
    colors,
    legend_below,
    new_figure,
    plain_axes,
    to_png,
    to_svg,
)

Row = Mapping[str, Any]

COLUMNS = (
    "protocol",
    "network",
    "metric",
    "series",
    "axis",
    "at",
    "value",
    "standard_error",
    "low",
    "high",
    "num_images",
    "feature",
    "data",
    "seed",
    "checkpoint",
    "fingerprint",
    "settings",
    "note",
    "published",
    "published_source",
    "harmonize",
)
"""Of a row: ``low`` and ``high`` bound the 95 % interval, ``settings`` is a hash of the protocol's and the data's."""

METRICS = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "grid_top1": "top-1 accuracy of each head",
    "accuracy_drop": "drop in top-1 accuracy",
    "miou": "mean IoU",
    "iou": "IoU",
    "pixel_accuracy": "pixel accuracy",
    "shape_bias": "shape bias",
    "shape_accuracy": "decisions for the shape",
    "texture_accuracy": "decisions for the texture",
}
AXES = {"frequency": "noise frequency (radians per px)", "learning_rate": "learning rate"}
LINES = ("-", "--", ":", "-.")
LABEL_LETTERS = 26


def result_key(row: Row) -> str:
    """The name of a row's number among the metrics of a run.

    >>> result_key({"protocol": "knn", "metric": "top1", "series": "k=20"})
    'evaluate/knn/top1 k=20'
    """
    return f"evaluate/{row['protocol']}/{row['metric']} {row['series']}".strip()


def write_results(folder: Path, rows: Sequence[Row], title: str) -> list[Path]:
    """Write ``results.json``, ``results.csv``, ``results.png`` and ``results.svg``, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", list(rows))
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / "results.csv", text.getvalue().encode())
    figure = result_figure(rows, title)
    write_whole(folder / "results.png", to_png(figure))
    write_whole(folder / "results.svg", to_svg(figure).encode())
    return [folder / f"results.{ending}" for ending in ("json", "csv", "png", "svg")]


def result_figure(rows: Sequence[Row], title: str) -> Figure:
    """Points with error bars for single numbers, then lines for every metric that runs over an axis; in percent.

    Args:
        rows: With the columns of :data:`COLUMNS`; at least one.
        title: Over the figure.
    """
    networks = list(dict.fromkeys(row["network"] for row in rows))
    palette = dict(zip(networks, colors(len(networks)), strict=True))
    single = [row for row in rows if not row["axis"]]
    curves = [
        [row for row in rows if row["axis"] and row["metric"] == metric]
        for metric in dict.fromkeys(row["metric"] for row in rows if row["axis"])
    ]
    labels = list(dict.fromkeys(_label(row) for row in single))
    lines = sum(1 + label.count("\n") for label in labels)
    heights = [*([0.5 + 0.12 * len(labels) + 0.13 * lines] if single else []), *(2.4 for _ in curves)]
    figure = new_figure(sum(heights) + 0.3)
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0].tolist()
    if single:
        _draw_points(axes.pop(0), single, labels, palette)
    for ax, curve in zip(axes, curves, strict=True):
        _draw_lines(ax, curve, palette)
    figure.suptitle(title, fontsize=LARGE)
    legend_below(figure)
    return figure


def _label(row: Row) -> str:
    words = ", ".join(filter(None, [METRICS.get(row["metric"], row["metric"]), row["series"]]))
    return textwrap.fill(words, LABEL_LETTERS)


def _draw_points(ax: Axes, rows: Sequence[Row], labels: Sequence[str], palette: Mapping[str, str]) -> None:
    plain_axes(ax)
    for n, (network, color) in enumerate(palette.items()):
        own = [row for row in rows if row["network"] == network]
        offset = 0.5 * ((n + 0.5) / len(palette) - 0.5)
        y = [labels.index(_label(row)) + offset for row in own]
        style: dict[str, Any] = {"linestyle": "", "marker": MARKERS[n % len(MARKERS)], "markersize": 4, "capsize": 2}
        ax.errorbar(_percent(own), y, xerr=_errors(own), label=network, color=color, **style)
        known = [
            (100 * row["published"], place) for row, place in zip(own, y, strict=True) if row["published"] is not None
        ]
        if known:
            published, where = zip(*known, strict=True)
            ax.plot(
                published, where, "D", label="published, of another network", color=GREY, fillstyle="none", markersize=4
            )
    ax.set_yticks(range(len(labels)), labels, fontsize=SMALL)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.set_xlabel("%", fontsize=LARGE)


def _draw_lines(ax: Axes, rows: Sequence[Row], palette: Mapping[str, str]) -> None:
    axis, metric = rows[0]["axis"], rows[0]["metric"]
    if axis == "block":
        block_axis(ax, [row["at"] for row in rows])
    else:
        plain_axes(ax)
        ax.set_xlabel(AXES.get(axis, str(axis)), fontsize=LARGE)
        if axis == "learning_rate":
            ax.set_xscale("log")
    names = list(dict.fromkeys(str(row["series"]) for row in rows))
    for network, color in palette.items():
        for i, name in enumerate(names):
            own = [row for row in rows if (row["network"], row["series"]) == (network, name)]
            if own:
                label = f"{network}, {name}" if name else network
                style: dict[str, Any] = {
                    "linestyle": LINES[i % len(LINES)],
                    "marker": "o",
                    "markersize": 3,
                    "linewidth": 1.2,
                    "capsize": 2,
                }
                ax.errorbar([row["at"] for row in own], _percent(own), _errors(own), label=label, color=color, **style)
    ax.set_ylabel("%", fontsize=LARGE)
    ax.set_title(METRICS.get(metric, str(metric)), fontsize=LARGE, loc="left")


def _percent(rows: Sequence[Row]) -> list[float]:
    return [100 * row["value"] for row in rows]


def _errors(rows: Sequence[Row]) -> list[list[float]]:
    """Lengths of the error bars below and above: the interval where there is one, else one standard error."""
    below, above = [], []
    for row in rows:
        error = row["standard_error"] or 0.0
        below.append(100 * (error if row["low"] is None else max(0.0, row["value"] - row["low"])))
        above.append(100 * (error if row["high"] is None else max(0.0, row["high"] - row["value"])))
    return [below, above]
