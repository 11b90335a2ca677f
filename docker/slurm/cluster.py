#!/usr/bin/env python3
"""A real SLURM on this machine for tests, of one node or several: no container, no systemd, no system file touched.

    eval "$(python docker/slurm/cluster.py start --nodes 2)"
    srun -N2 hostname
    python docker/slurm/cluster.py stop

It needs SLURM with munge (on Debian: ``apt-get install slurmctld slurmd slurm-client munge``), and of Python the
standard library only. Everything lies in one folder: slurm.conf, munge's key and socket, state and logs. Root is not
needed; without it, only the user who started the cluster can run jobs.

Each node is a slurmd of its own. The nodes are called 127.0.0.1, 127.0.0.2, ...: processes of a distributed job find
each other by the names of their nodes, and these need no entry in /etc/hosts. CPUs, memory and GPUs are what the
configuration says, not what the machine has, so that several tiny jobs run at once.

There are two partitions with the same nodes: jobs in ``urgent`` make jobs in ``main`` (the default) give way, which go
back into the queue. Nothing is accounted, so ``sacct`` fails, as on many small clusters.
"""

from __future__ import annotations

import argparse
import os
import pwd
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

DAEMONS = ("munged", "slurmctld", "slurmscriptd", "slurmd", "slurmstepd")
CLIENTS = ("sinfo", "squeue", "sbatch", "srun", "scancel", "scontrol")
HEADER = "# Written by docker/slurm/cluster.py."
# A socket's path ends after 107 bytes; that of a job step is FOLDER/127.0.0.1/127.0.0.1_JOB.STEP.
LONGEST_FOLDER = 64
# Of the user who runs a job. Inside of a job of a real cluster they would lead the commands there.
FOREIGN = re.compile(r"(SLURMD?|SBATCH|SRUN|SALLOC|SCANCEL|SQUEUE|SINFO)_")


class ClusterError(RuntimeError):
    """The cluster cannot be started, asked or stopped; the message says why."""


def missing() -> str | None:
    """What this machine lacks for a cluster, in one sentence, or None."""
    if not sys.platform.startswith("linux"):
        return "SLURM runs on Linux only."
    lacking = [name for name in ("munged", "slurmctld", "slurmd", *CLIENTS) if _program(name) is None]
    if lacking:
        packages = "apt-get install slurmctld slurmd slurm-client munge"
        return f"SLURM is not installed: {', '.join(lacking)} not found (on Debian: {packages})."
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        return f"SLURM needs a user with a name; {os.geteuid()} has none."
    return None


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin"]))


