"""Checkpoints: whole or not at all, plain, and enough to go on from."""

import errno
import os
from dataclasses import replace

import pytest
import torch

from harmonize.training.callbacks.checkpoint import AtomicCheckpointIO, Checkpoints
from harmonize.training.callbacks.probe import OnlineProbe
from harmonize.types import FeatureSpec
from tests.helpers import random_batch
from tests.training.conftest import make_batches, make_module
from tests.training.test_module import assert_bit_equal, weights


def load(path):
    return torch.load(path, weights_only=True)


def test_written_whole_and_read_back(tmp_path):
    io = AtomicCheckpointIO()
    state = {"state_dict": {"w": torch.arange(3)}, "step": 1, "list": [1.5, None, "a"]}
    io.save_checkpoint(state, tmp_path / "deep" / "x.ckpt")
    assert io.written
    loaded = io.load_checkpoint(tmp_path / "deep" / "x.ckpt")
    assert loaded["state_dict"]["w"].equal(state["state_dict"]["w"])
    assert {k: loaded[k] for k in ("step", "list")} == {"step": 1, "list": [1.5, None, "a"]}
    assert os.listdir(tmp_path / "deep") == ["x.ckpt"]


class FullDisk:
    """A file that takes some bytes and then none."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 5000])
def test_a_full_disk_leaves_the_previous_one_and_the_run_alive(tmp_path, monkeypatch, room):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"state_dict": {"w": torch.zeros(1000)}}, path)
    before = path.read_bytes()
    real = type(path).open

    def opened(self, mode="r", *args, **kwargs):
        file = real(self, mode, *args, **kwargs)
        return FullDisk(file, room) if "w" in mode else file

    monkeypatch.setattr(type(path), "open", opened)
    with pytest.warns(UserWarning, match=r"last\.ckpt could not be written .*previous one is untouched"):
        io.save_checkpoint({"state_dict": {"w": torch.ones(10_000)}}, path)
    assert not io.written
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.ckpt"]


def scripted_probe(monkeypatch, scores):
    """A probe whose k-NN accuracies are given."""
    values = iter(scores)
    monkeypatch.setattr("harmonize.training.callbacks.probe.knn_accuracy", lambda *_: next(values))
    return OnlineProbe(make_batches(1), 2, FeatureSpec())


def test_last_and_best(fit, tmp_path, monkeypatch):
    probe = scripted_probe(monkeypatch, [0.9, 0.3, 0.5, 0.4])  # the untrained network's does not count
    fit(
        make_module("mim", total_steps=6, steps_per_epoch=2),
        make_batches(2),
        [probe, Checkpoints(tmp_path / "checkpoints")],
        val=make_batches(1),
    )
    last, best = (load(tmp_path / "checkpoints" / f"{name}.ckpt") for name in ("last", "best"))
    assert (last["global_step"], best["global_step"]) == (6, 4)
    state = next(value for key, value in last["callbacks"].items() if key.startswith("Checkpoints"))
    assert state == {"best": 0.5, "monitor": "val/knn_top1"}


def test_without_labels_the_loss_decides(fit, tmp_path):
    folder = tmp_path / "checkpoints"
    monitor = Checkpoints(folder, monitor="epoch/loss", mode="min")
    fit(make_module("mim", total_steps=4, steps_per_epoch=2), make_batches(2), [monitor])
    assert monitor.best is not None
    assert load(folder / "best.ckpt")["global_step"] in (2, 4)
    assert load(folder / "last.ckpt")["global_step"] == 4


def test_a_failed_best_leaves_last_alone(fit, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    monitor = Checkpoints(folder, monitor="epoch/loss", mode="min")
    fit(make_module("mim", total_steps=2, steps_per_epoch=2), make_batches(2), [monitor])
    before = (folder / "last.ckpt").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("harmonize.training.callbacks.checkpoint.torch.save", full)
    with pytest.warns(UserWarning, match="training goes on"):
        trainer = fit(make_module("mim", total_steps=4, steps_per_epoch=2), make_batches(2), [monitor])
    assert trainer.global_step == 4
    assert (folder / "last.ckpt").read_bytes() == before


class KilledError(Exception):
    pass


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_resumed_equals_uninterrupted(fit, tmp_path, monkeypatch, precision):
    """The real command line is killed in test_run.py; this is the same at the level of the loop."""

    def run(folder, killed_at, ckpt_path=None):
        folder.mkdir(exist_ok=True)
        module = make_module("hybrid", total_steps=12, steps_per_epoch=4)
        probe = OnlineProbe(make_batches(2), 2, FeatureSpec(), k=3)
        checkpoints = Checkpoints(folder / "checkpoints")

        def step(*args, real=module.training_step):
            if module.trainer.global_step == killed_at:
                raise KilledError
            return real(*args)

        module.training_step = step
        sanity = -1 if ckpt_path is None else 0
        options = {"folder": folder, "precision": precision, "num_sanity_val_steps": sanity, "ckpt_path": ckpt_path}
        try:
            fit(module, make_batches(), [probe, checkpoints], val=[random_batch(5, seed=7)], **options)
        except KilledError:
            assert killed_at < 12
        return module

    straight = run(tmp_path / "a", 12)
    run(tmp_path / "b", 6)  # killed in the second epoch
    resumed = run(tmp_path / "b", 12, tmp_path / "b" / "checkpoints" / "last.ckpt")
    assert_bit_equal(weights(straight), weights(resumed))
    a, b = (load(tmp_path / name / "checkpoints" / "last.ckpt") for name in "ab")
    assert a["global_step"] == b["global_step"] == 12
    for number, state in a["optimizer_states"][0]["state"].items():
        assert_bit_equal(state, b["optimizer_states"][0]["state"][number])


def test_batches_of_the_fixture_differ():
    """Otherwise the test above could not see a wrong order."""
    first, second = make_batches(2)
    assert not first.views["mim"][0].equal(second.views["mim"][0])
    assert replace(first).index.equal(second.index)
