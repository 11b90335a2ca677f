"""SLURM on this machine does what other tests rely on: it starts, signals, requeues, preempts, and leaves nothing."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.clusters import SCRIPT, Cluster, ClusterError, kill, missing, processes

needs_slurm = pytest.mark.skipif(missing() is not None, reason=str(missing()))

# Writes down each signal that it gets, with the seconds since its start; SIGTERM ends it.
# `self`: at SIGUSR2 it hands its own job in again, and ends.
RECORDER = """
import os, signal, subprocess, sys, time
begin = time.time()
wanted = [signal.SIGTERM, signal.SIGUSR2]
signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
def say(*words):
    with open(sys.argv[1], "a") as file:
        print(*words, file=file)
say("restart", os.environ.get("SLURM_RESTART_COUNT", 0))
while True:
    name = signal.Signals(signal.sigwait(wanted)).name
    say(name, round(time.time() - begin, 1))
    if name == "SIGUSR2" and "self" in sys.argv:
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
    if name == "SIGTERM" or "self" in sys.argv:
        break
"""


@pytest.fixture
def submit(tmp_path):
    """submit(cluster, command, *options) -> job id; whatever still runs after the test is killed."""
    jobs = []

    def hand_in(cluster, command, *options):
        log = tmp_path / "%j.out"
        done = cluster.run("sbatch", "--parsable", f"--output={log}", *options, f"--wrap={command}", cwd=tmp_path)
        jobs.append((cluster, done.stdout.strip()))
        return jobs[-1][1]

    yield hand_in
    for cluster, job in jobs:
        cluster.run("scancel", "--signal=KILL", "--full", job, check=False)
        cluster.run("scancel", job, check=False)


@pytest.fixture
def recorder(tmp_path):
    """recorder(name, *words) -> the command of a recorder, and what reads the signals that it wrote down."""
    script = tmp_path / "recorder.py"
    script.write_text(RECORDER)

    def make(name, *words):
        path = tmp_path / name

        def read():
            return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

        return shlex.join([sys.executable, "-S", str(script), str(path), *words]), read

    return make


def names(lines):
    return [name if name.startswith("SIG") else f"{name} {value}" for name, value in lines]


def reaches(cluster, job, state, limit=30):
    cluster.wait(lambda: cluster.job(job)["JobState"] == state, limit, f"job {job} is {state}")


def test_a_node_is_larger_than_the_machine(cluster):
    assert cluster.run("sinfo", "-h", "-p", "main", "-o", "%N %c %m %t").stdout == "127.0.0.1 8 1000000 idle\n"
    assert cluster.run("sinfo", "-h", "-o", "%P").stdout.split() == ["main*", "urgent"]
    assert sorted(cluster.run("srun", "-n4", "printenv", "SLURM_PROCID").stdout.split()) == list("0123")


def test_several_jobs_run_at_once(cluster, submit):
    jobs = [submit(cluster, "sleep 100", "--cpus-per-task=2", "--mem=100G") for _ in range(4)]
    waiting = submit(cluster, "sleep 100")
    for job in jobs:
        reaches(cluster, job, "RUNNING")
    assert cluster.job(waiting)["JobState"] == "PENDING"


def test_a_batch_job_is_remembered(cluster, submit, tmp_path):
    good, bad = submit(cluster, "srun printenv SLURM_CONF"), submit(cluster, "exit 3")
    reaches(cluster, good, "COMPLETED")
    reaches(cluster, bad, "FAILED")
    assert (tmp_path / f"{good}.out").read_text().strip() == cluster.env["SLURM_CONF"]
    assert cluster.job(bad)["ExitCode"] == "3:0"


def test_nothing_is_accounted(cluster):
    assert cluster.run("sacct", check=False).returncode != 0
    with pytest.raises(ClusterError, match=r"^sacct ended with 1: Slurm accounting storage is disabled"):
        cluster.run("sacct")


def test_requeue_terminates_and_runs_again(cluster, submit, recorder):
    command, read = recorder("signals")
    job = submit(cluster, f"srun {command}")
    cluster.wait(read, 20, "the job has begun")
    cluster.run("scontrol", "requeue", job)
    cluster.wait(lambda: names(read()) == ["restart 0", "SIGTERM", "restart 1"], 30, "the job runs again")
    assert cluster.job(job)["JobState"] == "RUNNING"
    assert cluster.job(job)["Restarts"] == "1"


def test_a_job_hands_itself_in_again(cluster, submit, recorder, tmp_path):
    command, read = recorder("signals", "self")
    job = submit(cluster, f"echo run ${{SLURM_RESTART_COUNT:-0}}; srun {command}", "--open-mode=append")
    cluster.wait(read, 20, "the job has begun")
    cluster.run("scancel", "--signal=USR2", job)  # To the steps, not to the script.
    cluster.wait(lambda: names(read()) == ["restart 0", "SIGUSR2", "restart 1"], 30, "the job runs again")
    assert re.findall(r"^run \d$", (tmp_path / f"{job}.out").read_text(), re.M) == ["run 0", "run 1"]


def test_only_a_job_that_may_is_requeued(cluster, submit):
    job = submit(cluster, "sleep 100", "--no-requeue")
    reaches(cluster, job, "RUNNING")
    with pytest.raises(ClusterError, match="Requested operation is presently disabled"):
        cluster.run("scontrol", "requeue", job)


def test_an_urgent_job_preempts(cluster, submit, recorder):
    command, read = recorder("signals")
    submit(cluster, f"srun {command}", "--exclusive")
    cluster.wait(read, 20, "the job has begun")
    urgent = submit(cluster, "srun sleep 1", "--partition=urgent", "--exclusive")
    reaches(cluster, urgent, "COMPLETED")
    assert names(read()) == ["restart 0", "SIGTERM"]
    cluster.wait(lambda: names(read())[2:] == ["restart 1"], 30, "the preempted job runs again")
    assert cluster.job(urgent)["Restarts"] == "0"


def test_a_job_is_cancelled(cluster, submit, recorder):
    command, read = recorder("signals")
    job = submit(cluster, f"srun {command}")
    cluster.wait(read, 20, "the job has begun")
    cluster.run("scancel", job)
    reaches(cluster, job, "CANCELLED")
    assert names(read()) == ["restart 0", "SIGTERM"]


def test_a_job_is_signalled_before_its_time_is_up(cluster, submit, recorder):
    """SLURM looks at the clock every 30 s only: up to 30 s early with the signal, up to 30 s late with the end."""
    (step, read_step), (script, read_script) = recorder("step"), recorder("script")
    jobs = [
        submit(cluster, f"srun {step}", "--time=1", "--signal=USR2@10"),
        submit(cluster, f"exec {script}", "--time=1", "--signal=B:USR2@10"),
    ]
    for job, read in zip(jobs, (read_step, read_script), strict=True):
        reaches(cluster, job, "TIMEOUT", limit=150)
        assert names(read()) == ["restart 0", "SIGUSR2", "SIGTERM"]
        signalled, ended = (float(seconds) for _, seconds in read()[1:])
        assert 15 < signalled < 55
        assert 55 < ended < 100
        assert cluster.job(job)["Restarts"] == "0"


def test_two_nodes_have_one_task_each(two_nodes, submit, tmp_path):
    assert two_nodes.run("srun", "-N2", "hostname").stdout == 2 * two_nodes.run("hostname").stdout
    job = submit(two_nodes, "scontrol show hostnames; srun sh -c 'echo $SLURM_PROCID@$SLURMD_NODENAME'", "-N2")
    reaches(two_nodes, job, "COMPLETED")
    lines = (tmp_path / f"{job}.out").read_text().split()
    assert lines[:2] == ["127.0.0.1", "127.0.0.2"]
    assert sorted(lines[2:]) == ["0@127.0.0.1", "1@127.0.0.2"]


def test_two_nodes_lose_a_job_together(two_nodes, submit, recorder):
    (one, read_one), (two, read_two) = recorder("0"), recorder("1")
    job = submit(two_nodes, f"srun sh -c 'if [ $SLURM_PROCID = 0 ]; then exec {one}; else exec {two}; fi'", "-N2")
    two_nodes.wait(lambda: read_one() and read_two(), 20, "both tasks have begun")
    two_nodes.run("scontrol", "requeue", job)
    both = ["restart 0", "SIGTERM", "restart 1"]
    two_nodes.wait(lambda: names(read_one()) == both == names(read_two()), 30, "both tasks run again")


@needs_slurm
@pytest.mark.skipif(os.geteuid() != 0, reason="Device files need root.")
def test_gpus_are_handed_out():
    with Cluster(gpus=4) as cluster:
        given = cluster.run("srun", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES").stdout
        assert given == "0,1\n"
        with pytest.raises(ClusterError, match="Requested node configuration is not available"):
            cluster.run("srun", "--gpus-per-node=5", "true")


# Two steps, a child that left its session, and one that took no notice of SIGTERM.
STUBBORN = "trap '' TERM; setsid sleep 1000 & srun sh -c 'trap \"\" TERM; sleep 1000; sleep 1000' & sleep 1000; wait"


def test_stopping_leaves_nothing(cluster, tmp_path):
    other = Cluster().start()
    folder = other.folder
    job = other.run("sbatch", "--parsable", "--output=/dev/null", f"--wrap={STUBBORN}").stdout.strip()
    other.wait(lambda: sum("sleep 1000" in c for c in processes(folder).values()) >= 4, 20, f"job {job} is complete")
    running = processes(folder)
    assert other.stop() >= len(running)
    assert processes(folder) == {}
    assert not [pid for pid in running if Path(f"/proc/{pid}/cmdline").exists() and _command(pid)]
    assert not folder.exists()
    assert cluster.run("srun", "echo", "here").stdout == "here\n"


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()  # Nothing: a zombie, which waits for its parent.
    except OSError:
        return b""


@needs_slurm
def test_a_cluster_ends_with_the_process_that_started_it(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(SCRIPT.parent)!r})
from cluster import Cluster
print(Cluster().start().folder, flush=True)
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        folder = Path(owner.stdout.readline().strip())
        assert len(processes(folder)) >= 3
        owner.send_signal(signal.SIGKILL)
    end = time.monotonic() + 20
    while folder.exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert processes(folder) == {}
    assert not folder.exists()


def command_line(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120)


@needs_slurm
def test_the_command_line(tmp_path_factory):
    with Cluster() as neighbour:
        folder = neighbour.folder / "inner"  # A short path.
        options = ("--folder", str(folder))
        try:
            started = command_line("start", "--nodes", "2", "--cpus", "3", *options)
            assert started.stdout == f"export SLURM_CONF={folder}/slurm.conf\n", started.stderr
            shown = command_line("status", *options)
            assert shown.returncode == 0
            assert re.search(r"^127\.0\.0\.2 +1 +main\* +idle +3 ", shown.stdout, re.M)
            again = command_line("start", *options)
            assert (again.returncode, again.stderr) == (1, f"folder={folder}: its cluster is running; stop it first.\n")
            stopped = command_line("stop", *options)
            assert re.fullmatch(rf"\d+ processes of {folder} ended\.\n", stopped.stdout)
            assert command_line("status", *options).returncode == 1
        finally:
            kill(folder)


@needs_slurm
def test_a_failure_shows_the_logs():
    with pytest.raises(ClusterError, match=r"(?s)SLURM did not start: slurmctld ended with 1.*select/nonsense"):
        Cluster(settings={"SelectType": "select/nonsense"}).start()


@needs_slurm
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"nodes": 0}, "nodes=0"),
        ({"cpus": 0}, "cpus=0"),
        ({"folder": "/tmp/" + 80 * "x"}, "allowed are"),
        ({"folder": SCRIPT.parent}, "neither empty nor that of an earlier cluster"),
    ],
)
def test_mistakes(options, reason):
    with pytest.raises(ClusterError, match=reason):
        Cluster(**options).start()


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name, path=None: None if name == "slurmctld" else name)
    assert "slurmctld not found" in missing()
