"""The page, tables and figures of ``harmonize compare``."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from harmonize.files import write_whole
from harmonize.reports.html import Network, inline_svg, number, save_figure, table, write_report
from harmonize.reports.style import LARGE, MARKERS, colors, legend_below, new_figure, plain_axes
from harmonize.types import EncoderSpec, Findings

# Of the axes of the trade-off, the best that all groups have.
ACROSS = ("evaluate/linear_probe/top1", "val/linear_top1")
UP = ("evaluate/fine_tune/top1", "val/knn_top1")
COLUMNS = ("group", "runs", "metric", "mean", "standard_deviation", "num_values", "values")


@dataclass(frozen=True)
class Cell:
    """One metric over the seeds of a group.

    >>> str(Cell([0.5, 0.7])), str(Cell([0.25])), str(Cell([]))
    ('0.60 ± 0.14', '0.25', '')
    """

    values: list[float]

    @property
    def mean(self) -> float:
        """Over those that are finite; NaN if there is none."""
        finite = [value for value in self.values if math.isfinite(value)]
        return statistics.fmean(finite) if finite else math.nan

    @property
    def sd(self) -> float:
        """Standard deviation; NaN for fewer than two."""
        finite = [value for value in self.values if math.isfinite(value)]
        return statistics.stdev(finite) if len(finite) > 1 else math.nan

    def __str__(self) -> str:
        return number(self.mean, self.sd) if self.values else ""


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
        name: As in legends.
        folders: Of the runs.
        cells: Metric -> its values over the runs.
        spec: Of their encoder.
        weights: lambda over the steps of each run; empty where there is none.
        trained: Diagnostics: mean and standard deviation over the runs.
        untrained: The same before the first step.
        by_layer: What runs over blocks, or another axis: its name -> place -> values over the runs.
    """

    name: str
    folders: list[Path]
    cells: dict[str, Cell]
    spec: EncoderSpec
    weights: list[list[tuple[int, float]]]
    trained: Findings
    untrained: Findings
    by_layer: dict[str, dict[float, Cell]] = field(default_factory=dict)


def write_comparison(
    folder: Path,
    groups: Sequence[Group],
    differences: Mapping[str, list[str]],
    setting: tuple[str, list[float]] | None,
    command: str,
) -> None:
    """Write ``report.html``, ``comparison.md``, ``comparison.csv``, ``figures/`` and the files of the diagnostics.

    Args:
        folder: Made if need be.
        groups: At least one.
        differences: Key -> its value in each group, as one types it.
        setting: The one number in which the groups differ, with its values, if there is one.
        command: The command that made it.
    """
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    rows = metric_rows(groups)
    head = metric_head(groups)
    settings = [[key, *values] for key, values in differences.items()]
    drawn = {
        "trade_off": ("Trade-off", trade_off(groups)),
        "settings": ("Over the setting that differs", over_setting(groups, *setting) if setting else None),
        "lambda": ("Weight of the contrastive loss", weight_curves(groups)),
    }
    figures = {name: (title, figure) for name, (title, figure) in drawn.items() if figure is not None}
    parts = ["<h2>What they reached</h2><p>Mean ± standard deviation over seeds.</p>", table(head, rows)]
    cards = [
        f'<figure><h3>{escape(title)}</h3><div class="plot">'
        f"{inline_svg(save_figure(folder / 'figures', name, figure), f'{name}-', title)}</div></figure>"
        for name, (title, figure) in figures.items()
    ]
    parts.append(f'<div class="cards">{"".join(cards)}</div>')
    parts += ["<h2>What differs in their settings</h2>", table(["", *head[1:]], settings)]
    pictures = "\n\n".join(f"![{title}](figures/{name}.png)" for name, (title, _) in figures.items())
    text = [
        markdown_table(head, rows),
        pictures,
        "Settings that differ:",
        markdown_table(head, settings),
        f"Made by `{command}`.",
    ]
    write_whole(folder / "comparison.md", ("\n\n".join(filter(None, text)) + "\n").encode())
    write_whole(folder / "comparison.csv", _csv(groups).encode())
    networks = [
        Network(
            one.name,
            one.trained,
            one.untrained if one.untrained.curves else None,
            one.spec,
            {"runs": str(len(one.folders)), "run folders": ", ".join(path.name for path in one.folders)},
        )
        for one in groups
    ]
    many = max(len(one.folders) for one in groups) > 1
    spread = "standard deviation over seeds (of a single run: standard error over the images)"
    spread = spread if many else "standard error over the images"
    write_report(folder, networks, "Runs beside each other", command, "\n".join(parts), spread)


