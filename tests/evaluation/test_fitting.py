"""The loop that trains networks for evaluations: exact resumption, ranks, accumulation, learning rates, averages."""

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import nn

from harmonize.backbones.fine_tuning import trainable_copy
from harmonize.backbones.timm_models import TimmEncoder
from harmonize.evaluation import fitting
from harmonize.evaluation.base import Bench
from harmonize.evaluation.fitting import Training, fit, layer_ids, parameter_groups
from harmonize.functional.seeding import mix_int
from harmonize.types import ConfigError, NonFiniteLossError
from tests.helpers import random_batch, tiny_encoder

SETTINGS = {"epochs": 3, "batch_size": 8, "lr": 1e-2, "precision": "32"}


class Batches:
    """Random images and labels that are a function of the epoch and the batch alone."""

    def __init__(self, steps_per_epoch=3, batch_size=8, accumulate=1, rank=0, world=1):
        self.steps_per_epoch, self.parts = steps_per_epoch, accumulate * world
        self.batch_size, self.accumulate, self.rank = batch_size, accumulate, rank

    def train_loader(self, epoch=0, start=0):
        return Loader(self, epoch, start)

    def micro_batch(self, epoch, number):
        step, micro = divmod(number, self.accumulate)
        whole = random_batch(self.batch_size, seed=mix_int(epoch, step))
        size = self.batch_size // self.parts
        first = (self.rank * self.accumulate + micro) * size
        return whole.apply(lambda tensor: tensor[first : first + size])


class Loader:
    def __init__(self, batches, epoch, start):
        self.batches, self.first = batches, (epoch, start)
        self.batch_sampler = SimpleNamespace(set_epoch=lambda epoch: setattr(self, "epoch", epoch))

    def __iter__(self):
        number = self.batches.steps_per_epoch * self.batches.accumulate
        for i in range(self.first[1] if self.epoch == self.first[0] else 0, number):
            yield self.batches.micro_batch(self.epoch, i)


class Network(nn.Module):
    def __init__(self, drop_path=0.0):
        super().__init__()
        self.encoder = trainable_copy(tiny_encoder(), drop_path)
        torch.manual_seed(1)
        self.head = nn.Linear(24, 2)

    def forward(self, images):
        return self.head(self.encoder(images)[:, 0])


def loss(network, batch, seed):
    return nn.functional.cross_entropy(network(batch.image).float(), batch.label)


def make_bench(folder, **options):
    return Bench(tiny_encoder(), lambda: None, None, torch.device("cpu"), 0, Path(folder), Path(folder), **options)


def train(folder, network=None, data=None, loss=loss, bench=None, **settings):
    network = network or Network()
    return fit(bench or make_bench(folder), "run", network, loss, data or Batches(), Training(**SETTINGS | settings))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Killed(Exception):  # noqa: N818 (what happens)
    pass


