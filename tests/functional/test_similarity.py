"""Second derivations of similarities across heads, tokens and depth: naive fp64 loops and planted motions."""

import math

import numpy as np
import pytest
import torch

from harmonize.functional.similarity import (
    common_projection,
    depth_similarity,
    head_similarity,
    mean_cosine_to_others,
    principal_colors,
    token_similarity,
    translation_share,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(x, y):
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    return dot / math.sqrt(sum(a * a for a in x)) / math.sqrt(sum(b * b for b in y))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# --- cosines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, 2, -2])
def test_mean_cosine_to_others_against_a_naive_loop(dim):
    x = randn(3, 4, 2, 5) + 0.5
    ours = mean_cosine_to_others(x, dim)
    assert ours.shape == (3, 4, 2)
    for index in [(i, j, k) for i in range(3) for j in range(4) for k in range(2)]:
        want = []
        for other in range(x.shape[dim]):
            place = [*index, slice(None)]
            if other != index[dim if dim >= 0 else dim + 4]:
                place[dim] = other
                want.append(cosine(x[index].tolist(), x[tuple(place)].tolist()))
        assert ours[index].item() == pytest.approx(mean(want), abs=1e-6)


def test_a_zero_vector_is_like_nothing():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    assert mean_cosine_to_others(x, 0).tolist() == pytest.approx([0.0, 0.5, 0.5])


def test_head_similarity_against_a_naive_loop():
    outputs = randn(2, 3, 4, 5) + 0.3
    ours = head_similarity(outputs)
    assert ours.shape == (2, 3)
    x = outputs.double().tolist()
    for b in range(2):
        for g in range(3):
            want = mean(cosine(x[b][g][n], x[b][h][n]) for n in range(4) for h in range(3) if h != g)
            assert ours[b, g].item() == pytest.approx(want, abs=1e-6)


def test_head_similarity_compares_heads_of_one_token_and_no_tokens():
    one = randn(1, 1, 4, 5)  # its tokens differ
    torch.testing.assert_close(head_similarity(one * torch.tensor([1.0, 2.0, 0.1]).view(1, 3, 1, 1)), torch.ones(1, 3))
    torch.testing.assert_close(
        head_similarity(torch.cat([one, -one, one], dim=1)), torch.tensor([[0.0, -1.0, 0.0]]), rtol=0, atol=1e-6
    )


def test_token_similarity_against_a_naive_loop():
    tokens = randn(3, 6, 5) + 0.3
    ours = token_similarity(tokens)
    assert ours.shape == (3,)
    for b, x in enumerate(tokens.double().tolist()):
        want = mean(cosine(x[i], x[j]) for i in range(6) for j in range(6) if i != j)
        assert ours[b].item() == pytest.approx(want, abs=1e-6)


def test_token_similarity_of_planted_tokens():
    one = randn(1, 1, 8)
    lengths = torch.tensor([1.0, 3.0, 0.1, 7.0]).view(1, 4, 1)
    assert token_similarity(one * lengths).item() == pytest.approx(1.0, abs=1e-6)
    # The corners of a simplex are as unlike each other as N vectors can be: all at -1 / (N - 1).
    corners = torch.eye(5) - 1 / 5
    assert token_similarity(corners[None]).item() == pytest.approx(-1 / 4, abs=1e-6)
    # Of a common part of variance s and one of each token of variance 1: s / (s + 1).
    tokens = 2 * randn(50, 1, 400) + randn(50, 20, 400, seed=1)
    assert token_similarity(tokens).mean().item() == pytest.approx(4 / 5, abs=0.01)


def test_depth_similarity_against_a_naive_loop():
    before, after = randn(2, 4, 5), randn(2, 4, 5, seed=1) + 0.3
    ours = depth_similarity(before, after)
    assert ours.shape == (2,)
    for b in range(2):
        want = mean(cosine(before[b, n].tolist(), after[b, n].tolist()) for n in range(4))
        assert ours[b].item() == pytest.approx(want, abs=1e-6)


def test_depth_similarity_compares_each_token_with_itself():
    x = randn(2, 4, 5)
    torch.testing.assert_close(depth_similarity(x, 3 * x), torch.ones(2))
    torch.testing.assert_close(depth_similarity(x, -x), -torch.ones(2))
    assert (depth_similarity(x, x.roll(1, dims=1)) < 0.9).all()


# --- motion ----------------------------------------------------------------------------------------------------------


def test_translation_share_against_a_naive_loop():
    before, after = randn(2, 4, 3), randn(2, 4, 3, seed=1) + 0.5
    ours = translation_share(before, after)
    assert ours.shape == (2,)
    for b in range(2):
        moved = (after[b] - before[b]).double().tolist()
        centre = [mean(m[c] for m in moved) for c in range(3)]
        want = 4 * sum(c * c for c in centre) / sum(c * c for m in moved for c in m)
        assert ours[b].item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("num", [1, 4, 25])
def test_translation_share_of_planted_motions(num):
    x = randn(400, num, 16)
    torch.testing.assert_close(translation_share(x, x + randn(400, 1, 16, seed=1)), torch.ones(400), rtol=1e-4, atol=0)
    # Of independent motions exactly 1 / N on average, whatever their size; 400 images of 16 channels: 3 % and less
    alone = translation_share(x, x + 5 * randn(400, num, 16, seed=2))
    assert alone.mean().item() == pytest.approx(1 / num, rel=0.06)
    # Signal and noise of variances s and 1: (N s + 1) / (N s + N)
    both = translation_share(x, x + 2 * randn(400, 1, 16, seed=1) + randn(400, num, 16, seed=2))
    assert both.mean().item() == pytest.approx((4 * num + 1) / (5 * num), rel=0.03)


def test_opposite_motions_are_no_translation_and_no_motion_is_nothing():
    x, step = randn(1, 2, 3), randn(1, 1, 3, seed=1)
    assert translation_share(x, x + torch.cat([step, -step], dim=1)).item() == pytest.approx(0, abs=1e-6)
    assert translation_share(x, x).isnan().all()


# --- projection ------------------------------------------------------------------------------------------------------


def plane(num, width, seed=0):
    """Points (2 num, 2) of unequal spread, the same in ``width`` dimensions away from the origin, and the basis."""
    points = randn(2 * num, 2, seed=seed) * torch.tensor([3.0, 1.0])
    basis, _ = torch.linalg.qr(randn(width, 2, seed=seed + 1))
    return points, points @ basis.T + 10 * randn(width, seed=seed + 2), basis


def test_both_sets_are_shown_in_the_same_basis():
    points, tokens, _ = plane(6, 5)
    before, after = common_projection(tokens[:6], tokens[6:])
    assert before.shape == after.shape == (6, 2)
    shown = torch.cat([before, after])
    # Distances within both sets and between them
    torch.testing.assert_close(torch.cdist(shown, shown), torch.cdist(points, points), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shown.mean(dim=0), torch.zeros(2), rtol=0, atol=1e-5)
    assert (before.mean(dim=0) - after.mean(dim=0)).norm() > 0.1  # neither set is centred on its own


@pytest.mark.parametrize("num_components", [1, 2, 3])
def test_projection_keeps_the_leading_variances(num_components):
    tokens = randn(20, 6) * torch.tensor([1.0, 5.0, 2.0, 0.5, 3.0, 0.1])
    shown = torch.cat(common_projection(tokens[:10], tokens[10:], num_components)).double()
    variances = torch.linalg.eigvalsh(tokens.double().T.cov()).flip(0)[:num_components]
    torch.testing.assert_close(shown.T.cov().view(num_components, -1), variances.diag(), rtol=1e-5, atol=1e-5)


def test_the_sign_of_a_component_does_not_depend_on_the_data():
    axes = torch.tensor([[0.6, -0.8, 0.0], [0.8, 0.6, 0.0]])
    amounts = torch.tensor([[3.0, 1.0], [-3.0, 1.0], [3.0, -1.0], [-3.0, -1.0]])  # not correlated
    wanted = amounts * torch.tensor([-1.0, 1.0])  # the largest loading of the first axis, -0.8, becomes positive
    for sign in (1, -1):
        shown = torch.cat(common_projection(sign * amounts[:2] @ axes, sign * amounts[2:] @ axes))
        torch.testing.assert_close(shown, sign * wanted, rtol=1e-5, atol=1e-5)
    _, tokens, _ = plane(6, 5)
    there, back = (
        torch.cat(common_projection(tokens[:6], tokens[6:])),
        torch.cat(common_projection(tokens[6:], tokens[:6])),
    )
    torch.testing.assert_close(there[:6], back[6:])


def test_principal_colors_against_numpy():
    tokens = randn(4, 50, 6) * torch.tensor([1.0, 5.0, 2.0, 0.5, 3.0, 0.1]) + 7
    ours = principal_colors(tokens)
    assert ours.shape == (4, 50, 3)
    x = tokens.flatten(0, 1).double().numpy()
    _, _, axes = np.linalg.svd(x - x.mean(0), full_matrices=False)
    for component in range(3):  # of spreads 5, 3 and 2: along features 1, 4 and 2
        axis = axes[component] * np.sign(axes[component][(1, 4, 2)[component]])
        value = (x - x.mean(0)) @ axis
        low, high = np.quantile(value, [0.02, 0.98])
        want = np.clip((value - low) / (high - low), 0, 1)
        np.testing.assert_allclose(ours[..., component].flatten().numpy(), want, atol=1e-6)
        assert [(want == 0).sum(), (want == 1).sum()] == [4, 4]


def test_pictures_of_what_is_not_finite_take_it_for_zero():
    broken, zero = randn(12, 5), randn(12, 5)
    broken[3, 2], zero[3, 2] = math.nan, 0
    broken[7, 0], zero[7, 0] = math.inf, 0
    for ours, want in zip(
        common_projection(broken[:6], broken[6:]), common_projection(zero[:6], zero[6:]), strict=True
    ):
        torch.testing.assert_close(ours, want)
    torch.testing.assert_close(principal_colors(broken[None]), principal_colors(zero[None]))


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_single_vector_has_no_others():
    assert mean_cosine_to_others(randn(1, 4), 0).isnan().tolist() == [True]
    single_head = head_similarity(randn(2, 1, 4, 5))
    assert single_head.shape == (2, 1)
    assert single_head.isnan().all()
    assert token_similarity(randn(2, 1, 5)).isnan().tolist() == [True, True]


def test_no_images():
    tokens = torch.zeros(0, 6, 5)
    assert mean_cosine_to_others(tokens, 1).shape == (0, 6)
    assert head_similarity(torch.zeros(0, 3, 6, 5)).shape == (0, 3)
    for value in (token_similarity(tokens), depth_similarity(tokens, tokens), translation_share(tokens, tokens)):
        assert value.shape == (0,)
