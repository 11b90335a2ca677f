"""Sweeps on this machine: one process per job, a table from files alone, failed jobs that take nobody down."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from harmonize import sweeps
from harmonize.cli import main
from harmonize.sweeps import Job, Sweep, _slots, standing
from harmonize.types import ConfigError
from tests.training.test_run import TINY

SHORT = [*TINY, "data=shapes", "data.num_train=16", "data.num_val=8", "trainer.max_epochs=1", "trainer.sanity=false"]


def make_sweep(root, overrides=("seed=0", "seed=1")):
    jobs = [Job(i, [o], root / f"run{i}", root / "sweep" / f"{i:03d}.log") for i, o in enumerate(overrides)]
    sweep = Sweep(root / "sweep", "train", "local", {"jobs": None}, jobs)
    sweep.write()
    return sweep


def write(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def test_a_sweep_runs_and_its_table_says_so(tmp_path, capsys):
    """Every job in its own process and folder; the table afterwards, from files."""
    assert main(["train", *SHORT, "-m", "seed=0,1", f"run.root={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("Run folder:") == 2
    assert all(f"harmonize: job {i}: " in shown for i in range(2))
    (folder,) = (tmp_path / "sweeps").iterdir()
    sweep = Sweep.read(folder)
    assert [next(o for o in job.overrides if o.startswith("seed")) for job in sweep.jobs] == ["seed=0", "seed=1"]
    assert {standing(job).state for job in sweep.jobs} == {"finished"}
    assert main(["sweep", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "2 finished" in shown
    assert all(f"seed={i}" in shown for i in range(2))
    assert "2/2" in shown


def test_failed_jobs_are_named_and_run_again(tmp_path, capsys, monkeypatch):
    """One job has no right to its folder: the others finish, the exit code tells, and --retry-failed runs it alone."""
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    jobs = [
        Job(0, [*SHORT, f"run.dir={tmp_path / 'good'}"], tmp_path / "good", tmp_path / "sweep" / "000.log"),
        Job(1, [*SHORT, f"run.dir={blocked / 'run'}"], blocked / "run", tmp_path / "sweep" / "001.log"),
    ]
    sweep = Sweep(tmp_path / "sweep", "train", "local", {"jobs": 2}, jobs)
    sweep.write()
    with pytest.raises(sweeps.FaultError, match=r"1 of 2 jobs did not finish \(1 failed\): 1\. .*--retry-failed"):
        sweeps.start(sweep, jobs)
    capsys.readouterr()
    assert main(["sweep", str(sweep.folder)]) == 1
    shown = capsys.readouterr().out
    assert "1 finished, 1 failed" in shown
    assert "job 1 failed" in shown
    assert "harmonize: error: run.dir=" in shown  # the end of its log
    blocked.unlink()
    started = (tmp_path / "good" / "command.txt").read_text()
    assert main(["sweep", str(sweep.folder), "--retry-failed"]) == 0
    assert [standing(job).state for job in jobs] == ["finished", "finished"]
    assert (tmp_path / "good" / "command.txt").read_text() == started
    assert main(["sweep", str(sweep.folder), "--retry-failed"]) == 0
    assert "No job has failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("state", "metrics", "code", "queued", "expected"),
    [
        ({}, None, None, None, "waiting"),
        ({"state": "running", "age": 0}, None, None, None, "running"),
        ({"state": "running", "age": 1000}, None, None, None, "lost"),
        ({"state": "running", "age": 1000}, None, None, {0}, "running"),
        ({"state": "running", "age": 0}, None, None, set(), "lost"),
        ({"state": "running", "age": 0}, None, -9, None, "failed"),
        ({"state": "stopped", "message": "SIGTERM"}, None, 143, None, "stopped"),
        ({"state": "stopped"}, None, None, {0}, "waiting"),
        ({"state": "failed", "message": "X"}, None, 1, None, "failed"),
        ({"state": "running"}, {"step": 4, "total_steps": 4}, None, None, "finished"),
        ({}, None, 2, None, "failed"),
        ({}, None, 0, None, "finished"),
        ({}, None, None, set(), "lost"),
    ],
)
def test_how_a_job_stands(tmp_path, state, metrics, code, queued, expected):
    job = make_sweep(tmp_path).jobs[0]
    if state:
        write(job.folder, "state.json", {**state, "updated": time.time() - state.get("age", 0)})
    if metrics:
        write(job.folder, "metrics.json", metrics)
    if code is not None:
        job.log.with_suffix(".code").write_text(str(code))
    assert standing(job, queued).state == expected


def test_the_table_of_running_jobs(tmp_path, capsys):
    sweep = make_sweep(tmp_path)
    write(
        sweep.jobs[0].folder,
        "state.json",
        {"state": "running", "updated": time.time(), "step": 30, "total_steps": 90, "seconds_left": 3725},
    )
    rows = [{"step": 20, "epoch/loss": 1.5, "val/knn_top1": 0.25}, {"step": 30, "epoch/loss": 1.25}]
    (sweep.jobs[0].folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"torn')
    assert main(["sweep", str(sweep.folder)]) == 0
    shown = capsys.readouterr().out
    for words in ("1 running, 1 waiting", "30/90", "1:02:05", "1.2500", "25.0%", "seed=1"):
        assert words in shown


def test_a_folder_without_a_sweep(tmp_path, capsys):
    make_sweep(tmp_path)
    assert main(["sweep", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path} holds no sweep" in error
    assert str(tmp_path / "sweep") in error
    (tmp_path / "sweep" / "sweep.yaml").write_text("jobs: [")
    with pytest.raises(ConfigError, match="holds no sweep"):
        Sweep.read(tmp_path / "sweep")


@pytest.mark.parametrize(
    ("gpus", "visible", "devices", "wanted", "expected"),
    [
        (0, None, 1, None, [None]),
        (1, None, 1, 3, [None] * 3),
        (4, None, 1, None, ["0", "1", "2", "3"]),
        (4, "2,5", 1, None, ["2", "5"]),
        (5, None, 2, None, ["0,1", "2,3"]),
        (2, None, 1, 4, ["0", "1", "0", "1"]),
    ],
)
def test_jobs_share_out_the_gpus(tmp_path, monkeypatch, gpus, visible, devices, wanted, expected):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    job = Job(0, [f"trainer.devices={devices}"], Path("x"), Path("y"))
    assert _slots(Sweep(tmp_path, "train", "local", {"jobs": wanted}, [job]), [job]) == expected


def test_several_devices_in_a_sweep(tmp_path, capsys):
    """Each job starts its own second process, and none restarts the sweep."""
    arguments = [*SHORT, "-m", "seed=0", "trainer.devices=2", f"run.root={tmp_path}", "backbone.drop_path=0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        assert main(["train", *arguments]) == 0
    shown = capsys.readouterr().out
    assert shown.count("Run folder:") == 1
    assert "8 images a step = 2 processes x 4" in shown


def test_ctrl_c_lets_the_jobs_save(tmp_path):
    """A terminal sends it to the whole group."""
    import subprocess
    import sys

    swept = ["-m", "seed=0,1", f"run.root={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "harmonize", "train", *SHORT, "trainer.max_epochs=400", *swept],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Tests that run in the background ignore Ctrl-C, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parents[1],
    )
    while not list(tmp_path.glob("*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "job 1" not in output
    (state,) = tmp_path.glob("*/state.json")
    assert json.loads(state.read_text())["state"] == "stopped"
