"""One training step of the official MoCo v3: features, loss, every gradient, the momentum network afterwards."""

import math

import pytest
import torch

from harmonize.objectives.contrastive import Contrastive
from harmonize.types import Batch, Progress

from .conftest import assert_equal, assert_same_gradients, checkpoint, expected, names, strip, vit


def load(name):
    state, want = strip(checkpoint(name)["state_dict"], "module."), expected(name)
    config = want["config"]
    encoder = vit(config, freeze_patch_embed=config["stop_grad_conv1"])
    objective = Contrastive(
        encoder,
        temperature=config["temperature"],
        momentum=config["momentum"],
        momentum_schedule="constant",
        hidden_dim=config["mlp_dim"],
        out_dim=config["out_dim"],
    )
    for branch, network, projector in (
        ("base_encoder.", encoder, objective.projector),
        ("momentum_encoder.", objective.momentum_encoder, objective.momentum_projector),
    ):
        weights = strip(state, branch)
        projector.load_state_dict(strip(weights, "head."))
        fixed = network.pos_embed.detach().clone()
        network.load_state_dict({k: v for k, v in weights.items() if not k.startswith("head.")})
        assert_equal(network.pos_embed, fixed, "fixed sin-cos positions")
    objective.predictor.load_state_dict(strip(state, "predictor."))
    return encoder, objective, want


def batch(view1, view2):
    index = torch.arange(len(view1))
    return Batch(views={"contrastive": (view1, view2)}, label=index, index=index, seed=index)


@pytest.mark.parametrize("name", names("moco_v3"))
def test_features(name):
    encoder, _, want = load(name)
    with torch.no_grad():
        assert_equal(encoder.eval()(want["view1"])[:, 0], want["features_eval_view1"])


@pytest.mark.parametrize("name", names("moco_v3"))
def test_training_step(name):
    encoder, objective, want = load(name)
    module = torch.nn.ModuleDict({"encoder": encoder, "objective": objective}).train()
    progress = Progress(0, 1)
    objective.before_step(encoder, progress)
    output = objective(encoder, batch(want["view1"], want["view2"]), progress)
    assert_equal(output.loss, want["loss"], "loss")
    assert math.isclose(
        output.stats["chance_contrastive"], 4 * want["config"]["temperature"] * math.log(len(want["view1"]))
    )
    output.loss.backward()

    ours = {}
    for theirs in want["grads"]:
        if theirs.startswith("predictor."):
            ours[theirs] = f"objective.{theirs}"
        elif theirs.startswith("base_encoder.head."):
            ours[theirs] = theirs.replace("base_encoder.head.", "objective.projector.")
        else:
            ours[theirs] = theirs.replace("base_encoder.", "encoder.")
    assert_same_gradients(module, want["grads"], ours)

    after = strip(want["momentum_encoder_after"], "momentum_encoder.")
    projector = strip(after, "head.")
    network = {k: v for k, v in after.items() if not k.startswith("head.")}
    for module, state in ((objective.momentum_encoder, network), (objective.momentum_projector, projector)):
        actual = module.state_dict()
        assert set(actual) == set(state)
        for key, value in state.items():
            assert_equal(actual[key], value, key)
