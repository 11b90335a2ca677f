"""``harmonize doctor``: what would stop, slow down or spoil a run on this machine, before it starts.

Every check looks at the thing itself (a process group is started, a file is written, images are decoded) and yields
findings. One that raises is a finding, and one that hangs is left behind; nothing is trained, downloaded or kept.
"""

from __future__ import annotations

import os
import threading
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harmonize.checks.disks import disks
from harmonize.checks.findings import Finding, Patient, first_line, number, ok, problem, warning
from harmonize.checks.hardware import cores, gpus
from harmonize.checks.images import images, run
from harmonize.checks.packages import packages, torch_loading
from harmonize.checks.processes import limits, process_groups
from harmonize.checks.slurm import slurm
from harmonize.checks.speed import speed
from harmonize.checks.tracking import wandb
from harmonize.config import compose, launcher_of, to_plain
from harmonize.rules import violations
from harmonize.types import ConfigError

HELP = """\
Check this machine for the run of a configuration: packages, GPUs, cores, memory of the workers, process groups, SLURM,
W&B, images, disks, and whether the images come as fast as they are learnt from. Nothing is trained or kept.

usage: harmonize doctor [key=value ...] [--quick]

options
  --quick                leave out the speed of loader and training step, which takes 20 seconds

examples
  harmonize doctor
  harmonize doctor loss=hybrid data=folder data.root=my_images trainer.devices=2
  harmonize doctor --quick experiment=demo
"""


@dataclass(frozen=True)
class Check:
    """An entry of the list of checks.

    Attributes:
        name: As in the table.
        look: Yields what it finds.
        seconds: How long it may take.
        needs_torch: Whether it is of no use where torch does not load.
        of_machine: Whether it looks at the machine that computes, which of a job of SLURM is another one.
        quick: Whether ``--quick`` includes it.
    """

    name: str
    look: Callable[[Patient], Iterator[Finding]]
    seconds: float = 30
    needs_torch: bool = True
    of_machine: bool = False
    quick: bool = True


def main(arguments: list[str]) -> int:
    """Check this machine for the run of a configuration, and print what was found.

    Args:
        arguments: ``--quick``, and settings as for ``harmonize train``.

    Returns:
        1 if there is a problem, else 0.

    Raises:
        ConfigError: The settings contain a mistake, which is not the machine's.
    """
    parser = ArgumentParser(add_help=False)
    parser.error = _refuse  # type: ignore[method-assign]
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("settings", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    if options.help:
        print(HELP, end="")
        return 0
    cfg = compose(options.settings)
    if mistakes := list(violations(to_plain(cfg))):
        raise ConfigError("\n".join(mistakes))
    if _rank() > 0:  # started by srun or torchrun once per device: one of them looks
        return 0
    console = Console(highlight=False)
    findings = examine(Patient(cfg, launcher_of(options.settings)), options.quick, console)
    show(findings, console)
    return int(any(finding.level == "problem" for _, finding in findings))


def _refuse(message: str) -> NoReturn:
    raise ConfigError(
        f"{message[0].upper()}{message[1:]}; settings are written key=value, see harmonize doctor --help."
    )


def examine(patient: Patient, quick: bool, console: Console) -> list[tuple[str, Finding]]:
    """The names of the checks with what they found, each sentence once."""
    found: dict[Finding, str] = {}
    if patient.is_elsewhere:
        text = "This machine submits jobs; GPUs, cores, limits and speed are those of the machines that compute."
        found[ok(text, "To look at one, start harmonize doctor in a job.")] = "machine"
    torch_loads = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for check in CHECKS:
            if (quick and not check.quick) or (check.of_machine and patient.is_elsewhere):
                continue
            if check.needs_torch and not torch_loads:
                found[warning("Not checked, because torch does not load.")] = check.name
                continue
            with console.status(f"{check.name} ..."):
                findings = within(check, patient)
            if check.look is torch_loading:
                torch_loads = all(finding.level == "ok" for finding in findings)
            for finding in findings:
                found.setdefault(finding, check.name)
    return [(name, finding) for finding, name in found.items()]


def within(check: Check, patient: Patient) -> list[Finding]:
    """What a check finds in the time that it has; a failure or a delay of its own is a finding too."""
    findings: list[Finding] = []

    def look() -> None:
        try:
            for finding in check.look(patient):
                findings.append(finding)  # one by one: what came before a failure stays
        except ConfigError as error:
            sentences = (s if s.endswith((".", "?")) else f"{s}." for s in str(error).splitlines())
            findings.extend(map(problem, sentences))
        except Exception as error:  # whatever a broken machine may raise is what was asked for
            findings.append(problem(f"The check failed: {type(error).__name__}: {first_line(error)}."))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(check.seconds)
    if not thread.is_alive():
        return findings
    late = f"There is no answer after {check.seconds:.0f} seconds."
    return [
        *findings,
        problem(late, "Something hangs: a network file system, a driver or a server; look at it by hand."),
    ]


def show(findings: Iterable[tuple[str, Finding]], console: Console) -> None:
    """Print the table, and the count of what is not well."""
    colours = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    table = Table(show_header=False, box=None, padding=(0, 1, 0, 0))
    counts = dict.fromkeys(colours, 0)
    before = ""
    for name, finding in findings:
        counts[finding.level] += 1
        text = Text(finding.found)
        if finding.advice:
            text.append(f" {finding.advice}", style="bold" if finding.level != "ok" else "")
        table.add_row(Text(finding.level, style=colours[finding.level]), name if name != before else "", text)
        before = name
    console.print(table)
    console.print(", ".join(f"{n} {level if n == 1 or level == 'ok' else level + 's'}" for level, n in counts.items()))


CHECKS = (
    Check("packages", packages, needs_torch=False),
    Check("torch", torch_loading, seconds=300, needs_torch=False),  # imports are slow on a network file system
    Check("GPU", gpus, seconds=90, of_machine=True),
    Check("cores", cores, of_machine=True),
    Check("processes", process_groups, seconds=150),
    Check("SLURM", slurm, needs_torch=False),
    Check("W&B", wandb, seconds=60),
    Check("run", run, seconds=300),  # a million files are listed
    Check("images", images, seconds=300),
    Check("limits", limits, needs_torch=False, of_machine=True),
    Check("disk", disks),
    Check("speed", speed, seconds=120, quick=False, of_machine=True),
)


def _rank() -> int:
    """This process's number, if a launcher has started several."""
    started = "SLURM_STEP_ID" in os.environ
    return number("RANK") or (number("SLURM_PROCID") or 0 if started else 0)
