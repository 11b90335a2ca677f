"""Probes, gradient norms, metrics and progress: right, and without a trace in the training."""

import io
import math
import os
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch import Callback
from rich.console import Console

from harmonize.files import read_rows
from harmonize.objectives.hybrid import Hybrid
from harmonize.objectives.mim import MaskedImageModeling
from harmonize.training.callbacks import probe as probe_module
from harmonize.training.callbacks.gradient_norms import GradientNorms
from harmonize.training.callbacks.probe import OnlineProbe
from harmonize.training.callbacks.progress import ProgressDisplay
from harmonize.training.callbacks.speed import Speed
from harmonize.types import ConfigError, FeatureSpec
from tests.helpers import random_batch, tiny_encoder
from tests.training.conftest import CONTRASTIVE, make_batches, make_module
from tests.training.test_module import assert_bit_equal, weights


def column(folder, name):
    return {row["step"]: row[name] for row in read_rows(folder / "metrics.jsonl") if name in row}


# ---- gradient norms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_watching_gradients_changes_no_bit_of_the_training(fit, tmp_path, precision):
    results = []
    for callbacks in ([], [GradientNorms(2)]):
        module = make_module("hybrid")
        fit(module, make_batches(), callbacks, precision=precision)
        results.append(weights(module))
    assert_bit_equal(*results)
    assert list(column(tmp_path, "train/grad_norm_mim")) == [1, 2, 4]
    assert all(math.isfinite(v) and v > 0 for v in column(tmp_path, "train/grad_norm_contrastive").values())


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_the_norms_are_those_of_each_raw_term(fit, tmp_path, precision):
    module = make_module("hybrid", total_steps=1)
    fit(module, make_batches(1), [GradientNorms(1)], precision=precision)
    gradients = {}
    for name in ("mim", "contrastive"):
        fresh = make_module("hybrid")
        fresh.objective.before_step(fresh.encoder, _start())
        term = fresh.objective(fresh.encoder, random_batch(seed=0), _start()).terms[name]
        term.backward()
        grads = [p.grad.flatten() for p in fresh.encoder.parameters() if p.grad is not None]
        gradients[name] = torch.cat(grads)
    tolerance = 1e-4 if precision == "32-true" else 0.1
    for name, gradient in gradients.items():
        logged = column(tmp_path, f"train/grad_norm_{name}")[1]
        assert logged == pytest.approx(gradient.norm().item(), rel=tolerance)
    if precision == "32-true":
        shared = len(gradients["contrastive"]) == len(gradients["mim"])
        assert shared
        cosine = torch.nn.functional.cosine_similarity(*gradients.values(), dim=0).item()
        assert column(tmp_path, "train/grad_cosine")[1] == pytest.approx(cosine, abs=1e-4)


def _start():
    from harmonize.types import Progress

    return Progress(0, 1)


def test_norms_under_accumulation_are_measured_once_per_step(fit, tmp_path, monkeypatch):
    calls = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    module = make_module("mim", total_steps=2, steps_per_epoch=2)
    fit(module, make_batches(6), [GradientNorms(1)], accumulate_grad_batches=3)
    assert len(calls) == 2
    assert list(column(tmp_path, "train/grad_norm_mim")) == [1, 2]


# ---- gradients block by block ----------------------------------------------------------------------------------------

TERMS = ("contrastive", "mim")


def directly(module, batch, progress=None):
    """Block (0: before the first) -> cosine and ratio of norms, each from one backward pass per term."""
    module.objective.before_step(module.encoder, progress or _start())
    gradients = {}
    for name in TERMS:
        term = module.objective(module.encoder, batch, progress or _start()).terms[name]
        module.zero_grad()
        term.backward()
        gradients[name] = {n: p.grad.double() for n, p in module.encoder.named_parameters() if p.grad is not None}
    places = [["cls_token", "reg_token", "pos_embed", "patch_embed."]]
    places += [[f"blocks.{i}."] for i in range(module.encoder.spec.depth)]
    found = {}
    for block, starts in enumerate(places):
        cl, mim = (
            torch.cat([g.flatten() for n, g in gradients[name].items() if n.startswith(tuple(starts))])
            for name in TERMS
        )
        found[block] = (cl @ mim / (cl.norm() * mim.norm())).item(), (cl.norm() / mim.norm()).item()
    return found


