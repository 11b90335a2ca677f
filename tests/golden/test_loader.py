"""Every official checkpoint through the one loader: the features that the official code computed."""

import pytest
import torch

from harmonize.checkpoints.official import build, read_official
from harmonize.functional import masking

from .conftest import GOLDEN, assert_equal, checkpoint, expected, names, strip


def load(name, **options):
    """Encoder and expectations; the head count comes from the fixture only where the file does not tell it."""
    want = expected(name)
    official = read_official(str(GOLDEN / f"{name}.pth"), num_heads=want["config"]["num_heads"], **options)
    assert {row.outcome for row in official.keys} <= {"mapped", "dropped"}
    config = want["config"]
    sizes = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    ours = ("image_size", "patch_size", "width", "depth", "num_heads")
    assert [official.architecture[key] for key in ours] == [config[key] for key in sizes]
    return build(official), official, want


@pytest.mark.parametrize("name", names("moco_v3"))
def test_moco_v3(name):
    encoder, official, want = load(name)
    assert official.family == "MoCo v3, pre-trained"
    assert official.architecture["positions"] == "sincos"
    with torch.no_grad():
        assert_equal(encoder(want["view1"])[:, 0], want["features_eval_view1"])


@pytest.mark.parametrize("name", names("moco_v3"))
@pytest.mark.parametrize("branch", ["base", "momentum"])
def test_the_branch_of_moco_v3(name, branch):
    encoder, official, _ = load(name, branch=branch)
    theirs = strip(checkpoint(name)["state_dict"], f"module.{branch}_encoder.")
    state = encoder.state_dict()
    assert state.keys() == {key for key in theirs if not key.startswith("head.")}
    for key, value in state.items():
        assert value.equal(theirs[key]), key
    assert f"the {branch} encoder" in official.note


@pytest.mark.parametrize("name", names("simmim"))
def test_simmim(name):
    encoder, official, want = load(name)
    config = want["config"]
    assert official.family == "SimMIM, pre-trained"
    assert (official.architecture["positions"] != "none") is config["abs_pos_embed"]
    assert (official.architecture["layer_scale"] is not None) is bool(config["init_values"])
    if official.architecture["relative_position"] != "none":
        assert official.heads_from == "relative-position table"
    with torch.no_grad():
        tokens = encoder(want["image"])
    assert_equal(tokens[:, encoder.num_prefix_tokens :], want["tokens_unmasked_eval"])


@pytest.mark.parametrize("name", names("mae"))
def test_mae(name):
    encoder, official, want = load(name)
    assert official.family == "MAE, pre-trained"
    assert official.architecture["positions"] == "sincos_mae"
    num_visible = int((want["mask"][0] == 0).sum())
    keep = want["noise"].argsort(dim=1)[:, :num_visible]
    mask = masking.random_mask(want["noise"], want["config"]["mask_ratio"])
    assert not mask.gather(1, keep).any()
    with torch.no_grad():
        assert_equal(encoder.encode_visible(want["image"], keep), want["latent"])
