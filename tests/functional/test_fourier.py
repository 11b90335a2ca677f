"""Second derivations of the Fourier spectrum: a naive transform, the official cut, planted waves, closed forms."""

import cmath
import math

import pytest
import torch

from harmonize.functional.fourier import (
    EPSILON,
    dc_log_amplitude,
    diagonal,
    diagonal_frequencies,
    log_amplitude,
    radial,
    radial_frequencies,
)

GRIDS = [(4, 4), (5, 5), (3, 4), (4, 3), (2, 7), (7, 2), (1, 5), (1, 1)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_log_amplitude(tokens, grid):
    """(rows, columns) of one image (N, D): the whole plane, from the definition."""
    rows, columns = grid
    maps = tokens.double().view(rows, columns, -1)
    plane = torch.zeros(rows, columns, dtype=torch.float64)
    for u in range(rows):
        for v in range(columns):
            for channel in range(maps.shape[-1]):
                coefficient = sum(
                    maps[y, x, channel].item() * cmath.exp(-2j * math.pi * (u * y / rows + v * x / columns))
                    for y in range(rows)
                    for x in range(columns)
                )
                plane[u, v] += math.log(abs(coefficient) + 1e-6) / maps.shape[-1]
    return plane


def wave(grid, u, v, phase=0.4):
    """(1, N, 1): u periods down and v periods across."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) / n for n in grid), indexing="ij")
    return torch.cos(2 * math.pi * (u * y + v * x) + phase).reshape(1, -1, 1)


# --- log amplitude ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
def test_log_amplitude_against_a_naive_transform(grid):
    tokens = randn(2, grid[0] * grid[1], 3) + 0.5
    ours = log_amplitude(tokens, grid)
    assert ours.shape == (2, grid[0], grid[1] // 2 + 1)
    for image, spectrum in zip(tokens, ours, strict=True):
        want = naive_log_amplitude(image, grid)[:, : grid[1] // 2 + 1]
        torch.testing.assert_close(spectrum.double(), want, rtol=0, atol=2e-5)


def test_half_precision_is_transformed_in_fp32():
    tokens = randn(2, 12, 3).half()
    ours = log_amplitude(tokens, (3, 4))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, log_amplitude(tokens.double(), (3, 4)))


@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (6, 10)])
def test_constant_tokens_have_no_frequency_but_the_smallest_there_is(grid):
    num = grid[0] * grid[1]
    ours = log_amplitude(torch.ones(1, num, 2), grid)
    assert ours[0, 0, 0].item() == pytest.approx(math.log(num), abs=1e-5)
    cut = diagonal(ours, grid)
    # -19.09 for 14 x 14
    torch.testing.assert_close(
        cut[:, 1:] - cut[:, :1], torch.full_like(cut[:, 1:], math.log(1e-6 / num)), rtol=0, atol=1e-2
    )
    others = ours.flatten()[1:] - ours[0, 0, 0]
    assert others.min() >= math.log(1e-6 / num) - 1e-4
    assert others.max() <= math.log(1e-5 / num)  # rounding of the transform itself, of numbers of size num


def test_the_official_number_of_constant_tokens():
    cut = diagonal(log_amplitude(torch.ones(1, 196, 1), (14, 14)), (14, 14))[0]
    assert (cut - cut[0]).tolist() == pytest.approx([0] + 6 * [-19.09], abs=6e-3)


@pytest.mark.parametrize(
    ("offset", "delta"), [(0.0, 0.5 * math.log(2)), (1.0, 0.5 * math.log(2) - 0.5 * math.log(197))]
)
def test_white_tokens(offset, delta):
    """+0.35 without channel means, -2.29 with channel means ~ N(0, 1).

    The amplitude of N unit normals is root of N times that of a complex normal, but at DC of a real one, whose mean
    logarithm is lower by log(2) / 2. Channel means add N^2 to the variance N of DC.
    """
    tokens = randn(48, 196, 256) + offset * randn(48, 1, 256, seed=1)
    cut = diagonal(log_amplitude(tokens, (14, 14)), (14, 14)).mean(dim=0)
    # Standard errors of the mean logarithms of 12,288 amplitudes: pi / root of 24 and of 8 over 111
    torch.testing.assert_close(cut[1:] - cut[0], torch.full((6,), delta), rtol=0, atol=4 * 0.0116)
    assert cut[1:].mean().item() == pytest.approx(0.5 * (math.log(196) - 0.577216), abs=4 * 0.0058)


# --- cuts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 2, 4, 5, 7, 14])
def test_diagonal_against_the_official_procedure(side):
    tokens = randn(3, side * side, 4) + 0.5
    maps = tokens.view(3, side, side, 4).permute(0, 3, 1, 2)
    spectrum = (torch.fft.fft2(maps).abs() + 1e-6).log()
    centred = torch.roll(spectrum, (side // 2, side // 2), dims=(2, 3)).mean(dim=(0, 1))
    want = centred.diag()[side // 2 :]
    ours = diagonal(log_amplitude(tokens, (side, side)), (side, side))
    assert ours.shape == (3, len(want)) == (3, len(diagonal_frequencies((side, side))))
    torch.testing.assert_close(ours.mean(dim=0), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((ours - ours[:, :1]).mean(dim=0), want - want[0], rtol=1e-5, atol=1e-5)


def test_diagonal_frequencies():
    assert diagonal_frequencies((14, 14)) == pytest.approx([k / 7 for k in range(7)])
    assert diagonal_frequencies((5, 5)) == pytest.approx([0, 0.4, 0.8])
    assert diagonal_frequencies((4, 9)) == diagonal_frequencies((9, 4)) == pytest.approx([0, 0.5])
    assert diagonal_frequencies((1, 1)) == [0]


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (6, 9), (9, 6)])
def test_a_diagonal_wave_lands_in_its_bin(grid):
    num = grid[0] * grid[1]
    for k in range(1, len(diagonal_frequencies(grid))):
        cut = diagonal(log_amplitude(3 * wave(grid, k, k), grid), grid)[0]
        want = torch.full_like(cut, math.log(EPSILON))
        want[k] = math.log(3 * num / 2)  # a cosine is two waves of half its amplitude
        torch.testing.assert_close(cut[k], want[k], rtol=0, atol=1e-4)
        others = torch.arange(len(cut)) != k
        assert (cut[others] < math.log(1e-3)).all()  # rounding


def naive_radial(plane, grid):
    """Mean over the whole plane (rows, columns), both signs of both frequencies, by distance from DC."""
    rows, columns = grid
    side = min(grid)
    rings = [[] for _ in range(side // 2 + 1)]
    for u in range(rows):
        for v in range(columns):
            down, across = min(u, rows - u) / rows, min(v, columns - v) / columns  # periods per patch
            ring = round(side * math.hypot(down, across))
            if ring < len(rings):
                rings[ring].append(plane[u, v].item())
    return [sum(ring) / len(ring) for ring in rings]


@pytest.mark.parametrize("grid", [(4, 4), (5, 5), (6, 6), (3, 4), (4, 3), (5, 7), (6, 9), (9, 6), (1, 1)])
def test_radial_against_a_naive_loop_over_the_whole_plane(grid):
    tokens = randn(2, grid[0] * grid[1], 2) + 0.5
    ours = radial(log_amplitude(tokens, grid), grid)
    assert ours.shape == (2, len(radial_frequencies(grid)))
    for image, rings in zip(tokens, ours, strict=True):
        want = naive_radial(naive_log_amplitude(image, grid), grid)
        assert rings.tolist() == pytest.approx(want, abs=2e-5)


@pytest.mark.parametrize("grid", [(14, 14), (13, 13), (14, 16), (12, 9)])
def test_radial_against_a_naive_loop_over_random_amplitudes(grid):
    """Of the size of real networks; the second half of the plane is the mirror image of the first."""
    rows, columns = grid
    half = randn(rows, columns // 2 + 1)
    for v in (0, columns // 2) if columns % 2 == 0 else (0,):  # columns that are their own mirror image
        half[:, v] = half[:, v] + half[:, v][-torch.arange(rows) % rows]
    plane = torch.zeros(grid)
    for u in range(rows):
        for v in range(columns):
            plane[u, v] = half[u, v] if v <= columns // 2 else half[-u % rows, columns - v]
    assert radial(half[None], grid)[0].tolist() == pytest.approx(naive_radial(plane, grid), abs=1e-5)


def test_radial_frequencies():
    assert radial_frequencies((14, 14)) == pytest.approx([k / 7 for k in range(8)])
    assert radial_frequencies((5, 5)) == pytest.approx([0, 0.4, 0.8])
    assert radial_frequencies((4, 9)) == radial_frequencies((9, 4)) == pytest.approx([0, 0.5, 1])


@pytest.mark.parametrize("direction", [(0, 1), (1, 0), (0, -1), (0.6, 0.8), (0.8, -0.6)])
@pytest.mark.parametrize("side", [14, 15])
def test_a_wave_moves_its_ring_alone_whatever_its_direction(side, direction):
    u, v = (round(5 * d) for d in direction)
    background = randn(1, side * side, 1)
    before = log_amplitude(background, (side, side))
    after = log_amplitude(background + 50 * wave((side, side), u, v), (side, side))
    gain = (radial(after, (side, side)) - radial(before, (side, side)))[0]
    others = torch.arange(len(gain)) != 5
    assert gain[others].abs().max() < 1e-3
    # Two of the frequencies of the ring have all of the wave, of amplitude 25 each over a background of 1 / side.
    num = sum(round(math.hypot(a, b)) == 5 for a in range(-6, 7) for b in range(-6, 7))
    assert gain[5].item() == pytest.approx(2 * math.log(25 * side) / num, rel=0.25)


@pytest.mark.parametrize("side", [8, 14, 15])
def test_a_ring_of_waves_lands_in_its_bin(side):
    frequency = torch.fft.fftfreq(side) * side
    ring = torch.hypot(frequency[:, None], frequency[None]).round()
    random = torch.fft.fft2(randn(side, side))  # for phases that make a real image
    for k in range(side // 2 + 1):
        image = torch.fft.ifft2(100 * random / random.abs() * (ring == k)).real
        rings = radial(log_amplitude(image.reshape(1, -1, 1), (side, side)), (side, side))[0]
        assert rings[k].item() == pytest.approx(math.log(100), abs=1e-4)
        assert (rings[torch.arange(len(rings)) != k] < math.log(1e-3)).all()  # rounding


def test_a_flat_spectrum_is_flat_in_both_cuts():
    for grid in [(14, 14), (7, 7), (6, 10)]:
        flat = torch.full((1, grid[0], grid[1] // 2 + 1), -1.5)
        torch.testing.assert_close(diagonal(flat, grid), torch.full((1, len(diagonal_frequencies(grid))), -1.5))
        torch.testing.assert_close(radial(flat, grid), torch.full((1, len(radial_frequencies(grid))), -1.5))


def test_shifting_the_image_around_changes_no_amplitude():
    tokens = randn(1, 6 * 8, 3).unflatten(1, (6, 8))
    shifted = tokens.roll((2, 3), dims=(1, 2))
    torch.testing.assert_close(
        log_amplitude(shifted.flatten(1, 2), (6, 8)), log_amplitude(tokens.flatten(1, 2), (6, 8)), rtol=0, atol=1e-4
    )


# --- DC --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(14, 14), (3, 4), (5, 1)])
def test_dc_from_mean_tokens_is_the_dc_of_the_spectrum(grid):
    num = grid[0] * grid[1]
    tokens = randn(4, num, 5) + randn(4, 1, 5, seed=1)
    ours = dc_log_amplitude(tokens.mean(dim=1), num)
    torch.testing.assert_close(ours, log_amplitude(tokens, grid)[:, 0, 0], rtol=0, atol=2e-4)
    want = [
        sum(math.log(abs(sum(image[n][c] for n in range(num))) + 1e-6) for c in range(5)) / 5
        for image in tokens.double().tolist()
    ]
    assert ours.tolist() == pytest.approx(want, abs=2e-4)


def test_mean_tokens_of_zero_are_the_floor():
    assert dc_log_amplitude(torch.zeros(2, 3), 196).tolist() == pytest.approx([math.log(1e-6)] * 2)


# --- limits ----------------------------------------------------------------------------------------------------------


def test_no_images():
    spectrum = log_amplitude(torch.zeros(0, 12, 5), (3, 4))
    assert spectrum.shape == (0, 3, 3)
    assert spectrum.dtype == torch.float32
    assert diagonal(spectrum, (3, 4)).shape == (0, 2)
    assert radial(spectrum, (3, 4)).shape == (0, 2)
    assert dc_log_amplitude(torch.zeros(0, 5), 12).shape == (0,)
