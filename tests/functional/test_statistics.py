"""Second derivations of standard errors and intervals: numpy, the closed form for means, repeated sampling."""

import math

import numpy as np
import pytest
import torch

from harmonize.functional.statistics import bootstrap_interval, classification_error, jackknife, mean_and_error


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


def test_accuracy_and_its_error():
    correct = torch.arange(400) % 5 == 0
    assert classification_error(correct) == pytest.approx((0.2, math.sqrt(0.2 * 0.8 / 400)))
    assert classification_error(torch.ones(3, dtype=torch.bool)) == (1.0, 0.0)
    assert all(math.isnan(x) for x in classification_error(torch.ones(0, dtype=torch.bool)))


def miou(sums):
    """Of sums (R, 2, C) over images of intersections and unions."""
    return (sums[:, 0] / sums[:, 1]).mean(1)


def segmentations(num=40, num_classes=3):
    union = randn(num, num_classes).abs() + 1
    return torch.stack([union * randn(num, num_classes, seed=1).sigmoid(), union], 1)


def test_bootstrap_is_a_loop_over_resampled_images():
    rows = segmentations()
    low, high = bootstrap_interval(miou, rows, level=0.9, num=250, seed=3)  # more than fit into one product
    generator = torch.Generator().manual_seed(3)
    values = []
    for _ in range(250):
        drawn = torch.randint(40, (40,), generator=generator).tolist()
        intersection, union = sum(rows[i] for i in drawn)
        values.append((intersection / union).mean().item())
    assert (low.item(), high.item()) == pytest.approx(tuple(np.quantile(values, [0.05, 0.95])), rel=1e-12)


def test_bootstrap_depends_on_its_seed_alone():
    rows = segmentations()
    torch.manual_seed(0)
    first = bootstrap_interval(miou, rows, seed=1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert bootstrap_interval(miou, rows.float().double(), seed=1)[0].item() == pytest.approx(first[0].item(), rel=1e-6)
    assert bootstrap_interval(miou, rows, seed=1) == first
    assert bootstrap_interval(miou, rows, seed=2) != first
    assert torch.get_rng_state().equal(state)


def test_bootstrap_of_a_mean_agrees_with_its_standard_error():
    x = randn(400, 3)
    low, high = bootstrap_interval(lambda sums: sums / len(x), x)
    mean, error = mean_and_error(x)
    torch.testing.assert_close((high - low) / 2, 1.96 * error, rtol=0.1, atol=0)
    torch.testing.assert_close((high + low) / 2, mean, rtol=0, atol=0.02)


def test_bootstrap_covers_a_ratio():
    """A shape bias of 0.3 among decided images, some undecided: the interval holds it in about 95 % of samples."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(200):
        decided = torch.rand(300, generator=generator) < 0.6
        shape = decided & (torch.rand(300, generator=generator) < 0.3)
        rows = torch.stack([shape, decided], 1)
        low, high = bootstrap_interval(lambda sums: sums[:, 0] / sums[:, 1], rows, num=200, seed=seed)
        covered += bool(low <= 0.3 <= high)
    assert 0.9 <= covered / 200 <= 0.99


def test_a_bootstrap_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        bootstrap_interval(miou, torch.zeros(0, 2, 3))
