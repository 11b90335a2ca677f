"""Who works in a run folder, and how far the run is: ``run.lock`` and ``state.json``.

The lock keeps two processes from writing into one folder. It names host and process; one whose process is gone is
taken over. ``state.json`` says what the run is doing to whoever reads files: ``harmonize sweep``.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from harmonize.clock import HEARTBEAT, SILENCE
from harmonize.files import read_json, write_json
from harmonize.training.signals import Interrupted
from harmonize.types import ConfigError


class RunStatus:
    """Holds a run folder while the run lasts, and tells others how it goes; a context manager, on rank 0.

    A folder that does not exist yet is claimed by :meth:`claim`, one that does on entering: nobody else may change the
    checkpoint that is about to be read.

    Args:
        folder: The run folder.

    Attributes:
        step_of: Gives the current optimiser step.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "run.lock"
        self.step_of: Callable[[], int] = lambda: self._first
        self._first = self._total = 0
        self._held = False
        self._claimed = False
        self._started = time.time()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunStatus:
        if self.folder.is_dir():
            self._lock()
        return self

    def claim(self, total_steps: int, step: int) -> None:
        """Take the folder, made if need be, and say that the run goes on.

        Args:
            total_steps: Optimiser steps of the whole run.
            step: Those done already.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._held:
            self._lock()
        self._first, self._total, self._claimed = step, total_steps, True
        self._write("running")
        self._thread = threading.Thread(target=self._beat, name="run status", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let go of the folder."""
        if self._held:
            self.path.unlink(missing_ok=True)
            self._held = False

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        if self._claimed:
            if error is None:
                self._write("finished")
            elif isinstance(error, (Interrupted, KeyboardInterrupt)):
                self._write("stopped", str(error) or "SIGINT")
            else:
                self._write("failed", f"{type(error).__name__}: {error}".splitlines()[0])
        self.release()

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT):
            self._write("running")
            with suppress(OSError):
                os.utime(self.path)

    def _write(self, state: str, message: str = "") -> None:
        now, step = time.time(), self.step_of()
        done = step - self._first
        pace = (now - self._started) / done if done > 0 else None
        known = {
            "state": state,
            "message": message,
            "step": step,
            "total_steps": self._total,
            "seconds_left": None if pace is None else round(pace * (self._total - step)),
            "started": self._started,
            "updated": now,
            **identity(),
        }
        with suppress(OSError):  # a full disk costs the sign of life, not the run
            write_json(self.folder / "state.json", known)

    def _lock(self) -> None:
        for _ in range(3):
            if _create(self.path, json.dumps(identity())):
                self._held = True
                return
            holder = read_json(self.path)
            if is_alive(holder, self.path):
                raise ConfigError(
                    f"run.dir={self.folder} is in use by process {holder.get('pid')} on {holder.get('host')}; wait for "
                    f"it, choose another run.dir, or delete {self.path.name} in it if that process is gone."
                )
            with suppress(OSError):
                self.path.unlink()
        raise ConfigError(f"run.dir={self.folder} is in use: another process took it at the same time.")


def identity() -> dict[str, Any]:
    """This process: host, number, the time it began, and the job of SLURM that it belongs to."""
    job = os.environ.get("SLURM_JOB_ID")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid()), "slurm_job": job}


def is_alive(holder: dict[str, Any], lock: Path) -> bool:
    """Whether the process that a lock names still works.

    On this host it is looked up. An earlier start of this process's SLURM job is over. On any other host it shows a
    sign of life every few seconds, by the file system's own clock.
    """
    me = identity()
    if holder.get("slurm_job") is not None and holder.get("slurm_job") == me["slurm_job"]:
        return False
    if holder.get("host") == me["host"]:
        pid = holder.get("pid")
        return isinstance(pid, int) and pid != me["pid"] and _began(pid) == holder.get("began")
    return seconds_since(lock) < SILENCE


def seconds_since(path: Path) -> float:
    """Seconds since a file was changed, by the clock of its file system; infinite where it is not there."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.now")
    try:
        changed = path.stat().st_mtime
        probe.touch()
        now = probe.stat().st_mtime
    except OSError:
        return float("inf")
    finally:
        probe.unlink(missing_ok=True)
    return now - changed


def _began(pid: int) -> int | None:
    """When a process of this host began, in clock ticks since boot; None where it is gone, -1 where nobody can tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
        with suppress(OSError):
            os.kill(pid, 0)
            return -1
        return None
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _create(path: Path, content: str) -> bool:
    """Make a file with its content at once, unless it is there; whether it was made."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # no links on this file system
        try:
            with path.open("x") as file:
                file.write(content)
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    return True
