"""The tables of benchmarks/README.md, from the JSON files of the benchmarks.

python -m benchmarks.tables benchmarks/results/*.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.common import Row, verdict


def markdown(lines: Iterable[Mapping[str, Any]]) -> str:
    """Rows of one JSON file as a table; a row without a measurement is left out."""
    table = ["| | ours | unit | ours / peer | ours / limit | goal |", "|---|---|---|---|---|---|"]
    for line in lines:
        row = Row(**{field.name: line[field.name] for field in fields(Row)})
        if row.ours is not None:
            table.append(f"| {' | '.join((row.name, f'{row.ours:.3g}', row.unit, *verdict(row)))} |")
    return "\n".join(table)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        found = json.loads(path.read_text())
        machine = ", ".join(f"{key} {value}" for key, value in found[0]["machine"].items() if value)
        print(f"`{path.name}`: {machine}\n\n{markdown(found)}\n")
