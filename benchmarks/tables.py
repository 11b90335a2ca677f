"""The tables of benchmarks/README.md, from the JSON files of the benchmarks.

python -m benchmarks.tables benchmarks/results/*.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def number(value: float | None) -> str:
    """Three significant digits.

    >>> number(None), number(0.18619), number(1208.4)
    ('', '0.186', '1208')
    """
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def ratio(line: Mapping[str, Any], of: str) -> str:
    """A ratio with its smallest and largest value over the rounds."""
    value, spread = line[f"ratio_{of}"], line[f"spread_{of}"]
    if value is None:
        return ""
    return f"{value:.2f}" + (f" ({spread[0]:.2f} ... {spread[1]:.2f})" if spread else "")


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows of one JSON file as a table; a row without a measurement is left out."""
    lines = ["| | ours | unit | ours / peer | ours / limit | goal |", "|---|---|---|---|---|---|"]
    for line in rows:
        if line["ours"] is None:
            continue
        goal = ""
        if line["goal"] is not None:
            goal = f"{line['goal_of']} <= {line['goal']:.3g}: {'met' if line['met'] else '**missed**'}"
        cells = (line["name"], number(line["ours"]), line["unit"], ratio(line, "peer"), ratio(line, "limit"), goal)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        found = json.loads(path.read_text())
        machine = ", ".join(f"{key} {value}" for key, value in found[0]["machine"].items() if value)
        print(f"`{path.name}`: {machine}\n\n{markdown(found)}\n")
