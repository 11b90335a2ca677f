"""Encoding some images at a time (GradCache) and recomputing blocks: the gradients of the whole batch, less memory."""

import math
from functools import partial

import pytest
import torch

from harmonize.objectives.chunks import in_chunks
from harmonize.objectives.contrastive import Contrastive
from harmonize.objectives.hybrid import Hybrid
from harmonize.objectives.mim import MaskedAutoencoder, MaskedImageModeling
from harmonize.types import Progress
from tests.helpers import random_batch, tiny_encoder


def make(name, images_at_once=None):
    contrastive = partial(Contrastive, hidden_dim=16, out_dim=8, images_at_once=images_at_once)
    simmim = partial(MaskedImageModeling, images_at_once=images_at_once)
    mae = partial(MaskedAutoencoder, decoder_width=16, decoder_depth=1, decoder_heads=2, images_at_once=images_at_once)
    return {
        "contrastive": contrastive,
        "contrastive patches": partial(contrastive, pool="patch_mean"),
        "mim": simmim,
        "mae": mae,
        "hybrid": lambda e: Hybrid(e, contrastive, simmim, 0.3),
        "hybrid masked": lambda e: Hybrid(e, contrastive, mae, 0.3, contrastive_input="masked"),
        "shared": lambda e: Hybrid(e, contrastive, simmim, 0.3, share_views=True),
        "shared mae": lambda e: Hybrid(e, contrastive, mae, 0.3, share_views=True),
        "shared masked": lambda e: Hybrid(e, contrastive, simmim, 0.3, share_views=True, contrastive_input="masked"),
    }[name]


NAMES = (
    "contrastive",
    "contrastive patches",
    "mim",
    "mae",
    "hybrid",
    "hybrid masked",
    "shared",
    "shared mae",
    "shared masked",
)


def step(objective_of, num_images=7, recompute=False, dtype=torch.float64, **options):
    """Loss, statistics, gradients and batch-norm statistics of one step."""
    encoder = tiny_encoder(**options)
    if recompute:
        encoder.set_grad_checkpointing()
    torch.manual_seed(1)
    objective = objective_of(encoder)
    module = torch.nn.ModuleDict({"encoder": encoder, "objective": objective}).to(dtype).train()
    batch = random_batch(num_images)
    batch.views = {name: tuple(x.to(dtype) for x in views) for name, views in batch.views.items()}
    torch.manual_seed(2)
    output = objective(encoder, batch, Progress(0, 1))
    output.loss.backward()
    found = {"loss": output.loss.detach(), **{f"term {k}": v.detach() for k, v in output.terms.items()}}
    found |= {f"stat {k}": v for k, v in output.stats.items() if isinstance(v, torch.Tensor)}
    found |= {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return found | {n: b for n, b in module.named_buffers() if "running" in n}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 3, 7])
def test_loss_and_gradients_are_those_of_the_whole_batch(name, size):
    whole, parts = step(make(name)), step(make(name, size))
    assert whole.keys() == parts.keys()
    assert any(value.dim() and value.abs().max() > 0 for value in parts.values())
    for key, value in whole.items():
        # losses are computed in fp32 whatever the network's type is
        torch.testing.assert_close(parts[key], value, rtol=1e-5, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", ["contrastive", "mim", "mae", "shared"])
def test_recomputed_blocks_change_no_bit(name):
    kept = step(make(name), dtype=torch.float32, drop_path=0.3)
    again = step(make(name), dtype=torch.float32, drop_path=0.3, recompute=True)
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[key], again[key]) for key in kept)


def test_recomputed_blocks_pass_the_relative_positions_on():
    options = {"relative_position": "shared", "dtype": torch.float32}
    kept, again = step(make("mae"), **options), step(make("mae"), recompute=True, **options)
    assert torch.equal(
        kept["encoder.rel_pos_bias.relative_position_bias_table"],
        again["encoder.rel_pos_bias.relative_position_bias_table"],
    )


def saved_by_forward(name, images_at_once, recompute=False, num_images=32):
    """Bytes that autograd keeps for the backward pass."""
    encoder = tiny_encoder(depth=6)
    if recompute:
        encoder.set_grad_checkpointing()
    objective = make(name, images_at_once)(encoder)
    kept = {}

    def note(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = objective(encoder, random_batch(num_images), Progress(0, 1))
    assert output.loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("name", ["contrastive", "mim", "shared"])
def test_activations_are_not_kept(name):
    everything = saved_by_forward(name, None)
    assert saved_by_forward(name, 4) < 0.2 * everything
    assert saved_by_forward(name, None, recompute=True) < 0.4 * everything


def test_a_batch_of_4096_in_the_memory_of_64():
    whole = step(make("contrastive"), 4096, depth=1)
    parts = step(make("contrastive", 64), 4096, depth=1)
    assert whole["loss"] > 4 * 0.2 * math.log(2048), "there are fewer negatives than images"
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-5, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")


def test_negatives_are_those_of_the_whole_batch():
    encoder = tiny_encoder()
    output = make("contrastive", 2)(encoder)(encoder, random_batch(8), Progress(0, 1))
    halves = make("contrastive")(encoder)(encoder, random_batch(2), Progress(0, 1))
    assert output.stats["chance_contrastive"] == pytest.approx(3 * halves.stats["chance_contrastive"])


def test_rows_depend_on_no_chunk_and_scalars_are_means():
    x = torch.arange(10.0).view(5, 2).requires_grad_()
    rows, mean = in_chunks(lambda x: (x**2, x.mean()), 2, x)
    assert torch.equal(rows, x**2)
    assert mean.item() == pytest.approx(x.mean().item())
    mean.backward()
    assert x.grad.flatten().tolist() == pytest.approx([0.1] * 10)
