"""Figures that can be zoomed and read off, as HTML that needs nothing from elsewhere (plotly)."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from harmonize.files import finite
from harmonize.reports.comparison import Cell, Group
from harmonize.reports.figures import depth_points
from harmonize.reports.references import Reference
from harmonize.reports.style import GREY, colors
from harmonize.types import ConfigError, Findings

SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x")
CONFIG = {"displayModeBar": False, "responsive": True}

# Plotly draws text and grid in the colours of its layout, which has to follow the page's.
FOLLOW_THE_PAGE = """
const dark = window.matchMedia('(prefers-color-scheme: dark)');
function paint() {
  const css = getComputedStyle(document.documentElement), get = name => css.getPropertyValue(name).trim();
  for (const plot of document.querySelectorAll('.js-plot')) {
    const line = get('--line');
    Plotly.relayout(plot, {'font.color': get('--ink'), 'xaxis.gridcolor': line, 'yaxis.gridcolor': line,
      'xaxis.linecolor': line, 'yaxis.linecolor': line});
  }
}
function draw() {
  for (const plot of document.querySelectorAll('.js-plot')) {
    const figure = JSON.parse(plot.querySelector('script').textContent);
    plot.replaceChildren();
    Plotly.newPlot(plot, figure.data, figure.layout, figure.config);
  }
  paint();
}
dark.addEventListener('change', paint);
draw();
"""


def library() -> str:
    """The program that draws the figures, to be put into a page once.

    Raises:
        ConfigError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError("A report needs plotly: pip install 'harmonize[report]'.") from error
    return str(get_plotlyjs())


def curves(
    name: str,
    networks: Mapping[str, Findings],
    untrained: Findings | None = None,
    references: Sequence[Reference] = (),
) -> str:
    """A curve over depth: a line per network with its spread; dashed uniform attention, dotted the untrained one."""
    data: list[dict[str, Any]] = []
    for (label, findings), color, symbol in zip(
        networks.items(), colors(len(networks)), _symbols(len(networks)), strict=True
    ):
        if points := depth_points(findings, name):
            data += _with_band(points, label, color, symbol)
    if untrained is not None and (points := depth_points(untrained, name)):
        data.append(_line(points, "untrained", GREY, dash="dot"))
    curve = next(findings.curves[name] for findings in networks.values() if name in findings.curves)
    if curve.uniform:
        points = [(float(x), value, math.nan) for x, value in zip(curve.layer, curve.uniform, strict=True)]
        data.append(_line(points, "uniform attention", GREY, dash="dash"))
    for reference in references:
        points = [(float(x), value, math.nan) for x, value in zip(reference.layer, reference.value, strict=True)]
        data.append(_line(points, str(reference), GREY))
    quantity = curve.quantity
    unit = f" ({quantity.unit})" if quantity.unit else ""
    return _plot(data, "block", f"{quantity.title}{unit}", quantity.title)


def scatter(groups: Sequence[Group], across: str, up: str) -> str:
    """One metric over another, a point for each group with its spread over seeds; in percent."""
    data = []
    for one, color, symbol in zip(groups, colors(len(groups)), _symbols(len(groups)), strict=True):
        x, y = one.cells.get(across), one.cells.get(up)
        if x is None or y is None:
            continue
        data.append(
            _marker(one.name, color, symbol)
            | {"x": [100 * x.mean], "y": [100 * y.mean], "error_x": _bar([x]), "error_y": _bar([y]), "mode": "markers"}
        )
    return _plot(data, f"{across} (%)", f"{up} (%)", f"{up} over {across}")


def over_setting(setting: str, values: Sequence[float], lines: Mapping[str, Sequence[Cell]], title: str) -> str:
    """Metrics over a setting, a line for each; in percent."""
    data = []
    for (label, cells), color, symbol in zip(lines.items(), colors(len(lines)), _symbols(len(lines)), strict=True):
        data.append(
            _marker(label, color, symbol)
            | {"x": list(values), "y": [100 * cell.mean for cell in cells], "error_y": _bar(cells)}
        )
    return _plot(data, setting, "%", title)


def lines_over(axis: str, lines: Mapping[str, Mapping[float, Cell]], title: str, percent: bool) -> str:
    """A quantity over an axis, a line for each group with its spread over seeds."""
    scale = 100 if percent else 1
    data = []
    for (label, cells), color, symbol in zip(lines.items(), colors(len(lines)), _symbols(len(lines)), strict=True):
        points = [(at, scale * cell.mean, scale * cell.sd) for at, cell in sorted(cells.items())]
        data += _with_band(points, label, color, symbol)
    return _plot(data, axis, "%" if percent else "", title)


def _with_band(
    points: Sequence[tuple[float, float, float]], label: str, color: str, symbol: str
) -> list[dict[str, Any]]:
    line = _line(points, label, color) | {"marker": {"symbol": symbol, "size": 6}, "mode": "lines+markers"}
    solid = [(x, value, error) for x, value, error in points if math.isfinite(value) and math.isfinite(error)]
    if not solid:
        return [line]
    around = [value + error for _, value, error in solid] + [value - error for _, value, error in reversed(solid)]
    band = {
        "type": "scatter",
        "x": [x for x, _, _ in solid] + [x for x, _, _ in reversed(solid)],
        "y": around,
        "fill": "toself",
        "fillcolor": color + "30",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "legendgroup": label,
        "showlegend": False,
        "mode": "lines",
    }
    return [band, line | {"legendgroup": label}]


def _line(points: Sequence[tuple[float, float, float]], label: str, color: str, dash: str = "solid") -> dict[str, Any]:
    x, y, error = zip(*points, strict=True)
    text = ["" if not math.isfinite(e) else f"± {e:.2g}" for e in error]
    return {
        "type": "scatter",
        "x": list(x),
        "y": list(y),
        "name": label,
        "mode": "lines",
        "line": {"color": color, "width": 2, "dash": dash},
        "text": text,
        "hovertemplate": "%{y:.4g} %{text}<extra>%{fullData.name}, %{x:g}</extra>",
    }


def _marker(label: str, color: str, symbol: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": label,
        "mode": "lines+markers",
        "marker": {"color": color, "symbol": symbol, "size": 8},
        "line": {"color": color, "width": 2},
        "hovertemplate": "(%{x:.3g}, %{y:.3g})<extra>%{fullData.name}</extra>",
    }


def _bar(cells: Sequence[Cell]) -> dict[str, Any]:
    return {"type": "data", "array": [100 * cell.sd for cell in cells], "thickness": 1.2, "width": 4}


def _symbols(count: int) -> list[str]:
    return [SYMBOLS[i % len(SYMBOLS)] for i in range(count)]


def _plot(data: list[dict[str, Any]], across: str, up: str, title: str) -> str:
    axis = {"zeroline": False, "ticks": "outside", "automargin": True}
    up = textwrap.fill(up, 28, break_on_hyphens=False).replace("\n", "<br>")
    layout = {
        "autosize": True,
        "xaxis": axis | {"title": {"text": across}},
        "yaxis": axis | {"title": {"text": up}},
        "height": 380,
        "margin": {"l": 56, "r": 12, "t": 12, "b": 48},
        "legend": {"orientation": "h", "yref": "container", "y": 0},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "hovermode": "closest",
    }
    content = json.dumps(finite({"data": data, "layout": layout, "config": CONFIG})).replace("<", "\\u003c")
    return (
        f'<div class="js-plot" role="img" aria-label="{escape(title)}">'
        f'<script type="application/json">{content}</script>'
        "<noscript>This figure needs JavaScript; its numbers are below.</noscript></div>"
    )
