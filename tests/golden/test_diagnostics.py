"""What the notebooks of cl-vs-mim computed from given attention maps and tokens."""

import pytest
import torch

from harmonize.functional import fourier
from harmonize.functional.attention import (
    EPSILON,
    attention_distance,
    attention_entropy,
    mean_log_products,
    normalized_mutual_information,
    patch_attention,
    patch_distances,
)
from tests.golden.conftest import GOLDEN, assert_equal

NUM_PREFIX = 1  # the class token


@pytest.fixture(scope="module")
def official():
    return torch.load(GOLDEN / "diagnostics.pt", weights_only=True)


@pytest.fixture(scope="module")
def grid(official):
    side = official["config"]["grid"]
    return (side, side)


def test_attention_distance(official, grid):
    distances = patch_distances(grid, official["config"]["patch_size"])
    ours = attention_distance(patch_attention(official["attention"], NUM_PREFIX), distances)
    torch.testing.assert_close(ours.double(), official["attention_distance_px"], rtol=1e-6, atol=0)


def test_nmi(official):
    attention = patch_attention(official["attention"], NUM_PREFIX, EPSILON)
    entropy = attention_entropy(mean_log_products(attention, attention.log()))
    ours = normalized_mutual_information(attention, entropy)
    torch.testing.assert_close(ours.float(), official["nmi"], rtol=1e-5, atol=1e-6)


def test_one_layer_and_image_at_a_time_is_the_same(official, grid):
    """Nothing of one map leaks into another's number."""
    distances = patch_distances(grid, official["config"]["patch_size"])
    for layer in range(len(official["attention"])):
        one = official["attention"][layer, -1:]
        ours = attention_distance(patch_attention(one, NUM_PREFIX), distances).double()
        torch.testing.assert_close(ours, official["attention_distance_px"][layer, -1:], rtol=1e-6, atol=0)
        attention = patch_attention(one, NUM_PREFIX, EPSILON)
        entropy = attention_entropy(mean_log_products(attention, attention.log()))
        ours = normalized_mutual_information(attention, entropy).float()
        torch.testing.assert_close(ours, official["nmi"][layer, -1:], rtol=1e-5, atol=1e-6)


def test_relative_log_amplitude(official, grid):
    assert len(official["tokens"])
    for layer, tokens in enumerate(official["tokens"]):
        cut = fourier.diagonal(fourier.log_amplitude(tokens[:, NUM_PREFIX:], grid), grid).mean(dim=0)
        assert len(cut) == len(fourier.diagonal_frequencies(grid))
        assert_equal(cut - cut[0], official["relative_log_amplitude"][layer], f"layer {layer}")
        assert_equal(cut[-1] - cut[0], official["delta_log_amplitude"][layer], f"layer {layer}")
