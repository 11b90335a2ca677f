"""A sweep as a thing of its own: what its jobs are, how they are started, how each of them stands.

``sweep.yaml`` in the sweep's folder names the jobs; everything else is read from their run folders and logs, so that
``harmonize sweep`` needs neither the cluster nor the process that started it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from harmonize.arguments import Parser
from harmonize.clock import SILENCE, duration
from harmonize.config import composer, finish, run_dir
from harmonize.files import read_json, read_rows, write_whole
from harmonize.types import ConfigError, FaultError

BAD = ("failed", "stopped", "lost")
"""States of a job that has stopped before its end."""

ENDED = ("finished", *BAD)
"""States that a job does not leave by itself."""

Look = Callable[[], "dict[int, Standing]"]
"""How every job of a sweep stands now."""


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        num: Its number in the sweep, from 0.
        overrides: Its settings.
        folder: Its run folder.
        log: What it prints.
    """

    num: int
    overrides: list[str]
    folder: Path
    log: Path

    @property
    def arguments(self) -> list[str]:
        """What its command line says after the command: an experiment's file may ask for a sweep, and this is none."""
        return [*self.overrides, "hydra.mode=RUN"]


@dataclass(frozen=True)
class Sweep:
    """The jobs of a sweep, as ``sweep.yaml`` has them.

    Attributes:
        folder: Of the sweep.
        command: ``train`` or another command.
        launcher: ``local`` or ``slurm``.
        options: Of the launcher.
        jobs: In order.
    """

    folder: Path
    command: str
    launcher: str
    options: dict[str, Any]
    jobs: list[Job]

    def write(self) -> None:
        """Write ``sweep.yaml``."""
        jobs = [{"num": j.num, "overrides": j.overrides, "folder": str(j.folder), "log": str(j.log)} for j in self.jobs]
        plain = {"command": self.command, "launcher": self.launcher, "options": self.options, "jobs": jobs}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "sweep.yaml", OmegaConf.to_yaml(OmegaConf.create(plain)).encode())

    @classmethod
    def read(cls, folder: Path) -> Sweep:
        """The sweep of a folder.

        Raises:
            ConfigError: There is none.
        """
        try:
            plain = OmegaConf.to_container(OmegaConf.load(folder / "sweep.yaml"))
            assert isinstance(plain, dict)
            jobs = [Job(int(j["num"]), list(j["overrides"]), Path(j["folder"]), Path(j["log"])) for j in plain["jobs"]]
            return cls(folder, plain["command"], plain["launcher"], plain["options"], jobs)
        except Exception as error:  # a damaged file raises one of many errors
            known = sorted(str(path.parent) for path in folder.glob("**/sweep.yaml"))[:5]
            hint = f"; there are sweeps in {', '.join(known)}" if known else ""
            raise ConfigError(f"{folder} holds no sweep (a folder with sweep.yaml, as -m makes it){hint}.") from error


# ---- starting --------------------------------------------------------------------------------------------------------


def run_sweep(
    config: DictConfig, launcher: str, options: Mapping[str, Any], overrides: Sequence[Sequence[str]], first: int
) -> None:
    """Run the jobs of a sweep to their end.

    Raises:
        FaultError: Jobs have failed; the message names them.
    """
    command = str(config.hydra.job.config_name)
    folder = Path(str(config.hydra.sweep.dir)).absolute()
    launching = ("hydra/launcher", "hydra.launcher", "hydra.sweep")
    settings = [[o for o in job if not o.lstrip("+~").startswith(launching)] for job in overrides]
    jobs = [
        Job(num, own, run_dir(cfg).absolute(), folder / f"{num:03d}.log")
        for num, own, cfg in zip(count(first), settings, configurations(command, settings), strict=False)
    ]
    sweep = Sweep(folder, command, launcher, dict(options), jobs)
    sweep.write()
    start(sweep, jobs)


