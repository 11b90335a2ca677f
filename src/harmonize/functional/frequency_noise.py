"""Noise in one band of spatial frequencies, for the accuracy against noise frequency."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ring_mask(height: int, width: int, frequency: float, bandwidth: float) -> Tensor:
    """The square ring of a shifted spectrum that holds frequencies within ``bandwidth`` of ``frequency``.

    Args:
        height: Rows of the spectrum.
        width: Columns of the spectrum.
        frequency: Centre of the band, in [0, pi] radians per pixel.
        bandwidth: Half its width, in radians per pixel.

    Returns:
        (height, width) bool: a centred square of half-side floor((frequency + bandwidth) side / 2 pi) pixels without
        the one of frequency - bandwidth.

    Source: how-do-vits-work ``ops/adversarial.py``, ``FreqAttack``.

    >>> ring_mask(32, 32, 0.0, 0.2).sum().item()
    4
    """

    def square(radius: float) -> Tensor:
        sides = []
        for side in (height, width):
            half = max(0, math.floor(radius * side / (2 * math.pi)))
            position = torch.arange(side) - side // 2
            sides.append((position >= -half) & (position < half))
        return sides[0][:, None] & sides[1][None, :]

    return square(frequency + bandwidth) & ~square(frequency - bandwidth)


def band_noise(noise: Tensor, frequency: float, bandwidth: float = 0.2, rms: float | None = None) -> Tensor:
    """The part of ``noise`` that lies in one band of frequencies.

    Args:
        noise: (..., height, width), for example epsilon times random signs.
        frequency: Centre of the band, in [0, pi] radians per pixel.
        bandwidth: Half its width, in radians per pixel.
        rms: Scale the result of each image plane to this root mean square; None: as it is, so that wide rings, which
            are those of high frequencies, carry more energy (as the official code has it).

    Returns:
        (..., height, width), real.

    Source: how-do-vits-work ``ops/adversarial.py``, ``FreqAttack``; ``rms`` is ours.

    >>> noise = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    >>> band_noise(noise, math.pi, 0.2, rms=0.5).square().mean().sqrt().item()
    0.5
    """
    mask = ring_mask(noise.shape[-2], noise.shape[-1], frequency, bandwidth).to(noise.device)
    spectrum = torch.fft.fftshift(torch.fft.fft2(noise), dim=(-2, -1)) * mask
    band = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real
    if rms is None:
        return band
    size = band.square().mean(dim=(-2, -1), keepdim=True).sqrt()
    return band * (rms / size.clamp_min(torch.finfo(band.dtype).tiny))


def random_signs(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Random -1 and +1 (B, *shape), fp32, each image's a function of its seed (B,) int64 alone."""
    rows = []
    for seed in seeds.tolist():
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.randint(0, 2, shape, generator=generator).float() * 2 - 1)
    return torch.stack(rows) if rows else torch.empty(0, *shape)
