"""What a check looks at, what it says, and the small things that several checks need."""

from __future__ import annotations

import copy
import os
import subprocess
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from harmonize.training.setup import Setup

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """A line of the table.

    Attributes:
        level: ``ok``, ``warning`` (the run works, but slower or with less than one may expect) or ``problem``.
        found: What was found, one sentence.
        advice: What to do about it.
    """

    level: str
    found: str
    advice: str = ""


ok = partial(Finding, "ok")
warning = partial(Finding, "warning")
problem = partial(Finding, "problem")


@dataclass
class Patient:
    """What the checks look at.

    Attributes:
        cfg: The configuration; nothing is downloaded for it.
        launcher: The options of the launcher that a sweep with this configuration is started with.
        setup: The parts of its run, once they have been built.
    """

    cfg: DictConfig
    launcher: dict[str, Any] = field(default_factory=dict)
    setup: Setup | None = None

    def __post_init__(self) -> None:
        self.cfg = copy.deepcopy(self.cfg)
        self.downloads = bool(self.cfg.data.get("download"))
        if self.downloads:
            self.cfg.data.download = False

    @property
    def devices(self) -> int:
        """Processes of the run on one machine."""
        return self.cfg.trainer.devices

    @property
    def uses_slurm(self) -> bool:
        """Whether the run is to be submitted to SLURM."""
        return str(self.launcher.get("_target_", "")).endswith(".SlurmLauncher")

    @property
    def is_elsewhere(self) -> bool:
        """Whether the run computes on other machines than this one."""
        return self.uses_slurm and "SLURM_JOB_ID" not in os.environ


def on_gpu(patient: Patient) -> bool:
    """Whether the run computes on a GPU here."""
    from harmonize.training.setup import computes_on_gpu

    return computes_on_gpu(patient.cfg)


def installed(package: str) -> str | None:
    """The version of a package; None: it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def output_of(command: list[str]) -> str | None:
    """What a program prints; None where there is none, where it fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def number(variable: str) -> int | None:
    """A whole number from the environment."""
    value: str = os.environ.get(variable, "")
    return int(value) if value.isdigit() else None


def first_line(error: object) -> str:
    """What an exception says, without a full stop; its kind, if it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def in_bytes(num_bytes: float) -> str:
    """Bytes in words.

    >>> in_bytes(64 * 2**20), in_bytes(3 * 2**30)
    ('64 MiB', '3.0 GiB')
    """
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.0f} MiB"
