"""harmonize plan, replay and sync: what they say is what a run does."""

import json

import pytest
import torch

from harmonize.cli import main
from harmonize.config import compose
from harmonize.files import read_rows
from harmonize.plan import measure
from harmonize.syncing import sync
from harmonize.training.loggers import run_id
from harmonize.training.setup import build
from harmonize.types import FaultError
from tests.training.test_loggers import finished_records
from tests.training.test_run import TINY

SHAPES = [*TINY, "data=shapes", "data.num_train=32", "data.num_val=8", "trainer.sanity=false"]

MIM = [o for o in SHAPES if "contrastive" not in o] + ["loss=mim"]


def plan(capsys, *arguments):
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


# ---- plan ------------------------------------------------------------------------------------------------------------


def test_flops_are_those_of_the_formula():
    """MIM: one forward and two more for the backward pass, but none for the gradient of the pixels."""
    cfg = compose(MIM)
    flops, kept = measure(cfg, build(cfg))
    width, patches, pixels, depth = 16, 16, 3 * 4**2, 2
    tokens = patches + 1
    embed = 2 * patches * pixels * width
    block = 2 * tokens * width * (3 * width + width + 2 * 4 * width) + 2 * 2 * tokens**2 * width
    decoder = 2 * patches * width * pixels
    assert flops == 3 * (embed + depth * block + decoder) - embed
    assert kept > 4 * tokens * width * depth


def test_what_a_plan_says(tmp_path, capsys):
    settings = ["trainer.devices=2", "trainer.accelerator=cpu", "trainer.accumulate=2", "data.batch_size=8"]
    shown = plan(
        capsys,
        *SHAPES,
        *settings,
        "loss.lambda={schedule: linear, start: 0, end: 1}",
        f"run.root={tmp_path}",
        "--tflops=1",
    )
    flat = " ".join(shown.split())
    for words in (
        "32 to train on, 12 classes",
        "12 steps, 4 an epoch",
        "8 images a step = 2 processes x 2 micro-batches x 2",
        "x 8 / 256 =",
        "3 per query: accumulation adds none",
        "momentum networks",
        "at 1 TFLOP/s",
        "96 images",
        "(new)",
    ):
        assert words in flat, words
    for curve in ("learning rate", "lambda", "momentum"):
        assert any(line.strip(" │").startswith(curve) and "█" in line for line in shown.splitlines()), curve
    assert list(tmp_path.iterdir()) == []  # nothing is written


def test_memory_grows_with_the_images_at_once(tmp_path, capsys):
    assert "(8 images at once)" in plan(capsys, *SHAPES, f"run.root={tmp_path}")
    assert "(3 images at once)" in plan(capsys, *SHAPES, f"run.root={tmp_path}", "trainer.images_at_once=3")


def test_a_mistake_is_answered_as_always(capsys):
    assert main(["plan", "loss.lamda=0.2"]) == 2
    assert "did you mean loss.lambda" in capsys.readouterr().err
    assert main(["plan", "data=folder", "data.root=nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


# ---- replay ----------------------------------------------------------------------------------------------------------


def test_a_kept_step_is_computed_once_more(tmp_path, capsys):
    """One weight is infinite: the loss is not finite from there on, and the first such output is its layer's."""
    folder = tmp_path / "run"
    settings = [*MIM, f"run.dir={folder}", "trainer.max_skipped_steps=2"]
    assert main(["train", *settings, "optimizer.lr=1e30"]) == 1
    error = capsys.readouterr().err
    assert "steps in a row" in error
    path = folder / "nonfinite_rank0.pt"
    assert f"harmonize replay {path}" in error
    kept = torch.load(path, weights_only=True)
    assert len(kept["batch"]["index"]) == 8
    assert main(["replay", str(path)]) == 0
    shown = capsys.readouterr().out
    assert f"Optimiser step {kept['step'] + 1}, rank 0" in shown
    assert "nan" in shown or "inf" in shown
    kept["state_dict"] = {name: torch.nan_to_num(value * 0) for name, value in kept["state_dict"].items()}
    kept["state_dict"]["encoder.blocks.1.mlp.fc1.bias"][0] = torch.inf
    torch.save(kept, path)
    assert main(["replay", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "encoder.blocks.1.mlp.fc1" in shown
    assert "weights that are not finite" in shown


@pytest.mark.parametrize("content", [None, b"", b"torn"])
def test_no_kept_step_is_one_sentence(tmp_path, capsys, content):
    path = tmp_path / "x.pt"
    if content is not None:
        path.write_bytes(content)
    assert main(["replay", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path} is no file of a run that stopped" in line


# ---- sync ------------------------------------------------------------------------------------------------------------


def logged(folder):
    """Step -> what offline W&B runs of a folder hold."""
    found = {}
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for record in finished_records(path):
            if record.HasField("history"):
                values = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                found.setdefault(values.get("trainer/global_step"), {}).update(values)
    return found


def test_a_run_without_wandb_is_uploaded_later(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "runs" / "one"
    assert main(["train", *SHAPES, f"run.dir={folder}", "trainer.max_epochs=1"]) == 0
    monkeypatch.setenv("WANDB_MODE", "offline")
    capsys.readouterr()
    rows = read_rows(folder / "metrics.jsonl")
    assert main(["sync", str(tmp_path / "runs")]) == 0
    assert f"{folder}: {len(rows)} rows uploaded" in capsys.readouterr().out
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert run_id(folder) in path.name
    uploaded = logged(folder)
    for row in rows:
        for key, value in row.items():
            if key != "step" and value is not None:
                assert uploaded[row["step"]][key] == pytest.approx(value), key
    assert sync(folder) == 0  # what is there is not doubled
    assert sync(folder, again=True) == len(rows)


def test_wandb_that_cannot_be_reached_loses_nothing(tmp_path, monkeypatch):
    import wandb

    folder = tmp_path / "run"
    assert main(["train", *SHAPES, f"run.dir={folder}", "trainer.max_steps=1"]) == 0
    before = (folder / "metrics.jsonl").read_bytes()

    def fails(**_):
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", fails)
    with pytest.raises(
        FaultError, match=r"W&B does not take it \(no route to host\); nothing is lost, try again later\."
    ):
        sync(folder)
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert not (folder / "synced.json").exists()


def test_nothing_to_upload(tmp_path, capsys):
    assert main(["sync", str(tmp_path)]) == 2
    assert "no run folder with metrics.jsonl" in capsys.readouterr().err
