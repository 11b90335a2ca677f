"""What computes: GPUs as torch and as the driver see them, and the cores that this process may use."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harmonize.checks.findings import (
    GIB,
    Finding,
    Patient,
    first_line,
    number,
    ok,
    on_gpu,
    output_of,
    problem,
    warning,
)


@dataclass(frozen=True)
class Driver:
    """NVIDIA GPUs as the driver sees them.

    Attributes:
        names: One per GPU.
        version: Of the driver; empty where it does not say.
        cuda: The newest CUDA that it supports; empty where it does not say.
    """

    names: list[str]
    version: str = ""
    cuda: str = ""


def find_driver(devices: Path = Path("/dev")) -> Driver | None:
    """What nvidia-smi says, or else the device files alone; None: there is no sign of a GPU."""
    printed = output_of(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    rows = [line.rsplit(", ", 1) for line in (printed or "").splitlines() if ", " in line]
    if rows:
        cuda = re.search(r"CUDA Version: *([\d.]+)", output_of(["nvidia-smi"]) or "")
        return Driver([name for name, _ in rows], rows[0][1], cuda[1] if cuda else "")
    files = [file.name for file in devices.glob("nvidia[0-9]*")]
    return Driver(files) if files else None


def gpus(patient: Patient) -> Iterator[Finding]:
    """The GPUs that torch sees, against those that there are and those that the run wants."""
    import torch

    wanted = patient.cfg.trainer.accelerator
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        driver = find_driver()
        if driver is not None:
            yield _unseen(driver, [str(w.message) for w in caught], wanted)
        elif wanted == "gpu":
            yield problem("There is no GPU here.", "Set trainer.accelerator=auto, or go to a machine with a GPU.")
        else:
            yield ok("There is no GPU here; the run computes on the CPU.")
        return
    if wanted == "cpu":
        yield ok(f"The run computes on the CPU (trainer.accelerator=cpu); {count} GPUs are left alone.")
        return
    if patient.devices > count:
        yield problem(
            f"trainer.devices={patient.devices}, but torch sees {count} GPUs.",
            f"Set trainer.devices={count}, or ask for more GPUs (and look at CUDA_VISIBLE_DEVICES).",
        )
    for index in range(count):
        yield from _gpu(index)
    if patient.devices < count:
        yield ok(f"The run uses {patient.devices} of {count} GPUs.", f"trainer.devices={count} uses all.")
    yield from _precision(patient.cfg.trainer.precision)
    if patient.cfg.trainer.compile == "auto":
        from harmonize.training.compilation import should_compile

        if not should_compile("auto", on_gpu=True):
            yield warning(
                "The blocks cannot be compiled, which takes the package triton and a C compiler.",
                "Install gcc (or load its module): steps become faster.",
            )


def _unseen(driver: Driver, said: list[str], wanted: str) -> Finding:
    """Why torch sees no GPU although there is one."""
    import torch

    there = f"There is a GPU ({driver.names[0]}), but torch {torch.__version__} sees none"
    report = ok if wanted == "cpu" else problem
    if torch.version.cuda is None:
        return report(
            f"{there}: it is built without CUDA.",
            "Install the build that PyTorch's installation page shows for this driver"
            + (f" (CUDA {driver.cuda} or older)." if driver.cuda else "."),
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not re.match(r"\d|GPU-|MIG-", hidden):
        return report(f"{there}: CUDA_VISIBLE_DEVICES={hidden!r} hides it.", "Unset CUDA_VISIBLE_DEVICES.")
    if driver.cuda and _numbers(driver.cuda)[0] < _numbers(torch.version.cuda)[0]:
        return report(
            f"{there}: driver {driver.version} supports CUDA {driver.cuda}, torch is built for {torch.version.cuda}.",
            f"Update the driver, or install a torch that is built for CUDA {driver.cuda} or older.",
        )
    reason = said[0].partition("(Triggered")[0].strip().rstrip(".") if said else "it does not say why"
    return report(f"{there}: {reason}.", "Look at nvidia-smi; in a container, start it with --gpus all.")


def _gpu(index: int) -> Iterator[Finding]:
    """One GPU: does it compute, and is its memory free?"""
    import torch

    name = f"GPU {index} ({torch.cuda.get_device_name(index)})"
    try:
        torch.ones(8, device=f"cuda:{index}").sum().item()
    except Exception as error:  # RuntimeError, or one of CUDA's own
        architectures = ", ".join(torch.cuda.get_arch_list())
        yield problem(
            f"{name} cannot compute: {first_line(error)}.",
            f"This torch is built for {architectures or 'no GPU'}; install a build for this one, or reset the GPU.",
        )
        return
    free, total = torch.cuda.mem_get_info(index)
    if free < 0.7 * total:
        yield warning(
            f"{name} has {free / GIB:.1f} of {total / GIB:.1f} GiB free: another process uses it.",
            "Look at nvidia-smi, and choose another one with CUDA_VISIBLE_DEVICES.",
        )
    else:
        yield ok(f"{name} computes and has {free / GIB:.1f} of {total / GIB:.1f} GiB free.")


def _precision(precision: Any) -> Iterator[Finding]:
    """bf16 where the hardware computes in it."""
    import torch

    fast = torch.cuda.is_bf16_supported(including_emulation=False)
    if str(precision) == "bf16" and not fast:
        yield warning("This GPU only emulates bf16, slowly.", "Set trainer.precision=fp16 or 32.")
    elif str(precision) == "32" and fast:
        yield ok(
            "The run computes in 32 bit, though the GPU has bf16.", "trainer.precision=bf16 is about twice as fast."
        )


def cores(patient: Patient) -> Iterator[Finding]:
    """The cores that this process may use, against the loader's workers and the threads."""
    here, limit = cores_per_device(patient.devices)
    workers, devices = patient.cfg.data.num_workers, patient.devices
    few = f"{here:g} core{'s' * (here != 1)}{'' if devices == 1 else ' for each of the devices'}"
    if workers > here:
        in_job = f", or ask SLURM for --cpus-per-task={workers + 1}" if "SLURM_JOB_ID" in os.environ else ""
        yield warning(
            f"data.num_workers={workers}, but {limit} allows {few}.",
            f"Set data.num_workers={int(here)}{in_job}.",
        )
    else:
        yield ok(f"{few} ({limit}) for data.num_workers={workers}.")
    if not on_gpu(patient):
        if devices > (os.cpu_count() or 1):
            yield problem(
                f"trainer.devices={devices}, but there are {os.cpu_count()} cores.", "Use fewer processes on a CPU."
            )
        yield from _threads(here)


