"""Signals planted into views: what goes in is known, so what must come out is known in closed form."""

import math

import pytest
import torch
import torch.nn.functional as F

from harmonize.diagnostics.measure import measure
from harmonize.types import AttentionView
from tests.diagnostics.probes import KINDS, Player, clean_batch, maps_view, randn, stream

ROWS, COLUMNS, PATCHES, WIDTH = 4, 6, 24, 24  # of Player, whose patches are 4 px


def find(play, names, num_images=6, **options):
    """Findings on one batch, of an encoder of two blocks (unless told otherwise) that plays views."""
    player = Player(play, **options)
    batch = clean_batch(player.spec, num_images)
    chosen = {name: KINDS[name](player.spec) for name in names}
    return measure(player, [batch], chosen, range(num_images))


def attention(maps, num_prefix=0, num_images=6, names=None):
    """Curves of a network whose blocks attend as ``maps`` say: per block (H, S, S), equal for all images."""

    def play(images, call):
        for layer, of_block in enumerate(maps, start=1):
            yield maps_view(layer, of_block.expand(len(images), *of_block.shape))

    names = names or ("attention_distance", "mutual_information", "attention_entropy", "head_diversity")
    options = {"depth": len(maps), "num_heads": len(maps[0]), "num_prefix": num_prefix}
    return find(play, names, num_images, **options).curves


IDENTITY, UNIFORM = torch.eye(PATCHES), torch.full((PATCHES, PATCHES), 1 / PATCHES)
COLLAPSED = F.one_hot(torch.full((PATCHES,), 7), PATCHES).float()  # all attend to patch 7
RIGHT = torch.eye(PATCHES).view(ROWS, COLUMNS, ROWS, COLUMNS).roll(1, dims=3).reshape(PATCHES, PATCHES)