def processes(folder: Path) -> dict[int, str]:
    """Process id -> command of every daemon and job step of the cluster in ``folder``, and of everything below them.

    They are recognised by what they have open and by their environment, so that no list of ids can be out of date.
    """
    inside = f"{folder}/"
    conf = f"SLURM_CONF={folder}/slurm.conf".encode()
    commands: dict[int, str] = {}
    parents: dict[int, int] = {}
    found: set[int] = set()
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        with suppress(OSError):  # It ended meanwhile, or belongs to somebody else.
            title, *arguments = (entry / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
            if not title or pid == os.getpid():  # Kernel threads and zombies have no title.
                continue
            commands[pid] = " ".join([title, *arguments])
            parents[pid] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if any(name in title for name in DAEMONS):
                mine = any(inside in a for a in arguments) or any(f.startswith(inside) for f in _open_files(entry))
            else:  # SLURM_CONF alone may be a user's shell; a job's process knows its node as well.
                environment = (entry / "environ").read_bytes().split(b"\0")
                mine = conf in environment and any(e.startswith(b"SLURMD_NODENAME=") for e in environment)
            if mine:
                found.add(pid)
    while below := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= below
    return {pid: commands[pid] for pid in sorted(found) if pid in commands}


def _open_files(process: Path) -> list[str]:
    files = []
    for fd in (process / "fd").iterdir():
        with suppress(OSError):  # It was closed meanwhile.
            files.append(os.readlink(fd))
    return files


def kill(folder: Path, limit: float = 20) -> int:
    """End every process of the cluster in ``folder``, and say how many there were.

    SIGKILL from the start: there is nothing to save, and a step that is asked politely may take its time.
    """
    killed: set[int] = set()
    end = time.monotonic() + limit
    while left := processes(folder):
        if time.monotonic() > end:
            raise ClusterError(f"Still running {limit:g} s after SIGKILL: {left}.")
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed |= left.keys()
        time.sleep(0.05)
    return len(killed)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the system hands out to outgoing connections."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20000, 30000), 1000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    raise ClusterError(f"No {count} free ports between 20000 and 30000.")


class Cluster:
    """One cluster; as a context manager, it runs within the block.

        with Cluster(nodes=2) as cluster:
            print(cluster.run("srun", "-N2", "hostname").stdout)

    Args:
        nodes: number of nodes, 1 to 16.
        cpus: CPUs of each node, whatever the machine has.
        gpus: GPUs of each node: SLURM hands them out and sets CUDA_VISIBLE_DEVICES; nothing is behind them. Needs root.
        folder: where everything goes; it stays after ``stop``. Default: a temporary folder, which does not.
        settings: keys of slurm.conf to add or to replace.

    Raises:
        ClusterError: the arguments make no cluster.
    """

    def __init__(
        self,
        nodes: int = 1,
        cpus: int = 8,
        gpus: int = 0,
        folder: str | Path | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        if not 1 <= nodes <= 16 or cpus < 1 or gpus < 0:
            raise ClusterError(f"{nodes=}, {cpus=}, {gpus=}: allowed are 1 to 16 nodes, 1 CPU or more, 0 GPUs or more.")
        self.nodes = [f"127.0.0.{i}" for i in range(1, nodes + 1)]
        self.cpus, self.gpus = cpus, gpus
        self.settings = dict(settings or {})
        self.temporary = folder is None
        self._folder = None if folder is None else Path(folder).resolve()
        self._ports: list[int] = []
        self._daemons: list[subprocess.Popen] = []
        self._guard: subprocess.Popen | None = None

    @property
    def folder(self) -> Path:
        """Where everything of this cluster lies."""
        if self._folder is None:
            raise ClusterError("The cluster has not been started.")
        return self._folder

    @property
    def env(self) -> dict[str, str]:
        """The environment for a subprocess that is to talk to this cluster."""
        rest = {key: value for key, value in os.environ.items() if not FOREIGN.match(key)}
        return rest | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, tied: bool = True, limit: float = 60) -> Cluster:
        """Start the daemons and wait until every node is idle.

        Args:
            tied: end the cluster with this process, however that ends.
            limit: seconds until one daemon's silence counts as a failure.

        Raises:
            ClusterError: it did not work; the message has the ends of the logs.
        """
        if reason := missing():
            raise ClusterError(reason)
        self._claim()
        try:
            self._write()
            if tied:
                command = [sys.executable, "-I", "-S", __file__, "guard", "--folder", str(self.folder)]
                self._guard = subprocess.Popen(
                    [*command, *(["--remove"] if self.temporary else [])],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    start_new_session=True,
                )
            files = {"key": "munge.key", "seed": "munge.seed", "log": "munge.log", "pid": "munged.pid"}
            options = [f"--{name}-file={self.folder / file}" for name, file in files.items()]
            self._launch("munged", "--foreground", "--force", f"--socket={self.folder / 'munge.socket'}", *options)
            self.wait(lambda: self._answers(str(self.folder / "munge.socket")), limit, "munged answers")
            conf = str(self.folder / "slurm.conf")
            self._launch("slurmctld", "-D", "-c", "-f", conf)
            self.wait(lambda: self._answers(("127.0.0.1", self._ports[0])), limit, "slurmctld answers")
            for node in self.nodes:
                # A single slurmd finds its entry by the name of the host, even if it was not built for several (-N).
                self._launch("slurmd", "-D", "-c", "-f", conf, *(["-N", node] if len(self.nodes) > 1 else []), log=node)
            self.wait(self._idle, limit, "all nodes are idle")
        except BaseException as error:
            logs = self.logs()
            self.stop()
            if isinstance(error, (ClusterError, OSError)):
                raise ClusterError(f"SLURM did not start: {error}\n{logs}") from error
            raise
        return self

    def stop(self) -> int:
        """End the daemons and whatever jobs still run, and say how many processes there were."""
        if self._folder is None:
            return 0
        killed = kill(self._folder)
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            self._guard.wait(60)
            self._guard = None
        for daemon in self._daemons:
            daemon.wait(10)
        self._daemons.clear()
        if self.temporary:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        return killed

    def run(
        self, *command: object, check: bool = True, timeout: float = 60, cwd: str | Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the environment of this cluster, and return what it printed as text.

        Raises:
            ClusterError: it failed, and ``check`` is set.
        """
        words = [str(word) for word in command]
        done = subprocess.run(
            words, env=self.env, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
        )
        if check and done.returncode:
            raise ClusterError(
                f"{shlex.join(words)} ended with {done.returncode}: {done.stderr.strip() or done.stdout}"
            )
        return done

    def job(self, job: object) -> dict[str, str]:
        """What ``scontrol show job`` knows: JobState, Restarts, Reason, ExitCode, ..."""
        text = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(re.findall(r"(?:^| )([A-Za-z:/]+)=(\S*)", text))

    def wait(self, condition: Callable[[], T], limit: float, what: str) -> T:
        """Wait until the condition holds, and return what it returned.

        Raises:
            ClusterError: it does not hold within ``limit`` seconds, or a daemon ended.
        """
        end = time.monotonic() + limit
        while not (answer := condition()):
            for daemon in self._daemons:
                if daemon.poll() is not None:
                    raise ClusterError(f"{Path(daemon.args[0]).name} ended with {daemon.returncode}.")
            if time.monotonic() > end:
                raise ClusterError(f"Not within {limit:.0f} s: {what}.\n{self._queue()}")
            time.sleep(0.1)
        return answer

    def logs(self, lines: int = 15) -> str:
        """The ends of the daemons' logs."""
        tails = []
        for path in sorted(set(self.folder.glob("*.log")) - set(self.folder.glob("*.steps.log"))):
            text = path.read_text(errors="replace").splitlines()[-lines:]
            tails.append("\n".join([f"== {path.name}", *text]))
        return "\n".join(tails)

    def _claim(self) -> None:
        """Take the folder, unless it is somebody else's."""
        folder = self._folder or Path(tempfile.mkdtemp(prefix="slurm-")).resolve()
        if len(os.fsencode(folder)) > LONGEST_FOLDER or re.search(r"\s", str(folder)):
            if self.temporary:
                folder.rmdir()
            raise ClusterError(f"folder={folder}: allowed are {LONGEST_FOLDER} bytes (a socket's path) and no spaces.")
        folder.mkdir(parents=True, exist_ok=True)
        conf = folder / "slurm.conf"
        if any(folder.iterdir()) and not (conf.is_file() and conf.read_text().startswith(HEADER)):
            raise ClusterError(f"folder={folder}: neither empty nor that of an earlier cluster.")
        if processes(folder):
            raise ClusterError(f"folder={folder}: its cluster is running; stop it first.")
        self._folder = folder

    def _write(self) -> None:
        """Everything that the daemons read; nothing is left of an earlier cluster."""
        folder = self.folder
        folder.chmod(0o755)  # For the jobs of other users.
        self._ports = free_ports(1 + len(self.nodes))
        (folder / "slurm.conf").write_text(self._configuration())
        for name in ("state", *self.nodes):
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / name).mkdir()
        for path in [*folder.glob("*.log"), folder / "munge.socket"]:
            path.unlink(missing_ok=True)
        with open(os.open(folder / "munge.key", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as key:
            key.write(secrets.token_bytes(128))
        # Nothing that is used here needs cgroups, but slurmd looks for them, and may give up where systemd is missing.
        version = tuple(map(int, re.findall(r"\d+", self.run(_program("slurmctld"), "-V").stdout)[:2]))
        plugin = "disabled" if version >= (24, 5) else "cgroup/v1"
        (folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        for i in range(self.gpus):
            if not (gpu := folder / f"gpu{i}").exists():
                os.mknod(gpu, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # Another /dev/null.
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{self.gpus - 1}]\n" if self.gpus else "")

    def _configuration(self) -> str:
        host = socket.gethostname().split(".")[0]
        user = pwd.getpwuid(os.geteuid()).pw_name
        folder = self.folder
        settings = {
            "ClusterName": "tests",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmUser": user,
            "SlurmdUser": user,
            # A job that was requeued starts again after `cred_expire` seconds at the earliest (default: 120).
            "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",
            "SlurmctldPort": self._ports[0],
            "SlurmctldPidFile": f"{folder}/slurmctld.pid",
            "StateSaveLocation": f"{folder}/state",
            "SlurmdPidFile": f"{folder}/%n.pid",
            "SlurmdLogFile": f"{folder}/%n.steps.log",
            "SlurmdSpoolDir": f"{folder}/%n",
            "SlurmdParameters": "config_overrides",  # The CPUs and the memory below, whatever the machine has.
            "MailProg": shutil.which("true") or "/bin/true",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "ReturnToService": 2,
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU_Memory",
            "DefMemPerCPU": 1000,
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,bf_interval=1",
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "JobRequeue": 1,
            "KillWait": 10,
            "OverTimeLimit": 0,
            "MinJobAge": 30,
            "AccountingStorageType": "accounting_storage/none",
            **({"GresTypes": "gpu"} if self.gpus else {}),
            **self.settings,
        }
        gres = f" Gres=gpu:{self.gpus}" if self.gpus else ""
        rest = f"CPUs={self.cpus} RealMemory=1000000{gres} State=UNKNOWN"
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr={node} Port={port} {rest}"
            for node, port in zip(self.nodes, self._ports[1:], strict=True)
        ]
        partitions = [
            f"PartitionName={name} Nodes=ALL MaxTime=INFINITE State=UP PriorityTier={tier} Default={default}"
            for name, tier, default in [("main", 1, "YES"), ("urgent", 10, "NO")]
        ]
        return "\n".join([HEADER, *(f"{key}={value}" for key, value in settings.items()), *nodes, *partitions, ""])

    def _launch(self, program: str, *options: str, log: str = "") -> None:
        path = _program(program)
        assert path is not None  # `missing` looked.
        with open(self.folder / f"{log or program}.log", "ab") as file:
            daemon = subprocess.Popen(
                [path, *options],
                env=self.env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._daemons.append(daemon)

    def _queue(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            queue = self.run("squeue", "--all", "--long", check=False, timeout=10)
            return queue.stdout + queue.stderr
        return "slurmctld does not answer."

    @staticmethod
    def _answers(address: str | tuple[str, int]) -> bool:
        with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as client:
            return client.connect_ex(address) == 0

    def _idle(self) -> bool:
        answer = self.run(
            "sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T", check=False, timeout=30
        )
        return answer.stdout.split("\n")[:-1] == [f"{node} idle" for node in self.nodes]


def _default_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"slurm-of-{os.geteuid()}"
    if folder.is_symlink() or (folder.exists() and folder.stat().st_uid != os.geteuid()):
        raise ClusterError(f"{folder} belongs to somebody else; choose another --folder.")
    return folder


def main(arguments: list[str] | None = None) -> int:
    """The command line: start, stop or status."""
    parser = argparse.ArgumentParser(description="A real SLURM on this machine, for tests.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="start|stop|status")
    start = commands.add_parser("start", help="start the daemons; print the line for the shell that uses them")
    start.add_argument("--nodes", type=int, default=1, help="number of nodes (default 1)")
    start.add_argument("--cpus", type=int, default=8, help="CPUs of each node, whatever the machine has (default 8)")
    start.add_argument("--gpus", type=int, default=0, help="GPUs of each node, with nothing behind them (default 0)")
    others = [
        commands.add_parser("stop", help="end the daemons and the jobs"),
        commands.add_parser("status", help="show processes, nodes and jobs; fails where nothing runs"),
        commands.add_parser("guard"),  # Ends the cluster when its own standard input ends.
    ]
    others[-1].add_argument("--remove", action="store_true")
    for command in (start, *others):
        command.add_argument(
            "--folder", type=Path, help="of the cluster (default: one in the folder for temporary files)"
        )
    args = parser.parse_args(arguments)
    try:
        folder = (args.folder or _default_folder()).resolve()
        if args.command == "start":
            Cluster(args.nodes, args.cpus, args.gpus, folder).start(tied=False)
            print(f"export SLURM_CONF={shlex.quote(str(folder / 'slurm.conf'))}")
        elif args.command == "stop":
            print(f"{kill(folder)} processes of {folder} ended.")
            if args.folder is None:
                shutil.rmtree(folder, ignore_errors=True)
        elif args.command == "guard":
            sys.stdin.buffer.read()
            kill(folder)
            if args.remove:
                shutil.rmtree(folder, ignore_errors=True)
        else:
            running = processes(folder)
            if not running:
                print(f"No cluster in {folder}.")
                return 1
            print("\n".join(f"{pid} {command}" for pid, command in running.items()))
            for command in (["sinfo", "--Node", "--long"], ["squeue", "--all"]):
                print(Cluster(folder=folder).run(*command).stdout, end="")
    except (ClusterError, OSError, subprocess.TimeoutExpired) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
