"""Stopped, killed, out of disk, out of memory: no fault costs more than the work since the last checkpoint."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harmonize.files import read_rows
from harmonize.training.callbacks import diagnostics as diagnostics_module
from harmonize.training.module import PretrainModule
from harmonize.types import ConfigError, FaultError, WorkerError
from tests.training.test_module import assert_bit_equal
from tests.training.test_run import diagnostics, differences, images, load, measured, overrides, rows, run  # noqa: F401

STEPS = 12  # in 3 epochs


def same_end(straight: Path, other: Path) -> None:
    """Weights, moments, metrics and diagnostics of two runs are the same to the bit."""
    a, b = (load(path / "checkpoints" / "last.ckpt") for path in (straight, other))
    assert a["global_step"] == b["global_step"] == STEPS
    assert_bit_equal(a["state_dict"], b["state_dict"])
    for number, state in a["optimizer_states"][0]["state"].items():
        assert_bit_equal(state, b["optimizer_states"][0]["state"][number])
    assert not differences(rows(straight), rows(other))
    assert not differences(diagnostics(straight), diagnostics(other))


@pytest.fixture(scope="module")
def straight(images, tmp_path_factory):  # noqa: F811
    """One run without interruption, and its settings."""
    from tests.training.test_run import TINY

    folder = tmp_path_factory.mktemp("straight") / "run"
    settings = [o for o in TINY if o != "diagnostics=none"]
    settings += ["diagnostics.figures=false", "data=folder", f"data.root={images}", "trainer.val_every_n_epochs=2"]
    run(*settings, f"run.dir={folder}")
    return folder, settings


def signal_at(monkeypatch, step, signum=signal.SIGTERM):
    """Let this process receive a signal in the middle of a training step (from 1)."""
    real = PretrainModule.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == step - 1:
            monkeypatch.setattr(PretrainModule, "training_step", real)
            os.kill(os.getpid(), signum)
        return real(self, batch, batch_idx)

    monkeypatch.setattr(PretrainModule, "training_step", training_step)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_stopped_at_any_step_it_ends_as_if_it_had_not_been(straight, tmp_path, monkeypatch, capsys, accumulate):
    """In mid-epoch, in the last step of an epoch with and without validation, in the very last step."""
    folder, settings = straight
    settings = [*settings, f"trainer.accumulate={accumulate}"]
    if accumulate > 1:
        folder = tmp_path / "accumulated"
        run(*settings, f"run.dir={folder}")
    stopped = tmp_path / "stopped"
    for step, signum, code in (
        (2, signal.SIGTERM, 143),
        (4, signal.SIGUSR1, 138),
        (7, signal.SIGINT, 130),
        (8, signal.SIGUSR2, 140),
        (12, signal.SIGTERM, 143),
    ):
        signal_at(monkeypatch, step, signum)
        with pytest.raises(SystemExit) as stop:
            run(*settings, f"run.dir={stopped}")
        assert stop.value.code == code
        assert f"Stopped by {signal.Signals(signum).name}" in capsys.readouterr().out
        saved = load(stopped / "checkpoints" / "last.ckpt")
        assert saved["global_step"] == step
        assert saved["validation_due"] == (step in (8, 12))
        state = json.loads((stopped / "state.json").read_text())
        assert (state["state"], state["step"]) == ("stopped", step)
        assert not (stopped / "run.lock").exists()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    run(*settings, f"run.dir={stopped}")
    same_end(folder, stopped)


def test_stopped_while_it_validates(straight, tmp_path, monkeypatch):
    folder, settings = straight
    real, calls = diagnostics_module.measure, []

    def measure(*args):
        calls.append(1)
        if len(calls) == 2:  # the first is of the untrained network
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        return real(*args)

    monkeypatch.setattr(diagnostics_module, "measure", measure)
    stopped = tmp_path / "stopped"
    started = time.monotonic()
    with pytest.raises(SystemExit):
        run(*settings, f"run.dir={stopped}")
    assert time.monotonic() - started < 60
    assert load(stopped / "checkpoints" / "last.ckpt")["validation_due"]
    assert "val/knn_top1" in {key for row in read_rows(stopped / "metrics.jsonl") for key in row}
    run(*settings, f"run.dir={stopped}")
    same_end(folder, stopped)


def test_stopped_before_the_first_step(straight, tmp_path, monkeypatch):
    folder, settings = straight
    monkeypatch.setattr(diagnostics_module, "measure", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    stopped = tmp_path / "stopped"
    with pytest.raises(SystemExit):
        run(*settings, f"run.dir={stopped}")
    assert not (stopped / "checkpoints" / "last.ckpt").exists()
    monkeypatch.undo()
    run(*settings, f"run.dir={stopped}")
    same_end(folder, stopped)


def test_killed_twenty_times_it_ends_as_if_it_had_not_been(straight, tmp_path):
    """SIGKILL at random moments, workers on, a checkpoint after every step."""
    folder, settings = straight
    killed = tmp_path / "killed"
    often = [*settings, f"run.dir={killed}", "trainer.save_every_minutes=1e-9", "data.num_workers=1"]
    fork = multiprocessing.get_context("fork")
    generator, kills = random.Random(0), 0
    while kills < 20:
        process = fork.Process(target=run, args=often)
        process.start()
        before = len(read_rows(killed / "metrics.jsonl"))
        while process.is_alive() and len(read_rows(killed / "metrics.jsonl")) <= before:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.3))
        if not process.is_alive():
            assert process.exitcode == 0
            shutil.rmtree(killed)  # it came to its end: once more from the start
            continue
        process.kill()
        process.join()
        kills += 1
    process = fork.Process(target=run, args=often)
    process.start()
    process.join()
    assert process.exitcode == 0
    same_end(folder, killed)


def test_a_checkpoint_within_the_epoch_after_so_many_minutes(overrides, tmp_path, monkeypatch):  # noqa: F811
    saved = []
    from harmonize.training.callbacks.checkpoint import AtomicCheckpointIO

    real = AtomicCheckpointIO.save_checkpoint
    monkeypatch.setattr(
        AtomicCheckpointIO,
        "save_checkpoint",
        lambda self, state, path, **more: (saved.append(state["global_step"]), real(self, state, path, **more)),
    )
    run(*overrides, "trainer.max_epochs=1", "trainer.save_every_minutes=1e-9")
    assert saved == [1, 2, 3, 4, 4]  # every step; the epoch before and after its validation
    saved.clear()
    run(*overrides, "trainer.max_epochs=1", f"run.dir={tmp_path / 'rarely'}")
    assert saved == [4, 4]


def test_a_run_that_stops_between_epochs_validates_all_of_them(overrides, tmp_path):  # noqa: F811
    run(*overrides, "trainer.max_steps=6")
    run(*overrides, "trainer.max_steps=11")
    assert [row["step"] for row in rows(tmp_path / "run") if "val/knn_top1" in row] == [4, 6, 8, 11]


def test_other_ranks_take_over_in_mid_epoch(overrides, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Another number of micro-batches stands for another number of ranks: the same step is another micro-batch."""
    changed = [*overrides, "loss=mim", "optimizer.eps=1e-3", "backbone.drop_path=0"]
    changed = [o for o in changed if "contrastive" not in o]
    run(*changed)
    signal_at(monkeypatch, 6)
    with pytest.raises(SystemExit):
        run(*changed, f"run.dir={tmp_path / 'other'}")
    capsys.readouterr()
    run(*changed, f"run.dir={tmp_path / 'other'}", "trainer.accumulate=4")
    shown = capsys.readouterr().out
    assert "trainer.accumulate: 1 -> 4" in shown
    assert "Batch: 8 images a step = 4 micro-batches x 2; before: 8 images a step." in shown
    a, b = (load(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"] for name in ("run", "other"))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# ---- one folder, one process -----------------------------------------------------------------------------------------


def held(folder: Path, ready, go) -> None:
    from harmonize.training.status import RunStatus

    with RunStatus(folder) as status:
        status.claim(10, 0)
        ready.set()
        go.wait(60)


def test_the_second_process_is_refused(overrides, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    context = multiprocessing.get_context("fork")
    ready, go = context.Event(), context.Event()
    process = context.Process(target=held, args=(folder, ready, go))
    process.start()
    assert ready.wait(60)
    with pytest.raises(ConfigError, match=rf"^run\.dir=.* is in use by process {process.pid} on .*run\.lock.*\.$"):
        run(*overrides, "trainer.max_steps=1")
    assert sorted(path.name for path in folder.iterdir()) == ["run.lock", "state.json"]
    process.kill()  # a lock whose process is gone is taken over
    process.join()
    assert (folder / "run.lock").exists()
    run(*overrides, "trainer.max_steps=1")
    assert not (folder / "run.lock").exists()


@pytest.mark.parametrize(
    ("holder", "age", "alive"),
    [
        ({"host": "elsewhere", "pid": 1}, 5, True),
        ({"host": "elsewhere", "pid": 1}, 500, False),
        ({"host": "elsewhere", "pid": 1, "slurm_job": "7_1"}, 5, True),
        ({"host": "elsewhere", "pid": 1, "slurm_job": "7_2"}, 5, False),  # our own job, handed in again
        ({}, 500, False),
    ],
)
def test_locks_of_other_hosts_live_by_their_signs_of_life(tmp_path, monkeypatch, holder, age, alive):
    from harmonize.training.status import is_alive

    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    lock = tmp_path / "run.lock"
    lock.write_text(json.dumps(holder))
    os.utime(lock, (time.time() - age,) * 2)
    assert is_alive(holder, lock) == alive


# ---- the machine -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    ):
        pytest.skip("needs root and the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_costs_no_checkpoint(overrides, small_disk):  # noqa: F811
    folder = small_disk / "run"
    settings = [*overrides, f"run.dir={folder}", "trainer.max_epochs=2"]
    run(*settings, "trainer.max_epochs=1")
    before = load(folder / "checkpoints" / "last.ckpt")
    (folder / "checkpoints" / "previous.ckpt").unlink()  # it would make room for one more
    room = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(bytes(room - (100 << 10)))
    message = r"last\.ckpt could not be written .*MiB are free on its disk\); .*untouched"
    with (
        pytest.warns(UserWarning, match=message),
        pytest.raises(FaultError, match=r"could not be written, so that the run is not finished: make room"),
    ):
        run(*settings)
    after = load(folder / "checkpoints" / "last.ckpt")
    assert after["global_step"] == before["global_step"] == 4
    assert_bit_equal(after["state_dict"], before["state_dict"])
    (small_disk / "filler").unlink()
    run(*settings)
    assert load(folder / "checkpoints" / "last.ckpt")["global_step"] == 8


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_checkpoint_is_replaced_by_the_one_before(overrides, tmp_path, keep):  # noqa: F811
    settings = [*overrides, "trainer.save_every_minutes=1e-9"]
    run(*settings)
    expected = load(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    checkpoints = tmp_path / "run" / "checkpoints"
    content = (checkpoints / "last.ckpt").read_bytes()
    (checkpoints / "last.ckpt").unlink()  # it may be the same file as another
    (checkpoints / "last.ckpt").write_bytes(content[: int(keep * len(content))])
    (tmp_path / "run" / "metrics.json").unlink()
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged; going on from previous\.ckpt, of step 12\."):
        run(*settings)
    assert_bit_equal(load(checkpoints / "last.ckpt")["state_dict"], expected)


def test_a_worker_that_is_killed_is_one_sentence(overrides, tmp_path, monkeypatch):  # noqa: F811
    real = PretrainModule.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            for worker in multiprocessing.active_children():  # not W&B's service, which later tests go on with
                worker.kill()
            time.sleep(0.5)
        return real(self, batch, batch_idx)

    monkeypatch.setattr(PretrainModule, "training_step", training_step)
    settings = [*overrides, "data.num_workers=1", "trainer.save_every_minutes=1e-9", "callbacks.probe=null"]
    with pytest.raises(WorkerError, match=r"A data loader worker was killed .*data\.num_workers.*resumes"):
        run(*settings)
    monkeypatch.undo()
    assert json.loads((tmp_path / "run" / "state.json").read_text())["state"] == "failed"
    assert load(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] >= 2
    assert run(*settings)["step"] == STEPS


def test_two_processes_stop_at_the_same_step(overrides, tmp_path):  # noqa: F811
    """Only one of two ranks is asked to stop; both save and leave."""
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "train.py", *overrides, "trainer.devices=2", "trainer.max_epochs=500"],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while max((row["step"] for row in read_rows(folder / "metrics.jsonl")), default=0) < 6:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.terminate()
    started = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - started < 30
    assert process.returncode == 143, output
    assert load(folder / "checkpoints" / "last.ckpt")["global_step"] >= 6
    assert output.count("Stopped by SIGTERM") == 1


def test_a_folder_of_everything(tmp_path):
    """Damaged, empty, huge and mislabelled files are each named once and skipped; every kind of pixel is read."""
    from tests.training.test_run import TINY

    folder, other = tmp_path / "images" / "a", tmp_path / "images" / "b"  # two classes: the probes read all of them
    folder.mkdir(parents=True)
    other.mkdir()
    generator = np.random.default_rng(0)

    def noise(size=24, channels=3):
        return generator.integers(0, 255, (size, size, channels), dtype=np.uint8).squeeze()

    for i in range(8):
        Image.fromarray(noise()).save(folder / f"plain{i}.png")
        Image.fromarray(noise()).save(other / f"plain{i}.png")
    Image.fromarray(noise(channels=4), "CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(noise(channels=1).astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(noise(channels=4), "RGBA").save(folder / "alpha.webp")
    frames = [Image.fromarray(noise()) for _ in range(3)]
    frames[0].save(folder / "moves.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "moves.webp", save_all=True, append_images=frames[1:])
    whole = (folder / "plain0.png").read_bytes()
    damaged = {
        "cut.png": whole[: len(whole) // 2],
        "empty.png": b"",
        "text.jpg": b"no image",
        "page.png": b"<html></html>",
        "bitten.jpg": (folder / "cmyk.jpg").read_bytes()[:-300],
    }
    for name, content in damaged.items():
        (folder / name).write_bytes(content)
    Image.new("1", (20_000, 12_000)).save(folder / "bomb.png")
    (folder / "notes.txt").write_text("no image, and not taken for one")

    settings = [*TINY, "data=folder", f"data.root={tmp_path / 'images'}", f"run.dir={tmp_path / 'run'}"]
    settings += ["data.batch_size=4", "trainer.max_epochs=2"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metrics = run(*settings)
    assert metrics["step"] == metrics["total_steps"]
    skipped = [str(w.message) for w in caught if str(w.message).startswith("skipped")]
    assert sorted(text.split()[1].rstrip(",").rpartition("/")[2] for text in skipped) == sorted([*damaged, "bomb.png"])
    assert any("20000 x 12000 px are more than data.max_pixels" in text for text in skipped)
