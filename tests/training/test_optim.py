"""Parameter groups and peak learning rate against the official recipes (arithmetic by hand)."""

from functools import partial

import pytest
import torch
from torch import nn

from harmonize.objectives.contrastive import Contrastive
from harmonize.objectives.mim import MaskedAutoencoder, MaskedImageModeling
from harmonize.training.optim import build_optimizer, trained_parameters
from harmonize.types import ConfigError
from tests.helpers import tiny_encoder

MAE = partial(MaskedAutoencoder, decoder_width=16, decoder_depth=1, decoder_heads=2)


def groups(encoder, objective, **options):
    """Names of the decayed and of the undecayed parameters."""
    settings = {"lr": 1.0, "lr_batch": None, "weight_decay": 0.1, "global_batch": 8} | options
    optimizer = build_optimizer(encoder, objective, **settings).optimizer
    names = {id(p): n for n, p in trained_parameters(encoder, objective).items()}
    found = {0.0: set(), settings["weight_decay"]: set()}
    for group in optimizer.param_groups:
        found[group["weight_decay"]] |= {names[id(p)] for p in group["params"]}
    return found[settings["weight_decay"]], found[0.0]


def test_moco_v3_decays_everything_that_is_trained():
    encoder = tiny_encoder(freeze_patch_embed=True)
    objective = Contrastive(encoder, hidden_dim=16, out_dim=8)
    decayed, spared = groups(encoder, objective, no_decay=[])
    assert not spared
    assert {"encoder.cls_token", "encoder.norm.bias", "objective.projector.0.weight"} <= decayed
    # Frozen: the patch embedding, the fixed positions and the momentum networks; AdamW would decay them.
    assert not [n for n in decayed if "patch_embed" in n or "pos_embed" in n or "momentum" in n]


def test_simmim_spares_one_dimensional_parameters_and_the_class_token_only():
    encoder = tiny_encoder(positions="none", relative_position="shared", layer_scale=0.1)
    objective = MaskedImageModeling(encoder)
    decayed, spared = groups(encoder, objective, no_decay=["1d", "*.bias", "cls_token", "pos_embed"])
    tables = {n for n in trained_parameters(encoder, objective) if "relative_position_bias_table" in n}
    assert tables
    assert tables <= decayed
    assert "encoder.cls_token" in spared
    parameters = trained_parameters(encoder, objective)
    assert decayed | spared == set(parameters)
    assert spared == {n for n, p in parameters.items() if p.dim() <= 1 or n.endswith(("bias", "cls_token"))} - tables


def test_mae_spares_one_dimensional_parameters_only():
    encoder = tiny_encoder(positions="sincos_mae", initialization="mae")
    decayed, spared = groups(encoder, MAE(encoder), no_decay=["1d", "*.bias"])
    assert "encoder.cls_token" in decayed
    assert {"encoder.norm.weight", "encoder.blocks.0.attn.qkv.bias"} <= spared


@pytest.mark.parametrize("make", [MaskedImageModeling, MAE])
def test_mask_tokens_are_decayed(make):
    """Official mask tokens have three dimensions, (1, 1, D), and no exclusion list names them (SimMIM's ViT, MAE)."""
    encoder = tiny_encoder()
    decayed, _ = groups(encoder, make(encoder), no_decay=["1d", "*.bias", "cls_token", "pos_embed"])
    assert "objective.mask_token" in decayed


@pytest.mark.parametrize(
    ("lr", "lr_batch", "batch", "peak"),
    [
        (1.5e-4, 256, 4096, 2.4e-3),  # MoCo v3 and MAE
        (1e-4, 512, 2048, 4e-4),  # SimMIM
        (4e-3, None, 1024, 4e-3),  # not scaled
    ],
)
def test_learning_rate_rule(lr, lr_batch, batch, peak):
    module = nn.Linear(2, 2)
    built = build_optimizer(module, nn.Identity(), lr=lr, lr_batch=lr_batch, weight_decay=0, global_batch=batch)
    assert built.peak_lr == pytest.approx(peak, rel=1e-12)


def test_nothing_to_train():
    with pytest.raises(ConfigError, match="frozen"):
        build_optimizer(nn.Identity(), nn.Identity(), lr=1, lr_batch=None, weight_decay=0, global_batch=1)


def test_a_frozen_parameter_does_not_move():
    layer = nn.Linear(3, 3)
    layer.bias.requires_grad_(False)
    before = layer.bias.clone()
    settings = {"lr": 0.1, "lr_batch": None, "weight_decay": 0.5, "global_batch": 1}
    optimizer = build_optimizer(layer, nn.Identity(), **settings).optimizer
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert layer.bias.equal(before)