def start(sweep: Sweep, jobs: Sequence[Job]) -> None:
    """Start some jobs of a sweep, by its own launcher, and stay until they have ended.

    Raises:
        FaultError: Jobs have failed.
    """
    for job in jobs:
        _forget(job)
    found = (run_on_slurm if sweep.launcher == "slurm" else run_here)(sweep, jobs)
    bad = {job.num: found[job.num].state for job in jobs if found[job.num].state != "finished"}
    if bad:
        words = ", ".join(f"{n} {state}" for state, n in Counter(bad.values()).items())
        raise FaultError(
            f"{len(bad)} of {len(jobs)} jobs did not finish ({words}): {', '.join(map(str, bad))}. See them with: "
            f"harmonize sweep {sweep.folder} (--retry-failed runs them again)."
        )


def _forget(job: Job) -> None:
    """What an earlier start of the job has left to say."""
    if standing(job).state in BAD:
        (job.folder / "state.json").unlink(missing_ok=True)
    job.log.with_suffix(".code").unlink(missing_ok=True)


_composed: dict[tuple[str, ...], DictConfig] = {}


def configurations(command: str, settings: Sequence[Sequence[str]]) -> list[DictConfig]:
    """What jobs run with, by their settings; composing takes a moment, and several ask."""
    keys = [(command, *own) for own in settings]
    with composer(command) as conf:
        for key in keys:
            if key not in _composed:
                _composed[key] = finish(conf.load(key[1:]))
    return [_composed[key] for key in keys]


def run_on_slurm(sweep: Sweep, jobs: Sequence[Job]) -> dict[int, Standing]:
    """Hand jobs in and show the table until none is left; after Ctrl-C they go on."""
    from harmonize.slurm import submit

    sweep, submission = submit(sweep, jobs)
    nums = {job.num for job in jobs}

    def over(found: Mapping[int, Standing]) -> bool:
        return all(found[num].state in ENDED for num in nums)

    try:
        return _watch(sweep, lambda: stand(sweep, submission.queued()), over, seconds=5)
    except KeyboardInterrupt:
        print(f"harmonize: the jobs go on; see them with: harmonize sweep {sweep.folder}", file=sys.stderr)
        raise SystemExit(0) from None


