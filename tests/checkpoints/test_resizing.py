"""Weights for images of another size: only what depends on the grid changes, and an encoder can load it."""

import pytest
import torch

from harmonize.checkpoints.resizing import resize_state
from harmonize.functional.positions import resample_positions, resample_relative_table
from tests.helpers import tiny_encoder


@pytest.mark.parametrize("positions", ["learned", "sincos", "sincos_mae", "none"])
@pytest.mark.parametrize("relative", ["none", "shared", "per_block"])
@pytest.mark.parametrize("size", [(24, 24), (8, 24), (16, 16)])
def test_an_encoder_at_another_size(positions, relative, size):
    options = {"positions": positions, "relative_position": relative, "num_registers": 2 if relative == "none" else 0}
    encoder, other = tiny_encoder(**options), tiny_encoder(image_size=size, seed=1, **options)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name != "pos_embed":
                parameter.normal_()
    state = encoder.state_dict()
    fixed = None if other.pos_embed is None else other.pos_embed.clone()
    prefix = encoder.num_prefix_tokens
    resized = resize_state(state, encoder.spec.grid, other.spec.grid, prefix, positions, "mae")
    other.load_state_dict(resized)
    if positions.startswith("sincos"):
        assert other.pos_embed.equal(fixed)
    for name, value in state.items():
        if name == "pos_embed" and positions == "learned":
            expected = resample_positions(value, prefix, encoder.spec.grid, other.spec.grid, "mae")
        elif name.endswith("table"):
            expected = resample_relative_table(value, encoder.spec.grid, other.spec.grid)
        elif name != "pos_embed":
            expected = value
        else:
            continue
        assert resized[name].equal(expected), name
    assert all(value.equal(encoder.state_dict()[name]) for name, value in state.items())  # nothing written in place


def test_learned_prefix_positions_stay_beside_fixed_patches():
    encoder = tiny_encoder(positions="sincos")
    state = encoder.state_dict() | {"pos_embed": encoder.pos_embed.detach().clone()}
    state["pos_embed"][:, 0] = 3
    resized = resize_state(state, (4, 4), (6, 6), 1, "sincos")
    assert (resized["pos_embed"][:, 0] == 3).all()
    assert resized["pos_embed"][:, 1:].equal(tiny_encoder(image_size=24, positions="sincos").pos_embed[:, 1:])


def test_a_mistake_in_the_grid_is_noticed():
    state = tiny_encoder(positions="learned").state_dict()
    with pytest.raises(ValueError, match="17 position embeddings do not fit 1 prefix tokens and a grid of 3 x 3"):
        resize_state(state, (3, 3), (6, 6), 1, "learned")
