"""The real W&B client, a real connection, and a server that is not there, fails, or does its work."""

import pytest

from harmonize.files import read_rows
from harmonize.training.loggers import run_id
from tests.training.test_run import command, finish, images, overrides  # noqa: F401
from tests.training.wandb_server import WandbServer

NOBODY = "http://127.0.0.1:9"  # the port of "discard", where nothing listens


@pytest.fixture
def online(monkeypatch):
    """online(url, seconds to open a run, seconds to end it): what W&B's client in child processes goes by."""

    def set_up(url, init=60, end=60):
        for variable in ("WANDB_MODE", "WANDB_SERVICE"):  # the latter is the client of this process, if it has one
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", str(init))
        monkeypatch.setenv("WANDB_FINISH_TIMEOUT", str(end))

    return set_up


@pytest.fixture
def settings(overrides):  # noqa: F811
    return [*(o for o in overrides if o != "logger=csv"), "logger=wandb", "callbacks.probe=null"]


def losses(folder):
    return {row["step"]: row["train/loss"] for row in read_rows(folder / "metrics.jsonl") if "train/loss" in row}


def test_a_server_that_does_its_work(settings, online, tmp_path):
    folder = tmp_path / "run"
    with WandbServer() as server:
        online(server.url)
        finish(command(*settings))
        assert server.values(run_id(folder), "train/loss") == pytest.approx(losses(folder))


def test_a_server_that_is_not_there(settings, online, tmp_path):
    online(NOBODY, init=5)
    assert "logging offline instead" in finish(command(*settings))
    assert len(losses(tmp_path / "run")) == 12
    assert [*(tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")]


def test_a_server_that_fails(settings, online, tmp_path):
    """Training goes on and keeps all; it is uploaded later."""
    folder = tmp_path / "run"
    with WandbServer(fails=True) as server:
        online(server.url, end=5)
        assert "W&B failed (Timed out finishing run" in finish(command(*settings))
        assert server.refused > 0
    assert (folder / "metrics.json").exists()
    with WandbServer() as server:
        online(server.url)
        finish(command("sync", str(folder), program=("-m", "harmonize")))
        assert len(losses(folder)) == 12
        assert server.values(run_id(folder), "train/loss") == pytest.approx(losses(folder))
