"""One self-contained, interactive page: of runs, of a sweep, or of a set of studies with their findings.

A set of studies is a YAML file: for each study its question, the commands whose runs answer it, the groups of runs by
their settings, and the claims that are to be judged (``experiments/findings.yaml`` is this project's own).
"""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from harmonize.arguments import Parser
from harmonize.claims import Claim, judge, read_claim
from harmonize.comparison import (
    METRICS,
    Run,
    differing,
    group,
    in_order,
    labels,
    one_number,
    read_run,
    run_folders,
    summary,
)
from harmonize.config import composer
from harmonize.files import digest, write_whole
from harmonize.reports.comparison import Cell, Group
from harmonize.reports.study import (
    MARKS,
    Finding,
    Study,
    groups_from_plain,
    groups_to_plain,
    study_page,
    write_findings,
    write_results,
)
from harmonize.types import ConfigError

KEYS = {"question", "runs", "groups", "curves", "axes", "rows", "over", "pictures", "claims", "metrics"}


def main(arguments: list[str]) -> int:
    """``harmonize report RUN ... | SWEEP | FILE.yaml [key=value ...] [--only STUDY ...] [--out FOLDER]``."""
    parser = Parser(prog="harmonize report", description=__doc__)
    parser.add_argument(
        "targets",
        nargs="+",
        help="run folders, folders of runs or a sweep's folder; or one YAML file of studies, and settings (scale=gpu) "
        "that are added to the commands of its runs",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="STUDY", help="of a file: these studies alone")
    parser.add_argument(
        "--collect", action="store_true", help="of a file: keep the numbers beside it, NAME/results.json"
    )
    parser.add_argument(
        "--kept", action="store_true", help="of a file: show the numbers beside it, whatever runs are here"
    )
    parser.add_argument("--out", type=Path, help="where to write report.html; default: outputs/report")
    parser.add_argument("--title", help="of the page")
    options = parser.parse_intermixed_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    first = Path(options.targets[0])
    if first.suffix in (".yaml", ".yml"):
        if options.kept and (options.collect or options.targets[1:]):
            raise ConfigError("--kept shows what has been kept: it goes neither with --collect nor with settings.")
        studies = read_studies(first, options.targets[1:], options.only, options.collect, options.kept, console)
        title, out = options.title or "What the experiments found", options.out or Path("outputs/report")
    else:
        studies = [of_runs([Path(target) for target in options.targets])]
        title = options.title or "Runs beside each other"
        out = options.out or Path("outputs/report") / digest(sorted(options.targets), 8)
    out.mkdir(parents=True, exist_ok=True)
    _print_findings(studies, console)
    command = shlex.join(["harmonize", "report", *arguments])
    write_whole(out / "report.html", study_page(studies, title, command).encode())
    if options.collect:
        write_findings(first.parent, read_studies(first, kept=True))
    elif any(study.findings for study in studies):
        write_findings(out, studies)
    console.print(f"Report: {out / 'report.html'}")
    return 0


def of_runs(folders: Sequence[Path]) -> Study:
    """Runs as one study without claims.

    Raises:
        ConfigError: A folder holds no run.
    """
    runs = [read_run(run) for run in dict.fromkeys(run for folder in folders for run in run_folders(folder))]
    members = in_order(group(runs))
    names = labels([some[0] for some in members])
    groups = [summary(name, some, [*METRICS, "evaluate/*"]) for name, some in zip(names, members, strict=True)]
    over = one_number(differing([some[0].settings for some in members])) if len(members) > 1 else None
    axes = {key: _axis(key) for one in groups for key in one.by_layer if key.startswith("evaluate/")}
    return Study("Runs", "What the runs reached, and what became of each layer.", [], groups, over=over, axes=axes)


def read_studies(
    path: Path,
    settings: Sequence[str] = (),
    only: Sequence[str] = (),
    collect: bool = False,
    kept: bool = False,
    console: Console | None = None,
) -> list[Study]:
    """The studies of a file, with the verdicts on their claims.

    Where a study's runs are not there but its numbers are (``NAME/results.json`` beside the file), these are taken;
    so they are where numbers are to be written and fewer runs are there than the file holds.

    Args:
        path: The file.
        settings: Added to the commands of all runs.
        only: Names of studies; empty: all.
        collect: Whether to write the numbers beside the file.
        kept: Whether to take these numbers in any case, and leave out studies without.
        console: Where it says what is missing; None: nowhere.

    Raises:
        ConfigError: The file cannot be read, or neither runs nor numbers of a study are there.
    """
    try:
        plain = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # of YAML, or of the file system
        raise ConfigError(f"{path} cannot be read ({str(error).splitlines()[0]}).") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{path}: studies by name are needed.")
    nodes: dict[str, dict[str, Any]] = {str(name): node for name, node in plain.items()}
    if unknown := set(only) - set(nodes):
        raise ConfigError(f"--only {', '.join(sorted(unknown))}: {path} has {', '.join(nodes)}.")
    studies = []
    for name, node in nodes.items():
        if only and name not in only:
            continue
        if unknown := set(node) - KEYS:
            raise ConfigError(
                f"{path}, {name}: unknown {', '.join(sorted(unknown))}; there is {', '.join(sorted(KEYS))}."
            )
        if kept and not (path.parent / name / "results.json").exists():
            continue
        studies.append(_study(name, node, path.parent, settings, collect, kept, console or Console(quiet=True)))
    return studies


