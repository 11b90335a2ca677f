"""What all benchmarks share: rows, taking turns, the table, the JSON file, and what the machine is.

One convention everywhere: a ratio is ours over the other's, so that less is better, and a goal is the largest value
that the ratio may have.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
Spread = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: What was measured.
        ours: Median over rounds, in ``unit``.
        peer: The same of what it is compared with, if any.
        limit: The same of what no implementation can do without, if that is known.
        ratio_peer: Median of ours over peer, round by round.
        ratio_limit: Median of ours over limit, round by round.
        goal: Largest value of what ``goal_of`` names.
        met: Whether the goal is kept.
        goal_of: ``peer`` or ``limit`` (the ratio to it) or ``ours`` (the number itself).
        unit: Of ours, peer and limit.
        spread_peer: Smallest and largest ratio to the peer.
        spread_limit: Smallest and largest ratio to the limit.
        note: What a reader must know.
        more: Further numbers, by name.
    """

    name: str
    ours: float | None
    peer: float | None = None
    limit: float | None = None
    ratio_peer: float | None = None
    ratio_limit: float | None = None
    goal: float | None = None
    met: bool | None = None
    goal_of: str | None = None
    unit: str = "s"
    spread_peer: Spread | None = None
    spread_limit: Spread | None = None
    note: str = ""
    more: dict[str, Any] = field(default_factory=dict)


def row(
    name: str,
    ours: Sequence[float],
    peer: Sequence[float] = (),
    limit: Sequence[float] = (),
    goal: float | None = None,
    of: str = "peer",
    unit: str = "s",
    note: str = "",
    **more: Any,
) -> Row:
    """A row from the numbers of all rounds; nothing stands for no peer or no limit.

    >>> found = row("a", [2.0, 3.0, 4.0], peer=[1.0, 2.0, 1.0], goal=2.5)
    >>> found.ours, found.peer, found.ratio_peer, found.spread_peer, found.met
    (3.0, 1.0, 2.0, (1.5, 4.0), True)
    """
    ratios = {
        "ours": sorted(ours),
        "peer": sorted(a / b for a, b in zip(ours, peer, strict=True)) if peer else [],
        "limit": sorted(a / b for a, b in zip(ours, limit, strict=True)) if limit else [],
    }
    middle = {key: statistics.median(values) if values else None for key, values in ratios.items()}
    spread = {key: (values[0], values[-1]) if values else None for key, values in ratios.items()}
    judged = middle[of]
    return Row(
        name,
        middle["ours"],
        statistics.median(peer) if peer else None,
        statistics.median(limit) if limit else None,
        middle["peer"],
        middle["limit"],
        goal,
        None if goal is None or judged is None else judged <= goal,
        None if goal is None else of,
        unit,
        spread["peer"],
        spread["limit"],
        note,
        more,
    )


def skipped(name: str, reason: object) -> Row:
    """A row for what could not be measured here, with the reason."""
    return Row(name, None, note=f"skipped: {reason}")


def interleave(
    actions: Mapping[Any, Callable[[], object]], num: int, device: torch.device | str = "cpu", warm: bool = True
) -> dict[Any, list[float]]:
    """Seconds of each action in each round; who begins changes from round to round.

    Args:
        actions: What takes turns, by name.
        num: Number of rounds.
        device: Where the work is done; a GPU is waited for.
        warm: Whether there is a first round that is not counted.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    for action in actions.values() if warm else ():
        action()
    times: dict[Any, list[float]] = {name: [] for name in actions}
    for i in range(num):
        for name in list(actions)[:: 1 if i % 2 else -1]:
            wait()
            start = time.perf_counter()
            actions[name]()
            wait()
            times[name].append(time.perf_counter() - start)
    return times


def repeat(action: Callable[[], object], times: int) -> Callable[[], None]:
    """The action several times over."""

    def run() -> None:
        for _ in range(times):
            action()

    return run


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The power of ``x`` that ``y`` grows with: the slope of a straight line through their logarithms.

    >>> exponent([1, 2, 4], [3, 12, 48])
    2.0
    """
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


@contextmanager
def quietly() -> Iterator[None]:
    """Without what a training run prints."""
    with redirect_stdout(io.StringIO()):
        yield


@contextmanager
def own_cache() -> Iterator[None]:
    """With an empty folder for harmonize's cache of images, here and in child processes, instead of the user's."""
    with TemporaryDirectory() as folder, mock.patch.dict(os.environ, HARMONIZE_CACHE=folder):
        yield


# ---- the machine -----------------------------------------------------------------------------------------------------


def devices() -> list[str]:
    """The GPU, where there is one, else the CPU."""
    return ["cuda"] if torch.cuda.is_available() else ["cpu"]


def machine() -> dict[str, Any]:
    """What the numbers depend on, without the machine's name."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "cpu": found[1] if found else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def peak_mib(device: str = "cpu") -> float:
    """Peak memory of this process, in MiB: resident, or on a GPU that of the tensors."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's memory before exec
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


# ---- options, the table, the file ------------------------------------------------------------------------------------


def parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="write the rows there")
    made.add_argument("--quick", action="store_true", help="tiny sizes that show nothing but that it runs")
    made.add_argument("--rounds", type=int, default=rounds, help=f"in which all take turns ({rounds})")
    return made


class Report:
    """Prints tables as they come, and keeps the file whole after each of them.

    Args:
        options: With ``json`` and ``rounds``.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.path: Path | None = options.json
        self.rounds: int = options.rounds
        self.machine = machine()
        self.rows: list[Row] = []
        self.console = Console(highlight=False)
        if not self.console.is_terminal:
            self.console = Console(highlight=False, width=200)
        self.console.print(", ".join(f"{key} {value}" for key, value in self.machine.items() if value is not None))

    def add(self, title: str, rows: Sequence[Row]) -> None:
        """Show some rows, and write all of them so far."""
        table = Table(title=f"{title}; medians of {self.rounds} rounds", title_justify="left")
        table.add_column("", overflow="fold")
        for heading in ("ours", "peer", "limit", "unit", "ours / peer", "ours / limit", "goal"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("note", overflow="fold")
        for r in rows:
            note = "; ".join([r.note] * bool(r.note) + [f"{key} {_text(value)}" for key, value in r.more.items()])
            table.add_row(r.name, _text(r.ours), _text(r.peer), _text(r.limit), r.unit, *verdict(r), note)
        self.console.print(table)
        self.rows += rows
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = [asdict(r) | {"rounds": self.rounds, "machine": self.machine} for r in self.rows]
            self.path.write_text(json.dumps(content, indent=2) + "\n")


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def verdict(r: Row) -> tuple[str, str, str]:
    """Ours over the peer and over the limit, each with its spread, and whether the goal is met."""
    goal = "" if r.goal is None else f"{r.goal_of} <= {r.goal:.3g}: {'met' if r.met else 'MISSED'}"
    return _ratio(r.ratio_peer, r.spread_peer), _ratio(r.ratio_limit, r.spread_limit), goal


def _ratio(value: float | None, spread: Spread | None) -> str:
    return "" if value is None or spread is None else f"{value:.3f} ({spread[0]:.2f} ... {spread[1]:.2f})"