def _threads(here: float) -> Iterator[Finding]:
    """Threads of the matrix products on a CPU."""
    import torch

    threads, most = torch.get_num_threads(), max(1, int(here))
    if threads > most:
        yield warning(f"torch starts {threads} threads on {here:g} cores per process.", f"Set OMP_NUM_THREADS={most}.")
    elif threads < most // 2:
        set_by = "OMP_NUM_THREADS" if "OMP_NUM_THREADS" in os.environ else "torch"
        yield warning(f"{set_by} allows {threads} of {most} cores per process.", f"Set OMP_NUM_THREADS={most}.")


def cores_per_device(devices: int) -> tuple[float, str]:
    """Cores for each process of the run on this machine, and what limits them."""
    in_step, tasks = "SLURM_STEP_ID" in os.environ, number("SLURM_NTASKS") or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = 1 if in_step and tasks > 1 else devices  # within srun, this process is one of them
    limits = [(affinity / share, "the CPU affinity" if affinity < (os.cpu_count() or 1) else "the machine")]
    if (quota := cpu_quota()) is not None:
        limits.append((quota / share, "the cgroup's CPU quota"))
    if (per_task := number("SLURM_CPUS_PER_TASK")) is not None:
        limits.append((per_task / (1 if tasks > 1 else devices), "SLURM_CPUS_PER_TASK"))
    return min(limits, key=lambda limit: limit[0])


def cpu_quota(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores that the cgroups (version 1 or 2) of this process allow; None: no limit."""
    quotas = []
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = groups / controllers if controllers else groups
        mount = mount if mount.exists() or not controllers else groups / "cpu"
        inside = Path(path.lstrip("/"))
        for folder in (mount / inside, *(mount / parent for parent in inside.parents)):
            with suppress(OSError, ValueError):
                if controllers:
                    quota = (folder / "cpu.cfs_quota_us").read_text()
                    period = (folder / "cpu.cfs_period_us").read_text()
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
                if float(quota) > 0:  # "max", or -1: no limit
                    quotas.append(float(quota) / float(period))
    return min(quotas, default=None)


def _numbers(version: str) -> list[int]:
    """Version as numbers.

    >>> _numbers("12.4")
    [12, 4]
    """
    return [int(part) for part in re.findall(r"\d+", version)]
