"""The linear probe against the optimality conditions of its convex problem, and a planted solution."""

import math

import pytest
import torch

from harmonize.functional.linear_probe import fit_linear_probe


def overlapping(num=200, num_classes=3, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num,), generator=generator)
    centres = torch.randn(num_classes, width, generator=generator)
    scale = torch.tensor([1e-3, 1.0, 10.0, 1e3, 1.0])
    return (centres[labels] + torch.randn(num, width, generator=generator)) * scale + 7 * scale, labels


def gradient(probe, features, labels, l2):
    """d/dW and d/db of mean cross-entropy + l2/2 ||W||^2, by hand."""
    x = (features.double() - probe.mean) / probe.std
    probability = (x @ probe.weight.T + probe.bias).softmax(1)
    probability[torch.arange(len(labels)), labels] -= 1
    return probability.T @ x / len(x) + l2 * probe.weight, probability.mean(0)


@pytest.mark.parametrize("l2", [1e-3, 1.0])
def test_the_fit_is_the_minimum(l2):
    features, labels = overlapping()
    probe = fit_linear_probe(features, labels, 3, l2)
    for part in gradient(probe, features, labels, l2):
        assert part.abs().max() < 2e-6


def test_one_feature_two_classes_has_a_closed_form():
    """Balanced classes at -1 and +1: w1 - w0 = 2w with 2 l2 w = sigmoid(-2w)... solved by bisection."""
    features, labels = torch.tensor([[-1.0], [1.0]]).repeat(8, 1), torch.tensor([0, 1]).repeat(8)
    l2 = 0.1
    low, high = 0.0, 10.0
    for _ in range(100):  # stationarity: l2 w = sigmoid(-2 w) for w = w1 = -w0
        w = (low + high) / 2
        low, high = (w, high) if 1 / (1 + math.exp(2 * w)) > l2 * w else (low, w)
    probe = fit_linear_probe(features, labels, 2, l2)
    torch.testing.assert_close(probe.weight, torch.tensor([[-w], [w]], dtype=torch.float64), rtol=1e-5, atol=1e-7)
    assert probe.bias.abs().max() < 1e-7


def test_a_planted_separable_problem_is_solved():
    generator = torch.Generator().manual_seed(1)
    planted = torch.randn(4, 12, generator=generator)
    features = torch.randn(1200, 12, generator=generator)
    scores = (features @ planted.T).sort(dim=1, descending=True)
    clear = scores.values[:, 0] - scores.values[:, 1] > 0.5
    features, labels = features[clear], scores.indices[clear, 0]
    probe = fit_linear_probe(features[:600], labels[:600], 4)
    accuracy = (probe.logits(features[600:]).argmax(1) == labels[600:]).double().mean()
    assert len(features) > 900
    assert accuracy > 0.98


def test_scale_and_offset_of_features_do_not_matter():
    features, labels = overlapping()
    scale, offset = torch.rand(5, dtype=torch.float64) + 0.1, torch.randn(5, dtype=torch.float64)
    moved = features.double() * scale + offset
    plain = fit_linear_probe(features, labels, 3).logits(features)
    torch.testing.assert_close(fit_linear_probe(moved, labels, 3).logits(moved), plain, rtol=1e-4, atol=1e-5)


def test_a_constant_feature_does_no_harm():
    features, labels = overlapping()
    padded = torch.cat([features, torch.full((len(features), 1), 0.1)], dim=1)
    probe = fit_linear_probe(padded, labels, 3)
    torch.testing.assert_close(probe.logits(padded), fit_linear_probe(features, labels, 3).logits(features))


def test_two_fits_are_bit_identical_and_gradients_may_be_off():
    features, labels = overlapping()
    with torch.no_grad():
        first = fit_linear_probe(features, labels, 3)
    assert first.weight.equal(fit_linear_probe(features, labels, 3).weight)
    assert not first.weight.requires_grad
