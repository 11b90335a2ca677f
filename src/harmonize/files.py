"""Files and their names: written whole or not at all, so that nobody sees half of one, and named by what they hold."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file; NaN and infinities become null, which JSON lacks a word for."""
    write_whole(path, (json.dumps(finite(value), indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no such file, or something else in it."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_rows(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``; a line that a kill cut short is left out.

    Args:
        path: The file; where there is none, there are no rows.
        last_bytes: Only rows within so many bytes at its end; None: all.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        if last_bytes is not None:
            file.seek(max(0, path.stat().st_size - last_bytes))
        lines = file.read().splitlines()
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def digest(value: Any, length: int) -> str:
    """The first ``length`` hexadecimal digits of the SHA-256 of a plain value, whatever the order of its keys.

    >>> digest({"a": 1, "b": [2]}, 8) == digest({"b": [2], "a": 1}, 8)
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def finite(value: Any) -> Any:
    """Nested containers with None for every number that is not finite.

    >>> finite({"a": [1, float("nan")]})
    {'a': [1, None]}
    """
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def find_runs(folder: Path) -> list[Path]:
    """Run folders, which have ``metrics.jsonl``: the folder itself, or those in it."""
    if (folder / "metrics.jsonl").exists():
        return [folder]
    return sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
