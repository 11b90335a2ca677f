"""SLURM: its commands and queues, and, within a job, whether that has the shape of the run."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

from harmonize.checks.findings import Finding, Patient, installed, number, ok, output_of, problem, warning

if TYPE_CHECKING:
    from omegaconf import DictConfig

SLURM = {
    "sbatch": "jobs cannot be submitted from here",
    "srun": "a job cannot start one process per device",
    "scontrol": "a job that is stopped before its end is not handed in again",
    "squeue": "harmonize sweep cannot ask which jobs wait or run, and goes by the run folders alone",
    "sacct": "",  # harmonize does not ask it
}
"""Command -> what does not work without it."""
_MODULE = "Load SLURM's module, or start this on a login node."


def slurm(patient: Patient) -> Iterator[Finding]:
    """The commands of SLURM, its partitions, and, within a job, whether it has the shape of the run."""
    there = [name for name in SLURM if shutil.which(name)]
    in_job = "SLURM_JOB_ID" in os.environ
    if not there and not in_job:
        if patient.uses_slurm:
            yield problem("hydra/launcher=slurm needs sbatch and srun, which are not on PATH.", _MODULE)
        else:
            yield ok("There is no SLURM here; runs start directly.")
        return
    yield ok(f"Commands of SLURM on PATH: {', '.join(there) or 'none'}.")
    for name, lost in SLURM.items():
        if name not in there and lost:
            report = problem if patient.uses_slurm and name in ("sbatch", "srun") else warning
            yield report(f"{name} is not on PATH: {lost}.", _MODULE)
    absent = [name for name in ("submitit", "hydra-submitit-launcher") if installed(name) is None]
    if absent and "sbatch" in there:
        report = problem if patient.uses_slurm else warning
        yield report(
            f"{' and '.join(absent)}, which submit sweeps, are not installed.", "pip install 'harmonize[slurm]'"
        )
    if in_job:
        yield from _job(patient.cfg)
    if shutil.which("sinfo"):
        yield from _partitions(patient)


def _job(cfg: DictConfig) -> Iterator[Finding]:
    """Whether the job that this runs in starts as many processes, in as many places, as the run has."""
    job, devices, nodes = os.environ["SLURM_JOB_ID"], cfg.trainer.devices, cfg.trainer.num_nodes
    tasks, per_node = number("SLURM_NTASKS"), number("SLURM_NTASKS_PER_NODE")
    if os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive") or (tasks is None and nodes == 1):
        yield ok(f"Job {job} has no tasks of its own: the run starts its {devices} processes itself, without srun.")
        return
    shape = f"--nodes={nodes} --ntasks-per-node={devices}"
    wanted = f"trainer.devices x trainer.num_nodes = {devices} x {nodes} = {devices * nodes}"
    there = number("SLURM_NNODES") or number("SLURM_JOB_NUM_NODES")
    advice = f"Submit with {shape}, or change trainer.devices and trainer.num_nodes."
    wrong = True
    if (tasks or 1) != devices * nodes:
        yield problem(f"SLURM_NTASKS={tasks or 'unset'}, but {wanted}.", advice)
    elif per_node is not None and per_node != devices:
        yield problem(f"--ntasks-per-node={per_node}, but trainer.devices={devices}.", advice)
    elif there is not None and there != nodes:
        yield problem(f"The job has {there} nodes, but trainer.num_nodes={nodes}.", advice)
    elif (tasks or 1) > 1 and per_node is None:
        yield problem(f"The job was submitted with --ntasks={tasks}, which lightning refuses.", f"Submit with {shape}.")
    else:
        wrong = False
    if (tasks or 1) > 1 and "SLURM_STEP_ID" not in os.environ:
        yield ok(
            f"The job has {tasks} tasks, and this is none of them.",
            "Start the run with srun, or it waits for the others.",
        )
    if not wrong:
        cpus = os.environ.get("SLURM_CPUS_PER_TASK", "not set")
        yield ok(f"Job {job} has the shape of the run: {wanted} tasks; cpus per task: {cpus}.")


def _partitions(patient: Patient) -> Iterator[Finding]:
    """The queues, with the longest time of a job and the GPUs of a node."""
    printed = output_of(["sinfo", "--noheader", "--format=%P|%l|%G|%D|%a"])
    rows = [line.split("|") for line in (printed or "").splitlines() if line.count("|") == 4]
    if not rows:
        yield warning("sinfo does not list any partition.", "Is SLURM's controller running? Ask: scontrol ping")
        return
    texts = [
        f"{name} ({nodes} nodes, {'' if gres in ('(null)', '') else gres + ', '}up to {longest})"
        for name, longest, gres, nodes, up in rows
        if up == "up"
    ]
    yield ok(f"Partitions: {'; '.join(texts[:6])}{' ...' if len(texts) > 6 else ''}; * is the default.")
    if patient.uses_slurm:
        yield from _asked_for(patient, {name.rstrip("*"): (longest, gres) for name, longest, gres, *_ in rows})


def _asked_for(patient: Patient, partitions: dict[str, tuple[str, str]]) -> Iterator[Finding]:
    """Whether the partition that jobs go to exists, gives them their time, and has GPUs where they need one."""
    asked, minutes = patient.launcher.get("partition"), patient.launcher.get("timeout_min")
    if asked is None:
        return
    if asked not in partitions:
        names = ", ".join(partitions)
        yield problem(f"There is no partition {asked}.", f"Set hydra.launcher.partition to one of {names}.")
        return
    longest, gres = partitions[asked]
    most = minutes_of(longest)
    if isinstance(minutes, (int, float)) and minutes > most:
        yield problem(
            f"hydra.launcher.timeout_min={minutes}, but a job in {asked} ends after {most:g} minutes.",
            f"Set hydra.launcher.timeout_min={most:g}: a job that has not ended by then is handed in again.",
        )
    if patient.cfg.trainer.accelerator == "gpu" and "gpu" not in gres:
        others = [name for name, (_, there) in partitions.items() if "gpu" in there]
        yield problem(
            f"trainer.accelerator=gpu, but partition {asked} has no GPU.",
            f"Set hydra.launcher.partition to one of {', '.join(others)}."
            if others
            else "No other one has any either.",
        )


def minutes_of(time: str) -> float:
    """Minutes of a time as SLURM prints it.

    >>> minutes_of("1-02:30:00"), minutes_of("30:00"), minutes_of("infinite")
    (1590.0, 30.0, inf)
    """
    days, _, clock = time.rpartition("-")
    if not clock.replace(":", "").isdigit():
        return math.inf
    hours, minutes, seconds = ([0, 0, 0] + [int(part) for part in clock.split(":")])[-3:]
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60