def metric_head(groups: Sequence[Group]) -> list[str]:
    """What stands above the columns of :func:`metric_rows`."""
    return ["", *(f"{one.name} (n = {len(one.folders)})" for one in groups)]


def metric_rows(groups: Sequence[Group]) -> list[list[str]]:
    """Metrics down, groups across."""
    keys = dict.fromkeys(key for one in groups for key in one.cells)
    return [[key, *(str(one.cells.get(key, Cell([]))) for one in groups)] for key in keys]


def trade_off_axes(groups: Sequence[Group]) -> tuple[str, str] | None:
    """The metrics of the trade-off: for each axis the best that all groups have; None if there is none."""
    axes = [next((key for key in keys if all(key in one.cells for one in groups)), None) for keys in (ACROSS, UP)]
    return None if None in axes else (str(axes[0]), str(axes[1]))


def trade_off(groups: Sequence[Group]) -> Figure | None:
    """One metric over another, a point for each group with its spread; the hours of training in the legend."""
    axes_of = trade_off_axes(groups)
    if axes_of is None:
        return None
    across, up = axes_of
    figure = new_figure(3.2)
    axes = figure.add_subplot()
    plain_axes(axes)
    for i, (one, color) in enumerate(zip(groups, colors(len(groups)), strict=True)):
        x, y = one.cells[across], one.cells[up]
        hours = f", {one.cells['hours'].mean:.2g} h" if "hours" in one.cells else ""
        axes.errorbar(
            100 * x.mean,
            100 * y.mean,
            xerr=_bar(x, 100),
            yerr=_bar(y, 100),
            color=color,
            marker=MARKERS[i % len(MARKERS)],
            linestyle="",
            capsize=2,
            label=f"{one.name}{hours}",
        )
    axes.set_xlabel(f"{across} (%)", fontsize=LARGE)
    axes.set_ylabel(f"{up} (%)", fontsize=LARGE)
    legend_below(figure)
    return figure


def over_setting(groups: Sequence[Group], setting: str, values: Sequence[float]) -> Figure | None:
    """Every metric over a number, whose ascending values are the groups'; None for fewer than three."""
    if len(groups) < 3:
        return None
    keys = [key for key, *_ in metric_rows(groups)]
    rows = -(-len(keys) // 2)
    figure = new_figure(1.9 * rows)
    panels = figure.subplots(rows, 2, squeeze=False).flatten().tolist()
    for axes in panels[len(keys) :]:
        axes.set_axis_off()
    for axes, key in zip(panels, keys, strict=False):
        points = [(value, one.cells[key]) for value, one in zip(values, groups, strict=True) if key in one.cells]
        axes.errorbar(
            [value for value, _ in points],
            [cell.mean for _, cell in points],
            [_bar(cell) or 0.0 for _, cell in points],
            color=colors(1)[0],
            marker="o",
            markersize=4,
            capsize=2,
        )
        axes.set_title(key, fontsize=LARGE)
        plain_axes(axes)
    for axes in panels[max(0, len(keys) - 2) : len(keys)]:
        axes.set_xlabel(setting, fontsize=LARGE)
    return figure


def weight_curves(groups: Sequence[Group]) -> Figure | None:
    """The weight lambda over the steps, where it changes in some run."""
    if not any(len({value for _, value in curve}) > 1 for one in groups for curve in one.weights):
        return None
    figure = new_figure(2.4)
    axes = figure.add_subplot()
    plain_axes(axes)
    for one, color in zip(groups, colors(len(groups)), strict=True):
        if curve := next(filter(None, one.weights), None):
            axes.plot(*zip(*curve, strict=True), color=color, label=one.name)
    axes.set_xlabel("step", fontsize=LARGE)
    axes.set_ylabel("lambda", fontsize=LARGE)
    legend_below(figure)
    return figure


def _bar(cell: Cell, scale: float = 1.0) -> float | None:
    return scale * cell.sd if cell.sd > 0 else None


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; nothing without rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _csv(groups: Sequence[Group]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in groups:
        for key, cell in one.cells.items():
            numbers = ["" if math.isnan(value) else value for value in (cell.mean, cell.sd)]
            writer.writerow(
                [one.name, len(one.folders), key, *numbers, len(cell.values), " ".join(map(str, cell.values))]
            )
    return text.getvalue()