def test_attention_that_is_known():
    curves = attention([torch.stack([IDENTITY, UNIFORM]), torch.stack([COLLAPSED, RIGHT])])
    right = 4 * (5 * 1 + 1 * 5) / 6  # five of six columns go one to the right, the last returns to the first
    to_seven = sum(4 * math.hypot(i // 6 - 1, i % 6 - 1) for i in range(PATCHES)) / PATCHES
    uniform = curves["attention_distance"].uniform[0]
    for name, heads in {
        "attention_distance": [[0, uniform], [to_seven, right]],
        "attention_distance_normalized": [[0, 1], [to_seven / uniform, right / uniform]],
        "attention_entropy": [[0, 1], [0, 0]],
    }.items():
        for row, want in zip(curves[name].heads, heads, strict=True):
            assert row == pytest.approx(want, abs=1e-5), name
    assert curves["nmi"].heads[0] == pytest.approx([1, 0], abs=1e-5)
    assert curves["nmi"].heads[1][1] == pytest.approx(1, abs=1e-5)
    assert "prefix_attention" not in curves
    assert curves["head_map_similarity"].value[0] == pytest.approx(1 / math.sqrt(PATCHES), rel=1e-5)
    assert curves["head_map_similarity"].value[1] == pytest.approx(1 / PATCHES, rel=1e-5)  # they meet at patch 7 alone
    one_to_uniform = math.log(PATCHES)  # KL of a one-hot from a uniform row
    assert curves["head_divergence"].heads[0][0] == pytest.approx(one_to_uniform, rel=1e-5)


def test_attention_collapse_is_not_uniform_attention():
    soft = (0.99 * COLLAPSED + 0.01 * UNIFORM).expand(2, -1, -1)
    curves = attention([soft, UNIFORM.expand(2, -1, -1)])
    assert curves["nmi"].value == pytest.approx([0, 0], abs=2e-3)
    assert curves["attention_entropy"].value[0] < 0.05
    assert curves["attention_entropy"].value[1] == pytest.approx(1, abs=1e-6)


def test_prefix_tokens_take_their_share_and_no_more():
    """The patches' attention is renormalised; what prefix tokens themselves attend to plays no part."""
    share, prefix = 0.3, 3
    full = torch.zeros(prefix + PATCHES, prefix + PATCHES)
    full[:prefix, :] = 1 / (prefix + PATCHES)
    full[prefix:, :prefix] = share / prefix
    full[prefix:, prefix:] = (1 - share) * RIGHT
    curves = attention([full.expand(2, -1, -1)] * 2, num_prefix=prefix)
    bare = attention([RIGHT.expand(2, -1, -1)] * 2)
    assert curves["prefix_attention"].value == pytest.approx([share, share], abs=1e-6)
    for name in ("attention_distance", "nmi", "attention_entropy", "head_map_similarity", "head_divergence"):
        assert curves[name].value == pytest.approx(bare[name].value, abs=1e-5), name
    assert curves["attention_distance"].value == pytest.approx([20 / 3, 20 / 3], rel=1e-5)


def test_a_prefix_token_that_takes_nearly_all():
    """Trained networks have such sinks; the exponential of a difference of 150 is beyond fp32."""
    logits = torch.cat([torch.full((PATCHES + 1, 1), 150.0), torch.cat([torch.zeros(1, PATCHES), 60 * RIGHT])], dim=1)

    def play(images, call):
        key = torch.eye(PATCHES + 1).expand(len(images), 2, -1, -1)
        for layer in (1, 2):
            yield AttentionView(layer, logits.expand_as(key), key, key, None, 1.0)

    curves = find(play, ["attention_distance", "attention_entropy", "mutual_information"], num_prefix=1).curves
    assert curves["prefix_attention"].value == pytest.approx([1, 1])
    assert curves["attention_distance"].value == pytest.approx([20 / 3, 20 / 3], rel=1e-5)
    assert curves["attention_entropy"].value == pytest.approx([0, 0], abs=1e-5)
    assert curves["nmi"].value == pytest.approx([1, 1], abs=1e-5)


def test_images_are_told_apart():
    """Half of the images look at themselves, half to the right: mean and standard error are known."""

    def play(images, call):
        maps = torch.stack([IDENTITY, RIGHT])[torch.arange(len(images)) % 2]
        for layer in (1, 2):
            yield maps_view(layer, maps[:, None].expand(-1, 2, -1, -1))

    curve = find(play, ["attention_distance"], 8).curves["attention_distance"]
    assert curve.value == pytest.approx([10 / 3, 10 / 3], rel=1e-5)
    error = (20 / 3 / 2) * math.sqrt(8 / 7) / math.sqrt(8)
    assert curve.error == pytest.approx([error, error], rel=1e-5)
    assert curve.head_errors == [pytest.approx([error, error], rel=1e-5)] * 2


def test_outputs_of_heads():
    def play(images, call):
        first = randn(len(images), PATCHES, 8)
        orthogonal = torch.cat([-first[..., 4:], first[..., :4]], dim=-1)
        for layer, second in enumerate((first, -3 * first, orthogonal), start=1):
            output = torch.stack([first, second], dim=1)
            yield maps_view(layer, UNIFORM.expand(len(images), 2, -1, -1), output)

    curve = find(play, ["head_similarity"], depth=3).curves["head_similarity"]
    assert curve.value == pytest.approx([1, -1, 0], abs=1e-5)


# --- tokens ----------------------------------------------------------------------------------------------------------


def tokens_of(images, seed=0, grid=(ROWS, COLUMNS), width=WIDTH):
    return randn(len(images), grid[0] * grid[1], width, seed=seed)


def test_translation_of_all_tokens_in_unison():
    def play(images, call):
        x = tokens_of(images)
        each_image = randn(len(images), 1, WIDTH, seed=1)
        halves = torch.ones(1, PATCHES, 1)
        halves[:, ::2] = -1
        yield from stream([x, x + each_image, x, x + halves * each_image, x, x + tokens_of(images, 2), x])

    share = find(play, ["token_translation"], 32, depth=3).curves["translation_share"]
    assert share.value[:2] == pytest.approx([1, 0], abs=1e-5)
    assert share.value[2] == pytest.approx(1 / PATCHES, abs=4 * share.error[2])  # each on its own
    assert 0 < share.error[2] < 0.01


def test_similarity_of_tokens():
    def play(images, call):
        x = tokens_of(images)
        alike = randn(len(images), 1, WIDTH, seed=1) * (1 + torch.arange(PATCHES).view(1, -1, 1))
        axes = torch.eye(PATCHES).expand(len(images), -1, -1)
        turned = torch.cat([-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]], dim=-1)  # orthogonal to x
        yield from stream([alike, x, 2 * x, turned, axes])

    curves = find(play, ["token_similarity", "depth_similarity"]).curves
    assert curves["token_similarity"].value[0] == pytest.approx(1, abs=1e-5)
    assert curves["token_similarity"].value[2] == pytest.approx(0, abs=1e-5)
    assert curves["depth_similarity_attention"].value[1] == pytest.approx(0, abs=1e-5)
    assert curves["depth_similarity_attention"].layer == curves["depth_similarity_block"].layer == [1, 2]


def test_similarity_across_depth_is_to_the_input_of_the_block():
    def play(images, call):
        x = tokens_of(images)
        turned = torch.cat([-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]], dim=-1)
        yield from stream([x, turned, 3 * x, x + turned, -x])

    curves = find(play, ["depth_similarity"]).curves
    assert curves["depth_similarity_attention"].value == pytest.approx([0, math.sqrt(0.5)], abs=1e-5)
    assert curves["depth_similarity_block"].value == pytest.approx([1, -1], abs=1e-5)


