"""One training step of the official MAE: latent, prediction, mask, loss, every gradient."""

import pytest
import torch

from harmonize.functional import masking
from harmonize.objectives.mim import MaskedAutoencoder
from harmonize.types import Batch, Progress

from .conftest import assert_equal, assert_same_gradients, checkpoint, expected, names, vit

DECODER = {
    "decoder_embed.": "embed.",
    "decoder_norm.": "norm.",
    "decoder_pred.": "projection.",
    "decoder_blocks.": "blocks.",
    ".attn.qkv.weight": ".self_attn.in_proj_weight",
    ".attn.qkv.bias": ".self_attn.in_proj_bias",
    ".attn.proj.": ".self_attn.out_proj.",
    ".mlp.fc1.": ".linear1.",
    ".mlp.fc2.": ".linear2.",
}


def is_decoder(key: str) -> bool:
    return key.startswith("decoder_")


def decoder_name(key: str) -> str:
    """Our name, below the objective, of an official decoder parameter."""
    for theirs, ours in DECODER.items():
        key = key.replace(theirs, ours)
    return f"decoder.{key}"


def load(name):
    state, want = checkpoint(name)["model"], expected(name)
    config = want["config"]
    encoder = vit(config, positions="sincos_mae")
    objective = MaskedAutoencoder(
        encoder,
        mask_ratio=config["mask_ratio"],
        norm_pix_loss=config["norm_pix_loss"],
        decoder_width=config["decoder_dim"],
        decoder_depth=config["decoder_depth"],
        decoder_heads=config["decoder_heads"],
    )
    fixed = encoder.pos_embed.detach().clone()
    encoder.load_state_dict({k: v for k, v in state.items() if not is_decoder(k) and k != "mask_token"})
    assert_equal(encoder.pos_embed, fixed, "fixed sin-cos positions")
    assert_equal(objective.decoder.positions[None], state["decoder_pos_embed"], "the decoder's positions")
    decoder = {decoder_name(k): v for k, v in state.items() if is_decoder(k) and k != "decoder_pos_embed"}
    objective.load_state_dict(decoder | {"mask_token": state["mask_token"]})
    objective.mask = lambda seed: masking.random_mask(want["noise"], config["mask_ratio"])
    return encoder, objective, want


@pytest.mark.parametrize("name", names("mae"))
def test_mask_and_latent(name):
    encoder, objective, want = load(name)
    assert_equal(objective.mask(None).float(), want["mask"], "mask")
    keep = want["noise"].argsort(dim=1)[:, : objective.num_visible]
    with torch.no_grad():
        assert_equal(encoder.eval().encode_visible(want["image"], keep), want["latent"], "latent")


@pytest.mark.parametrize("name", names("mae"))
def test_training_step(name):
    encoder, objective, want = load(name)
    module = torch.nn.ModuleDict({"encoder": encoder, "objective": objective}).train()
    assert_equal(objective.reconstruct(encoder, want["image"], objective.mask(None)), want["pred"], "prediction")
    index = torch.arange(len(want["image"]))
    batch = Batch(views={"mim": (want["image"],)}, label=index, index=index, seed=index)
    output = objective(encoder, batch, Progress(0, 1))
    assert_equal(output.loss, want["loss"], "loss")
    output.loss.backward()
    ours = {k: f"objective.{decoder_name(k)}" if is_decoder(k) else f"encoder.{k}" for k in want["grads"]}
    ours["mask_token"] = "objective.mask_token"
    assert_same_gradients(module, want["grads"], ours)
