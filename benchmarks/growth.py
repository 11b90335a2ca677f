"""How time and memory grow with what a user may make larger.

    python -m benchmarks.growth --json growth.json --figures figures      # some 15 minutes on two cores
    python -m benchmarks.growth --quick

Four sweeps: a training step of the hybrid over images in a batch, side of the images in px and blocks of the network,
and a pass of all diagnostics over the number of images. Each point is a fresh process in each round. Memory is its
peak: resident, without what was there before the step (``MiB``; on a GPU that of the tensors). The peer of each point
is the time of the sweep's smallest one in proportion to the size: a ratio above 1 is growth faster than the size. Two
rows for each sweep have the exponents that fit all of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.common import ROOT, Report, Row, devices, exponent, interleave, parser, peak_mib, row
from benchmarks.diagnostics import prepare
from benchmarks.steps import Size, our_step
from harmonize.config import compose, instantiate

BASE = Size("vit_tiny", 64, 8, 32)
QUICK = Size("vit_tiny", 16, 8, 4, head=64, depth=1)
SWEEPS: dict[str, tuple[list[int], list[int]]] = {
    "batch": ([16, 32, 64, 128], [4, 8]),
    "image_size": ([32, 64, 96, 128], [16, 32]),
    "depth": ([3, 6, 12, 24], [1, 2]),
    "diagnostics": ([16, 32, 64, 128], [4, 8]),
}
"""What grows -> its values, and those of --quick."""


def action(sweep: str, value: int, size: Size, device: str) -> Callable[[], object]:
    """What one point measures, ready to run."""
    if sweep == "diagnostics":
        encoder = instantiate(compose(size.overrides).backbone).to(device).eval()
        return prepare(encoder, "all", value, size.image_size, device)
    return our_step(["loss=hybrid"], replace(size, **{sweep: value}), device).run


def point(sweep: str, value: int, size: Size) -> None:
    """In the child: the median time of three runs, and the memory that they took; a first one is not timed."""
    device = devices()[0]
    run = action(sweep, value, size, device)
    before = peak_mib(device)
    seconds = statistics.median(interleave({"": run}, 3, device)[""])
    print(json.dumps({"seconds": seconds, "mib": peak_mib(device) - before}))


def measure(sweep: str, values: Sequence[int], options: argparse.Namespace) -> list[Row]:
    """All rows of one sweep."""
    seconds: dict[int, list[float]] = {value: [] for value in values}
    memory: dict[int, list[float]] = {value: [] for value in values}
    for i in range(options.rounds):
        for value in values[:: 1 if i % 2 else -1]:
            command = [sys.executable, "-m", "benchmarks.growth", "--child", sweep, str(value)]
            command += ["--quick"] * options.quick
            found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            numbers = json.loads(found.splitlines()[-1])
            seconds[value].append(numbers["seconds"])
            memory[value].append(max(numbers["mib"], 0.1))
    first = values[0]
    rows = []
    for value in values:
        proportional = [t * value / first for t in seconds[first]]
        mib = sorted(memory[value])[len(memory[value]) // 2]
        rows.append(row(f"{sweep} {value}", seconds[value], proportional, MiB=mib))
    for what, found in (("time", seconds), ("memory", memory)):
        powers = [exponent(values, [found[value][i] for value in values]) for i in range(options.rounds)]
        rows.append(row(f"{sweep}: exponent of {what}", powers, unit=""))
    if options.figures:
        draw(options.figures / f"{sweep}.png", sweep, seconds, memory)
    return rows


def draw(path: Path, sweep: str, seconds: dict[int, list[float]], memory: dict[int, list[float]]) -> None:
    """Time and memory with their exponents, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (what, unit, found) in zip(
        figure.subplots(1, 2), (("time", "s", seconds), ("memory", "MiB", memory)), strict=True
    ):
        values = list(found)
        middle = [sorted(found[value])[len(found[value]) // 2] for value in values]
        axes.loglog(values, middle, "o-")
        for value in values:
            axes.plot([value] * 2, [min(found[value]), max(found[value])], color="C0", alpha=0.4)
        axes.set(xlabel=sweep.replace("_", " "), ylabel=f"{what} [{unit}]")
        axes.set_title(f"{what}, exponent {exponent(values, middle):.2f}")
        axes.set_xticks(values, map(str, values))
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    options = parser(__doc__, rounds=3)
    options.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    options.add_argument("--figures", type=Path, help="folder for one PNG for each sweep")
    options.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = options.parse_args(arguments)
    size = QUICK if options.quick else BASE
    if options.child:
        point(options.child[0], int(options.child[1]), size)
        return
    if options.quick:
        options.rounds = 1
    report = Report(options)
    for sweep in options.sweeps:
        report.add(f"{sweep} ({size.title})", measure(sweep, SWEEPS[sweep][options.quick], options))


if __name__ == "__main__":
    main()
