"""Several processes: what the loader's workers need of the system, and whether ranks reach each other."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from harmonize.checks.findings import Finding, Patient, in_bytes, ok, on_gpu, problem, warning


def limits(patient: Patient) -> Iterator[Finding]:
    """What worker processes need of the system: shared memory and open files."""
    workers = patient.cfg.data.num_workers * patient.devices
    if not workers:
        yield ok("data.num_workers=0: images are loaded in the main process, which needs no shared memory.")
        return
    yield from _shared_memory(patient, workers)
    yield from _open_files(workers)


def _shared_memory(patient: Patient, workers: int) -> Iterator[Finding]:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    needed = 2 * workers * batch_bytes(patient)  # every worker is up to two batches ahead
    free = shutil.disk_usage(folder).free
    if free < needed:
        yield problem(
            f"/dev/shm has {in_bytes(free)} free, and {workers} workers may hold {in_bytes(needed)} of images in it: "
            "they die of a bus error.",
            "Start the container with --shm-size=8g or --ipc=host, or set data.num_workers=0.",
        )
    else:
        yield ok(f"/dev/shm has {in_bytes(free)} free for up to {in_bytes(needed)} of images in flight.")


def batch_bytes(patient: Patient) -> int:
    """Most that a micro-batch of images takes, in bytes: two views of a contrastive loss, one of MIM, in fp32."""
    cfg = patient.cfg
    views = 1 + len(patient.setup.module.objective.required_views) if patient.setup else 3  # type: ignore[arg-type]
    images = cfg.data.batch_size // (cfg.trainer.devices * cfg.trainer.num_nodes * cfg.trainer.accumulate)
    return images * views * 3 * cfg.data.image_size**2 * 4


def _open_files(workers: int) -> Iterator[Finding]:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 256 + 64 * workers  # every tensor on its way from a worker is an open file
    if 0 <= soft < needed:
        ceiling = "" if hard < 0 or hard >= needed else f" (the hard limit is {hard}: ask the administrator)"
        yield warning(
            f"{soft} files may be open at once; {workers} workers need up to {needed}.",
            f"ulimit -n {needed}{ceiling}",
        )


PROCESS_SECONDS = 60.0
_RANK = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
rank, port, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
dist.init_process_group(
    backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=50)
)
x = torch.full((4,), rank + 1.0, device=device)
dist.all_reduce(x)
assert x.tolist() == [3.0] * 4, x
dist.destroy_process_group()
"""


def process_groups(patient: Patient) -> Iterator[Finding]:
    """Two processes that add up a tensor, with gloo and, where two GPUs are, with NCCL."""
    report = problem if patient.devices * patient.cfg.trainer.num_nodes > 1 else warning
    error = all_reduce("gloo")
    if error is None:
        yield ok("Two processes added up a tensor (gloo).")
    else:
        yield report(f"Two processes cannot add up a tensor with gloo: {error}.", _interface_advice("GLOO"))
    import torch
    import torch.distributed as dist

    if not on_gpu(patient):
        return
    if not dist.is_nccl_available():
        report = problem if patient.devices > 1 else warning
        yield report(
            "This torch has no NCCL, which several GPUs need.", "Install a build of torch with CUDA for Linux."
        )
        return
    version = ".".join(map(str, torch.cuda.nccl.version()))
    if torch.cuda.device_count() < 2:
        yield ok(f"NCCL {version} is there.")
        return
    error = all_reduce("nccl")
    if error is None:
        yield ok(f"Two GPUs added up a tensor (NCCL {version}).")
    else:
        yield report(f"Two GPUs cannot add up a tensor with NCCL {version}: {error}.", _interface_advice("NCCL"))


def all_reduce(backend: str) -> str | None:
    """Let two new processes add up a tensor; what went wrong, or None."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC_", "SLURM_", "MASTER_"))}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-c", _RANK]
    deadline = time.monotonic() + PROCESS_SECONDS
    with tempfile.TemporaryFile("w+") as output:
        started = [
            subprocess.Popen([*command, str(rank), port, backend], env=environment, stdout=output, stderr=output)
            for rank in range(2)
        ]
        try:
            while None in (codes := [process.poll() for process in started]):
                if any(codes):  # the other one would wait for it
                    break
                if time.monotonic() > deadline:
                    return f"no answer after {PROCESS_SECONDS:.0f} seconds"
                time.sleep(0.05)
        finally:
            for process in started:
                process.kill()
                process.wait()
        if codes == [0, 0]:
            return None
        output.seek(0)
        lines = [line.strip() for line in output if re.match(r"\S*(Error|Exception)\b.*:", line)]
    return re.sub(r"^\[.*?\] *", "", lines[0].partition(": ")[2]).rstrip(".") if lines else f"exit codes {codes}"


def _interface_advice(prefix: str) -> str:
    variable = f"{prefix}_SOCKET_IFNAME"
    there = [name for _, name in socket.if_nameindex()]
    chosen = os.environ.get(variable)
    if chosen and chosen not in there:
        return f"{variable}={chosen} is no network interface here: unset it, or choose one of {', '.join(there)}."
    more = "; NCCL_DEBUG=INFO says more, and NCCL_P2P_DISABLE=1 helps on some machines" if prefix == "NCCL" else ""
    return (
        f"Set {variable} to the interface that connects the processes, one of {', '.join(there)} (lo is enough on one "
        f"machine){more}."
    )
