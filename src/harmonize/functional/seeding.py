"""Random numbers that are a pure function of what they belong to.

A counter-based generator: a hash of integers instead of a state. Masks and augmentations of an image depend on
(seed, epoch, index) alone, so workers, ranks, batch composition and resumes cannot change them.
Source: the finaliser of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_M1 = _signed(0xBF58476D1CE4E5B9)
_M2 = _signed(0x94D049BB133111EB)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(*values: int | Tensor) -> Tensor:
    """Hash integers into int64, element-wise.

    Args:
        *values: Python ints or int64 tensors of broadcastable shapes; order matters.

    Returns:
        int64 tensor of the broadcast shape, the same on every device.

    >>> mix(1, torch.tensor([2, 3])).tolist() == [mix(1, 2).item(), mix(1, 3).item()]
    True
    """
    state: int | Tensor = 0
    for value in values:
        if not isinstance(state, Tensor) and not isinstance(value, Tensor):
            state = _step(state, value)
            continue
        # numbers stay numbers: moving them to a GPU would make the host wait for it
        left, right = (x if isinstance(x, Tensor) else _signed(x) for x in (state, value))
        mixed = torch.as_tensor(left ^ right) + _GOLDEN
        mixed = (mixed ^ _shift(mixed, 30)) * _M1
        mixed = (mixed ^ _shift(mixed, 27)) * _M2
        state = mixed ^ _shift(mixed, 31)
    return state if isinstance(state, Tensor) else torch.tensor(_signed(state), dtype=torch.int64)


def _step(state: int, value: int) -> int:
    state = ((state ^ (value & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def mix_int(*values: int) -> int:
    """The same hash for Python ints, as a seed for ``torch.manual_seed``.

    Returns:
        An int in [0, 2**63).

    >>> mix_int(1, 2) == mix(1, 2).item() % 2**63
    True
    """
    state = 0
    for value in values:
        state = _step(state, value)
    return state % (1 << 63)


def uniform(seed: Tensor, num: int) -> Tensor:
    """Uniform random numbers, one row per seed.

    Args:
        seed: (B,) int64.
        num: Numbers per row.

    Returns:
        (B, num) fp32 in [0, 1), with 24 random bits each.

    >>> uniform(torch.tensor([7]), 2).shape
    torch.Size([1, 2])
    """
    bits = mix(seed[:, None], torch.arange(num, device=seed.device)[None])
    return _shift(bits, 40).float() / (1 << 24)
