"""One weight of a loss for each depth of the encoder: the loss is computed as ever, its gradients are scaled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from harmonize.functional.layers import layer_of
from harmonize.functional.schedules import weight_schedule
from harmonize.types import Encoder, EncoderSpec


class ScaledByDepth:
    """The encoder, with the same outputs and the same signal that flows back through it, but scaled weight gradients.

    The gradient of every block's weights is multiplied by the block's own factor. Scaling the signal at the blocks'
    boundaries would come to the same, but could not take a block out (factor 0) without those below it.

    Args:
        encoder: The encoder; ``forward`` and ``encode_visible`` are passed on.
        factor: Share of the depth, from 0 (first block, and all that comes before it) to 1 (last block, and the final
            norm) -> factor.
    """

    def __init__(self, encoder: Encoder, factor: Callable[[float], float]) -> None:
        self.spec: EncoderSpec = encoder.spec
        self._pass = _Pass(encoder)
        last = max(1, encoder.spec.depth - 1)
        self._factors = {}
        for name, parameter in self._pass.encoder.named_parameters():
            if parameter.requires_grad:
                layer = layer_of(name)
                share = 1.0 if layer is None else max(0, layer - 1) / last
                self._factors[f"encoder.{name}"] = factor(share)

    def __call__(self, *arguments: Any) -> Tensor:
        """As the encoder's."""
        return self._call("__call__", *arguments)

    def encode_visible(self, *arguments: Any) -> Tensor:
        """As the encoder's."""
        return self._call("encode_visible", *arguments)

    def _call(self, method: str, *arguments: Any) -> Tensor:
        weights = dict(self._pass.named_parameters())
        scaled = {name: _ScaledGradient.apply(weights[name], factor) for name, factor in self._factors.items()}
        return functional_call(self._pass, scaled, (method, *arguments))


def weights_by_depth(
    value: float | Mapping[str, float | str] | Sequence[float], depth: int
) -> Callable[[float], float]:
    """Share of the depth, from 0 (first block) to 1 (last block) -> weight.

    Args:
        value: One weight for each block, or what ``weight_schedule`` takes.
        depth: Number of blocks.

    Raises:
        ValueError: There are more or fewer weights than blocks, or one is outside [0, 1].

    >>> weights_by_depth([0.1, 0.2, 0.9], 3)(0.5)
    0.2
    """
    if not isinstance(value, Sequence):
        return weight_schedule(value)
    if len(value) != depth:
        raise ValueError(f"lambda_by_depth has {len(value)} weights; one for each of {depth} blocks is needed")
    weights = [weight_schedule(weight)(0.0) for weight in value]
    return lambda share: weights[round(share * (depth - 1))]


class _Pass(nn.Module):
    """Any method of an encoder as a forward pass, which is what ``functional_call`` can replace the weights of."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder: Any = encoder

    def forward(self, method: str, *arguments: Any) -> Tensor:
        return getattr(self.encoder, method)(*arguments)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, weight: Tensor, factor: float) -> Tensor:
        context.factor = factor
        return weight.view_as(weight)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * context.factor, None
