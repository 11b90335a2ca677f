"""Reading harmonize's own checkpoints: whole, or one sentence; never any code that a file brings along."""

import pickle

import pytest
import torch

from harmonize.checkpoints.own import read_checkpoint
from harmonize.types import ConfigError
from tests.helpers import tiny_encoder


def content(**changes):
    encoder = tiny_encoder()
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    state["objective.mim.mask_token"] = torch.ones(3)
    return {"state_dict": state, "config": {"backbone": {"width": 24}, "seed": 3}, "global_step": 7} | changes


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(content(), folder / "checkpoints" / "last.ckpt")
    torch.save(content(global_step=5), folder / "checkpoints" / "best.ckpt")
    return folder


@pytest.mark.parametrize(("name", "step"), [("", 7), ("checkpoints/last.ckpt", 7), ("checkpoints/best.ckpt", 5)])
def test_a_run_folder_or_a_file(run_folder, name, step):
    found = read_checkpoint(str(run_folder / name))
    assert found.path == run_folder / (name or "checkpoints/last.ckpt")
    assert (found.step, found.config) == (step, {"backbone": {"width": 24}, "seed": 3})
    encoder = tiny_encoder(seed=1)
    encoder.load_state_dict(found.weights)  # all of the encoder, and nothing of the objective
    for name, value in tiny_encoder().state_dict().items():
        assert encoder.state_dict()[name].equal(value)


def test_the_home_folder(run_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(run_folder.parent))
    assert read_checkpoint("~/run").path == run_folder / "checkpoints" / "last.ckpt"


def sentence(name):
    with pytest.raises(ConfigError) as error:
        read_checkpoint(str(name))
    text = str(error.value)
    assert text.startswith(f"checkpoint={name}")
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_nothing_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentence("vit_tiny_patch16_224") == (
        "checkpoint=vit_tiny_patch16_224: there is no such file or run folder; models of timm are written timm:NAME."
    )
    (tmp_path / "empty").mkdir()
    assert "empty/checkpoints/last.ckpt does not exist" in sentence("empty")


@pytest.mark.parametrize("text", ["", "hello\n" * 100, "PK\x03\x04 torn"])
def test_another_kind_of_file(tmp_path, text):
    (tmp_path / "a.ckpt").write_text(text)
    assert "is an empty file" if not text else "is damaged or no file of torch.save" in sentence(tmp_path / "a.ckpt")


def test_a_torn_checkpoint(run_folder):
    path = run_folder / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:2000])
    assert "is damaged or no file of torch.save" in sentence(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": {"patch_embed.proj.weight": torch.ones(2)}},  # as other projects write them
        torch.ones(3),
        [1, 2],
        content(state_dict={"objective.mim.mask_token": torch.ones(3)}),
        content(state_dict={"module.encoder.cls_token": torch.ones(3)}),
        content(state_dict=None),
        content(state_dict=[1]),
        content(state_dict={0: torch.ones(3)}),
        content(config=None),
        content(config={"seed": 3}),
        {"state_dict": content()["state_dict"]},
    ],
)
def test_no_encoder_of_harmonize(tmp_path, wrong):
    torch.save(wrong, tmp_path / "a.ckpt")
    assert ("holds no encoder of harmonize" if isinstance(wrong, dict) else "by name") in sentence(tmp_path / "a.ckpt")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, zipped):
    path, harm = tmp_path / "a.ckpt", tmp_path / "harm"
    if zipped:
        torch.save(content(extra=Bomb(harm)), path)
    else:
        path.write_bytes(pickle.dumps(content(extra=Bomb(harm))))
    assert "it is refused" in sentence(path) or "is damaged" in sentence(path)
    assert not harm.exists()
    pickle.loads(pickle.dumps(Bomb(harm))).close()  # it would have
    assert harm.exists()
