"""k-NN and linear probe as protocols on features: one feature on both sides, unlabelled images left out."""

from dataclasses import replace

import pytest
import torch

from harmonize.evaluation.features import Features
from harmonize.evaluation.knn import knn_accuracy
from harmonize.evaluation.linear_probe import linear_probe_accuracy
from harmonize.types import ConfigError, FeatureSpec

PROTOCOLS = [knn_accuracy, linear_probe_accuracy]


def planted(num, seed):
    """Three classes around three centres, one image in ten at a wrong one."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(3, (num,), generator=generator)
    shown = torch.where(torch.arange(num) % 10 == 0, (label + 1) % 3, label)
    x = 8 * torch.eye(3, 5)[shown] + torch.randn(num, 5, generator=generator)
    return Features(x, label, torch.arange(num), FeatureSpec(2))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_finds_what_is_planted(protocol):
    assert protocol(planted(300, 0), planted(100, 1), 3) == pytest.approx(0.9)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_same_feature_on_both_sides(protocol):
    with pytest.raises(ValueError, match=r"layer=2 .*layer=1 "):
        protocol(planted(30, 0), replace(planted(30, 1), spec=FeatureSpec(1)), 3)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("side", ["train", "val"])
def test_no_labelled_image_is_a_sentence(protocol, side):
    sides = {"train": planted(30, 0), "val": planted(30, 1)}
    sides[side] = replace(sides[side], label=torch.full((30,), -1))
    with pytest.raises(ConfigError, match=rf"data\.root .* {side} images"):
        protocol(**sides, num_classes=3)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_unlabelled_images_take_no_part(protocol):
    train, val = planted(300, 0), planted(100, 1)
    expected = protocol(train, val, 3)
    noise = torch.full((50, 5), 1e3)
    none, index = torch.full((50,), -1), torch.arange(50)

    def padded(features):
        return Features(
            torch.cat([features.x, noise]),
            torch.cat([features.label, none]),
            torch.cat([features.index, 1000 + index]),
            features.spec,
        )

    assert protocol(padded(train), padded(val), 3) == expected
