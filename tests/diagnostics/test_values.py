"""Every number that is measured, against the formulas applied to what a network holds, found by another path.

The maps come from timm's own unfused attention, the tokens from hooks, the images one at a time, the formulas in fp64.
"""

import math

import pytest
import torch

from harmonize.diagnostics.measure import measure, second_view
from harmonize.functional.attention import (
    attention_distance,
    attention_entropy,
    head_divergence,
    head_map_similarity,
    mean_log_products,
    normalized_mutual_information,
    patch_attention,
    patch_distances,
    prefix_mass,
)
from harmonize.functional.cka import linear_cka
from harmonize.functional.fourier import diagonal, log_amplitude, radial
from harmonize.functional.similarity import depth_similarity, head_similarity, token_similarity, translation_share
from harmonize.functional.spectrum import alpha_req, effective_rank, singular_values
from harmonize.functional.sphere import alignment, uniformity
from tests.diagnostics.probes import all_diagnostics, clean_batch, opinionated

NUM_IMAGES, DEPTH, GRID = 20, 3, (4, 6)
NUM_PATCHES = 24


@torch.no_grad()
def held(encoder, images):
    """What the network holds: maps (M, L, H, S, S), heads' outputs, tokens after attention and blocks (0 ... L)."""
    kept = {"maps": [], "outputs": [], "branch": []}
    num_heads, handles = encoder.spec.num_heads, []
    for block in encoder.blocks:
        block.attn.fused_attn = False
        handles += [
            block.attn.attn_drop.register_forward_hook(lambda _m, _a, x: kept["maps"].append(x[0])),
            block.attn.proj.register_forward_pre_hook(
                lambda _m, args: kept["outputs"].append(args[0][0].unflatten(-1, (num_heads, -1)).transpose(0, 1))
            ),
            block.drop_path1.register_forward_hook(lambda _m, _a, x: kept["branch"].append(x[0])),
        ]
    blocks = []
    for image in images:
        embedding = encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(image[None])))
        blocks.append(torch.cat([embedding, *encoder.iter_blocks(image[None])]))
    for handle in handles:
        handle.remove()
    for block in encoder.blocks:
        block.attn.fused_attn = True
    rows = {name: torch.stack(x).unflatten(0, (len(images), DEPTH)).double() for name, x in kept.items()}
    rows["blocks"] = torch.stack(blocks).double()
    rows["middles"] = rows["blocks"][:, :-1] + rows["branch"]
    return rows


@pytest.fixture(scope="module", params=[0, 1, 3])
def both(request):
    """What was found, what the network holds, and the number of prefix tokens."""
    encoder = opinionated(request.param)
    batch = clean_batch(encoder.spec, NUM_IMAGES)
    found = measure(encoder, [batch], all_diagnostics(encoder.spec), batch.index.tolist())
    rows = held(encoder, batch.image)
    rows["second"] = held(encoder, second_view(batch.image))["blocks"]
    return found, rows, request.param


def each(formula, *stacks):
    """A formula for (B, ...) applied at every place of (M, L, ...)."""
    return torch.stack([formula(*(x[:, i] for x in stacks)) for i in range(stacks[0].shape[1])], dim=1)


def expected_rows(rows, p):
    """Curve -> rows (M, places) or (M, places, H)."""
    maps, blocks, middles = rows["maps"], rows["blocks"][:, :, p:], rows["middles"][:, :, p:]
    patches = patch_attention(maps, p)
    distances = patch_distances(GRID, 4).double()
    products = mean_log_products(patches, patches.log())  # the official epsilon moves sharp attention by 1e-5
    entropy = attention_entropy(products)
    out = {
        "attention_distance": attention_distance(patches, distances),
        "attention_distance_normalized": attention_distance(patches, distances) / distances.mean(),
        "nmi": normalized_mutual_information(patches, entropy),
        "attention_entropy": entropy / math.log(NUM_PATCHES),
        "head_divergence": head_divergence(products),
        "head_map_similarity": head_map_similarity(patches),
        "head_similarity": each(lambda x: head_similarity(x[:, :, p:]), rows["outputs"]),
        "depth_similarity_block": each(depth_similarity, blocks[:, :-1], blocks[:, 1:]),
        "depth_similarity_attention": each(depth_similarity, blocks[:, :-1], middles),
        "token_similarity": each(token_similarity, blocks),
        "translation_share": each(translation_share, blocks[:, :-1], middles),
        "token_effective_rank": each(lambda x: effective_rank(singular_values(x)[:, :-1]), blocks),
        "alignment": each(alignment, blocks.mean(2), rows["second"][:, :, p:].mean(2)),
    }
    if p:
        out["prefix_attention"] = prefix_mass(maps, p)
    for name, relative in spectra(rows, p).items():
        out[name] = relative[:, ::2, -1]
        out[f"{name}_attention"] = relative[:, 1::2, -1]
    return out


