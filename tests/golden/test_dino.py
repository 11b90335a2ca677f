"""Features and attention maps of the official DINO, through the loader."""

import pytest
import torch

from harmonize.types import AttentionView

from .conftest import assert_equal, checkpoint, names, strip
from .test_loader import load


@pytest.mark.parametrize("name", names("dino"))
def test_features_and_last_attention_of_the_teacher(name):
    encoder, official, want = load(name)
    assert official.family == "DINO, pre-trained"
    assert "teacher" in official.note
    last = {}

    def visit(view):
        if isinstance(view, AttentionView) and view.layer == encoder.spec.depth:
            last["attention"] = view.weights()

    with torch.no_grad():
        tokens = encoder.visit_layers(want["image"], visit)
    assert_equal(tokens[:, 0], want["features_eval"], "class token")
    assert_equal(last["attention"], want["last_attention"], "attention")


@pytest.mark.parametrize("name", names("dino"))
def test_the_student(name):
    encoder, official, _ = load(name, branch="student")
    assert "student" in official.note
    theirs = strip(checkpoint(name)["student"], "module.backbone.")
    for key, value in encoder.state_dict().items():
        assert value.equal(theirs[key]), key