@pytest.mark.parametrize(("at", "every"), [(1, 1), (4, 1), (8, 2), (2, 1000), (3, 1000), (7, 1000)])
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(tmp_path, monkeypatch, at, every):
    """Random numbers (stochastic depth) and the moving average included."""
    monkeypatch.setattr(fitting, "SAVE_EVERY", every)
    settings = {"ema": 0.9, "clip": 1.0, "accumulate": 2, "warmup_epochs": 1, "layer_decay": 0.7}
    data = Batches(accumulate=2)
    whole = train(tmp_path / "whole", Network(0.5), data, **settings)
    calls = []

    def until_killed(*args):
        calls.append(args)
        if len(calls) == 2 * at + 2:  # in the middle of a step
            raise Killed
        return loss(*args)

    with pytest.raises(Killed):
        train(tmp_path / "part", Network(0.5), data, until_killed, **settings)
    calls.clear()
    done = max((at // every) * every, at // 3 * 3)

    def counted(*args):
        calls.append(args)
        return loss(*args)

    resumed = train(tmp_path / "part", Network(0.5), data, counted, **settings)
    assert len(calls) == 2 * (9 - done)
    assert same(resumed.network, whole.network)
    assert same(resumed.average, whole.average)
    assert resumed.losses == whole.losses
    assert len(whole.losses) == 3
    assert not same(whole.network, whole.average)


def test_a_finished_training_is_not_repeated(tmp_path):
    first = train(tmp_path)
    again = train(tmp_path, loss=lambda *_: pytest.fail("trained again"))
    assert same(first.network, again.network)
    assert not again.network.training
    assert first.losses == again.losses


def test_the_global_random_state_stays(tmp_path):
    network, bench = Network(0.5), make_bench(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(tmp_path, network, bench=bench)
    assert torch.equal(torch.rand(3), expected)


def large_eps():
    """Adam divides by the gradient's size: where that is rounding alone (biases of keys), a step would be noise."""
    return patch.object(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-3))


@large_eps()
def test_micro_batches_do_not_matter(tmp_path):
    one = train(tmp_path / "1", clip=0.5, lr=1e-3)
    for number in (2, 4):
        more = train(tmp_path / str(number), data=Batches(accumulate=number), clip=0.5, accumulate=number, lr=1e-3)
        assert more.losses == pytest.approx(one.losses, rel=1e-5)
        for a, b in zip(more.network.parameters(), one.network.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_layers_of_a_tiny_network():
    """By hand; the final norm and the shared table stand with the head, unlike in timm."""
    network = Network()
    network.encoder = tiny_encoder(relative_position="shared", num_registers=1)
    expected = dict.fromkeys(("encoder.norm.weight", "encoder.norm.bias", "head.weight", "head.bias"), 3)
    expected["encoder.rel_pos_bias.relative_position_bias_table"] = 3
    for name in ("cls_token", "pos_embed", "reg_token", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        expected[f"encoder.{name}"] = 0
    for block in (0, 1):
        for layer in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            for kind in ("weight", "bias"):
                expected[f"encoder.blocks.{block}.{layer}.{kind}"] = block + 1
    assert layer_ids(network, 2) == expected


def test_layers_of_models_of_timm():
    encoder = TimmEncoder("vit_tiny_patch16_224", pretrained=False, image_size=32)
    ids = layer_ids(encoder, 12)
    assert ids["model.blocks.11.attn.qkv.weight"] == 12
    assert ids["model.blocks.0.norm1.bias"] == 1
    assert ids["model.patch_embed.proj.weight"] == ids["model.cls_token"] == ids["model.pos_embed"] == 0
    assert ids["model.norm.weight"] == 13


def test_a_table_for_each_block_belongs_to_its_block():
    encoder = trainable_copy(tiny_encoder(relative_position="shared"), per_block=True)
    ids = layer_ids(encoder, 2)
    assert [ids[f"blocks.{i}.rel_pos_bias.relative_position_bias_table"] for i in (0, 1)] == [1, 2]


def test_learning_rate_and_decay_of_every_parameter():
    """MAE's rule: layer_decay ** (depth + 1 - layer); weight decay but for one-dimensional parameters."""
    network = Network()
    training = Training(**SETTINGS | {"layer_decay": 0.65, "weight_decay": 0.1, "no_decay": ["1d", "pos_embed"]})
    groups = parameter_groups(network, training, 2)
    found = {id(p): (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == len(list(network.parameters())) == sum(len(g["params"]) for g in groups)
    scales = {0: 0.65**3, 1: 0.65**2, 2: 0.65, 3: 1.0}
    for name, parameter in network.named_parameters():
        layer = layer_ids(network, 2)[name]
        decay = 0.0 if parameter.dim() <= 1 or name.endswith("pos_embed") else 0.1
        assert found[id(parameter)] == (pytest.approx(scales[layer]), decay), name
    assert found[id(network.encoder.cls_token)][1] == 0.1  # 3-D: decayed, as in MAE


def test_a_frozen_parameter_is_in_no_group():
    network = Network()
    network.encoder.requires_grad_(False)
    groups = parameter_groups(network, Training(**SETTINGS), 2)
    assert sorted(p.numel() for g in groups for p in g["params"]) == [2, 48]


def test_the_step_is_adamw_with_the_scheduled_rate(tmp_path):
    """The first step of Adam moves every weight by its learning rate, whatever its gradient."""
    network = Network()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    train(
        tmp_path, network, Batches(1), epochs=1, lr=1e-3, lr_batch=4, layer_decay=0.5, weight_decay=0.0,
        warmup_epochs=0.5, warmup_lr=0.25,
    )  # fmt: skip
    ids = layer_ids(network, 2)
    for name, parameter in network.named_parameters():
        rate = 2e-3 * 0.25 * 0.5 ** (3 - ids[name])
        moved = (parameter - before[name]).abs()
        assert moved.max().item() == pytest.approx(rate, rel=0.02), name


def test_schedule():
    training = Training(**SETTINGS | {"epochs": 10, "warmup_epochs": 2, "warmup_lr": 0.1, "min_lr": 0.2, "lr": 3.0})
    for step in range(50):
        epoch = step / 5
        expected = 0.3 + 2.7 * epoch / 2 if epoch < 2 else 0.6 + 2.4 * (1 + math.cos(math.pi * (epoch - 2) / 8)) / 2
        assert training.lr_at(step, 50) == pytest.approx(expected, rel=1e-9)
    straight = Training(**SETTINGS | {"epochs": 10, "warmup_epochs": 2, "decay": "polynomial"})
    assert straight.lr_at(30, 50) == pytest.approx(0.01 * 0.5)


@pytest.mark.parametrize(("lr", "lr_batch", "batch", "peak"), [(5e-4, 256, 1024, 2e-3), (1.25e-3, 512, 2048, 5e-3)])
def test_peak(lr, lr_batch, batch, peak):
    assert Training(epochs=1, batch_size=batch, lr=lr, lr_batch=lr_batch).peak_lr == pytest.approx(peak)
    assert Training(epochs=1, batch_size=batch, lr=lr).peak_lr == lr


def test_moving_average_in_closed_form(tmp_path):
    """After n steps: 0.8^n w_0 + 0.2 (0.8^(n-1) w_1 + ... + w_n), in fp32 and in place."""
    seen = []

    def watched(network, batch, seed):
        seen.append(network.head.weight.detach().clone())  # before each step
        return loss(network, batch, seed)

    fitted = train(tmp_path, loss=watched, ema=0.8, epochs=2)
    weights = [*seen, fitted.network.head.weight.detach()]
    n = len(weights) - 1
    expected = 0.8**n * weights[0] + 0.2 * sum(0.8 ** (n - k) * weights[k] for k in range(1, n + 1))
    torch.testing.assert_close(fitted.average.head.weight, expected)
    assert fitted.average.head.weight.dtype == torch.float32
    assert not fitted.average.head.weight.requires_grad
    assert list(fitted.versions) == ["", "EMA"]


def test_clipping(tmp_path):
    norms = []

    def huge(network, batch, seed):
        return 1e4 * loss(network, batch, seed)

    step = torch.optim.AdamW.step

    def watched(optimizer, *args):
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        norms.append(torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads])).item())
        return step(optimizer, *args)

    with patch.object(torch.optim.AdamW, "step", watched):
        train(tmp_path, loss=huge, clip=0.7, epochs=1)
    assert norms == pytest.approx([0.7] * 3, rel=1e-4)


def test_it_learns(tmp_path):
    """Labels of a planted kind: whether an image is bright."""

    def planted(network, batch, seed):
        images = batch.image + 0.25 * (2 * batch.label - 1)[:, None, None, None]
        return nn.functional.cross_entropy(network(images).float(), batch.label)

    fitted = train(tmp_path, loss=planted, epochs=8, lr=3e-3)
    assert fitted.losses[0] > 0.2
    assert fitted.losses[-1] < 0.1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops(tmp_path, value):
    calls = []

    def broken(network, batch, seed):
        calls.append(seed)
        return loss(network, batch, seed) * (value if len(calls) == 5 else 1)

    with pytest.raises(NonFiniteLossError, match=r"run: the loss is (nan|inf) at step 5 of 9 .*eval\.lr"):
        train(tmp_path, loss=broken)
    state = make_bench(tmp_path).load_state("run")
    assert state["step"] == 3
    assert all(value.isfinite().all() for value in state["network"].values())


def test_bf16(tmp_path):
    """Weights stay fp32, and what is learnt is close to fp32's."""
    types = []

    def watched(network, batch, seed):
        output = network(batch.image)
        types.append(output.dtype)
        return nn.functional.cross_entropy(output.float(), batch.label)

    half = train(tmp_path / "half", loss=watched, precision="bf16", lr=1e-3)
    full = train(tmp_path / "full", lr=1e-3)
    assert set(types) == {torch.bfloat16}
    assert {p.dtype for p in half.network.parameters()} == {torch.float32}
    assert half.losses == pytest.approx(full.losses, rel=0.05)
    assert half.losses != full.losses


def test_auto_is_fp32_on_a_cpu(tmp_path):
    a, b = train(tmp_path / "a", precision="auto", epochs=1), train(tmp_path / "b", precision=32, epochs=1)
    assert same(a.network, b.network)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 0), ("batch_size", 0), ("lr", 0.0), ("lr_batch", 0), ("layer_decay", 1.5), ("layer_decay", 0.0),
        ("weight_decay", -1.0), ("betas", [0.9, 1.0]), ("warmup_epochs", 3), ("warmup_lr", 2.0), ("decay", "linear"),
        ("min_lr", -0.1), ("clip", 0.0), ("accumulate", 0), ("precision", "fp8"), ("ema", 1.0),
    ],
)  # fmt: skip
def test_an_impossible_number_is_a_sentence(key, value):
    with pytest.raises(ConfigError, match=rf"eval\.{key}=.* is not possible: .* needed"):
        Training(**SETTINGS | {key: value})


def test_a_batch_that_cannot_be_made():
    with pytest.raises(ConfigError, match=r"eval\.batch_size=8 is too large: there are 7 images"):
        Training(**SETTINGS).check_batch(7)
    with pytest.raises(ConfigError, match=r"eval\.batch_size=8 .* a multiple of 3 .* eval\.accumulate=3"):
        Training(**SETTINGS | {"accumulate": 3}).check_batch(100)
    Training(**SETTINGS).check_batch(8)
