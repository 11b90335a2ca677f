"""A run on two processes is the run on one, however the weights are kept, and goes on where another left off."""

import signal

import pytest
import torch

from harmonize.cli import main
from tests.training.test_resumption import signal_at
from tests.training.test_run import command, finish, images, load, measured, overrides, rows, run  # noqa: F401

PER_RANK = ("train/query_std", "train/key_std")  # means over ranks of a spread within each rank
PER_TERM = ("train/grad_norm_", "train/grad_cosine", "diagnostics/gradient_")  # not measured with fsdp


def comparable(folder, leave_out):
    found = [{k: v for k, v in row.items() if not k.startswith(leave_out)} for row in rows(folder)]
    return [row for row in found if len(row) > 1]  # more than the step


@pytest.mark.parametrize(("strategy", "goes_on"), [("ddp", True), ("fsdp", True), ("fsdp", False)])
def test_two_processes_give_what_one_gives(measured, tmp_path, monkeypatch, strategy, goes_on):  # noqa: F811
    """From the start, the untrained network included, or from where one process was stopped in mid-epoch.

    DropPath draws per rank, so it is off; Adam's eps is large, see test_module.py.
    """
    same = [*measured, "backbone.drop_path=0", "optimizer.eps=1e-3", "optimizer.clip=0.5", "trainer.max_steps=7"]
    same.append("evaluate=[knn]")
    straight = tmp_path / "straight"
    run(*same, f"run.dir={straight}")
    if goes_on:
        signal_at(monkeypatch, 3, signal.SIGTERM)
        with pytest.raises(SystemExit):
            run(*same)
    more = [f"trainer={strategy}", "trainer.devices=2"]
    output = finish(command(*more, *same, "trainer.activation_checkpointing=false"))
    assert output.count("Resuming at step 3 of 7 from last.ckpt.") == goes_on
    assert output.count("Batch: 8 images a step = 2 processes x 4; before: 8 images a step.") == goes_on
    assert output.count("Gradients of single loss terms are not measured") == (strategy == "fsdp")

    one, two = (load(folder / "checkpoints" / "last.ckpt") for folder in (straight, tmp_path / "run"))
    assert two["global_step"] == 7
    torch.testing.assert_close(two["state_dict"], one["state_dict"], rtol=1e-3, atol=1e-5)
    (a,), (b,) = one["optimizer_states"], two["optimizer_states"]
    assert a["param_groups"] == b["param_groups"]
    for number, moments in a["state"].items():
        for key, moment in moments.items():  # elements near zero carry the rounding of the large ones
            atol = 1e-4 * moment.abs().max().item()
            torch.testing.assert_close(b["state"][number][key], moment, rtol=1e-4, atol=atol, msg=f"{number} {key}")
    assert "evaluate/knn/top1 k=20, temperature=0.07" in rows(tmp_path / "run")[-1]
    leave_out = PER_RANK + PER_TERM * (strategy == "fsdp")
    for row, other in zip(comparable(straight, leave_out), comparable(tmp_path / "run", leave_out), strict=True):
        assert other == pytest.approx(row, rel=1e-3, abs=1e-5)


def test_every_process_keeps_the_whole_network_that_has_diverged(overrides, tmp_path):  # noqa: F811
    diverging = ["trainer=fsdp", "trainer.devices=2", *overrides, "optimizer.lr=1e30", "trainer.max_skipped_steps=2"]
    process = command(*diverging)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    one, two = (load(tmp_path / "run" / f"nonfinite_rank{rank}.pt") for rank in (0, 1))
    assert one["state_dict"]
    torch.testing.assert_close(two["state_dict"], one["state_dict"], rtol=0, atol=0, equal_nan=True)
    assert main(["replay", str(tmp_path / "run" / "nonfinite_rank1.pt")]) == 0
