"""A weight for every depth: same values, and in each block the gradient that the two losses' own gradients make."""

from functools import partial

import pytest
import torch

from harmonize.functional.layers import layer_of
from harmonize.objectives.contrastive import Contrastive
from harmonize.objectives.depth import ScaledByDepth, weights_by_depth
from harmonize.objectives.hybrid import Hybrid
from harmonize.objectives.mim import MaskedAutoencoder, MaskedImageModeling
from harmonize.types import Progress
from tests.helpers import random_batch, tiny_encoder

CONTRASTIVE = partial(Contrastive, hidden_dim=16, out_dim=8)
MAE = partial(MaskedAutoencoder, decoder_width=16, decoder_depth=1, decoder_heads=2)
LINEAR = {"schedule": "linear", "start": 0.0, "end": 1.0}  # 0 in the first block, 1 in the last


def gradients(lambda_, by_depth=None, mim=MaskedImageModeling):
    """The loss and the gradient of every parameter, in double precision but for the losses themselves."""
    encoder = tiny_encoder().double()
    torch.manual_seed(1)
    hybrid = Hybrid(encoder, CONTRASTIVE, mim, lambda_, lambda_by_depth=by_depth).double()
    batch = random_batch()
    batch.views = {view: tuple(image.double() for image in images) for view, images in batch.views.items()}
    output = hybrid(encoder, batch, Progress(0, 1))
    output.loss.backward()
    parts = {"encoder": encoder, "objective": hybrid}
    found = {f"{part}.{n}": p.grad for part, m in parts.items() for n, p in m.named_parameters() if p.grad is not None}
    return output.loss.detach(), found


@pytest.mark.parametrize("mim", [MaskedImageModeling, MAE])
def test_every_block_gets_its_own_mixture(mim):
    depth = tiny_encoder().spec.depth
    loss, mixed = gradients(0.3, LINEAR, mim)
    plain_loss, plain = gradients(0.3, None, mim)
    # The gradient is linear in lambda: two mixtures give those of the losses alone.
    other = gradients(0.6, None, mim)[1]
    assert loss == plain_loss
    assert mixed.keys() == plain.keys()
    seen = set()
    for name, gradient in mixed.items():
        if name.startswith("objective."):
            expected = plain[name]
        else:
            slope = (other[name] - plain[name]) / 0.3
            layer = layer_of(name.removeprefix("encoder."))
            weight = 1.0 if layer is None else max(0, layer - 1) / (depth - 1)
            seen.add(weight)
            expected = plain[name] + (weight - 0.3) * slope
        atol = 1e-6 * max(plain[name].abs().max(), other[name].abs().max()).item()  # the losses are in single precision
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=atol, msg=name)
    assert {0.0, 1.0} <= seen


def test_the_same_weight_at_every_depth_is_the_plain_hybrid():
    loss, mixed = gradients(0.3, 0.3)
    plain_loss, plain = gradients(0.3)
    assert loss == plain_loss
    for name, gradient in mixed.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-12, atol=1e-14, msg=name)


def test_a_list_names_the_weight_of_every_block():
    depth = tiny_encoder().spec.depth
    ends = [LINEAR["start"], LINEAR["end"]]
    assert len(ends) == depth
    listed, scheduled = gradients(0.3, ends)[1], gradients(0.3, LINEAR)[1]
    assert all(torch.equal(listed[name], scheduled[name]) for name in scheduled)
    at = weights_by_depth([0.1, 0.7, 0.2, 0.9], 4)
    assert [at(i / 3) for i in range(4)] == [0.1, 0.7, 0.2, 0.9]


@pytest.mark.parametrize(("weights", "sentence"), [([0.1], "has 1 weights"), ([0.1, 1.5], "must be a number between")])
def test_a_list_fits_the_network(weights, sentence):
    with pytest.raises(ValueError, match=sentence):
        gradients(0.3, weights)


def test_a_block_can_be_taken_out_without_those_below_it():
    encoder = tiny_encoder(depth=3)
    image = random_batch().views["mim"][0]
    scaled = ScaledByDepth(encoder, lambda share: float(share != 1))
    assert torch.equal(scaled(image), encoder(image))
    scaled(image).square().sum().backward()
    moved = {layer_of(n) for n, p in encoder.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {0, 1, 2}
    assert all(parameter.is_leaf for parameter in encoder.parameters())  # its own weights are in their place again


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lambda_": 0.0}, "lambda=0.0 must be a number between 0 and 1 with lambda_by_depth"),
        ({"lambda_": 1}, "lambda=1 must be"),
        ({"lambda_": LINEAR}, "must be a number between 0 and 1 with lambda_by_depth"),
        ({"lambda_": 0.2, "share_views": True}, "needs share_views=false"),
    ],
)
def test_it_takes_two_losses(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Hybrid(tiny_encoder(), CONTRASTIVE, MaskedImageModeling, **options, lambda_by_depth=LINEAR)
