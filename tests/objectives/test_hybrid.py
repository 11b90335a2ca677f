"""lambda 0 == MIM and lambda 1 == CL, bit for bit, random numbers included; between them, the weighted sum."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harmonize.objectives.contrastive import Contrastive
from harmonize.objectives.hybrid import Hybrid
from harmonize.objectives.mim import MaskedAutoencoder, MaskedImageModeling
from harmonize.types import Progress
from tests.helpers import random_batch, tiny_encoder

CONTRASTIVE = partial(Contrastive, hidden_dim=16, out_dim=8)
SIMMIM = MaskedImageModeling
MAE = partial(MaskedAutoencoder, decoder_width=16, decoder_depth=1, decoder_heads=2)


def train(make_objective, steps=3):
    """Weights and losses after a few steps of an encoder with DropPath."""
    encoder = tiny_encoder(drop_path=0.3)
    torch.manual_seed(1)
    objective = make_objective(encoder)
    module = torch.nn.ModuleList([encoder, objective]).train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 1e-3)
    losses = []
    torch.manual_seed(2)  # what DropPath draws
    for step in range(steps):
        progress = Progress(step, steps)
        objective.before_step(encoder, progress)
        output = objective(encoder, random_batch(seed=step), progress)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    return encoder.state_dict(), losses, objective


@pytest.mark.parametrize(("weight", "parent"), [(0, SIMMIM), (0.0, MAE), (1, CONTRASTIVE), (1.0, CONTRASTIVE)])
def test_the_ends_are_the_parents_bit_for_bit(weight, parent):
    mim = SIMMIM if parent is CONTRASTIVE else parent
    alone, losses, _ = train(parent)
    mixed, mixed_losses, hybrid = train(lambda e: Hybrid(e, CONTRASTIVE, mim, weight))
    assert losses == mixed_losses
    assert all(torch.equal(alone[k], mixed[k]) for k in alone)
    assert hybrid.required_views == parent(tiny_encoder()).required_views


# Shared views


@pytest.mark.parametrize("mim", [SIMMIM, MAE])
def test_shared_views_are_those_of_separate_passes(mim):
    encoder = tiny_encoder().double()
    hybrid = Hybrid(encoder, CONTRASTIVE, mim, 0.3, share_views=True).double()
    batch = random_batch()
    first, second = views = tuple(view.double() for view in batch.views["contrastive"])
    batch.views = {"contrastive": views, "mim": (first,)}
    output = hybrid(encoder, batch, Progress(0, 1))

    reconstruction = hybrid.mim(encoder, batch, Progress(0, 1))
    masked = hybrid.mim.encode(encoder, first, hybrid.mim.mask(batch.seed))
    queries = masked[:, 0], encoder(second)[:, 0]
    contrast = hybrid.contrastive(encoder, batch, Progress(0, 1), queries)
    torch.testing.assert_close(output.terms["mim"], reconstruction.loss)
    torch.testing.assert_close(output.terms["contrastive"], contrast.loss)
    assert output.stats.keys() == {"lambda", *reconstruction.stats, *contrast.stats}
    assert contrast.loss != hybrid.contrastive(encoder, batch, Progress(0, 1)).loss, "the mask must matter"


def test_shared_views_save_an_encoder_pass():
    def flops(mixed, views):
        encoder = tiny_encoder(depth=6)
        objective = mixed(encoder)
        batch = random_batch()
        batch.views = {name: batch.views[name] for name in views}
        calls = []
        handle = encoder.register_forward_hook(lambda *_: calls.append(1))
        with FlopCounterMode(display=False) as counter:
            objective(encoder, batch, Progress(0, 1)).loss.backward()
        handle.remove()
        return counter.get_total_flops(), len(calls)

    parts = flops(CONTRASTIVE, ["contrastive"])[0] + flops(SIMMIM, ["mim"])[0]
    shared, num_passes = flops(lambda e: Hybrid(e, CONTRASTIVE, SIMMIM, 0.3, share_views=True), ["contrastive"])
    assert num_passes == 1
    assert shared < 0.8 * parts


@pytest.mark.parametrize(("weight", "parent"), [(0, partial(SIMMIM, recipe="moco_v3")), (1, CONTRASTIVE)])
def test_shared_views_change_nothing_where_one_part_is_alone(weight, parent):
    encoder = tiny_encoder()
    batch = random_batch()
    batch.views["mim"] = batch.views["contrastive"][:1]
    torch.manual_seed(1)
    alone = parent(encoder)(encoder, batch, Progress(0, 1))
    torch.manual_seed(1)
    hybrid = Hybrid(encoder, CONTRASTIVE, SIMMIM, weight, share_views=True)
    assert hybrid(encoder, batch, Progress(0, 1)).loss == alone.loss
    assert hybrid.required_views == {"contrastive": "moco_v3"}


@pytest.mark.parametrize("mim", [SIMMIM, MAE])
@pytest.mark.parametrize("contrastive_input", ["clean", "masked"])
@pytest.mark.parametrize(("mim_view", "share_views"), [("own", False), ("contrastive", False), ("own", True)])
def test_weighted_sum_of_both_terms(mim, contrastive_input, mim_view, share_views):
    encoder = tiny_encoder()
    hybrid = Hybrid(encoder, CONTRASTIVE, mim, 0.3, mim_view, contrastive_input, share_views)
    output = hybrid(encoder, random_batch(), Progress(0, 1))
    terms = {name: term.item() for name, term in output.terms.items()}
    assert output.loss.item() == pytest.approx(0.7 * terms["mim"] + 0.3 * terms["contrastive"], rel=1e-6)
    assert ("mim" in hybrid.required_views) == (mim_view == "own" and not share_views)
    output.loss.backward()
    unused = [n for m in (encoder, hybrid) for n, p in m.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused


def test_gradient_is_the_weighted_sum_of_the_parents_gradients():
    def gradient(make):
        encoder = tiny_encoder()
        torch.manual_seed(1)
        objective = make(encoder)
        objective(encoder, random_batch(), Progress(0, 1)).loss.backward()
        return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])

    mixed = gradient(lambda e: Hybrid(e, CONTRASTIVE, SIMMIM, 0.2))
    torch.testing.assert_close(mixed, 0.8 * gradient(SIMMIM) + 0.2 * gradient(CONTRASTIVE), rtol=1e-4, atol=1e-6)


def test_both_parts_start_as_they_would_alone():
    torch.manual_seed(1)
    alone = SIMMIM(tiny_encoder_once()).state_dict()
    torch.manual_seed(1)
    heads = CONTRASTIVE(tiny_encoder_once()).projector.state_dict()
    torch.manual_seed(1)
    hybrid = Hybrid(tiny_encoder_once(), CONTRASTIVE, SIMMIM, 0.5)
    assert all(torch.equal(value, hybrid.mim.state_dict()[key]) for key, value in alone.items())
    assert all(torch.equal(value, hybrid.contrastive.projector.state_dict()[key]) for key, value in heads.items())


def tiny_encoder_once():
    with torch.random.fork_rng():
        return tiny_encoder()


def test_scheduled_lambda_skips_a_part_only_while_its_weight_is_zero():
    encoder = tiny_encoder()
    hybrid = Hybrid(encoder, CONTRASTIVE, SIMMIM, {"schedule": "step", "start": 0, "end": 1, "at": 0.5})
    first = hybrid(encoder, random_batch(), Progress(0, 10))
    last = hybrid(encoder, random_batch(), Progress(5, 10))
    assert (set(first.terms), first.stats["lambda"]) == ({"mim"}, 0)
    assert (set(last.terms), last.stats["lambda"]) == ({"contrastive"}, 1)
    assert hybrid.scheduled
    assert all(p.requires_grad for p in hybrid.contrastive.predictor.parameters())


def test_frozen_parts_at_the_ends():
    shared_view = Hybrid(tiny_encoder(), CONTRASTIVE, SIMMIM, 0, mim_view="contrastive")
    assert not any(p.requires_grad for p in shared_view.contrastive.parameters())
    assert shared_view.required_views == {"contrastive": "moco_v3"}
    masked = Hybrid(tiny_encoder(), CONTRASTIVE, SIMMIM, 1, contrastive_input="masked")
    assert not any(p.requires_grad for p in masked.mim.decoder.parameters())
    assert masked.mim.mask_token.requires_grad
    assert masked.required_views == {"contrastive": "moco_v3"}


def test_masked_queries_depend_on_the_masks():
    encoder = tiny_encoder()
    hybrid = Hybrid(encoder, CONTRASTIVE, SIMMIM, 0.5, contrastive_input="masked")
    batch, other = random_batch(), random_batch()
    other.seed = other.seed + 1
    assert (
        hybrid(encoder, batch, Progress(0, 1)).terms["contrastive"]
        != hybrid(encoder, other, Progress(0, 1)).terms["contrastive"]
    )


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("lambda", {"lambda_": 1.5}),
        ("mim_view", {"mim_view": "both"}),
        ("contrastive_input", {"contrastive_input": "x"}),
    ],
)
def test_bad_values_are_named(key, options):
    with pytest.raises(ValueError, match=rf"\b{key}="):
        Hybrid(tiny_encoder(), CONTRASTIVE, SIMMIM, **options)