def planted_rank(num, width, rank, seed=0):
    """(num, width) with ``rank`` equal singular values around the mean of its rows, and a mean that is not zero."""
    basis = torch.linalg.qr(torch.cat([torch.ones(num, 1), randn(num, rank, seed=seed)], dim=1))[0][:, 1:]
    directions = torch.linalg.qr(randn(width, rank, seed=seed + 1))[0]
    return basis @ directions.T + 5


@pytest.mark.parametrize("num_prefix", [0, 1, 3])
def test_effective_rank_of_tokens(num_prefix):
    def play(images, call):
        prefix = 100 * randn(len(images), num_prefix, WIDTH)  # plays no part
        places = [
            torch.cat([prefix, planted_rank(PATCHES, WIDTH, k).expand(len(images), -1, -1)], dim=1)
            for k in (1, 7, 2, 7, 11)
        ]
        yield from stream(places)

    found = find(play, ["token_spectrum"], num_prefix=num_prefix)
    assert found.curves["token_effective_rank"].value == pytest.approx([1, 2, 11], rel=1e-3)
    relative = torch.tensor(found.surfaces["token_spectrum"].value)
    assert relative[2, :2] == pytest.approx([0, 0], abs=1e-4)
    assert (relative[2, 2:11] > 10).all()  # there was nothing after block 1
    assert (relative[1] == 0).all()


def test_effective_rank_across_images():
    num = 20

    def play(images, call):
        places = [
            planted_rank(num, WIDTH, k)[: len(images), None] + randn(1, PATCHES, WIDTH, seed=9)
            for k in (1, 9, 3, 9, 13)
        ]
        yield from stream(places)

    found = find(play, ["image_spectrum"], num)
    assert found.curves["image_effective_rank"].value == pytest.approx([1, 3, 13], rel=1e-3)
    relative = torch.tensor(found.surfaces["image_spectrum"].value)
    assert relative[2, :3] == pytest.approx([0, 0, 0], abs=1e-4)
    assert len(found.surfaces["image_spectrum"].columns) == num - 1


def test_decay_of_the_spectrum():
    num, width = 160, 128

    def play(images, call):
        places = []
        for alpha in (0.5, 9, 1.0, 9, 1.5):
            basis = torch.linalg.qr(torch.cat([torch.ones(num, 1), randn(num, width)], dim=1))[0][:, 1:]
            x = basis * torch.arange(1.0, width + 1) ** (-alpha / 2)
            places.append(x[:, None].expand(-1, PATCHES, -1))
        yield from stream(places)

    curve = find(play, ["image_spectrum"], num, width=width).curves["image_alpha"]
    assert curve.value == pytest.approx([0.5, 1.0, 1.5], rel=1e-3)


def test_layers_that_are_equal_and_layers_that_are_not():
    num = 64

    def play(images, call):
        x = randn(num, WIDTH)[:, None].expand(-1, PATCHES, -1)
        turn = torch.linalg.qr(randn(WIDTH, WIDTH, seed=3))[0]
        other = randn(num, WIDTH, seed=4)[:, None].expand(-1, PATCHES, -1)
        yield from stream([x, other, 3 * x @ turn + 1, x, other])

    found = find(play, ["cka"], num)
    assert found.curves["cka"].layer == [1, 2]
    assert found.curves["cka"].value[0] == pytest.approx(1, abs=1e-5)  # a turn, a factor and a shift are nothing
    assert found.curves["cka"].value[1] == pytest.approx(0, abs=0.1)  # the biased estimator would say 0.3
    surface = torch.tensor(found.surfaces["cka"].value)
    assert torch.equal(surface, surface.T)
    assert surface.diagonal().tolist() == pytest.approx([1, 1, 1])
    assert surface[0, 1] == pytest.approx(1, abs=1e-5)
    assert surface[0, 2] == pytest.approx(found.curves["cka"].value[1], abs=1e-5)


