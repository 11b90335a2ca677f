"""Decoders: from tokens back to pixels."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from harmonize.functional.positions import sincos_2d
from harmonize.types import EncoderSpec


class LinearDecoder(nn.Module):
    """SimMIM's decoder: one linear map from a patch token to the pixels of its patch.

    The same as the official 1 x 1 convolution and PixelShuffle; its weights keep their colour-major channel order.

    Args:
        spec: The encoder's.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.projection = nn.Linear(spec.width, 3 * spec.patch_size**2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, P + N, D) -> patches (B, N, p * p * 3) in the order of ``patchify``."""
        pixels = self.projection(tokens[:, self.spec.num_prefix_tokens :])
        return rearrange(pixels, "b n (c i j) -> b n (i j c)", c=3, i=self.spec.patch_size)


class SelfAttention(nn.MultiheadAttention):
    """torch's attention of a sequence to itself, without the copies that torch makes of queries, keys and values."""

    def forward(self, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Tokens (B, N, D) -> tokens (B, N, D), and no weights; keys and values are of the same tokens, none masked."""
        qkv = linear(query, self.in_proj_weight, self.in_proj_bias)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        return self.out_proj(rearrange(scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")), None


class ViTDecoder(nn.Module):
    """MAE's decoder: a narrower Transformer with fixed sin-cos positions over all patches.

    Args:
        spec: The encoder's.
        width: Token dimension, divisible by 4 and by ``num_heads``.
        depth: Number of blocks.
        num_heads: Attention heads.

    Source: MAE ``models_mae.py``.
    """

    positions: Tensor

    def __init__(self, spec: EncoderSpec, width: int = 512, depth: int = 8, num_heads: int = 16) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Linear(spec.width, width)
        prefix = torch.zeros(spec.num_prefix_tokens, width)
        positions = torch.cat([prefix, sincos_2d(spec.grid, width, columns_first=True)])
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                num_heads,
                dim_feedforward=4 * width,
                dropout=0.0,
                activation="gelu",
                layer_norm_eps=1e-6,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )
        for block in self.blocks:
            block.self_attn = SelfAttention(width, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.projection = nn.Linear(width, 3 * spec.patch_size**2)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.MultiheadAttention):
                nn.init.xavier_uniform_(module.in_proj_weight)
                nn.init.zeros_(module.in_proj_bias)

    def forward(self, tokens: Tensor, keep: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Predict the pixels of every patch.

        Args:
            tokens: (B, P + N, D), or (B, P + K, D) where only the patches ``keep`` are there.
            keep: (B, K) int64, which patches the tokens belong to.
            mask_token: (1, 1, width), stands for the others; required with ``keep``.

        Returns:
            (B, N, p * p * 3) in the order of ``patchify``.
        """
        x = self.embed(tokens)
        num_prefix = self.spec.num_prefix_tokens
        if keep is not None:
            assert mask_token is not None, "patches that are left out need a mask token"
            filled = mask_token.to(x.dtype).expand(len(x), self.spec.num_patches, -1)
            filled = filled.scatter(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]), x[:, num_prefix:])
            x = torch.cat([x[:, :num_prefix], filled], dim=1)
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        return self.projection(self.norm(x))[:, num_prefix:]
