"""One training step: what happens once per optimiser step, what is random, what is the same however it is cut up."""

import math
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from harmonize.files import read_rows
from harmonize.functional.schedules import learning_rate
from harmonize.training.callbacks.metrics import StepMetrics
from harmonize.types import Batch, NonFiniteLossError, ObjectiveOutput, Progress
from tests.helpers import random_batch, tiny_encoder
from tests.training.conftest import OPTIMIZER, make_batches, make_module


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_bit_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].equal(b[name]), name


def cut(batch: Batch, parts: int) -> list[Batch]:
    size = len(batch) // parts
    rows = [slice(i * size, (i + 1) * size) for i in range(parts)]
    return [
        replace(
            batch,
            views={n: tuple(v[r] for v in views) for n, views in batch.views.items()},
            label=batch.label[r],
            index=batch.index[r],
            seed=batch.seed[r],
        )
        for r in rows
    ]


class Recorder(nn.Module):
    """An objective that writes down how it is called."""

    required_views = {"mim": "simmim"}  # noqa: RUF012

    def __init__(self, broken_at=(), broken=math.nan):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.calls, self.draws, self.broken = [], [], broken
        self.broken_at = (broken_at,) if isinstance(broken_at, int) else broken_at

    def before_step(self, encoder, progress):
        self.calls.append(("before", progress))

    def forward(self, encoder, batch, progress):
        self.calls.append(("forward", progress))
        self.draws.append(torch.rand(1).item())
        value = self.scale * encoder(batch.views["mim"][0]).square().mean()
        if progress.step in self.broken_at:
            value = value * self.broken
        return ObjectiveOutput(loss=value, terms={"mim": value})


def test_before_step_comes_once_per_optimiser_step(fit):
    objective = Recorder()
    fit(make_module(objective, total_steps=2, steps_per_epoch=2), make_batches(6), accumulate_grad_batches=3)
    one, two = Progress(0, 2), Progress(1, 2)
    step = [("before", one), *[("forward", one)] * 3, ("before", two), *[("forward", two)] * 3]
    assert objective.calls == step


def test_random_numbers_depend_on_step_micro_batch_and_seed_alone(fit):
    def draws(seed, **options):
        objective = Recorder()
        torch.manual_seed(seed + 100)
        fit(make_module(objective, seed=seed, **options), make_batches(4))
        return objective.draws

    first = draws(0)
    assert len(set(first)) == 4
    assert draws(0) == first
    assert draws(0, total_steps=2) == first[:2]
    assert not set(draws(1)) & set(first)


def test_the_learning_rate_is_a_function_of_the_step(fit, tmp_path):
    fit(make_module(total_steps=7, steps_per_epoch=4), make_batches(4))
    logged = {row["step"]: row["train/lr"] for row in read_rows(tmp_path / "metrics.jsonl") if "train/lr" in row}
    assert logged == {s + 1: learning_rate(s / 7, OPTIMIZER["lr"], warmup=0.25) for s in range(7)}


@pytest.mark.parametrize("objective", ["mim", "hybrid"])
def test_two_runs_are_bit_identical(fit, objective):
    results = []
    for state in (0, 1):  # whatever the global generator was before
        module = make_module(objective, encoder=tiny_encoder(drop_path=0.5))
        torch.manual_seed(state)
        fit(module, make_batches())
        results.append(weights(module))
    assert_bit_equal(*results)


def test_accumulation_equals_one_large_batch_for_mim(fit):
    """Not so for the contrastive loss: accumulation gives it no more negatives."""
    batches = [random_batch(8, seed=i) for i in range(3)]
    results = []
    for parts in (1, 4):
        # A large eps: otherwise Adam blows up the rounding of gradients that are zero (the biases of the keys).
        module = make_module("mim", total_steps=3, steps_per_epoch=3, optimizer={"eps": 1e-3})
        micro = [part for batch in batches for part in cut(batch, parts)]
        trainer = fit(module, micro, accumulate_grad_batches=parts)
        assert trainer.global_step == 3
        results.append(weights(module))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_the_momentum_network_moves_once_per_optimiser_step(fit):
    """With a step of zero learning rate first, the copy stays put; m^k per micro-batch would show after the second."""
    module = make_module("contrastive", total_steps=2, steps_per_epoch=2, optimizer={"clip": None})
    moved = []
    original = module.objective.before_step
    module.objective.before_step = lambda *a: (moved.append(a[1].step), original(*a))
    fit(module, make_batches(8), accumulate_grad_batches=4)
    assert moved == [0, 1]