def test_alignment_and_uniformity():
    def play(images, call):
        second = call % 2
        spread = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])[: len(images)]
        same = torch.ones(len(images), WIDTH)
        sides = torch.where(torch.arange(len(images)) % 2 == 0, 1.0, -1.0)[:, None] * same
        places = [same, spread, spread * (1 + second), sides, sides * (-1 if second else 1)]
        yield from stream([x[:, None].expand(-1, PATCHES, -1) for x in places])

    curves = find(play, ["alignment"], 2 * WIDTH).curves
    assert curves["alignment"].value == pytest.approx([0, 0, 4], abs=1e-5)
    assert curves["alignment"].error == pytest.approx([0, 0, 0], abs=1e-5)
    pairs = WIDTH * (2 * WIDTH - 1)
    spread = math.log((WIDTH * math.exp(-8) + (pairs - WIDTH) * math.exp(-4)) / pairs)
    halves = math.log((WIDTH * (WIDTH - 1) + WIDTH**2 * math.exp(-8)) / pairs)
    assert curves["uniformity"].value == pytest.approx([0, spread, halves], abs=1e-5)


def wave(grid, u, v, amplitude):
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) / n for n in grid), indexing="ij")
    return (amplitude * torch.cos(2 * math.pi * (u * y + v * x))).float().reshape(1, -1, 1)


@pytest.mark.parametrize("num_prefix", [0, 2])
def test_a_spatial_frequency_lands_in_its_bin_and_place(num_prefix):
    """Of a wave of amplitude a on a mean m the log amplitude relative to DC is log(a / 2 m)."""
    grid, mean, amplitude = (8, 8), 2.0, 0.5
    waves = {0: (0, 0), 0.5: (1, 1), 1: (2, 2), 1.5: (3, 3), 2: (3, 0)}

    def play(images, call):
        places = [mean + wave(grid, u, v, amplitude).expand(len(images), -1, 4) for u, v in waves.values()]
        yield from stream([torch.cat([randn(len(images), num_prefix, 4), x], dim=1) for x in places])

    found = find(play, ["fourier"], grid=grid, width=4, num_prefix=num_prefix)
    peak, floor = math.log(amplitude / 2 / mean), math.log(1e-6 / (64 * mean))
    diagonal, rings = found.surfaces["fourier"], found.surfaces["fourier_radial"]
    assert diagonal.layer == rings.layer == [0, 0.5, 1, 1.5, 2]
    assert diagonal.columns == [0, 0.25, 0.5, 0.75]
    assert rings.columns == [0, 0.25, 0.5, 0.75, 1]
    for (place, (u, v)), row, ring in zip(waves.items(), diagonal.value, rings.value, strict=True):
        assert row[0] == ring[0] == 0
        for k in range(1, 4):
            planted = (u, v) == (k, k)
            assert row[k] == pytest.approx(peak, abs=1e-4) if planted else row[k] < floor + 4, (place, k)
        loudest = max(range(1, 5), key=ring.__getitem__)
        if (u, v) != (0, 0):
            assert loudest == round(math.hypot(u, v)), place  # 1.4 -> 1, 2.8 -> 3, 4.2 -> 4, 3 -> 3
    curve = found.curves["fourier"]
    assert (curve.layer, found.curves["fourier_attention"].layer) == ([0, 1, 2], [1, 2])
    assert max(curve.value) < floor + 4
    assert found.curves["fourier_attention"].value[0] < floor + 4
    assert found.curves["fourier_attention"].value[1] == pytest.approx(peak, abs=1e-4)


def test_a_constant_offset_of_channels_moves_the_official_value_alone():
    offset = 10 * randn(1, 1, WIDTH, seed=3)

    def playing(added):
        def play(images, call):
            yield from stream([tokens_of(images, k) + added for k in range(5)])

        return find(play, ["fourier"], 8, grid=(ROWS, COLUMNS)).curves

    plain, moved = playing(0.0), playing(offset)
    for name in ("fourier", "fourier_radial", "fourier_attention"):
        assert all(b < a - 1 for a, b in zip(plain[name].value, moved[name].value, strict=True)), name
    for name in ("fourier_mean_free", "fourier_radial_mean_free", "fourier_mean_free_attention"):
        assert moved[name].value == pytest.approx(plain[name].value, abs=1e-3), name


def test_every_image_in_every_number():
    """One image of another kind among equal ones moves each mean by its share."""

    def playing(odd):
        def play(images, call):
            x = tokens_of(images[:1]).expand(len(images), -1, -1).clone()
            if odd is not None:
                x[odd] = randn(PATCHES, WIDTH, seed=11) + 3
            yield from stream([x, x, x, x, x])

        return find(play, ["token_similarity"], 5).curves["token_similarity"]

    equal, odd = playing(None), [playing(i) for i in range(5)]
    assert equal.error == pytest.approx([0, 0, 0], abs=1e-7)
    assert len({round(curve.value[0], 6) for curve in odd}) == 1
    assert abs(odd[0].value[0] - equal.value[0]) > 0.1
