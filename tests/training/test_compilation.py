"""Compiled blocks: the same loss and gradients, nothing compiled after the first step, validation untouched."""

import shutil
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch._dynamo.utils import counters

from harmonize.objectives.hybrid import Hybrid
from harmonize.training import compilation
from harmonize.training.compilation import Compilation, compile_blocks, should_compile
from harmonize.types import ConfigError, Progress
from tests.helpers import random_batch, tiny_encoder
from tests.objectives.test_hybrid import CONTRASTIVE, MAE, SIMMIM
from tests.training.conftest import make_batches, make_module


def make(mim=SIMMIM, depth=2):
    encoder = tiny_encoder(depth=depth)
    torch.manual_seed(1)
    return encoder, Hybrid(encoder, CONTRASTIVE, mim, 0.3)


def step(encoder, objective, num_images=6):
    encoder.zero_grad()
    loss = objective(encoder, random_batch(num_images), Progress(0, 1)).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compare(mim, backend, depth=2):
    encoder, objective = make(mim, depth)
    names = list(objective.state_dict())
    want = step(encoder, objective)
    num_blocks = 2 * depth + (mim is MAE)  # the encoder's, its momentum copy's, the decoder's
    assert compile_blocks(encoder, objective, backend=backend) == num_blocks
    assert list(objective.state_dict()) == names
    got = step(encoder, objective)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > 0
    for key, value in want.items():
        atol = 2e-5 * value.abs().max().item()  # fp32 rounding, in another order
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=atol, msg=lambda m, k=key: f"{k}: {m}")
    for _ in range(2):
        step(encoder, objective)
    assert counters["stats"]["unique_graphs"] == compiled
    assert not counters["graph_break"]


@pytest.mark.parametrize("mim", [SIMMIM, MAE])
def test_nothing_is_compiled_after_the_first_step(mim, fresh_dynamo):
    compare(mim, "eager")


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "g++", "clang"))), reason="torch.compile needs a C compiler"
)
def test_generated_code_has_the_same_gradients(fresh_dynamo):
    compare(MAE, "inductor", depth=1)


class LooksInside(pl.Callback):
    """Looks at the attention of the blocks in every validation."""

    def __init__(self):
        self.seen = []

    def on_validation_batch_end(self, trainer, module, outputs, batch, *_):
        seen = []
        module.encoder.visit_layers(batch.image, lambda view: seen.append(type(view).__name__))
        self.seen.append(seen.count("AttentionView"))


def test_validation_looks_into_blocks_that_are_compiled_for_training(fit, tmp_path, monkeypatch, fresh_dynamo):
    monkeypatch.setattr(compilation, "compile_blocks", partial(compile_blocks, backend="eager"))
    batches = make_batches(4)
    plain, module = make_module(), make_module()
    for name in ("plain", "compiled"):
        (tmp_path / name).mkdir()
    fit(plain, batches, val=make_batches(2), folder=tmp_path / "plain")
    looks = LooksInside()
    fit(module, batches, [Compilation(), looks], val=make_batches(2), folder=tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] > 0
    assert looks.seen == [2] * 4  # the sanity check before the first step, then after the epoch
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_auto_compiles_on_a_gpu_that_has_its_tools(monkeypatch):
    monkeypatch.setattr(compilation.shutil, "which", lambda name: name)
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: name)
    assert [should_compile(choice, on_gpu) for choice in ("auto", True, False) for on_gpu in (False, True)] == [
        False, True, True, True, False, False,
    ]  # fmt: skip
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    assert not should_compile("auto", True)
    with pytest.raises(ConfigError, match=r"trainer\.compile=true needs the package triton"):
        should_compile(True, True)
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="needs a C compiler"):
        should_compile(True, False)
