"""Second derivations of CKA: the U-statistic that defines it, matrices, planted relations."""

import itertools
import math

import pytest
import torch

from harmonize.functional.cka import linear_cka


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_hsic(x, y):
    """Song et al. 2012: the mean over four different images of k_ij l_ij + k_ij l_qr - 2 k_ij l_iq."""
    k, ell = (x @ x.T).tolist(), (y @ y.T).tolist()
    terms = [
        k[i][j] * ell[i][j] + k[i][j] * ell[q][r] - 2 * k[i][j] * ell[i][q]
        for i, j, q, r in itertools.permutations(range(len(k)), 4)
    ]
    return sum(terms) / len(terms)


def trace_hsic(x, y):
    """The same with matrices (Nguyen et al. 2021, equation 3)."""
    num = len(x)
    k, ell = x @ x.T, y @ y.T
    k, ell = k - k.diag().diag(), ell - ell.diag().diag()
    one = torch.ones(num, 1, dtype=x.dtype)
    value = (
        (k @ ell).trace()
        + (one.T @ k @ one) * (one.T @ ell @ one) / ((num - 1) * (num - 2))
        - 2 / (num - 2) * (one.T @ k @ ell @ one)
    )
    return value.item() / (num * (num - 3))


@pytest.mark.parametrize("num", [5, 7])
@pytest.mark.parametrize("hsic", [naive_hsic, trace_hsic])
def test_cka_against_its_definition(num, hsic):
    layers = randn(3, num, 4) + 0.5 * randn(1, num, 4, seed=1) + 2 * randn(3, 1, 4, seed=2)
    ours = linear_cka(layers)
    assert ours.dtype == torch.float64
    for a in range(3):
        for b in range(3):
            want = hsic(layers[a], layers[b]) / math.sqrt(hsic(layers[a], layers[a]) * hsic(layers[b], layers[b]))
            assert ours[a, b].item() == pytest.approx(want, abs=1e-9)


def test_rotations_scales_and_offsets_change_nothing():
    x = randn(20, 6)
    rotation, _ = torch.linalg.qr(randn(6, 6, seed=1))
    same = torch.stack([x, -3 * x @ rotation, x + 100 * randn(6, seed=2)])
    torch.testing.assert_close(linear_cka(same), torch.ones(3, 3, dtype=torch.float64))
    assert linear_cka(torch.stack([x, x * torch.tensor([10.0, 1, 1, 1, 1, 1])]))[0, 1] < 0.9  # a linear map does


def test_images_are_matched():
    x = randn(20, 6)
    permutation = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    together = linear_cka(torch.stack([x, x.tanh()]))[0, 1]
    assert linear_cka(torch.stack([x[permutation], x[permutation].tanh()]))[0, 1].item() == pytest.approx(
        together.item()
    )
    assert together - linear_cka(torch.stack([x, x[permutation].tanh()]))[0, 1] > 0.5


def test_independent_layers_have_nothing_in_common_in_however_many_dimensions():
    """Where the biased estimator says 0.9 for 64 images and 512 dimensions."""
    off = linear_cka(randn(12, 64, 512))[~torch.eye(12, dtype=torch.bool)]
    # 66 pairs, each with a standard deviation of root of 2 over n
    assert off.abs().max() < 4.5 * math.sqrt(2) / 64
    assert off.mean().abs() < 4 * math.sqrt(2) / 64 / math.sqrt(66)


def test_cka_of_a_shared_part():
    """Layers (s, e) of n dimensions of which s are shared: s / n in the limit of many images."""
    shared = randn(1, 3000, 6).expand(2, 3000, 6)
    layers = torch.cat([shared, randn(2, 3000, 18, seed=1)], dim=-1)
    assert linear_cka(layers)[0, 1].item() == pytest.approx(6 / 24, abs=0.01)


def test_cka_is_symmetric_and_one_on_the_diagonal():
    ours = linear_cka(randn(4, 10, 3).float())
    torch.testing.assert_close(ours, ours.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.diagonal(), torch.ones(4, dtype=torch.float64))


def test_large_offsets_in_fp32_are_no_similarity():
    layers = randn(2, 40, 8)
    offset = (layers + 1000).float()
    torch.testing.assert_close(linear_cka(offset), linear_cka(layers), rtol=0, atol=1e-3)


def test_fewer_than_four_images():
    with pytest.raises(ValueError, match="at least 4 images, not 3"):
        linear_cka(randn(2, 3, 5))
    assert linear_cka(randn(2, 4, 5)).shape == (2, 2)
