"""A run on two processes is the run on one, however the weights are kept, and goes on where another left off."""

import signal

import pytest
import torch

from tests.training.test_resumption import signal_at
from tests.training.test_run import command, finish, images, load, measured, overrides, rows, run  # noqa: F401

PER_RANK = ("train/query_std", "train/key_std")  # means over ranks of a spread within each rank
PER_TERM = ("train/grad_norm_", "train/grad_cosine", "diagnostics/gradient_")  # not measured with fsdp


def comparable(folder, leave_out):
    found = [{k: v for k, v in row.items() if not k.startswith(leave_out)} for row in rows(folder)]
    return [row for row in found if len(row) > 1]  # more than the step


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_goes_on_with_two_processes(measured, tmp_path, monkeypatch, strategy):  # noqa: F811
    """DropPath draws per rank, so it is off; Adam's eps is large, see test_module.py."""
    same = [*measured, "backbone.drop_path=0", "optimizer.eps=1e-3", "optimizer.clip=0.5", "trainer.max_steps=7"]
    straight = tmp_path / "straight"
    run(*same, f"run.dir={straight}")
    signal_at(monkeypatch, 3, signal.SIGTERM)
    with pytest.raises(SystemExit):
        run(*same)
    more = [f"trainer={strategy}", "trainer.devices=2"]
    output = finish(command(*more, *same, "trainer.activation_checkpointing=false"))
    assert "Resuming at step 3 of 7 from last.ckpt." in output
    assert output.count("Batch: 8 images a step = 2 processes x 4; before: 8 images a step.") == 1
    assert output.count("Gradients of single loss terms are not measured") == (strategy == "fsdp")

    one, two = (load(folder / "checkpoints" / "last.ckpt") for folder in (straight, tmp_path / "run"))
    assert two["global_step"] == 7
    torch.testing.assert_close(two["state_dict"], one["state_dict"], rtol=1e-3, atol=1e-5)
    (a,), (b,) = one["optimizer_states"], two["optimizer_states"]
    assert a["param_groups"] == b["param_groups"]
    torch.testing.assert_close(b["state"], a["state"], rtol=1e-2, atol=1e-5)
    leave_out = PER_RANK + PER_TERM * (strategy == "fsdp")
    for row, other in zip(comparable(straight, leave_out), comparable(tmp_path / "run", leave_out), strict=True):
        assert other == pytest.approx(row, rel=1e-3, abs=1e-5)