def by_block(folder, step):
    """Block -> cosine and ratio, as logged at a step."""
    merged = {}
    for row in read_rows(folder / "metrics.jsonl"):
        merged |= row if row["step"] == step else {}
    layers = sorted(int(name[-2:]) for name in merged if name.startswith("diagnostics/gradient_cosine/layer_"))
    return {
        i: tuple(merged[f"diagnostics/gradient_{key}/layer_{i:02d}"] for key in ("cosine", "ratio")) for i in layers
    }


def test_cosine_and_ratio_of_each_block_are_those_of_its_own_gradients(fit, tmp_path):
    fit(make_module("hybrid", total_steps=1, encoder=tiny_encoder(depth=3)), make_batches(1), [GradientNorms(1)])
    logged = by_block(tmp_path, 1)
    expected = directly(make_module("hybrid", encoder=tiny_encoder(depth=3)), random_batch(seed=0))
    assert list(logged) == list(expected) == [0, 1, 2, 3]
    for block, (cosine, ratio) in expected.items():
        assert logged[block] == (pytest.approx(cosine, abs=1e-4), pytest.approx(ratio, rel=1e-4))
    assert len({round(ratio, 3) for _, ratio in expected.values()}) == 4  # blocks are told apart


def test_findings_are_means_over_the_measured_steps_of_an_epoch(fit, tmp_path):
    found = []

    class Ask(Callback):
        def on_train_epoch_end(self, trainer, module):
            found.append((gradients.findings(), gradients.findings()))

    gradients = GradientNorms(2)
    fit(make_module("hybrid", total_steps=8, steps_per_epoch=4), make_batches(4), [gradients, Ask()])
    assert len(found) == 2
    for (findings, nothing), steps in zip(found, ([1, 2, 4], [6, 8]), strict=True):
        assert not nothing.curves  # each step counts once
        rows = torch.tensor([list(by_block(tmp_path, step).values()) for step in steps], dtype=torch.float64)
        for i, name in enumerate(("gradient_cosine", "gradient_ratio")):
            curve = findings.curves[name]
            assert curve.layer == [0, 1, 2]
            assert curve.value == pytest.approx(rows[..., i].mean(0).tolist())
            assert curve.error == pytest.approx((rows[..., i].std(0) / math.sqrt(len(steps))).tolist())
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl") if GRADIENT in row] == [1, 2, 4, 6, 8]


GRADIENT = "diagnostics/gradient_cosine/layer_01"


@pytest.mark.parametrize("objective", ["mim", "contrastive"])
def test_one_term_has_nothing_to_be_compared_with(fit, tmp_path, objective):
    gradients = GradientNorms(1)
    fit(make_module(objective, total_steps=1), make_batches(1), [gradients])
    assert list(column(tmp_path, f"train/grad_norm_{objective}")) == [1]
    assert not by_block(tmp_path, 1)
    assert not gradients.findings().curves


def test_terms_are_compared_where_both_run(fit, tmp_path):
    encoder = tiny_encoder()
    late = {"schedule": "step", "start": 0, "end": 0.5, "at": 0.5}
    module = make_module(Hybrid(encoder, CONTRASTIVE, MaskedImageModeling, late), encoder=encoder)
    fit(module, make_batches(), [GradientNorms(1)])
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl") if GRADIENT in row] == [3, 4]


