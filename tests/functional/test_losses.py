"""Second derivations of the losses: naive fp64 loops and closed forms."""

import math

import numpy as np
import pytest
import torch

from harmonize.functional import masking, schedules
from harmonize.functional.contrastive import chance_level, embedding_std, info_nce
from harmonize.functional.reconstruction import masked_l1, masked_mse, normalize_patches, patchify
from harmonize.functional.seeding import mix, uniform


def naive_info_nce(q, k, temperature, offset):
    total = 0.0
    for i in range(len(q)):
        logits = [
            sum(a * b for a, b in zip(q[i], k[j], strict=True))
            / math.sqrt(sum(a * a for a in q[i]))
            / math.sqrt(sum(b * b for b in k[j]))
            / temperature
            for j in range(len(k))
        ]
        total += math.log(sum(math.exp(value) for value in logits)) - logits[i + offset]
    return 2 * temperature * total / len(q)


@pytest.mark.parametrize(("offset", "temperature"), [(0, 0.2), (3, 1.0)])
def test_info_nce_against_a_naive_loop(offset, temperature):
    q, k = torch.randn(3, 5), torch.randn(6, 5)
    loss, _ = info_nce(q, k, temperature, offset)
    assert loss.item() == pytest.approx(naive_info_nce(q.tolist(), k.tolist(), temperature, offset), rel=1e-5)


def test_info_nce_of_equal_keys_is_the_chance_level():
    loss, _ = info_nce(torch.randn(8, 4), torch.ones(8, 4), 0.2)
    assert 2 * loss.item() == pytest.approx(chance_level(0.2, 8), rel=1e-6)


def test_info_nce_gets_better_towards_its_own_key():
    keys = torch.eye(4)
    good, accuracy = info_nce(keys, keys, 0.2)
    bad, wrong = info_nce(keys.roll(1, 0), keys, 0.2)
    assert good < bad
    assert (accuracy.item(), wrong.item()) == (1.0, 0.0)


def test_embedding_std_of_a_sphere_is_one():
    torch.manual_seed(0)
    assert embedding_std(torch.randn(4000, 32)).item() == pytest.approx(1.0, abs=0.01)


def test_masked_l1_against_a_naive_loop():
    prediction, target = torch.randn(2, 4, 12), torch.randn(2, 4, 12)
    mask = torch.tensor([[True, False, True, False], [False, True, True, False]])
    p, t = prediction.double().numpy(), target.double().numpy()
    total = sum(abs(p[b, n, c] - t[b, n, c]) for b in range(2) for n in range(4) for c in range(12) if mask[b, n])
    assert masked_l1(prediction, target, mask).item() == pytest.approx(total / (4 * 4 + 1e-5) / 3, rel=1e-6)


def test_masked_mse_and_patch_normalisation_against_numpy():
    prediction, pixels = torch.randn(2, 4, 12), torch.randn(2, 4, 12) * 3 + 1
    mask = torch.tensor([[True, False, True, False], [False, True, True, True]])
    x = pixels.double().numpy()
    target = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(normalize_patches(pixels).numpy(), target, rtol=1e-5, atol=1e-5)
    error = ((prediction.double().numpy() - target) ** 2).mean(-1)
    want = error[mask.numpy()].mean()
    assert masked_mse(prediction, normalize_patches(pixels), mask).item() == pytest.approx(want, rel=1e-5)


def test_patchify_order_is_row_column_colour():
    image = torch.arange(3 * 4 * 4).view(1, 3, 4, 4)
    assert patchify(image, 2)[0, 1].tolist() == [
        image[0, c, i, j].item() for i in (0, 1) for j in (2, 3) for c in range(3)
    ]


def test_block_masks_hide_whole_units_and_the_official_number():
    noise = uniform(mix(0, torch.arange(4000)), 49)
    mask = masking.block_mask(noise, (7, 7), 2, 0.6)
    assert mask.shape == (4000, 196)
    assert (mask.sum(dim=1) == 120).all()  # ceil(49 * .6) = 30 units of 2 x 2 patches: recipes of SimMIM at 224 px
    units = mask.view(4000, 7, 2, 7, 2)
    assert (units == units[:, :, :1, :, :1]).all()
    assert (mask.float().mean(dim=0) - 30 / 49).abs().max() < 0.04  # every unit equally often: 5 standard errors


def test_random_masks_keep_the_official_number():
    noise = uniform(mix(1, torch.arange(8)), 196)
    assert (masking.random_mask(noise, 0.75).sum(dim=1) == 147).all()
    assert ((~masking.random_mask(noise, 0.6)).sum(dim=1) == 78).all()  # int() truncates
    mask = masking.random_mask(noise, 0.75)
    keep = masking.visible(mask, 49)
    assert not mask.gather(1, keep).any()
    assert (keep.diff(dim=1) > 0).all()


def test_momentum_against_the_official_formula():
    for epoch in (0, 1.5, 100, 300):
        official = 1.0 - 0.5 * (1.0 + math.cos(math.pi * epoch / 300)) * (1.0 - 0.99)
        assert schedules.momentum(epoch / 300, 0.99) == pytest.approx(official, abs=1e-12)


@pytest.mark.parametrize(
    ("value", "fraction", "want"),
    [
        (0.3, 0.9, 0.3),
        ({"schedule": "linear", "start": 1, "end": 0}, 0.25, 0.75),
        ({"schedule": "cosine", "start": 0, "end": 1}, 1 / 3, 0.25),
        ({"schedule": "step", "start": 0, "end": 1, "at": 0.3}, 0.29, 0.0),
        ({"schedule": "step", "start": 0, "end": 1, "at": 0.3}, 0.3, 1.0),
    ],
)
def test_lambda_schedules(value, fraction, want):
    assert schedules.weight_schedule(value)(fraction) == pytest.approx(want)


@pytest.mark.parametrize(
    "value", [-0.1, 1.01, float("nan"), "0.2", True, {"schedule": "sine", "start": 0, "end": 1}, {"schedule": "linear"}]
)
def test_lambda_outside_its_range(value):
    with pytest.raises(ValueError, match=r"lambda"):
        schedules.weight_schedule(value)