def spectra(rows, p):
    """Surface -> (M, 2 L + 1, F)."""
    places = torch.zeros(NUM_IMAGES, 2 * DEPTH + 1, *rows["blocks"].shape[2:], dtype=torch.float64)
    places[:, ::2], places[:, 1::2] = rows["blocks"], rows["middles"]
    places = places[:, :, p:]
    free = places - places.mean(dim=(0, 2), keepdim=True)  # of each channel, over images and patches
    out = {}
    for name, cut in (("fourier", diagonal), ("fourier_radial", radial)):
        value = each(lambda x, cut=cut: cut(log_amplitude(x, GRID), GRID).double(), places)
        dc = each(lambda x: log_amplitude(x, GRID)[:, 0, 0].double(), free)
        out[name] = value - value[..., :1]
        out[f"{name}_mean_free"] = value - dc[..., None]
        out[f"{name}_mean_free"][..., 0] = 0
    return out


def close(actual, expected, name):
    expected = expected if isinstance(expected, torch.Tensor) else torch.tensor(expected, dtype=torch.float64)
    actual = torch.tensor(actual, dtype=torch.float64)
    atol = 2e-5 * max(1e-2, expected.abs().max().item())
    torch.testing.assert_close(actual, expected.double(), rtol=2e-5, atol=atol, msg=lambda m: f"{name}: {m}")


def naive_error(rows):
    squares = ((rows - rows.mean(0)) ** 2).sum(0)
    return (squares / (len(rows) - 1) / len(rows)).sqrt()


def test_means_over_images(both):
    found, rows, p = both
    expected = expected_rows(rows, p)
    for name, want in expected.items():
        curve = found.curves[name]
        first = 0 if want.shape[1] == DEPTH + 1 else 1
        assert curve.layer == list(range(first, DEPTH + 1)), name
        alone = want if want.dim() == 2 else want.mean(2)
        close(curve.value, alone.mean(0), name)
        close(curve.error, naive_error(alone), f"error of {name}")
        assert (curve.heads is None) == (want.dim() == 2), name
        if curve.heads is not None:
            close(curve.heads, want.mean(0), f"heads of {name}")
            close(curve.head_errors, naive_error(want), f"head errors of {name}")
            close(curve.value, torch.tensor(curve.heads).mean(1), f"mean of the heads of {name}")
    assert set(found.curves) - set(expected) == {"uniformity", "image_effective_rank", "image_alpha", "cka"}
    assert found.num_images == NUM_IMAGES


def leave_out(statistic, num=NUM_IMAGES, groups=16):
    """Value and error of the delete-a-group jackknife: image i is in group i modulo 16."""
    parts = torch.stack([statistic([i for i in range(num) if i % groups != g]) for g in range(groups)])
    variance = (groups - 1) / groups * ((parts - parts.mean(0)) ** 2).sum(0)
    return statistic(list(range(num))), variance.sqrt()


def test_what_is_no_mean_over_images(both):
    found, rows, p = both
    features = rows["blocks"][:, :, p:].mean(2).transpose(0, 1)  # (L + 1, M, D)
    for name, statistic in {
        "uniformity": lambda i: uniformity(features[:, i]),
        "image_effective_rank": lambda i: effective_rank(singular_values(features[:, i])[:, : len(i) - 1]),
        "image_alpha": lambda i: alpha_req(singular_values(features[:, i])),
    }.items():
        value, error = leave_out(statistic)
        assert value.isfinite().all()
        close(found.curves[name].value, value, name)
        close(found.curves[name].error, error, f"error of {name}")
        assert found.curves[name].layer == [0, 1, 2, 3]
    value, error = leave_out(lambda i: linear_cka(features[:, i]))
    close(found.surfaces["cka"].value, value, "cka")
    close(found.surfaces["cka"].error, error, "error of cka")
    assert found.surfaces["cka"].layer == found.surfaces["cka"].columns == [0, 1, 2, 3]
    assert found.curves["cka"].layer == [1, 2, 3]
    close(found.curves["cka"].value, [value[i - 1, i] for i in (1, 2, 3)], "cka of neighbours")
    close(found.curves["cka"].error, [error[i - 1, i] for i in (1, 2, 3)], "error of cka of neighbours")