def test_stops_in_mid_epoch(fit):
    trainer = fit(make_module(total_steps=6, steps_per_epoch=4), make_batches(4))
    assert trainer.global_step == 6


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_clipping_limits_the_global_norm(fit, tmp_path, clip):
    norms = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            loss = closure()
            grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
            norms.append(torch.nn.utils.get_total_norm(grads).item())
            return loss

    module = make_module("mim", optimizer={"clip": clip})
    optimization = module.optimization
    watched = Watched(optimization.optimizer.param_groups, lr=0.0)
    module.optimization = replace(optimization, optimizer=watched)
    fit(module, make_batches())
    before = [row["train/grad_norm"] for row in read_rows(tmp_path / "metrics.jsonl") if "train/grad_norm" in row]
    assert min(before) > 1e-3
    assert norms == pytest.approx(before if clip is None else [clip] * 4, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run(fit, tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"is not finite at step 3 \(loss = nan, loss_mim = nan\)"):
        fit(make_module(Recorder(broken_at=2)), make_batches())
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_step_whose_loss_is_not_finite_is_skipped(fit, tmp_path, fused, broken):
    """Weights, moments and their step count are those of the step before; the next step goes on from there."""
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            state = module.optimization.optimizer.state_dict()["state"].values()
            moments = [{name: value.clone() for name, value in entry.items()} for entry in state]
            seen.append((weights(module), moments))

    objective = Recorder(broken_at=2, broken=broken)
    module = make_module(objective, total_steps=8, fused=fused)
    fit(module, make_batches(), [Watch()], metrics=StepMetrics(max_skipped=2))
    assert len(seen) == 8
    assert_bit_equal(seen[1][0], seen[2][0])
    assert len(seen[1][1]) == len(seen[2][1]) > 0
    for before, after in zip(seen[1][1], seen[2][1], strict=True):
        assert_bit_equal(before, after)
    changed = seen[3][0]
    assert any(not changed[name].equal(value) for name, value in seen[2][0].items())
    assert all(value.isfinite().all() for value in seen[-1][0].values())
    rows = {row["step"]: row for row in read_rows(tmp_path / "metrics.jsonl") if "train/loss" in row}
    assert [rows[step]["train/skipped_steps"] for step in (1, 2, 3, 4, 8)] == [0, 0, 1, 1, 1]
    assert rows[3]["train/loss"] is None
    epochs = [row["epoch/loss"] for row in read_rows(tmp_path / "metrics.jsonl") if "epoch/loss" in row]
    assert epochs[0] == pytest.approx(sum(rows[i]["train/loss"] for i in (1, 2, 4)) / 3)  # of what was finite


def test_a_gradient_that_is_not_finite_is_enough(fit):
    """sqrt at 0: the loss is finite, its gradient is not."""

    class Root(Recorder):
        def forward(self, encoder, batch, progress):
            found = super().forward(encoder, batch, progress)
            extra = (self.scale - self.scale.detach()).sqrt() if progress.step == 1 else 0
            return replace(found, loss=found.loss + extra)

    module = make_module(Root(), fused=True)
    with pytest.raises(NonFiniteLossError, match=r"is not finite at step 2 \(loss = [0-9.]+, loss_mim = [0-9.]+\)"):
        fit(module, make_batches())
    assert all(value.isfinite().all() for value in weights(module).values())


def test_too_many_skipped_steps_in_a_row_stop_the_run_and_keep_the_batch(fit, tmp_path, capsys):
    """Three bad steps are not four; after the fourth in a row the run stops, and the last batch is there."""
    objective = Recorder(broken_at=(1, 2, 3, 5, 6, 7, 8))
    module = make_module(objective, total_steps=20, steps_per_epoch=4, config={"seed": 0})
    batches = make_batches()
    message = r"at 4 steps in a row, from step 6 on \(loss = nan, loss_mim = nan\); .*\nThe batch .*harmonize replay "
    with pytest.raises(NonFiniteLossError, match=message):
        fit(module, batches, metrics=StepMetrics(max_skipped=4, folder=tmp_path))
    kept = torch.load(tmp_path / "nonfinite_rank0.pt", weights_only=True)
    assert (kept["step"], kept["micro_batch"], kept["rank"]) == (8, 0, 0)
    assert kept["batch"]["index"].equal(batches[0].index)
    assert kept["batch"]["views"]["mim"][0].equal(batches[0].views["mim"][0])
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_the_checkpoint_names_its_parts(fit, tmp_path):
    trainer = fit(make_module("hybrid", config={"seed": 0, "loss": {"lambda": 0.2}}), make_batches())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"encoder", "objective"}
    assert checkpoint["config"] == {"seed": 0, "loss": {"lambda": 0.2}}
    encoder = {n.removeprefix("encoder."): v for n, v in checkpoint["state_dict"].items() if n.startswith("encoder.")}
    tiny_encoder().load_state_dict(encoder)
