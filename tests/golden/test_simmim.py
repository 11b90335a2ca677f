"""One training step of the official SimMIM: tokens, reconstruction, loss, every gradient."""

import pytest
import torch
from einops import rearrange

from harmonize.functional.reconstruction import unpatchify
from harmonize.objectives.mim import MaskedImageModeling
from harmonize.types import Batch, Progress

from .conftest import assert_equal, assert_same_gradients, checkpoint, expected, names, strip, vit


def encoder_state(official: dict) -> dict:
    """Official encoder parameters under our names: LayerScale renamed, q and v bias joined (the key bias is 0)."""
    state = {}
    for key, value in official.items():
        if key.endswith(("relative_position_index", "mask_token", "v_bias")):
            continue
        if key.endswith("q_bias"):
            v_bias = official[key.replace("q_bias", "v_bias")]
            state[key.replace("q_bias", "qkv.bias")] = torch.cat([value, torch.zeros_like(value), v_bias])
            continue
        state[our_name(key)] = value
    return state


def our_name(key: str) -> str:
    return (
        key.replace("gamma_1", "ls1.gamma")
        .replace("gamma_2", "ls2.gamma")
        .replace("attn.relative_position_bias_table", "rel_pos_bias.relative_position_bias_table")
    )


def load(name):
    state, want = checkpoint(name)["model"], expected(name)
    config = want["config"]
    relative = "shared" if config["shared_rel_pos_bias"] else "per_block" if config["rel_pos_bias"] else "none"
    encoder = vit(
        config,
        positions="learned" if config["abs_pos_embed"] else "none",
        relative_position=relative,
        layer_scale=config["init_values"] or None,
    )
    encoder.load_state_dict(encoder_state(strip(state, "encoder.")))
    objective = MaskedImageModeling(encoder, mask_unit=config["patch_size"])
    with torch.no_grad():
        objective.mask_token.copy_(state["encoder.mask_token"])
        objective.decoder.projection.weight.copy_(state["decoder.0.weight"].flatten(1))
        objective.decoder.projection.bias.copy_(state["decoder.0.bias"])
    objective.mask = lambda seed: want["mask"].flatten(1).bool()
    return encoder, objective, want


@pytest.mark.parametrize("name", names("simmim"))
def test_tokens(name):
    encoder, objective, want = load(name)
    encoder.eval()
    with torch.no_grad():
        assert_equal(encoder(want["image"])[:, 1:], want["tokens_unmasked_eval"], "without mask")
        masked = encoder(want["image"], objective.mask(None), objective.mask_token)[:, 1:]
        assert_equal(masked, want["tokens_masked_eval"], "with mask")


@pytest.mark.parametrize("name", names("simmim"))
def test_training_step(name):
    encoder, objective, want = load(name)
    module = torch.nn.ModuleDict({"encoder": encoder, "objective": objective}).train()
    mask = objective.mask(None)
    patches = objective.reconstruct(encoder, want["image"], mask)
    assert_equal(unpatchify(patches, encoder.spec.grid), want["reconstruction"], "reconstruction")

    index = torch.arange(len(want["image"]))
    batch = Batch(views={"mim": (want["image"],)}, label=index, index=index, seed=index)
    output = objective(encoder, batch, Progress(0, 1))
    assert_equal(output.loss, want["loss"], "loss")
    output.loss.backward()

    width = want["config"]["embed_dim"]
    ours = {}
    for theirs in want["grads"]:
        name = our_name(theirs)
        if theirs.endswith("q_bias"):
            name = theirs.replace("q_bias", f"qkv.bias#0:{width}")
        elif theirs.endswith("v_bias"):
            name = theirs.replace("v_bias", f"qkv.bias#{2 * width}:{3 * width}")
        elif theirs == "encoder.mask_token":
            name = "objective.mask_token"
        elif theirs.startswith("decoder.0."):
            name = theirs.replace("decoder.0.", "objective.decoder.projection.")
        ours[theirs] = name
    assert_same_gradients(module, want["grads"], ours)
    for block in encoder.blocks:  # the key bias, which the official network does not have
        key_gradient = block.attn.qkv.bias.grad[width : 2 * width]
        assert_equal(key_gradient, torch.zeros_like(key_gradient), "key bias")


@pytest.mark.parametrize("name", names("simmim"))
def test_reconstruction_is_colour_major(name):
    """The official decoder is a 1 x 1 convolution and PixelShuffle."""
    encoder, objective, _ = load(name)
    grid, patch = encoder.spec.grid, encoder.spec.patch_size
    tokens = torch.randn(2, encoder.spec.num_prefix_tokens + encoder.spec.num_patches, encoder.spec.width)
    projection = objective.decoder.projection
    maps = rearrange(tokens[:, encoder.spec.num_prefix_tokens :], "b (h w) d -> b d h w", h=grid[0])
    conv = torch.nn.functional.conv2d(maps, projection.weight[:, :, None, None], projection.bias)
    image = torch.nn.functional.pixel_shuffle(conv, patch)
    assert_equal(unpatchify(objective.decoder(tokens), grid), image)