def _study(
    name: str,
    node: Mapping[str, Any],
    folder: Path,
    settings: Sequence[str],
    collect: bool,
    kept: bool,
    console: Console,
) -> Study:
    file = folder / name / "results.json"
    groups = [] if kept else _groups_of(name, node, settings, console)
    held: list[Group] = []
    if (collect or not groups) and file.exists() and not settings:
        held = groups_from_plain(json.loads(file.read_text()))
    if not groups and not held:
        raise ConfigError(f"{name}: no runs are there yet; start them with: {_commands(node, settings)[0]}")
    if _num_runs(groups) < _num_runs(held):  # a part of the runs must not take the place of all
        console.print(f"{name}: from {file}{f', which holds {_num_runs(held)} runs' if groups else ''}.")
        groups = held
    else:
        for rows in node.get("rows", []):
            _add_rows(groups, folder / rows)
        if collect:
            file.parent.mkdir(parents=True, exist_ok=True)
            plain = groups_to_plain(groups)
            write_whole(file, (json.dumps(plain, separators=(",", ":")) + "\n").encode())
            groups = groups_from_plain(plain)  # what is shown is what is kept
    by_name = {one.name: one for one in groups}
    findings = [
        _finding(read_claim(claim), by_name, list(map(str, node["groups"]))) for claim in node.get("claims", [])
    ]
    over = None
    if "over" in node:
        over = node["over"], [float(node["groups"][one.name][node["over"]]) for one in groups]
    study = Study(
        name,
        str(node["question"]),
        _commands(node, settings),
        groups,
        curves=node.get("curves"),
        over=over,
        axes={key: _axis(key) for key in node.get("axes", [])},
        pictures={folder / p: text for p, text in node.get("pictures", {}).items() if (folder / p).exists()},
        findings=findings,
    )
    if collect:
        write_results(folder / name, study)
    return study


def _num_runs(groups: Sequence[Group]) -> int:
    return len({folder.name for one in groups for folder in one.folders})


def _add_rows(groups: Sequence[Group], path: Path) -> None:
    """Add what a script has measured: rows of group, seed, quantity, place on its axis and value."""
    if not path.exists():
        return
    with path.open() as file:
        rows = sorted(csv.DictReader(file), key=lambda row: int(row["seed"]))
    for one in groups:
        for row in rows:
            if row["group"] == one.name:
                curve = one.by_layer.setdefault(row["quantity"], {})
                curve.setdefault(float(row["at"]), Cell([])).values.append(float(row["value"]))


def _commands(node: Mapping[str, Any], settings: Sequence[str]) -> list[str]:
    return [" ".join(["python train.py", command, *settings]) for command in node["runs"]]


def _groups_of(name: str, node: Mapping[str, Any], settings: Sequence[str], console: Console) -> list[Group]:
    """The groups of a study from its runs; none if no run is there."""
    with composer("train") as conf:
        commands = [[*shlex.split(command), *settings] for command in node["runs"]]
        folders = list(dict.fromkeys(run for command in commands for run in conf.folders(command)))
    there = [run for run in folders if (run / "metrics.json").exists()]
    if not there:
        return []
    if len(there) < len(folders):
        console.print(f"{name}: {len(folders) - len(there)} of {len(folders)} runs are not finished.")
    runs = sorted(map(read_run, there), key=lambda run: run.settings["seed"])
    found = []
    for label, wanted in node["groups"].items():
        members = [run for run in runs if _fits(run, wanted)]
        if len(alike := group(members)) > 1:
            keys = ", ".join(differing([some[0].settings for some in alike]))
            raise ConfigError(f"{name}, group {label}: its runs differ in {keys}; say which are meant.")
        if members:
            found.append(summary(str(label), members, node.get("metrics", [*METRICS, "evaluate/*"])))
    return found


def _fits(run: Run, wanted: Mapping[str, Any]) -> bool:
    """Whether a run has some settings; one that is a schedule, say, has keys of its own."""
    flat = {f"{key}.{k}": v for key, value in wanted.items() if isinstance(value, Mapping) for k, v in value.items()}
    flat |= {key: value for key, value in wanted.items() if not isinstance(value, Mapping)}
    return all(key in run.settings and run.settings[key] == value for key, value in flat.items())


def _finding(claim: Claim, groups: Mapping[str, Group], declared: Sequence[str]) -> Finding:
    sides = [side for one in (claim.more, claim.less) for side in (one, one.minus) if side is not None]
    if unknown := [side.group for side in sides if side.group not in declared]:
        raise ConfigError(f"Claim {claim.text!r}: there is no group {unknown[0]}; there are {', '.join(declared)}.")
    return judge(claim, groups)


def _axis(key: str) -> str:
    return "noise frequency (radians per px)" if "frequency" in key else "block"


def _print_findings(studies: Sequence[Study], console: Console) -> None:
    table = Table(title="Findings", title_justify="left")
    for column in ("", "claim", "more", "less"):
        table.add_column(column)
    for study in studies:
        for f in study.findings:
            sides = f"{f.more} {f.more_values}", f"{f.less} {f.less_values}"
            table.add_row(f"{MARKS[f.verdict]} {f.verdict}", f.claim, *sides)
    if table.row_count:
        console.print(table)
