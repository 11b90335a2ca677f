"""A network's fingerprint: a few numbers that its features of fixed images give, stored beside its weights.

Shapes alone cannot tell a ViT-S with 6 heads from one with 12, nor rows from columns in its positions: the weights load
and every feature is wrong. Whoever loads a file with a fingerprint computes it again and compares.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from harmonize.functional.seeding import mix, uniform
from harmonize.types import EncoderSpec

NUM_NUMBERS = 16
MAX_DEVIATION = 1e-4
"""What other libraries and processors may change: two orders above fp32 rounding, orders below any mistake."""

_SEED = 2305_00729
Module = TypeVar("Module", bound=nn.Module)


def fingerprint(encoder: nn.Module) -> list[float]:
    """Sixteen numbers that say what an encoder computes, the same on every machine up to fp32 rounding.

    Each is a sum of all tokens' features of two fixed images with fixed random signs, over the square root of their
    number: as large as a typical feature, and changed by a change of any token.

    Args:
        encoder: With a ``spec`` (:class:`~harmonize.types.EncoderSpec`); called with images. It is not changed.

    Source: our definition.
    """
    copied = plain_copy(encoder)
    with exact():
        tokens = copied(probe_images(copied.spec, 2)).double().flatten()  # type: ignore[arg-type]
    seeds = mix(_SEED, 1, torch.arange(NUM_NUMBERS))
    # a row at a time: all signs together would take more memory than the network
    signs = (uniform(seed[None], len(tokens))[0] < 0.5 for seed in seeds)
    return [(torch.where(sign, tokens, -tokens).sum() / math.sqrt(len(tokens))).item() for sign in signs]


def matches(encoder: nn.Module, stored: Sequence[float]) -> float:
    """How far an encoder's fingerprint is from a stored one.

    Returns:
        The largest difference over the root mean square of ``stored``; infinite where they cannot be compared.
    """
    if len(stored) != NUM_NUMBERS:
        return math.inf
    expected = torch.tensor(stored, dtype=torch.float64)
    difference = torch.tensor(fingerprint(encoder), dtype=torch.float64) - expected
    deviation = (difference.abs().max() / expected.square().mean().sqrt()).item()
    return deviation if math.isfinite(deviation) else math.inf


def probe_images(spec: EncoderSpec, num_images: int) -> Tensor:
    """Fixed noise (num_images, 3, height, width), fp32, uniform with mean 0 and variance 1, the same on every machine.

    >>> probe_images(EncoderSpec(8, 1, 1, (2, 4), 2, (1, 2), 0, False), 2).shape
    torch.Size([2, 3, 2, 4])
    """
    height, width = spec.image_size
    noise = uniform(mix(_SEED, 0, torch.arange(num_images)), 3 * height * width)
    return ((noise - 0.5) * math.sqrt(12)).view(num_images, 3, height, width)


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest absolute difference of outputs; as a share of the largest output, where that is more than one.

    >>> difference([torch.tensor([1.0, 20.0])], [torch.tensor([1.0, 40.0])])
    0.5
    """
    pairs = zip(found, expected, strict=True)
    # torch's maximum keeps NaN, Python's may lose it
    return torch.stack([(a - b).abs().max() / b.abs().max().clamp(min=1) for a, b in pairs]).max().item()


def plain_copy(module: Module) -> Module:
    """A copy on the CPU in fp32 and eval mode, without gradients."""
    return copy.deepcopy(module).cpu().float().eval().requires_grad_(False)


@contextmanager
def exact() -> Iterator[None]:
    """Full fp32 on the CPU, without gradients, whatever precision the program around has chosen."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # less may mean bf16 on a CPU that has it
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
