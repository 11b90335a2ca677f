"""Sweeps on SLURM: what a job asks for, handing jobs in, asking which are still there.

submitit writes the batch scripts and hands a job in again that runs out of time or makes room for another; it alone
does, for lightning's own requeueing is off. Nothing needs ``sacct``; without ``squeue`` the run folders alone tell.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from harmonize.sweeps import Job, Sweep, configurations
from harmonize.types import ConfigError

OURS = ("_target_", "submitit_folder", "max_num_timeout", "gpus_per_node", "cpus_per_task", "nodes", "tasks_per_node")
"""Options that do not go to submitit as they are."""


@dataclass
class Start:
    """Runs ``harmonize <command> <overrides>``; what is sent to the cluster.

    Attributes:
        command: The command.
        overrides: Its overrides.
    """

    command: str
    overrides: list[str]

    def __call__(self) -> None:
        """Run it in this process, which is the one that SLURM sends its signals to."""
        sys.argv = ["harmonize", self.command, *self.overrides]
        runpy.run_module("harmonize", run_name="__main__")

    def checkpoint(self) -> Any:
        """The same once more: the run folder says where it goes on."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


class Submission:
    """Jobs that were handed in.

    Args:
        ids: SLURM's name for a job (``123_4``) by its number in the sweep.
    """

    def __init__(self, ids: Mapping[int, str]) -> None:
        self.ids = dict(ids)
        self._silent = False

    def queued(self) -> set[int] | None:
        """Numbers of the jobs that wait or run; None where the cluster does not answer."""
        try:
            command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={os.getuid()}"]
            found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
        except (OSError, subprocess.SubprocessError) as error:
            if not self._silent:
                text = f"squeue does not answer ({error}); the run folders alone tell how jobs stand."
                warnings.warn(text, stacklevel=1)
            self._silent = True
            return None
        return {num for num, name in self.ids.items() if name in found}


def submit(sweep: Sweep, jobs: Sequence[Job]) -> tuple[Sweep, Submission]:
    """Hand jobs in, as one array for all that ask for the same.

    Returns:
        The sweep, which now knows where their logs are (as does ``sweep.yaml``), and what can be asked about them.

    Raises:
        ConfigError: submitit or SLURM is not installed, or SLURM refuses the jobs.
    """
    groups: dict[tuple[tuple[str, Any], ...], list[Job]] = {}
    for job, cfg in zip(jobs, configurations(sweep.command, [job.overrides for job in jobs]), strict=True):
        asked = tuple(resources(cfg, sweep.options).items())
        groups.setdefault(asked, []).append(job)
    folder = sweep.folder / "slurm"
    ids: dict[int, str] = {}
    logs: dict[int, Path] = {}
    for asked, members in groups.items():
        executor = make_executor(folder, sweep.options, dict(asked))
        try:
            handed_in = executor.submit_array([Start(sweep.command, job.arguments) for job in members])
        except Exception as error:  # submitit wraps what sbatch says
            raise ConfigError(f"SLURM refuses the jobs: {_last_line(error)}") from error
        for job, handle in zip(members, handed_in, strict=True):
            ids[job.num], logs[job.num] = handle.job_id, Path(handle.paths.stdout)
            print(f"harmonize: job {job.num} is SLURM's {handle.job_id}: {' '.join(job.overrides)}", flush=True)
    sweep = replace(sweep, jobs=[replace(job, log=logs.get(job.num, job.log)) for job in sweep.jobs])
    sweep.write()
    print(f"harmonize: see them, here or elsewhere, with: harmonize sweep {sweep.folder}", flush=True)
    return sweep, Submission(ids)


def resources(cfg: DictConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """Nodes, processes, cores and GPUs of a job.

    >>> from harmonize.config import compose
    >>> resources(compose(["trainer.devices=2", "trainer.accelerator=cpu", "data.num_workers=3"]), {})
    {'nodes': 1, 'tasks_per_node': 2, 'cpus_per_task': 4, 'gpus_per_node': None}
    """
    trainer = cfg.get("trainer") or {}
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    accelerator = trainer.get("accelerator", cfg.get("accelerator", "auto"))
    workers = (cfg.get("data") or {}).get("num_workers", 0)
    gpus = options.get("gpus_per_node")
    if gpus is None and (accelerator == "gpu" or (accelerator == "auto" and cluster_has_gpus())):
        gpus = devices
    cpus = options.get("cpus_per_task") or workers + 1
    return {"nodes": nodes, "tasks_per_node": devices, "cpus_per_task": cpus, "gpus_per_node": gpus}


def cluster_has_gpus() -> bool:
    """Whether ``sinfo`` knows of GPUs."""
    try:
        found = subprocess.run(["sinfo", "--noheader", "--format=%G"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return False
    return "gpu" in found.stdout


def make_executor(folder: Path, options: Mapping[str, Any], asked: Mapping[str, Any]) -> Any:
    """What submitit hands jobs in with.

    Raises:
        ConfigError: submitit or SLURM is not installed, or an option is not known.
    """
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("hydra/launcher=slurm needs submitit: pip install 'harmonize[slurm]'.") from error
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise ConfigError("hydra/launcher=slurm needs sbatch and srun: this machine does not reach a SLURM cluster.")
    executor = submitit.SlurmExecutor(folder=folder / "%j", max_num_timeout=int(options.get("max_num_timeout", 1000)))
    wanted = {key: value for key, value in options.items() if key not in OURS and value is not None}
    names = {"timeout_min": "time", "mem_gb": "mem", "name": "job_name", "tasks_per_node": "ntasks_per_node"}
    parameters = {names.get(key, key): value for key, value in {**wanted, **asked}.items() if value is not None}
    if "mem" in parameters:
        parameters["mem"] = f"{parameters['mem']}G"
    more = parameters.get("additional_parameters") or {}
    parameters |= {"stderr_to_stdout": True, "additional_parameters": {"requeue": True, **more}}
    try:
        executor.update_parameters(**parameters)
    except ValueError as error:
        raise ConfigError(f"hydra.launcher: {str(error).splitlines()[0]}") from error
    return executor


def script(cfg: DictConfig, options: Mapping[str, Any], folder: Path) -> str:
    """The batch script of one job."""
    executor = make_executor(folder, options, resources(cfg, options))
    return executor._make_submission_file_text(executor._submitit_command_str, "preview")


def _last_line(error: Exception) -> str:
    return ([line for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]
