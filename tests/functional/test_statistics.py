"""Second derivations of standard errors: numpy, the closed form for means, repeated sampling."""

import math

import numpy as np
import pytest
import torch

from harmonize.functional.statistics import jackknife, mean_and_error


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mean_and_error_against_numpy():
    rows = randn(7, 2, 3) * 3 + 1
    mean, error = mean_and_error(rows.float())
    assert mean.dtype == error.dtype == torch.float64
    assert mean.shape == error.shape == (2, 3)
    np.testing.assert_allclose(mean, rows.numpy().mean(0), rtol=1e-6)
    np.testing.assert_allclose(error, rows.numpy().std(0, ddof=1) / np.sqrt(7), rtol=1e-6)


def test_the_error_is_the_spread_of_the_mean():
    means, errors = mean_and_error(randn(50, 4000) + 3)  # 4000 times 50 images
    assert means.std().item() == pytest.approx(1 / math.sqrt(50), rel=0.05)
    assert errors.square().mean().sqrt().item() == pytest.approx(means.std().item(), rel=0.05)


def test_a_large_offset_in_fp32_does_not_drown_the_spread():
    rows = torch.tensor([10000.0, 10001.0, 10002.0] * 1000)
    assert mean_and_error(rows)[0].item() == pytest.approx(10001, rel=1e-12)
    assert mean_and_error(rows)[1].item() == pytest.approx(math.sqrt(2 / 3 * 3000 / 2999 / 3000), rel=1e-9)


@pytest.mark.parametrize("num", [0, 1])
def test_fewer_than_two_images_have_no_error(num):
    mean, error = mean_and_error(torch.full((num, 2), 5.0))
    assert error.isnan().tolist() == [True, True]
    assert mean.tolist() == [5.0, 5.0] if num else mean.isnan().all()


@pytest.mark.parametrize("num", [2, 5, 16])
def test_jackknife_of_a_mean_is_its_standard_error(num):
    x = randn(num, 3)
    value, error = jackknife(lambda i: x[i].mean(dim=0), num)
    torch.testing.assert_close(value, x.mean(dim=0))
    torch.testing.assert_close(error, mean_and_error(x)[1])


@pytest.mark.parametrize("max_groups", [2, 4, 6])
def test_jackknife_of_groups_is_the_standard_error_of_their_means(max_groups):
    x = randn(24)
    _, error = jackknife(lambda i: x[i].mean(), 24, max_groups)
    means = torch.stack([x[g::max_groups].mean() for g in range(max_groups)])
    assert error.item() == pytest.approx(means.std().item() / math.sqrt(max_groups), rel=1e-9)


def test_jackknife_leaves_out_each_image_once():
    seen = []

    def statistic(index):
        seen.append(index.tolist())
        return torch.zeros(())

    jackknife(statistic, 7, max_groups=3)
    assert seen == [[0, 1, 2, 3, 4, 5, 6], [1, 2, 4, 5], [0, 2, 3, 5, 6], [0, 1, 3, 4, 6]]


def test_jackknife_of_a_product_against_a_naive_loop():
    x = randn(6, 2)

    def correlation(index):
        a, b = x[index].T
        return torch.corrcoef(torch.stack([a, b]))[0, 1]

    value, error = jackknife(correlation, 6)
    parts = [np.corrcoef(np.delete(x.numpy(), i, axis=0).T)[0, 1] for i in range(6)]
    centre = sum(parts) / 6
    assert value.item() == pytest.approx(np.corrcoef(x.numpy().T)[0, 1], rel=1e-9)
    assert error.item() == pytest.approx(math.sqrt(5 / 6 * sum((p - centre) ** 2 for p in parts)), rel=1e-9)


@pytest.mark.parametrize("num", [64, 70])  # with groups of equal and of unequal size
def test_the_jackknife_error_is_the_spread_of_a_statistic_that_is_no_mean(num):
    x = randn(num, 2000)  # 2000 times
    value, error = jackknife(lambda i: x[i].var(dim=0).log(), num)
    assert error.square().mean().sqrt().item() == pytest.approx(value.std().item(), rel=0.12)