def run_here(sweep: Sweep, jobs: Sequence[Job]) -> dict[int, Standing]:
    """Run jobs on this machine, one process each; with one at a time its output is shown as it comes."""
    slots = _slots(sweep, jobs)
    threads_each = str(max(1, (os.cpu_count() or 1) // len(slots)))
    waiting, lock = list(jobs), threading.Lock()
    processes: list[subprocess.Popen[str]] = []

    def work(devices: str | None) -> None:
        while True:
            with lock:
                if not waiting:
                    return
                job = waiting.pop(0)
                print(f"harmonize: job {job.num}: {' '.join(job.overrides)}", flush=True)
                environment = {"OMP_NUM_THREADS": threads_each} | os.environ
                if devices is not None:
                    environment["CUDA_VISIBLE_DEVICES"] = devices
                process = subprocess.Popen(
                    [sys.executable, "-m", "harmonize", sweep.command, *job.arguments],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                )
                processes.append(process)
            assert process.stdout is not None
            with job.log.open("w") as log:
                for line in process.stdout:
                    log.write(line)
                    log.flush()
                    if len(slots) == 1:
                        print(line, end="", flush=True)
            process.wait()
            write_whole(job.log.with_suffix(".code"), f"{process.returncode}\n".encode())

    threads = [threading.Thread(target=work, args=(devices,), daemon=True) for devices in slots]
    for thread in threads:
        thread.start()
    try:
        if len(slots) > 1:
            _watch(sweep, lambda: stand(sweep), lambda _: not any(thread.is_alive() for thread in threads))
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:  # the terminal has sent it to the jobs as well, which save
        waiting.clear()
        for process in processes:
            process.wait()
        raise
    return stand(sweep)


def _slots(sweep: Sweep, jobs: Sequence[Job]) -> list[str | None]:
    """For each job at a time the GPUs that it sees; None: all that there are."""
    configs = configurations(sweep.command, [job.overrides for job in jobs])
    devices = {cfg.trainer.devices for cfg in configs if "trainer" in cfg} or {1}
    cpu = all("trainer" in cfg and cfg.trainer.accelerator == "cpu" for cfg in configs)
    wanted = sweep.options.get("jobs")
    if cpu:
        return [None] * (wanted or 1)
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if len(devices) > 1 or len(gpus) < 2:
        return [None] * (wanted or 1)
    (each,) = devices
    groups = [",".join(gpus[i : i + each]) for i in range(0, len(gpus) - each + 1, each)]
    return [groups[i % len(groups)] for i in range(wanted or len(groups))]


# ---- how it stands ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """How a job stands.

    Attributes:
        state: ``waiting``, ``running``, ``finished``, ``failed``, ``stopped`` (by a signal) or ``lost`` (silent).
        step: Optimiser steps done.
        total: Those of the whole run, 0 if not known yet.
        seconds_left: Estimate, or None.
        metrics: The latest values.
        message: Why it failed or stopped.
    """

    state: str
    step: int = 0
    total: int = 0
    seconds_left: float | None = None
    metrics: Mapping[str, float] = ()  # type: ignore[assignment]
    message: str = ""


def standing(job: Job, queued: set[int] | None = None) -> Standing:
    """How a job stands, by its files.

    Args:
        job: The job.
        queued: Numbers of the jobs that the cluster still knows; None: it was not asked.
    """
    state, code = read_json(job.folder / "state.json"), _code(job)
    metrics = _latest(job.folder)
    if done := read_json(job.folder / "metrics.json"):
        step = int(done.get("step", 0))
        return Standing("finished", step, int(done.get("total_steps", step)), 0, metrics | done)
    name, message = str(state.get("state", "waiting")), str(state.get("message", ""))
    if code is not None and code != 0 and name in ("waiting", "running"):
        name, message = ("stopped" if code in (130, 138, 140, 143) else "failed"), f"exit code {code}"
    elif code == 0 and name == "waiting":  # a command that keeps no state
        name = "finished"
    if name in ("waiting", "running") and queued is not None and job.num not in queued:
        name = "lost"
    if name == "running" and queued is None and time.time() - float(state.get("updated", 0)) > SILENCE:
        name = "lost"
    if name == "stopped" and queued is not None and job.num in queued:
        name = "waiting"  # handed in again
    left = state.get("seconds_left") if name == "running" else None
    return Standing(name, int(state.get("step", 0)), int(state.get("total_steps", 0)), left, metrics, message)


def stand(sweep: Sweep, queued: set[int] | None = None) -> dict[int, Standing]:
    """How every job stands, by its number."""
    return {job.num: standing(job, queued) for job in sweep.jobs}


def table(sweep: Sweep, found: Mapping[int, Standing]) -> Group:
    """All jobs, and the last lines of those that failed."""
    counts = Counter(s.state for s in found.values())
    title = f"{sweep.folder}: " + ", ".join(f"{n} {state}" for state, n in counts.items())
    grid = Table(title=title, title_justify="left")
    shown = [
        ("loss", "epoch/loss", "{:.4f}"),
        ("k-NN", "val/knn_top1", "{:.1%}"),
        ("linear", "val/linear_top1", "{:.1%}"),
    ]
    shown = [entry for entry in shown if any(entry[1] in s.metrics for s in found.values())]
    for name in ("job", "settings", "state", "step", "left", *(label for label, _, _ in shown)):
        grid.add_column(name, justify="left" if name in ("settings", "state") else "right")
    common = set.intersection(*(set(job.overrides) for job in sweep.jobs)) if len(sweep.jobs) > 1 else set()
    for job in sweep.jobs:
        s = found[job.num]
        values = [(s.metrics.get(key), text) for _, key, text in shown]
        grid.add_row(
            str(job.num),
            " ".join(o for o in job.overrides if o not in common),
            Text(s.state, style=COLOURS.get(s.state, "")),
            f"{s.step}/{s.total}" if s.total else "",
            "" if s.seconds_left is None or s.state != "running" else duration(s.seconds_left),
            *("" if value is None else text.format(value) for value, text in values),
        )
    tails = []
    for job in sweep.jobs:
        s = found[job.num]
        if s.state in ("failed", "lost"):
            lines = [*([s.message] if s.message else []), *_tail(job.log)]
            tails.append(Text(f"\njob {job.num} {s.state}: {job.log}", style="bold"))
            tails.append(Text("\n".join(f"  {line}" for line in lines)))
    return Group(grid, *tails)


COLOURS = {"finished": "green", "running": "cyan", "failed": "red", "lost": "red", "stopped": "yellow"}


def _watch(
    sweep: Sweep, look: Look, over: Callable[[Mapping[int, Standing]], bool], seconds: float = 1
) -> dict[int, Standing]:
    """Show how jobs stand until that is over, and return it: a table on a terminal, elsewhere a line per change.

    Args:
        sweep: The jobs.
        look: Says how they stand.
        over: Whether it is over.
        seconds: From one look to the next.
    """
    console = Console()
    before: dict[int, str] = {}

    def say(found: Mapping[int, Standing]) -> None:
        for num, s in found.items():
            if before.get(num) != s.state:
                text = f"job {num}: {s.state}" + (f" ({s.message})" if s.message and s.state != "running" else "")
                console.print(text, highlight=False, soft_wrap=True)
                before[num] = s.state

    with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
        while True:
            ended = over(found := look())
            if live is not None:
                live.update(table(sweep, found), refresh=True)
            else:
                say(found)
            if ended:
                return found
            time.sleep(seconds)


def main(arguments: list[str]) -> int:
    """``harmonize sweep DIR [--watch] [--retry-failed]``.

    Returns:
        0: every job finished or is under way; 1: some did not.
    """
    parser = Parser(prog="harmonize sweep", description=__doc__)
    parser.add_argument("folder", type=Path, help="of the sweep, under RUN_ROOT/sweeps")
    parser.add_argument("--watch", action="store_true", help="renew the table until all jobs have ended")
    parser.add_argument("--retry-failed", action="store_true", help="start again what failed, stopped or got lost")
    options = parser.parse_args(arguments)
    sweep = Sweep.read(options.folder)
    console = Console(width=None if sys.stdout.isatty() else 160)
    found = stand(sweep)
    if options.retry_failed:
        again = [job for job in sweep.jobs if found[job.num].state in BAD]
        if not again:
            console.print("No job has failed.")
            return 0
        start(sweep, again)
        return 0
    if options.watch:
        found = _watch(sweep, lambda: stand(sweep), lambda now: all(s.state in ENDED for s in now.values()))
    if not (options.watch and console.is_terminal):
        console.print(table(sweep, found))
    return int(any(s.state in BAD for s in found.values()))


# ---- files -----------------------------------------------------------------------------------------------------------


def _code(job: Job) -> int | None:
    """Exit code of a local job that has ended."""
    try:
        return int(job.log.with_suffix(".code").read_text())
    except (OSError, ValueError):
        return None


def _latest(folder: Path) -> dict[str, float]:
    latest: dict[str, float] = {}
    for row in read_rows(folder / "metrics.jsonl", last_bytes=1 << 18):  # the file may be long
        latest.update(row)
    return {key: value for key, value in latest.items() if isinstance(value, (int, float))}


def _tail(path: Path, lines: int = 8) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()[-lines:]
    except OSError:
        return ["(no log)"]
