"""A real sweep on a real SLURM: one job requeued, one out of time, one cancelled; all end as if nothing had been."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hydra.core.config_store import ConfigStore
from PIL import Image

from harmonize.cli import main
from harmonize.config import compose
from harmonize.files import read_rows
from harmonize.slurm import resources, script
from harmonize.sweeps import Sweep, standing
from tests.slurm.clusters import missing
from tests.slurm.slow import SECONDS
from tests.training.test_module import assert_bit_equal
from tests.training.test_run import TINY, differences, load, rows

ROOT = Path(__file__).resolve().parents[2]
STEPS = 200
needs_slurm = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture
def settings(tmp_path):
    root, generator = tmp_path / "images", np.random.default_rng(0)
    for i in range(24):
        path = root / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(path)
    return [
        *(o for o in TINY if not o.startswith("trainer.max_epochs")),
        "data=folder",
        f"data.root={root}",
        "data.dataset._target_=tests.slurm.slow.SlowFolder",
        f"trainer.max_steps={STEPS}",
        "trainer.log_every_n_steps=5",
        "trainer.val_every_n_epochs=1000",
        "callbacks.probe=null",
        "callbacks.gradient_norms=null",
    ]


def until(condition, what, seconds=120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.2)
    return found


def steps(job):
    return max((row["step"] for row in read_rows(job.folder / "metrics.jsonl")), default=0)


@needs_slurm
def test_requeued_timed_out_and_cancelled_jobs(cluster, settings, tmp_path):
    environment = os.environ | cluster.env | {"OMP_NUM_THREADS": "1", SECONDS: "0.03"}
    arguments = [*settings, "-m", "seed=0,1,2", f"run.root={tmp_path / 'runs'}", "hydra/launcher=slurm"]
    arguments += ["hydra.launcher.timeout_min=30", "hydra.launcher.signal_delay_s=30"]
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "train.py", *arguments], cwd=ROOT, env=environment, stdout=output, stderr=output
        )
    (folder,) = until(lambda: list((tmp_path / "runs" / "sweeps").glob("*")), "the sweep's folder")
    until(lambda: "see them" in (tmp_path / "output.txt").read_text(), "submission")
    sweep = Sweep.read(folder)
    ids = [job.log.name.partition("_0_log")[0] for job in sweep.jobs]
    until(lambda: all(steps(job) >= 10 for job in sweep.jobs), "training of all three")

    cluster.run("scontrol", "requeue", ids[0])
    cluster.run("scontrol", "update", f"JobId={ids[1]}", "TimeLimit=1")  # its signal comes at most a minute early
    cluster.run("scancel", ids[2])
    until(lambda: "SIGUSR2" in sweep.jobs[1].log.read_text(), "the signal before the end", 90)
    until(lambda: cluster.job(ids[1])["Restarts"] == "1", "handing in again")
    cluster.run("scontrol", "update", f"JobId={ids[1]}", "TimeLimit=30")
    process.wait(timeout=300)
    text = (tmp_path / "output.txt").read_text()
    assert process.returncode == 1, text
    assert "1 of 3 jobs did not finish (1 stopped): 2. See them with: harmonize sweep" in text
    assert [standing(job).state for job in sweep.jobs] == ["finished", "finished", "stopped"]
    assert [cluster.job(name)["Restarts"] for name in ids[:2]] == ["1", "1"]  # by one party, once
    for job, name in zip(sweep.jobs, ("SIGTERM", "SIGUSR2", "SIGTERM"), strict=True):
        shown = job.log.read_text()
        assert shown.count(f"Stopped by {name}") == 1
        assert ("Resuming at step" in shown) == (job.num != 2)

    environment[SECONDS] = "0"
    again = subprocess.run(
        [sys.executable, "-m", "harmonize", "sweep", str(folder), "--retry-failed"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is SLURM's") == 1
    sweep = Sweep.read(folder)
    assert [standing(job).state for job in sweep.jobs] == ["finished"] * 3
    for job in sweep.jobs:
        straight = tmp_path / f"straight{job.num}"
        overrides = [o for o in job.overrides if not o.startswith("run.root")]
        assert main(["train", *overrides, f"run.dir={straight}"]) == 0
        a, b = (load(path / "checkpoints" / "last.ckpt") for path in (straight, job.folder))
        assert a["global_step"] == b["global_step"] == STEPS
        assert_bit_equal(a["state_dict"], b["state_dict"])
        for number, state in a["optimizer_states"][0]["state"].items():
            assert_bit_equal(state, b["optimizer_states"][0]["state"][number])
        assert not differences(rows(straight), rows(job.folder))


@needs_slurm
def test_one_run_on_two_nodes_preempted(two_nodes, settings, tmp_path):
    """One task on each of two nodes, ranks come from SLURM alone; a job of a higher partition takes both away."""
    environment = os.environ | two_nodes.env | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", SECONDS: "0.05"}
    same = [*settings, "trainer.max_steps=40", "backbone.drop_path=0", "optimizer.eps=1e-3"]
    arguments = [*same, "-m", "seed=0", f"run.root={tmp_path / 'runs'}", "hydra/launcher=slurm"]
    arguments += ["trainer.num_nodes=2", "trainer.devices=1", "hydra.launcher.timeout_min=10"]
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "train.py", *arguments], cwd=ROOT, env=environment, stdout=output, stderr=output
        )
    (folder,) = until(lambda: list((tmp_path / "runs" / "sweeps").glob("*")), "the sweep's folder")
    until(lambda: "see them" in (tmp_path / "output.txt").read_text(), "submission")
    (job,) = Sweep.read(folder).jobs
    until(lambda: steps(job) >= 10, "training")
    two_nodes.run("srun", "--partition=urgent", "--nodes=2", "--exclusive", "true")
    process.wait(timeout=300)
    shown = job.log.read_text()
    assert process.returncode == 0, (tmp_path / "output.txt").read_text() + shown
    assert shown.count("Stopped by SIGTERM") == 1
    assert shown.count("Resuming at step") == 1
    assert "8 images a step = 2 processes x 4" in shown
    assert two_nodes.job(job.log.name.partition("_0_log")[0])["Restarts"] == "1"
    assert main(["train", *same, f"run.dir={tmp_path / 'one'}"]) == 0
    import torch

    one, two = (load(path / "checkpoints" / "last.ckpt")["state_dict"] for path in (tmp_path / "one", job.folder))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)


@needs_slurm
def test_what_a_job_asks_for(tmp_path):
    options = {"timeout_min": 90, "partition": "gpu", "mem_gb": 4, "signal_delay_s": 60, "additional_parameters": {}}
    cfg = compose(["trainer.devices=4", "trainer.num_nodes=2", "trainer.accelerator=gpu", "data.num_workers=7"])
    text = script(cfg, options, tmp_path)
    for line in (
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--cpus-per-task=8",
        "--time=90",
        "--partition=gpu",
        "--mem=4G",
        "--signal=USR2@60",
        "--requeue",
    ):
        assert f"#SBATCH {line}\n" in text, line
    assert resources(cfg, {"cpus_per_task": 2, "gpus_per_node": 1})["cpus_per_task"] == 2


def test_the_extra_that_is_missing_is_named(monkeypatch, tmp_path, capsys):
    repo = ConfigStore.instance().repo["hydra"]["launcher"]
    monkeypatch.delitem(repo, "submitit_slurm.yaml")
    assert main(["train", "-m", "seed=0,1", "hydra/launcher=slurm", f"run.root={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("hydra/launcher=slurm needs hydra-submitit-launcher: pip install 'harmonize[slurm]'.")


def test_no_cluster_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["train", "-m", "seed=0,1", "hydra/launcher=slurm", f"run.root={tmp_path}", "logger=csv"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "harmonize: error: hydra/launcher=slurm needs sbatch and srun: this machine does not reach a SLURM cluster."
    )
