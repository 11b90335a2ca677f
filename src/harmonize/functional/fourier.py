"""The Fourier spectrum of token maps: which spatial frequencies a representation is made of.

Frequencies are in units of pi per patch: 1 is the highest a grid can hold (Nyquist), 0 the mean (DC).
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6
"""What the official code adds to amplitudes before the logarithm."""


def log_amplitude(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Log amplitude of the (unnormalised) two-dimensional Fourier transform of patch tokens, mean over channels.

    Args:
        tokens: (B, N, D).
        grid: (rows, columns).

    Returns:
        (B, rows, columns // 2 + 1): the non-redundant half; [:, 0, 0] is DC.

    Source: how-do-vits-work ``fourier_analysis.ipynb``, cl-vs-mim ``representation_analysis.ipynb``.

    >>> round(log_amplitude(torch.ones(1, 4, 1), (2, 2))[0, 0, 0].item(), 4)  # log 4
    1.3863
    """
    if not len(tokens):  # which MKL's transform refuses
        return tokens.new_zeros(0, grid[0], grid[1] // 2 + 1, dtype=torch.float32)
    maps = tokens.float().unflatten(1, grid)
    spectrum = torch.fft.rfft2(maps, dim=(1, 2))
    amplitude = spectrum.real.square().add_(spectrum.imag.square()).sqrt_()  # twice as fast as the modulus of complex
    return amplitude.add_(EPSILON).log_().mean(dim=-1)


def dc_log_amplitude(mean_tokens: Tensor, num_patches: int) -> Tensor:
    """Log amplitude of the DC coefficient, mean over channels, from the mean tokens alone.

    With the channels' mean over a data set subtracted from ``mean_tokens`` this is the DC that carries information
    about the image: a constant offset of a channel moves the official value (which is relative to DC) and no image.

    Args:
        mean_tokens: (B, D), mean over patches.
        num_patches: N.

    Returns:
        (B,).
    """
    return (mean_tokens.abs() * num_patches + EPSILON).log().mean(dim=-1)


def diagonal_frequencies(grid: tuple[int, int]) -> list[float]:
    """Frequencies of :func:`diagonal` in units of pi, of the coarser side: 0, 2 / n, 4 / n ... below 1.

    >>> [round(f, 3) for f in diagonal_frequencies((14, 14))]
    [0.0, 0.143, 0.286, 0.429, 0.571, 0.714, 0.857]
    """
    side = min(grid)
    return [2 * k / side for k in range((side + 1) // 2)]


def diagonal(spectrum: Tensor, grid: tuple[int, int]) -> Tensor:
    """The paper's cut through a spectrum: from DC along the diagonal, the highest frequency of even grids excluded.

    Args:
        spectrum: (B, rows, columns // 2 + 1), see :func:`log_amplitude`.
        grid: (rows, columns).

    Returns:
        (B, F), at :func:`diagonal_frequencies`.

    Source: cl-vs-mim ``representation_analysis.ipynb``. For 14 x 14 patches the last entry is 0.857 pi, not pi.
    """
    index = torch.arange((min(grid) + 1) // 2, device=spectrum.device)
    return spectrum[:, index, index]


def radial_frequencies(grid: tuple[int, int]) -> list[float]:
    """Frequencies of :func:`radial` in units of pi: one ring per step of the coarser side, up to 1.

    >>> radial_frequencies((4, 4))
    [0.0, 0.5, 1.0]
    """
    side = min(grid)
    return [2 * k / side for k in range(side // 2 + 1)]


def radial(spectrum: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean of a spectrum over rings of equal frequency, whatever its direction.

    Args:
        spectrum: (B, rows, columns // 2 + 1), see :func:`log_amplitude`.
        grid: (rows, columns).

    Returns:
        (B, F), at :func:`radial_frequencies`; corners beyond a frequency of 1 take no part.
    """
    rows, columns = grid
    side = min(grid)
    y = torch.fft.fftfreq(rows, dtype=torch.float64).abs() * side
    x = torch.arange(columns // 2 + 1, dtype=torch.float64) / columns * side
    ring = (y[:, None].square() + x[None].square()).sqrt().round().long()
    # Of a column and its mirror image only one is stored, except for the first and (of an even number) the last.
    weight = torch.full((columns // 2 + 1,), 2.0)
    weight[0] = 1.0
    if columns % 2 == 0:
        weight[-1] = 1.0
    one_hot = (ring.flatten()[:, None] == torch.arange(side // 2 + 1)).float() * weight.repeat(rows)[:, None]
    return spectrum.flatten(1) @ (one_hot / one_hot.sum(dim=0)).to(spectrum)


__all__ = [
    "EPSILON",
    "dc_log_amplitude",
    "diagonal",
    "diagonal_frequencies",
    "log_amplitude",
    "radial",
    "radial_frequencies",
]
