"""The tables of README.md and the files beside it, from the results of ``evaluate.sh``.

Command: python experiments/evaluation_first_look/report.py outputs/evaluation_first_look/results
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROTOCOLS = (
    "knn",
    "linear_probe",
    "linear_probe_grid",
    "linear_probe_mae",
    "layer_probe",
    "shape_bias",
    "frequency_noise",
    "robustness",
    "segmentation_linear",
    "fine_tune",
)
LEFT_OUT = {"grid_top1", "iou"}  # long; they are in the rows


def cell(rows: list[dict[str, Any]]) -> str:
    """A number with its error, or the values of a curve."""
    if len(rows) > 1:
        return " ".join(f"{100 * row['value']:.1f}" for row in rows)
    row = rows[0]
    text = f"{100 * row['value']:.1f}"
    if row["low"] is not None:
        return f"{text} ({100 * row['low']:.1f} ... {100 * row['high']:.1f})"
    return text if row["standard_error"] is None else f"{text} ± {100 * row['standard_error']:.1f}"


def table(rows: list[dict[str, Any]]) -> str:
    networks = list(dict.fromkeys(row["network"] for row in rows))
    lines = [f"| | {' | '.join(networks)} |", "|---|" + "---|" * len(networks)]
    for metric, series in dict.fromkeys((r["metric"], r["series"]) for r in rows if r["metric"] not in LEFT_OUT):
        own = [[r for r in rows if (r["network"], r["metric"], r["series"]) == (n, metric, series)] for n in networks]
        axis = own[0][0]["axis"] if own[0] else ""
        label = ", ".join(filter(None, [metric, series, f"by {axis}" if axis else ""]))
        lines.append(f"| {label} | {' | '.join(cell(found) if found else '' for found in own)} |")
    notes = list(dict.fromkeys(f"{r['network']}: {r['note']}" for r in rows if r["note"]))
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])


def main(results: str) -> None:
    """Print a table for each protocol and data set, and keep rows and figures beside the README."""
    for folder in sorted(path for path in Path(results).iterdir() if path.is_dir()):
        for protocol in PROTOCOLS:
            source = folder / protocol
            if not (source / "results.json").is_file():
                continue
            place = HERE / folder.name
            place.mkdir(exist_ok=True)
            shutil.copy(source / "results.csv", place / f"{protocol}.csv")
            shutil.copy(source / "results.png", place / f"{protocol}.png")
            rows = json.loads((source / "results.json").read_text())
            print(f"\n#### {folder.name}: {protocol}\n\n{table(rows)}\n\n![{protocol}]({folder.name}/{protocol}.png)")


if __name__ == "__main__":
    main(sys.argv[1])
