"""Second derivations of alignment and uniformity: naive fp64 loops and closed forms."""

import itertools
import math

import pytest
import torch

from harmonize.functional.sphere import alignment, uniformity


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squared_distance(x, y):
    x, y = ([value / math.sqrt(sum(v * v for v in vector)) for value in vector] for vector in (x, y))
    return sum((a - b) ** 2 for a, b in zip(x, y, strict=True))


def test_alignment_against_a_naive_loop():
    x, y = randn(5, 4), randn(5, 4, seed=1) + 0.5
    want = [squared_distance(a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    assert alignment(x, y).tolist() == pytest.approx(want, abs=1e-6)


def test_alignment_is_of_directions():
    x = randn(5, 4)
    torch.testing.assert_close(alignment(x, 3 * x), torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(alignment(x, -0.1 * x), torch.full((5,), 4.0))


@pytest.mark.parametrize("t", [2.0, 0.5])
def test_uniformity_against_a_naive_loop(t):
    x = randn(2, 6, 4) + 0.5
    ours = uniformity(x, t)
    assert ours.shape == (2,)
    for b in range(2):
        potentials = [math.exp(-t * squared_distance(i, j)) for i, j in itertools.combinations(x[b].tolist(), 2)]
        assert ours[b].item() == pytest.approx(math.log(sum(potentials) / len(potentials)), abs=1e-9)


def test_uniformity_of_closed_forms():
    assert uniformity(randn(1, 4).expand(7, 4) * torch.arange(1.0, 8.0)[:, None]).item() == pytest.approx(0, abs=1e-9)
    assert uniformity(5 * torch.eye(6)).item() == pytest.approx(-2 * 2, abs=1e-9)  # distances of root of 2
    assert uniformity(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]), t=3).item() == pytest.approx(-3 * 4, abs=1e-9)


def test_uniformity_of_the_sphere():
    """On the sphere in three dimensions |x - y|^2 is uniform in [0, 4], so that E exp(-2 .) = (1 - exp(-8)) / 8."""
    points = randn(1500, 3)
    assert uniformity(points).item() == pytest.approx(math.log((1 - math.exp(-8)) / 8), abs=0.02)
    assert uniformity(randn(300, 2000)).item() == pytest.approx(-4, abs=0.02)


def test_no_images_and_one_image():
    assert alignment(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)
    assert uniformity(torch.zeros(0, 4, 3)).shape == (0,)
    assert uniformity(randn(1, 4)).isnan()  # no pair
