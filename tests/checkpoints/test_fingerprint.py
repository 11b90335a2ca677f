"""The fingerprint: the same everywhere, blind to rounding, and changed by every mistake that shapes cannot show."""

import copy
import math

import pytest
import torch

from harmonize.checkpoints.fingerprint import MAX_DEVIATION, exact, fingerprint, matches, probe_images
from harmonize.functional.positions import sincos_2d
from harmonize.functional.seeding import mix, uniform
from tests.helpers import tiny_encoder


def fixed_encoder(**options):
    """Weights that no generator of torch's has drawn."""
    encoder = tiny_encoder(**options)
    with torch.no_grad():
        for index, parameter in enumerate(encoder.parameters()):
            values = uniform(mix(torch.tensor([index])), parameter.numel())[0] - 0.5
            parameter.copy_(values.view(parameter.shape) + (parameter.dim() == 1))
    return encoder


def test_images_are_the_same_on_every_machine():
    images = probe_images(tiny_encoder().spec, 2)
    assert images.shape == (2, 3, 16, 16)
    expected = [-1.6713004112243652, -1.188232183456421, 1.0357214212417603]
    assert images.flatten()[[0, 1, -1]].tolist() == pytest.approx(expected, abs=1e-6)
    assert images.mean().abs() < 0.1
    assert images.var() == pytest.approx(1, abs=0.1)
    assert probe_images(tiny_encoder().spec, 3)[:2].equal(images)


def test_numbers_are_the_same_on_every_machine():
    numbers = fingerprint(fixed_encoder())
    assert len(numbers) == 16
    assert numbers[:4] == pytest.approx([-1.142472, 0.061035, 1.265987, -0.012966], abs=1e-4)


def test_second_derivation():
    encoder = tiny_encoder().eval()
    with torch.no_grad():
        tokens = encoder.double()(probe_images(encoder.spec, 2).double()).flatten().tolist()
    for number, found in list(enumerate(fingerprint(tiny_encoder())))[::5]:
        bits = uniform(mix(230500729, 1, torch.tensor([number])), len(tokens))[0].tolist()
        total = math.fsum(token if bit < 0.5 else -token for token, bit in zip(tokens, bits, strict=True))
        assert found == pytest.approx(total / math.sqrt(len(tokens)), abs=1e-5)


def heads(encoder):
    other = tiny_encoder(num_heads=6)
    other.load_state_dict(encoder.state_dict())
    return other


def rows_and_columns(encoder):
    encoder.pos_embed[0, 1:] = sincos_2d((4, 4), 24, columns_first=True)
    return encoder


def two_positions(encoder):
    encoder.pos_embed[0, [3, 4]] = encoder.pos_embed[0, [4, 3]].clone()
    return encoder


def query_and_key(encoder):
    weight = encoder.blocks[1].attn.qkv.weight
    weight.copy_(torch.cat([weight[24:48], weight[:24] * 1.1, weight[48:]]))
    return encoder


def colours(encoder):
    encoder.patch_embed.proj.weight.copy_(encoder.patch_embed.proj.weight.flip(1))
    return encoder


def blocks(encoder):
    encoder.blocks = encoder.blocks[::-1]
    return encoder


def final_norm(encoder):
    encoder.norm = torch.nn.Identity()
    return encoder


def norm_epsilon(encoder):
    for module in encoder.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-3
    return encoder


@pytest.mark.parametrize(
    "mistake",
    [heads, rows_and_columns, two_positions, query_and_key, colours, blocks, final_norm, norm_epsilon],
)
@torch.no_grad()
def test_a_mistake_that_loads_is_found(mistake):
    stored = fingerprint(tiny_encoder())
    assert matches(mistake(tiny_encoder()), stored) > 3 * MAX_DEVIATION


def test_the_head_count_is_found_even_where_attention_is_almost_uniform():
    stored = fingerprint(tiny_encoder(initialization="timm"))
    assert matches(tiny_encoder(initialization="timm", num_heads=6), stored) > 3 * MAX_DEVIATION


@pytest.mark.parametrize("relative_position", ["none", "shared", "per_block"])
def test_rounding_is_not_found(relative_position):
    encoder = tiny_encoder(relative_position=relative_position, num_registers=2, image_size=(8, 16))
    stored = fingerprint(encoder)
    assert matches(encoder, stored) == 0
    rounded = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.mul_(1 + 1e-7)
    assert 0 < matches(rounded, stored) < MAX_DEVIATION / 20


def test_the_precision_around_does_not_matter():
    encoder = tiny_encoder(drop_path=0.5).train()
    stored = fingerprint(encoder)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert matches(encoder, stored) == 0
        with pytest.raises(RuntimeError, match="inside"), exact():
            raise RuntimeError("inside")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_encoder_is_left_as_it_is():
    encoder = tiny_encoder().train()
    before, state = copy.deepcopy(encoder.state_dict()), torch.get_rng_state()
    fingerprint(encoder)
    assert encoder.training
    assert all(parameter.dtype == torch.float32 for parameter in encoder.parameters())
    assert encoder.norm.weight.requires_grad
    assert all(before[name].equal(value) for name, value in encoder.state_dict().items())
    assert torch.get_rng_state().equal(state)
    assert matches(copy.deepcopy(encoder).bfloat16(), fingerprint(encoder)) > 0  # its weights are rounded


@pytest.mark.parametrize("stored", [[], [1.0] * 15, [math.nan] * 16, [0.0] * 16, [math.inf] * 16])
def test_what_cannot_be_compared(stored):
    assert matches(tiny_encoder(), stored) == math.inf
