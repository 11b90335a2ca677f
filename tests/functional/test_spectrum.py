"""Second derivations of ranks and decays of singular values: a full decomposition, planted spectra, numpy's fit."""

import math

import numpy as np
import pytest
import torch

from harmonize.functional.spectrum import alpha_req, effective_rank, singular_values


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def planted(num, width, values, seed=0):
    """(num, width) whose rows have mean 0 and whose singular values are the given ones, and no others."""
    # Columns that are orthogonal to the vector of ones, and to each other.
    left, _ = torch.linalg.qr(
        torch.cat([torch.ones(num, 1, dtype=torch.float64), randn(num, len(values), seed=seed)], 1)
    )
    right, _ = torch.linalg.qr(randn(width, len(values), seed=seed + 1))
    return left[:, 1:] @ torch.tensor(values, dtype=torch.float64).diag() @ right.T


# --- singular values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (2, 3, 6, 4), (3, 4, 6)])
def test_singular_values_against_a_full_decomposition(shape):
    x = randn(*shape) + 3 * randn(shape[-1], seed=1)
    ours = singular_values(x)
    want = torch.linalg.svdvals(x - x.mean(dim=-2, keepdim=True))
    assert ours.shape == (*shape[:-2], min(shape[-2:]))
    torch.testing.assert_close(ours, want, rtol=1e-7, atol=1e-6)  # the root of a rounding is 1e-8 of the largest
    assert (ours.diff(dim=-1) <= 0).all()


def test_fp32_features_are_decomposed_in_fp64():
    x = randn(20, 8, dtype=torch.float32) + 1000  # a mean that fp32 would not survive
    ours = singular_values(x)
    assert ours.dtype == torch.float64
    y = x.double()
    torch.testing.assert_close(ours, torch.linalg.svdvals(y - y.mean(dim=0)), rtol=1e-7, atol=1e-6)


def test_an_offset_is_no_direction():
    x = randn(20, 8)
    torch.testing.assert_close(singular_values(x + 100 * randn(8, seed=1)), singular_values(x), rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (12, 12)])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_planted_rank(shape, k):
    values = singular_values(planted(*shape, [5.0] * k))
    torch.testing.assert_close(values[:k], torch.full((k,), 5.0, dtype=torch.float64), rtol=1e-9, atol=0)
    assert (values > 1e-6 * values[0]).sum() == k
    assert effective_rank(values).item() == pytest.approx(k, rel=1e-4)
    # In fp32, as features come, rounding is 1e-7 of each number: still no direction to speak of.
    assert effective_rank(singular_values(planted(*shape, [5.0] * k).float() + 1)).item() == pytest.approx(k, rel=1e-3)


def test_as_many_images_as_dimensions_lose_one_to_the_mean():
    values = singular_values(randn(6, 10))
    assert (values > 1e-6 * values[0]).tolist() == [True] * 5 + [False]


# --- effective rank --------------------------------------------------------------------------------------------------


def test_effective_rank_against_a_naive_loop():
    values = torch.tensor([[5.0, 3.0, 1.0, 0.5], [2.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    for row, ours in zip(values.tolist(), effective_rank(values).tolist(), strict=True):
        shares = [value / sum(row) for value in row]
        assert ours == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares if p > 0)), rel=1e-12)


def test_effective_rank_is_of_values_and_not_of_their_squares():
    """RankMe: e ** H of (2 / 3, 1 / 3), which is 3 / 2 ** (2 / 3)."""
    assert effective_rank(torch.tensor([2.0, 1.0])).item() == pytest.approx(3 / 2 ** (2 / 3), rel=1e-6)


def test_effective_rank_of_a_scaled_spectrum_and_of_none():
    values = randn(3, 6).abs()
    torch.testing.assert_close(effective_rank(100 * values), effective_rank(values))
    assert effective_rank(torch.zeros(3)).isnan()
    assert effective_rank(torch.ones(1)).item() == 1


# --- alpha -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("num", [40, 100, 300])
def test_alpha_of_a_power_law(alpha, num):
    """Of eigenvalues, which are squares of singular values."""
    values = 3 * torch.arange(1.0, num + 1, dtype=torch.float64) ** (-alpha / 2)
    assert alpha_req(values).item() == pytest.approx(alpha, abs=1e-9)
    x = planted(num + 20, num + 10, values.tolist())
    assert alpha_req(singular_values(x)).item() == pytest.approx(alpha, abs=1e-4)


@pytest.mark.parametrize(("first", "last"), [(11, 100), (1, 20), (3, 1000)])
def test_alpha_against_numpys_weighted_fit(first, last):
    values = randn(2, 150).abs().sort(descending=True).values + 0.01
    end = min(last, 150)
    rank = np.arange(first, end + 1)
    ours = alpha_req(values, first, last)
    for row, alpha in zip(values.numpy(), ours.tolist(), strict=True):
        # numpy's weights multiply residuals before they are squared
        slope, _ = np.polyfit(np.log(rank), np.log(row[first - 1 : end] ** 2), 1, w=rank**-0.5)
        assert alpha == pytest.approx(-slope, rel=1e-9)


def test_ranks_outside_the_fit_do_not_matter():
    values = torch.arange(1.0, 201.0, dtype=torch.float64) ** -0.5
    values[:10] += 5
    values[100:] /= 100
    assert alpha_req(values).item() == pytest.approx(1.0, abs=1e-9)
    values[10] *= 2
    assert alpha_req(values).item() > 1.1


def test_values_that_are_rounding_take_no_part_in_the_fit():
    values = torch.arange(1.0, 101.0, dtype=torch.float64) ** -0.5
    values[60:] = 1e-9
    assert alpha_req(values).item() == pytest.approx(1.0, abs=1e-9)
    x = planted(100, 80, values[:60].tolist())
    assert alpha_req(singular_values(x)).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("num", "is_nan"), [(13, False), (12, True), (5, True), (1, True)])
def test_fewer_than_three_ranks_have_no_slope(num, is_nan):
    ours = alpha_req(torch.arange(1.0, num + 1).expand(2, num).flip(-1))
    assert ours.shape == (2,)
    assert ours.isnan().tolist() == [is_nan] * 2


def test_nothing_has_no_slope():
    assert alpha_req(torch.zeros(50)).isnan()


def test_no_images():
    values = singular_values(torch.zeros(0, 6, 5))
    assert values.shape == (0, 5)
    assert effective_rank(values).shape == alpha_req(values).shape == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_matrix_that_is_not_finite_has_no_values_and_spoils_no_other(bad):
    x = randn(3, 6, 4)
    want = singular_values(x)
    x[1, 2, 3] = bad
    ours = singular_values(x)
    assert ours[1].isnan().all()
    torch.testing.assert_close(ours[[0, 2]], want[[0, 2]])
    assert effective_rank(ours).isnan().tolist() == [False, True, False]
