"""Each benchmark runs, with sizes that show nothing else, and writes rows that agree with themselves: no times."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FIELDS = {"name", "ours", "peer", "limit", "ratio_peer", "ratio_limit", "goal", "met"}
# Name -> further options that keep it short.
BENCHMARKS = {
    "train_step": ["--objectives", "contrastive", "mim", "hybrid", "hybrid, shared"],
    "input_pipeline": [],
    "diagnostics": [],
    "evaluation": [],
    "startup": [],
    "growth": ["--sweeps", "batch", "diagnostics"],
}


def check_row(row: dict) -> None:
    """The eight fields are there, the ratio lies within its spread and near that of the medians, the goal is judged."""
    assert row.keys() >= FIELDS
    if row["ours"] is None:  # what is not installed says so
        assert row["note"].startswith("skipped: ")
        assert [row[key] for key in FIELDS - {"name", "ours"}] == [None] * 6
        return
    assert math.isfinite(row["ours"])
    for other in ("peer", "limit"):
        ratio, spread = row[f"ratio_{other}"], row[f"spread_{other}"]
        assert (row[other] is None) == (ratio is None) == (spread is None)
        if ratio is not None:
            assert row[other] > 0
            assert 0 < spread[0] <= ratio <= spread[1]
            if row["rounds"] == 1:
                assert ratio == pytest.approx(row["ours"] / row[other])
    assert (row["goal"] is None) == (row["met"] is None) == (row["goal_of"] is None)
    if row["goal"] is not None:
        judged = row["ours"] if row["goal_of"] == "ours" else row[f"ratio_{row['goal_of']}"]
        assert row["met"] == (judged <= row["goal"])


SLOW = ("diagnostics", "startup", "growth")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in BENCHMARKS])
def test_benchmark(name, tmp_path):
    file = tmp_path / "new" / "rows.json"
    more = [*BENCHMARKS[name], *(["--figures", str(tmp_path)] if name == "growth" else [])]
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", str(file), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(file.read_text())
    assert rows
    for row in rows:
        check_row(row)
    assert len({row["name"] for row in rows}) == len(rows)
    if name == "growth":
        assert {path.stem for path in tmp_path.glob("*.png")} == {"batch", "diagnostics"}


def test_every_benchmark_is_tested_explained_and_run_by_make():
    listed = re.search(r"^BENCHMARKS := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert listed == list(BENCHMARKS)
    assert [name for name in listed if f"benchmarks.{name}" not in page] == []
