"""Findings as plain containers (JSON) and as one long table (CSV), and back."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harmonize.files import finite, write_whole
from harmonize.types import Curve, Findings, Quantity, Surface

COLUMNS = ["network", "diagnostic", "layer", "head", "column", "column_value", "value", "standard_error", "unit"]


def to_plain(findings: Findings) -> dict[str, Any]:
    """Curves and surfaces as lists, numbers and strings that JSON can hold; pictures are left out.

    A value that is not finite becomes None, because JSON knows neither NaN nor infinity.
    """
    return {
        "num_images": findings.num_images,
        "curves": {
            name: asdict(curve.quantity)
            | {
                "layer": list(curve.layer),
                "value": finite(curve.value),
                "standard_error": finite(curve.error),
                "heads": finite(curve.heads),
                "head_standard_errors": finite(curve.head_errors),
                "uniform": finite(curve.uniform),
            }
            for name, curve in findings.curves.items()
        },
        "surfaces": {
            name: asdict(surface.quantity)
            | {
                "layer": list(surface.layer),
                "column": surface.column,
                "columns": list(surface.columns),
                "value": finite(surface.value),
                "standard_error": finite(surface.error),
            }
            for name, surface in findings.surfaces.items()
        },
    }


def from_plain(plain: Mapping[str, Any]) -> Findings:
    """The findings that :func:`to_plain` wrote, without pictures; None among numbers becomes NaN."""
    findings = Findings(num_images=plain["num_images"])
    for name, entry in plain["curves"].items():
        findings.curves[name] = Curve(
            quantity=_quantity(entry),
            layer=entry["layer"],
            value=_floats(entry["value"]),
            error=_floats(entry["standard_error"]),
            heads=_floats(entry["heads"]),
            head_errors=_floats(entry["head_standard_errors"]),
            uniform=_floats(entry["uniform"]),
        )
    for name, entry in plain["surfaces"].items():
        findings.surfaces[name] = Surface(
            quantity=_quantity(entry),
            layer=entry["layer"],
            column=entry["column"],
            columns=entry["columns"],
            value=_floats(entry["value"]),
            error=_floats(entry["standard_error"]),
        )
    return findings


def read_history(folder: Path) -> dict[int, Findings]:
    """Epoch -> what was found, from the files of a run; a file that cannot be read is left out."""
    found = map(_read_epoch, sorted(folder.glob("epoch_*.json")))
    return dict(epoch for epoch in found if epoch is not None)


def read_ends(folder: Path) -> tuple[Findings | None, Findings | None]:
    """What was found in the first epoch that can be read, if it is that of the untrained network, and in the last."""
    paths = sorted(folder.glob("epoch_*.json"))
    last = next(filter(None, map(_read_epoch, reversed(paths))), None)
    first = next(filter(None, map(_read_epoch, paths)), None)
    return (first[1] if first and first[0] == 0 else None), (last[1] if last and last[0] > 0 else None)


def _read_epoch(path: Path) -> tuple[int, Findings] | None:
    try:
        plain = json.loads(path.read_text())
        return int(plain["epoch"]), from_plain(plain)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_csv(path: Path, networks: Mapping[str, Findings]) -> None:
    """Write every number in a row of its own.

    ``head`` counts from 1 and is empty for the mean over heads; ``column`` and ``column_value`` are filled for surfaces
    alone; a number that is not finite is an empty cell.

    Args:
        path: File to write, whole or not at all.
        networks: Findings by network name.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for network, findings in networks.items():
        for name, curve in findings.curves.items():
            writer.writerows([network, name, *row, curve.quantity.unit] for row in _curve_rows(curve))
        for name, surface in findings.surfaces.items():
            writer.writerows([network, name, *row, surface.quantity.unit] for row in _surface_rows(surface))
    write_whole(path, text.getvalue().encode())


def _curve_rows(curve: Curve) -> Iterator[list[Any]]:
    for i, layer in enumerate(curve.layer):
        yield [layer, "", "", "", _cell(curve.value[i]), _cell(curve.error[i])]
        for head, value in enumerate(curve.heads[i] if curve.heads else []):
            error = curve.head_errors[i][head] if curve.head_errors else math.nan
            yield [layer, head + 1, "", "", _cell(value), _cell(error)]


def _surface_rows(surface: Surface) -> Iterator[list[Any]]:
    for i, layer in enumerate(surface.layer):
        for j, column in enumerate(surface.columns):
            error = surface.error[i][j] if surface.error else math.nan
            yield [layer, "", surface.column, column, _cell(surface.value[i][j]), _cell(error)]


def _cell(number: float) -> float | str:
    return number if math.isfinite(number) else ""


def _quantity(entry: Mapping[str, Any]) -> Quantity:
    return Quantity(**{key: entry[key] for key in ("title", "unit", "definition", "source", "figure")})


def _floats(numbers: Any) -> Any:
    """Nested lists with NaN for None; None itself, a list that was never there, stays None."""
    return numbers if numbers is None else [_floats(n) if isinstance(n, list) else _nan(n) for n in numbers]


def _nan(number: float | None) -> float:
    return math.nan if number is None else number
