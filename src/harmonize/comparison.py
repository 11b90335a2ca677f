"""Runs beside each other: their settings, what they reached (mean and spread over seeds), what became of each layer.

Runs that differ in their seed alone are one group, and one line or row. Everything is read from the run folders, and,
if asked for, from the results of ``harmonize evaluate``; runs may still be training.
"""

from __future__ import annotations

import json
import shlex
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from harmonize.arguments import Parser
from harmonize.config import changed_keys, instantiate, load_config
from harmonize.files import digest, find_runs, read_json, read_rows
from harmonize.reports.comparison import Cell, Group, metric_rows, write_comparison
from harmonize.reports.evaluation import result_key
from harmonize.reports.files import read_ends
from harmonize.rules import is_number, show
from harmonize.sweeps import Sweep
from harmonize.types import ConfigError, Curve, EncoderSpec, Findings, Surface

METRICS = ("epoch/loss*", "untrained/*_top1", "val/*_top1", "hours")
"""What is compared unless ``--metrics`` says otherwise, beside all results of evaluations."""


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        folder: The run folder.
        name: ``run.name``: loss, data and backbone.
        spec: Of its encoder.
        settings: Dotted key -> value, of all that can change the result.
        metrics: The latest value of every metric, and ``hours`` of training at the median rate.
        series: Metric -> (step, value) of every row.
        total_steps: Of the whole run, if it has said so.
        untrained: The diagnostics before the first step.
        trained: Those of the last epoch that has any.
        by_layer: Curve of a diagnostic, or ``evaluate/<protocol>/<metric> <series>`` -> place on its axis -> value.
    """

    folder: Path
    name: str
    spec: EncoderSpec
    settings: dict[str, Any]
    metrics: dict[str, float]
    series: dict[str, list[tuple[int, float]]]
    total_steps: int | None
    untrained: Findings | None
    trained: Findings | None
    by_layer: dict[str, dict[float, float]]


def main(arguments: list[str]) -> int:
    """``harmonize compare RUN ... | SWEEP [--evaluations FOLDER ...] [--out FOLDER]``."""
    parser = Parser(prog="harmonize compare", description=__doc__)
    parser.add_argument(
        "folders", nargs="+", type=Path, help="run folders, folders of run folders, or a sweep's folder"
    )
    parser.add_argument("--names", nargs="+", help="of the groups of runs, in the order of the table")
    parser.add_argument("--metrics", nargs="+", default=list(METRICS), help="patterns, such as 'val/*' or 'train/loss'")
    parser.add_argument(
        "--evaluations", nargs="+", type=Path, default=[], help="folders with results.json of harmonize evaluate"
    )
    parser.add_argument("--out", type=Path, help="where to write; default: the sweep's folder, or outputs/compare")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)

    folders = list(dict.fromkeys(run for folder in options.folders for run in run_folders(folder)))
    runs = [read_run(folder) for folder in folders]
    for folder in options.evaluations:
        _add_evaluations(runs, folder)
    members = in_order(group(runs))
    differences = differing([some[0].settings for some in members])
    names = options.names or labels([some[0] for some in members])
    if len(names) != len(members):
        raise ConfigError(f"--names must be {len(members)} names, one for each group of runs, not {len(names)}.")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"--names must differ from each other; {repeated[0]} stands there twice.")
    patterns = [*options.metrics, "evaluate/*"]
    groups = [summary(name, some, patterns) for name, some in zip(names, members, strict=True)]
    _print_table(groups, console)
    for run in runs:
        step = run.series["step"][-1][1]
        if run.total_steps is not None and step < run.total_steps:
            console.print(f"Note: {run.folder} is at step {step} of {run.total_steps}.")

    out = options.out or _place(options.folders, folders)
    console.print("Drawing ...")
    words = {key: list(map(show, values)) for key, values in differences.items()}
    write_comparison(out, groups, words, one_number(differences), shlex.join(["harmonize", "compare", *arguments]))
    console.print(f"Report: {out / 'report.html'}")
    return 0


def _place(given: Sequence[Path], runs: Sequence[Path]) -> Path:
    """Where the comparison goes unless somebody says: to the sweep, or to a folder named after the runs."""
    if len(given) == 1 and (given[0] / "sweep.yaml").exists():
        return given[0] / "comparison"
    return Path("outputs/compare") / digest(sorted(str(folder.absolute()) for folder in runs), 8)


def run_folders(folder: Path) -> list[Path]:
    """The run folders that a folder stands for.

    Raises:
        ConfigError: It stands for none.
    """
    if (folder / "sweep.yaml").exists():
        found = [job.folder for job in Sweep.read(folder).jobs if (job.folder / "metrics.jsonl").exists()]
    else:
        found = find_runs(folder)
    if not found:
        raise ConfigError(f"{folder}: no run folder with metrics.jsonl, nor a sweep whose runs have begun.")
    return found


def read_run(folder: Path) -> Run:
    """What a run folder holds.

    Raises:
        ConfigError: Its configuration cannot be read, or nothing has been measured.
    """
    try:
        config = load_config(folder / "config.yaml")
        name = str(config.run.name)
        settings = {key: value for key, (_, value) in changed_keys({}, config).items()}
        spec = instantiate(config.backbone).spec
    except Exception as error:  # damaged files raise one of many
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{folder} cannot be read as a run folder ({reason}).") from error
    series: dict[str, list[tuple[int, float]]] = {}
    for row in read_rows(folder / "metrics.jsonl"):
        for key, value in row.items():
            if is_number(value) and not key.startswith("diagnostics/"):
                series.setdefault(key, []).append((row["step"], value))
    if not series:
        raise ConfigError(f"{folder}: nothing has been measured yet.")
    metrics = {key: values[-1][1] for key, values in series.items()}
    if rates := [rate for _, rate in series.get("train/images_per_second", ()) if rate > 0]:
        metrics["hours"] = metrics["step"] * settings["data.batch_size"] / statistics.median(rates) / 3600
    state = read_json(folder / "metrics.json") or read_json(folder / "state.json")
    untrained, trained = read_ends(folder / "diagnostics")
    curves = {} if trained is None else trained.curves
    by_layer = {key: dict(zip(map(float, c.layer), c.value, strict=True)) for key, c in curves.items()}
    run = Run(folder, name, spec, settings, metrics, series, state.get("total_steps"), untrained, trained, by_layer)
    for path in sorted(folder.glob("evaluations/*/results.json")):
        _add_results(run, json.loads(path.read_text()))
    return run


def group(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in their seed alone, together; in the order of their first."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in run.settings.items() if key != "seed"}
        found.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    return list(found.values())


def differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Key -> its value in each of several configurations, for every key in which they differ; the seed is none.

    >>> differing([{"seed": 0, "a": 1, "b": 2}, {"seed": 1, "a": 1, "b": 3}])
    {'b': [2, 3]}
    """
    keys = sorted(set().union(*settings) - {"seed"})
    values = {key: [some.get(key) for some in settings] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def one_number(differences: Mapping[str, list[Any]]) -> tuple[str, list[float]] | None:
    """The setting that differs, with its values, if it is a single one and a number."""
    numbers = [(key, values) for key, values in differences.items() if all(map(is_number, values))]
    return numbers[0] if len(numbers) == len(differences) == 1 else None


def in_order(groups: list[list[Run]]) -> list[list[Run]]:
    """Groups of runs by the one number in which they differ; as they are if they differ otherwise."""
    setting = one_number(differing([some[0].settings for some in groups]))
    if setting is None:
        return groups
    return [some for _, some in sorted(zip(setting[1], groups, strict=True), key=lambda pair: pair[0])]


def labels(runs: Sequence[Run]) -> list[str]:
    """A name for each of several runs: where ``run.name`` differs, then settings until they can be told apart.

    Of the settings that differ those take part that all runs have, in alphabetical order.
    """
    parts = [run.name.split("-") for run in runs]
    differ = [column for column in zip(*parts, strict=False) if len(set(column)) > 1]
    names = [" ".join(column[i] for column in differ) for i in range(len(runs))]
    for key, values in differing([run.settings for run in runs]).items():
        if len(set(names)) == len(names):
            break
        if any(key not in run.settings for run in runs):
            continue
        short = key.rpartition(".")[2]
        names = [f"{name} {short}={show(value)}".strip() for name, value in zip(names, values, strict=True)]
    return [name if names.count(name) == 1 and name else f"{name} {i + 1}".strip() for i, name in enumerate(names)]


def _add_evaluations(runs: Sequence[Run], folder: Path) -> None:
    """Add single numbers of ``results.json`` files to the metrics of the runs whose checkpoints they are about.

    Raises:
        ConfigError: None of them is about these runs.
    """
    added = 0
    for path in sorted(folder.rglob("results.json")):
        rows = json.loads(path.read_text())
        for run in runs:
            own = [row for row in rows if _is_about(row, run)]
            _add_results(run, own)
            added += len(own)
    if not added:
        raise ConfigError(f"--evaluations {folder}: no results.json there is about a checkpoint of these runs.")


def _is_about(row: Mapping[str, Any], run: Run) -> bool:
    return Path(str(row.get("checkpoint") or "")).absolute().is_relative_to(run.folder.absolute())


def _add_results(run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        key = result_key(row)
        if row["axis"]:
            run.by_layer.setdefault(key, {})[float(row["at"])] = row["value"]
        else:
            run.metrics[key] = row["value"]


def summary(name: str, runs: Sequence[Run], patterns: Sequence[str]) -> Group:
    """Runs that differ in their seed alone, as a group whose metrics match one of some patterns."""
    known = dict.fromkeys(key for run in runs for key in run.metrics)
    keys = [k for k in known if any(fnmatch(k, pattern) for pattern in patterns) and "chance" not in k]
    return Group(
        name,
        [run.folder for run in runs],
        {key: Cell([run.metrics[key] for run in runs if key in run.metrics]) for key in keys},
        runs[0].spec,
        [run.series.get("train/lambda", []) for run in runs],
        average([run.trained for run in runs if run.trained is not None]),
        average([run.untrained for run in runs if run.untrained is not None]),
        {
            key: {at: Cell([run.by_layer[key][at] for run in runs]) for at in runs[0].by_layer[key]}
            for key in runs[0].by_layer
            if all(run.by_layer.get(key, {}).keys() == runs[0].by_layer[key].keys() for run in runs)
        },
    )


def average(found: Sequence[Findings]) -> Findings:
    """The mean over runs of every curve and surface that all of them have, with its standard deviation over runs.

    Of one run it is the run's own, with its standard errors over images.
    """
    if len(found) <= 1:
        return found[0] if found else Findings()
    mean = Findings(num_images=min(one.num_images for one in found))
    for name, curve in found[0].curves.items():
        curves = [one.curves.get(name) for one in found]
        same = [c for c in curves if isinstance(c, Curve) and list(c.layer) == list(curve.layer)]
        if len(same) == len(found):
            cells = [Cell(list(values)) for values in zip(*(c.value for c in same), strict=True)]
            numbers = [cell.mean for cell in cells], [cell.sd for cell in cells]
            mean.curves[name] = Curve(curve.quantity, curve.layer, *numbers, uniform=curve.uniform)
    for name, surface in found[0].surfaces.items():
        surfaces = [one.surfaces.get(name) for one in found]
        alike = [s for s in surfaces if isinstance(s, Surface) and list(s.columns) == list(surface.columns)]
        if len(alike) == len(found):
            rows = [
                [Cell(list(values)) for values in zip(*lines, strict=True)]
                for lines in zip(*(s.value for s in alike), strict=True)
            ]
            value, error = ([[getattr(cell, what) for cell in row] for row in rows] for what in ("mean", "sd"))
            mean.surfaces[name] = replace(surface, value=value, error=error)
    return mean


def _print_table(groups: Sequence[Group], console: Console) -> None:
    table = Table(title="mean ± standard deviation over seeds", title_justify="left")
    table.add_column("", no_wrap=True)
    for one in groups:
        table.add_column(f"{one.name}\nn = {len(one.folders)}", justify="right")
    for row in metric_rows(groups):
        table.add_row(*row)
    console.print(table)
