"""The Vision Transformer encoder: timm's, with what the pre-training recipes add."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harmonize.backbones.tap import Visit, visit_blocks
from harmonize.functional.positions import relative_position_index, sincos_2d
from harmonize.types import EncoderSpec

POSITIONS = ("learned", "sincos", "sincos_mae", "none")
RELATIVE_POSITIONS = ("none", "shared", "per_block")
INITIALIZATIONS = ("timm", "moco_v3", "simmim", "mae")


class RelativePositionBias(nn.Module):
    """One bias per head and per offset between two patches, added to the attention logits.

    Args:
        grid: (rows, columns) of the patch grid.
        num_prefix_tokens: P.
        num_heads: H.

    Source: BEiT and SimMIM (table layout and zero initialisation).
    """

    relative_position_index: Tensor

    def __init__(self, grid: tuple[int, int], num_prefix_tokens: int, num_heads: int) -> None:
        super().__init__()
        num_rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_rows, num_heads))
        self.register_buffer(
            "relative_position_index", relative_position_index(grid, num_prefix_tokens), persistent=False
        )

    def forward(self) -> Tensor:
        """The bias (1, H, P + N, P + N)."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1).unsqueeze(0)


class PatchProjection(PatchEmbed):
    """timm's patch embedding; in training as one matrix product, which is faster than its strided convolution.

    In evaluation it stays timm's to the bit: that is what exported weights are compared with.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) of the one size -> patches (B, N, D)."""
        if not self.training:
            return super().forward(images)
        torch._assert(
            images.shape[-2:] == torch.Size(self.img_size),
            f"images of {tuple(images.shape[-2:])} px in an encoder for {self.img_size}",
        )
        (rows, columns), (height, width) = self.grid_size, self.patch_size
        patches = images.unflatten(3, (columns, width)).unflatten(2, (rows, height))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return self.norm(F.linear(patches, self.proj.weight.flatten(1), self.proj.bias))