def test_nothing_is_said_of_what_is_not_trained(fit, tmp_path):
    """Before the first block: a frozen patch embedding, fixed positions and no class token."""
    encoder = tiny_encoder(class_token=False, freeze_patch_embed=True)
    gradients = GradientNorms(1)
    objective = Hybrid(encoder, partial(CONTRASTIVE, pool="patch_mean"), MaskedImageModeling, 0.2)
    fit(make_module(objective, total_steps=1, encoder=encoder), make_batches(1), [gradients])
    assert list(by_block(tmp_path, 1)) == [1, 2]
    curve = gradients.findings().curves["gradient_cosine"]
    assert curve.layer == [1, 2]
    assert all(math.isfinite(value) for value in curve.value)


def measure_a_part(rank, world, folder):
    """Gradients of this rank's share of eight images."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    module, batch = make_module("hybrid"), random_batch(8)
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    views = {name: tuple(view[part] for view in views) for name, views in batch.views.items()}
    batch = replace(batch, views=views, **{name: getattr(batch, name)[part] for name in ("label", "index", "seed")})
    module.objective.before_step(module.encoder, _start())
    module.output = module.objective(module.encoder, batch, _start())
    trainer = SimpleNamespace(
        global_step=0,
        fit_loop=SimpleNamespace(batch_idx=0),
        accumulate_grad_batches=1,
        precision_plugin=None,
        loggers=[],
    )
    gradients = GradientNorms(1)
    gradients.on_before_backward(trainer, module, module.output.loss)
    found = {name: curve.value for name, curve in gradients.findings().curves.items()}
    torch.save(found | {"norm": module.extra["grad_norm_mim"].item()}, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def test_two_ranks_measure_what_one_does(tmp_path):
    mp.start_processes(measure_a_part, (2, str(tmp_path)), nprocs=2, start_method="fork")
    measure_a_part(0, 1, tmp_path)
    alone = torch.load(tmp_path / "1-0.pt")
    for rank in (0, 1):
        shared = torch.load(tmp_path / f"2-{rank}.pt")
        for name in ("gradient_cosine", "gradient_ratio", "norm"):
            assert shared[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-5)


# ---- probes ----------------------------------------------------------------------------------------------------------


def make_probe(train, **options):
    return OnlineProbe(train, 2, FeatureSpec(), **{"k": 3} | options)


def test_probes_of_the_untrained_network_come_first(fit, tmp_path):
    module = make_module("mim", total_steps=8, steps_per_epoch=4)
    train, val = make_batches(3), [random_batch(6, seed=9)]
    fit(module, make_batches(), [make_probe(train)], val=val)
    assert list(column(tmp_path, "untrained/knn_top1")) == [0]
    assert list(column(tmp_path, "val/knn_top1")) == [4, 8]
    for name in ("knn_top1", "linear_top1"):
        values = [*column(tmp_path, f"untrained/{name}").values(), *column(tmp_path, f"val/{name}").values()]
        assert all(0 <= v <= 1 for v in values)
    assert set(column(tmp_path, "val/chance_top1").values()) == {0.5}


def test_probing_changes_no_bit_of_the_training(fit):
    results = []
    for callbacks, val in (([], None), ([make_probe(make_batches(2))], make_batches(2))):
        module = make_module("hybrid", total_steps=8)
        fit(module, make_batches(), callbacks, val=val)
        results.append(weights(module))
    assert_bit_equal(*results)


def test_one_function_makes_the_feature_for_fitting_and_for_scoring(fit, monkeypatch):
    from harmonize.evaluation import features

    seen = []
    real = features.pooled_features

    def watched(encoder, images, specs):
        assert not any(m.training for m in encoder.modules())
        seen.append((len(images), *specs))
        return real(encoder, images, specs)

    fitted = {}
    monkeypatch.setattr(features, "pooled_features", watched)
    monkeypatch.setattr(probe_module, "knn_accuracy", lambda train, val, *_: fitted.update(t=train, v=val) or 0.5)
    train, val = [random_batch(5, seed=1)], [random_batch(4, seed=2)]
    probe = OnlineProbe(train, 2, {"layer": 1, "pool": "patch_mean", "norm": False})
    fit(make_module("mim", total_steps=1), make_batches(1), [probe], val=val)
    spec = FeatureSpec(1, "patch_mean", False)
    assert seen == [(4, spec), (5, spec)] * 2  # before training and after it
    assert fitted["t"].spec == fitted["v"].spec == spec


def test_no_readable_validation_image_is_a_sentence(fit):
    none = replace(random_batch(), **{key: getattr(random_batch(), key)[:0] for key in ("image", "label", "index")})
    with pytest.raises(ConfigError, match=r"data\.root has no readable image .*callbacks\.probe=null"):
        fit(make_module("mim", total_steps=1), make_batches(1), [make_probe(make_batches(1))], val=[none])


# ---- metrics and progress --------------------------------------------------------------------------------------------


def test_logged_values_are_means_over_micro_batches(fit, tmp_path):
    values = {}
    for parts in (1, 2):
        module = make_module("mim", total_steps=1)
        fit(module, make_batches(2)[:parts], accumulate_grad_batches=parts)
        values[parts] = column(tmp_path, "train/loss_mim")[1]
    single = []
    for i in range(2):
        module = make_module("mim")
        single.append(module.objective(module.encoder, random_batch(seed=i), _start()).loss.item())
    assert values[1] == pytest.approx(single[0], rel=1e-5)
    assert values[2] == pytest.approx(sum(single) / 2, rel=1e-5)


def test_epoch_rows_are_means_over_the_epoch(fit, tmp_path):
    fit(make_module("hybrid", total_steps=8), make_batches())
    steps = column(tmp_path, "train/loss")
    for end, mean in column(tmp_path, "epoch/loss").items():
        assert mean == pytest.approx(sum(steps[s] for s in range(end - 3, end + 1)) / 4, rel=1e-5)


def test_a_term_that_comes_later_takes_nothing_from_the_others(fit, tmp_path):
    encoder = tiny_encoder()
    late = {"schedule": "step", "start": 0, "end": 0.5, "at": 0.5}
    fit(make_module(Hybrid(encoder, CONTRASTIVE, MaskedImageModeling, late), encoder=encoder), make_batches())
    for name, steps in (("loss", 4), ("loss_mim", 4), ("loss_contrastive", 2)):
        values = column(tmp_path, f"train/{name}")
        assert len(values) == steps
        assert column(tmp_path, f"epoch/{name}")[4] == pytest.approx(sum(values.values()) / steps, rel=1e-5)


def test_all_that_is_promised_is_logged(fit, tmp_path):
    fit(make_module("hybrid"), make_batches(), [GradientNorms(1), Speed()][::-1])
    row = next(row for row in read_rows(tmp_path / "metrics.jsonl") if row["step"] == 2 and "train/loss" in row)
    promised = {"loss", "loss_contrastive", "loss_mim", "lambda", "momentum", "lr", "grad_norm", "grad_cosine"}
    promised |= {"grad_norm_contrastive", "grad_norm_mim", "chance_contrastive", "chance_mim"}
    assert promised <= {name.removeprefix("train/") for name in row}
    assert row["train/lambda"] == 0.2
    assert row["train/loss"] == pytest.approx(0.8 * row["train/loss_mim"] + 0.2 * row["train/loss_contrastive"])


@pytest.mark.parametrize("bar", [True, False])
def test_progress(fit, bar):
    out = io.StringIO()
    console = Console(file=out, width=160, force_terminal=bar)
    display = ProgressDisplay(None, console)
    assert display.bar is bar
    probe = make_probe(make_batches(2))
    fit(make_module("hybrid", total_steps=8), make_batches(), [probe, display], val=make_batches(1))
    lines = [line for line in out.getvalue().splitlines() if "k-NN" in line]
    assert len(lines) == 2
    for word in ("epoch 2/2", "contrastive", "mim", "linear", "left"):
        assert word in lines[1]
    if not bar:
        assert "\x1b" not in out.getvalue()