def test_surfaces(both):
    found, rows, p = both
    assert set(found.surfaces) == {
        *("cka", "token_spectrum", "image_spectrum"),
        *("fourier", "fourier_mean_free", "fourier_radial", "fourier_radial_mean_free"),
    }
    for name, want in spectra(rows, p).items():
        surface = found.surfaces[name]
        close(surface.value, want.mean(0), name)
        close(surface.error, naive_error(want), f"error of {name}")
        assert surface.layer == [0, 0.5, 1, 1.5, 2, 2.5, 3]
        assert surface.columns == ([0, 0.5] if "radial" not in name else [0, 0.5, 1])
    blocks = rows["blocks"][:, :, p:]
    logs = torch.linalg.svdvals(blocks - blocks.mean(2, keepdim=True))[..., : NUM_PATCHES - 1].log()
    relative = logs - logs[:, 1:2]
    surface = found.surfaces["token_spectrum"]
    close(surface.value, relative.mean(0), "token_spectrum")
    close(surface.error, naive_error(relative), "error of token_spectrum")
    assert surface.columns == list(range(1, NUM_PATCHES))
    means = blocks.mean(2).transpose(0, 1)
    logs = torch.linalg.svdvals(means - means.mean(1, keepdim=True))[:, : NUM_IMAGES - 1].log()
    close(found.surfaces["image_spectrum"].value, logs - logs[1], "image_spectrum")
    assert found.surfaces["image_spectrum"].columns == list(range(1, NUM_IMAGES))


def test_attention_was_far_from_uniform(both):
    """Else much of the above would hold for any network."""
    found, _, _ = both
    for name, least in {"nmi": 0.05, "attention_distance_normalized": 0.005, "attention_entropy": 0.05}.items():
        curve = found.curves[name]
        heads, uniform = torch.tensor(curve.heads), torch.tensor(curve.uniform)
        assert ((heads - uniform[:, None]).abs().amax(dim=1) > least).all(), name


@pytest.mark.parametrize("num_prefix", [0, 1, 3])
def test_uniform_attention_gives_the_uniform_values(num_prefix):
    encoder = opinionated(num_prefix)
    with torch.no_grad():
        for block in encoder.blocks:
            block.attn.qkv.weight[: 2 * 24].zero_()  # queries and keys; values stay
            block.attn.qkv.bias[: 2 * 24].zero_()
    batch = clean_batch(encoder.spec, 5)
    found = measure(encoder, [batch], all_diagnostics(encoder.spec), range(5))
    curves = {name: curve for name, curve in found.curves.items() if curve.uniform is not None}
    assert set(curves) == {
        *("attention_distance", "attention_distance_normalized", "nmi", "attention_entropy"),
        *("head_divergence", "head_map_similarity", *(["prefix_attention"] if num_prefix else [])),
    }
    by_hand = sum(
        math.hypot(4 * (a // 6 - b // 6), 4 * (a % 6 - b % 6)) for a in range(NUM_PATCHES) for b in range(NUM_PATCHES)
    )
    assert curves["attention_distance"].uniform == pytest.approx(DEPTH * [by_hand / NUM_PATCHES**2])
    assert curves["attention_distance_normalized"].uniform == pytest.approx(DEPTH * [1.0])
    if num_prefix:
        assert curves["prefix_attention"].uniform == pytest.approx(DEPTH * [num_prefix / (num_prefix + NUM_PATCHES)])
    for name, curve in curves.items():
        assert curve.value == pytest.approx(curve.uniform, rel=1e-5, abs=2e-6), name
        assert curve.error == pytest.approx(DEPTH * [0.0], abs=1e-6), name


def test_second_view_is_mirrored_and_enlarged_by_a_quarter():
    """On a ramp: the slope turns round and falls to 0.8, the centre stays."""
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(60.0), indexing="ij")
    ramps = torch.stack([x, y, torch.ones_like(x)])[None]
    (turned,) = second_view(ramps)
    inside = slice(2, -2)  # bilinear interpolation clamps at the border
    torch.testing.assert_close(turned[0][:, inside], (29.5 - 0.8 * (x - 29.5))[:, inside])
    torch.testing.assert_close(turned[1][inside], (19.5 + 0.8 * (y - 19.5))[inside])
    torch.testing.assert_close(turned[2], torch.ones(40, 60))
    assert second_view(ramps[:0]).shape == (0, 3, 40, 60)