class ViTEncoder(VisionTransformer):
    """timm's Vision Transformer without a head, with masking and the recipes' options.

    The names in its ``state_dict`` are timm's. Without a mask and without relative positions ``forward`` is timm's
    own ``forward_features``.

    Args:
        image_size: Side in px, or (height, width).
        patch_size: Side of a patch in px.
        width: Token dimension D.
        depth: Number of blocks.
        num_heads: Attention heads H.
        positions: ``learned``, ``sincos`` (fixed, MoCo v3's channel order), ``sincos_mae`` (fixed, MAE's order) or
            ``none``; fixed positions of prefix tokens are zero.
        relative_position: Relative-position bias: ``none``, ``shared`` by all blocks or ``per_block``.
        layer_scale: Initial value of LayerScale, None for none.
        drop_path: Stochastic-depth rate of the last block, rising linearly from 0 at the first.
        class_token: Whether there is a class token.
        num_registers: Number of register tokens.
        final_norm: Whether the tokens are normalised after the last block (not in networks fine-tuned as MAE, BEiT and
            SimMIM do it, which normalise the pooled patch tokens instead).
        freeze_patch_embed: Keep the patch embedding at its random initialisation (MoCo v3's ``stop_grad_conv1``).
        initialization: ``timm``, ``moco_v3``, ``simmim`` or ``mae``.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        positions: str = "sincos",
        relative_position: str = "none",
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        class_token: bool = True,
        num_registers: int = 0,
        final_norm: bool = True,
        freeze_patch_embed: bool = False,
        initialization: str = "moco_v3",
    ) -> None:
        for key, value, allowed in (
            ("positions", positions, POSITIONS),
            ("relative_position", relative_position, RELATIVE_POSITIONS),
            ("initialization", initialization, INITIALIZATIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{key}={value} must be one of {', '.join(allowed)}")
        super().__init__(
            img_size=image_size if isinstance(image_size, int) else (image_size[0], image_size[1]),
            patch_size=patch_size,
            num_classes=0,
            global_pool="",
            embed_dim=width,
            depth=depth,
            num_heads=num_heads,
            init_values=layer_scale,
            class_token=class_token,
            pos_embed="none" if positions == "none" else "learn",
            reg_tokens=num_registers,
            final_norm=final_norm,
            drop_path_rate=drop_path,
            embed_layer=PatchProjection,
        )
        self.spec = EncoderSpec(
            width=width,
            depth=depth,
            num_heads=num_heads,
            image_size=tuple(self.patch_embed.img_size),
            patch_size=patch_size,
            grid=tuple(self.patch_embed.grid_size),
            num_prefix_tokens=self.num_prefix_tokens,
            has_class_token=class_token,
        )
        self.relative_position = relative_position
        bias = (self.spec.grid, self.num_prefix_tokens, num_heads)
        if relative_position == "shared":
            self.rel_pos_bias = RelativePositionBias(*bias)
        elif relative_position == "per_block":
            for block in self.blocks:
                block.rel_pos_bias = RelativePositionBias(*bias)

        self._initialize(initialization)
        if positions.startswith("sincos"):
            assert self.pos_embed is not None
            patches = sincos_2d(self.spec.grid, width, columns_first=positions == "sincos_mae")
            with torch.no_grad():
                self.pos_embed.copy_(torch.cat([torch.zeros(self.num_prefix_tokens, width), patches])[None])
            self.pos_embed.requires_grad_(False)
        self.patch_embed.requires_grad_(not freeze_patch_embed)

    @torch.no_grad()
    def _initialize(self, recipe: str) -> None:
        """Initialise as the recipe's official code does (recipes differ in Linear, patch embedding and tokens)."""
        if recipe == "timm":
            return  # timm's constructor has done it
        projection = self.patch_embed.proj
        block: Any  # timm's modules are not typed closely enough for mypy
        for index, block in enumerate(self.blocks, start=1):
            for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                if recipe == "simmim":
                    trunc_normal_(linear.weight, std=0.02)
                elif recipe == "moco_v3" and linear is block.attn.qkv:
                    bound = math.sqrt(6 / (linear.out_features // 3 + linear.in_features))  # q, k, v apart
                    nn.init.uniform_(linear.weight, -bound, bound)
                else:
                    nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
            if recipe == "simmim":
                block.attn.proj.weight.div_(math.sqrt(2 * index))
                block.mlp.fc2.weight.div_(math.sqrt(2 * index))
        if recipe == "simmim":
            trunc_normal_(projection.weight, std=0.02)
        elif recipe == "moco_v3":
            bound = math.sqrt(6 / (projection.weight[0].numel() + projection.out_channels))
            nn.init.uniform_(projection.weight, -bound, bound)
        else:
            nn.init.xavier_uniform_(projection.weight.view(projection.out_channels, -1))
        nn.init.zeros_(projection.bias)
        for token in (self.cls_token, self.reg_token, self.pos_embed):
            if token is None:
                continue
            if recipe == "simmim":
                trunc_normal_(token, std=0.02, a=-0.02, b=0.02)
            elif token is not self.pos_embed:
                nn.init.normal_(token, std=1e-6 if recipe == "moco_v3" else 0.02)

    def _biases(self, positions: Tensor | None) -> list[Tensor | None]:
        """Relative-position bias of every block: (1, H, S, S), or (B, H, S, S) for the token ``positions`` (B, S)."""
        if self.relative_position == "none":
            return [None] * self.spec.depth

        def cut(bias: Tensor) -> Tensor:
            if positions is None:
                return bias
            return bias[0][:, positions[:, :, None], positions[:, None, :]].transpose(0, 1)

        if self.relative_position == "shared":
            return [cut(self.rel_pos_bias())] * self.spec.depth
        blocks: Any = self.blocks
        return [cut(block.rel_pos_bias()) for block in blocks]

    def _run_blocks(self, tokens: Tensor, positions: Tensor | None = None) -> Iterator[Tensor]:
        """The tokens after each block; ``positions`` says which tokens these are where some are left out."""
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        for block, bias in zip(self.blocks, self._biases(positions), strict=True):
            run = block if bias is None else partial(block, attn_mask=bias)
            tokens = checkpoint(run, tokens, use_reentrant=False) if recompute else run(tokens)
            yield tokens

    def _encode(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        tokens = self.norm_pre(tokens)
        for after_block in self._run_blocks(tokens, positions):
            tokens = after_block
        return self.norm(tokens)

    def final_norm(self, tokens: Tensor) -> Tensor:
        """The norm after the last block."""
        return self.norm(tokens)

    def forward(  # type: ignore[override]  # an encoder's interface, not a classifier's
        self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tensor:
        """Encode images, with some patches hidden if a mask is given.

        Args:
            images: (B, 3, height, width), normalised.
            mask: (B, N) bool, True = the patch embedding is replaced by ``mask_token``.
            mask_token: (1, 1, D), required with ``mask``.

        Returns:
            Tokens (B, P + N, D) after the final norm, prefix tokens first.
        """
        tokens = self.patch_embed(images)
        if mask is not None:
            assert mask_token is not None, "a mask needs a mask token"
            # before positions and prefix tokens are added, as in SimMIM
            tokens = torch.where(mask.unsqueeze(-1), mask_token.to(tokens.dtype), tokens)
        return self._encode(self._pos_embed(tokens))

    def encode_visible(self, images: Tensor, keep: Tensor) -> Tensor:
        """Encode only some of the patches, as MAE does.

        Args:
            images: (B, 3, height, width), normalised.
            keep: (B, K) int64 indices of the patches that enter.

        Returns:
            Tokens (B, P + K, D) after the final norm: prefix tokens, then the patches in the order of ``keep``.
        """
        tokens = self._pos_embed(self.patch_embed(images))
        prefix = torch.arange(self.num_prefix_tokens, device=keep.device).expand(len(keep), -1)
        positions = torch.cat([prefix, keep + self.num_prefix_tokens], dim=1)
        tokens = tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        return self._encode(tokens, positions)

    def visit_layers(self, images: Tensor, visit: Visit) -> Tensor:
        """``forward`` that shows every layer to ``visit``, see :func:`~harmonize.backbones.tap.visit_blocks`."""
        num_tokens = self.num_prefix_tokens + self.spec.num_patches
        return visit_blocks(self.blocks, lambda: self(images), visit, num_tokens)

    def iter_blocks(self, images: Tensor) -> Iterator[Tensor]:
        """The tokens (B, P + N, D) after each block, in order, before the final norm."""
        yield from self._run_blocks(self.norm_pre(self._pos_embed(self.patch_embed(images))))
