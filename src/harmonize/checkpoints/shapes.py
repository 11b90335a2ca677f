"""What the shapes and values of an encoder's tensors say about its architecture."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harmonize.functional.positions import sincos_2d

TABLE = "rel_pos_bias.relative_position_bias_table"


@dataclass(frozen=True)
class Shapes:
    """Sizes of an encoder, as far as tensors tell them.

    Attributes:
        width: D.
        depth: Number of blocks.
        patch_size: In px.
        num_heads: H of relative-position tables; None without such, for nothing else depends on it.
        grid: (rows, columns) of the patch grid, None if no tensor depends on it.
        class_token: Whether there is one.
        num_registers: Number of further prefix tokens.
        positions: Kind of absolute positions, as ``ViTEncoder`` calls them.
        relative_position: Kind of relative positions, as ``ViTEncoder`` calls them.
        layer_scale: Whether the blocks have LayerScale.
        final_norm: Whether there is a norm after the last block.
    """

    width: int
    depth: int
    patch_size: int
    num_heads: int | None
    grid: tuple[int, int] | None
    class_token: bool
    num_registers: int
    positions: str
    relative_position: str
    layer_scale: bool
    final_norm: bool

    @property
    def num_prefix_tokens(self) -> int:
        """P."""
        return self.class_token + self.num_registers


def read_shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    """Sizes of the encoder whose tensors, by our names, these are.

    Raises:
        ValueError: They are no Vision Transformer's; the message is the end of a sentence about the file.
    """
    projection = tensors["patch_embed.proj.weight"]
    depth = len({name.split(".")[1] for name in tensors if re.match(r"blocks\.\d+\.", name)})
    if projection.ndim != 4 or projection.shape[2] != projection.shape[3] or not depth:
        raise ValueError(
            f"holds no plain Vision Transformer: patch_embed.proj.weight has shape {tuple(projection.shape)}, and "
            f"there are {depth} blocks named blocks.N"
        )
    class_token, registers = "cls_token" in tensors, tensors.get("reg_token")
    num_registers = registers.shape[1] if registers is not None and registers.ndim == 3 else 0
    num_prefix = class_token + num_registers
    grid, positions = None, "none"
    if (pos_embed := tensors.get("pos_embed")) is not None:
        grid = _grid(pos_embed, num_prefix, class_token)
        positions = _kind(pos_embed[0, -grid[0] * grid[1] :], grid)
    relative_position = "shared" if TABLE in tensors else "per_block" if f"blocks.0.{TABLE}" in tensors else "none"
    table = tensors.get(TABLE if relative_position == "shared" else f"blocks.0.{TABLE}")
    if table is not None and table.ndim != 2:
        raise ValueError(f"has a relative-position table of shape {tuple(table.shape)}")
    if table is not None and grid is None:
        rows = len(table)
        side = (math.isqrt(max(0, rows - 3)) + 1) // 2
        if (2 * side - 1) ** 2 != rows - 3:
            raise ValueError(f"has a relative-position table of {rows} rows, which fits no square grid of patches")
        grid = (side, side)
    return Shapes(
        width=len(projection),
        depth=depth,
        patch_size=projection.shape[2],
        num_heads=None if table is None else table.shape[1],
        grid=grid,
        class_token=class_token,
        num_registers=num_registers,
        positions=positions,
        relative_position=relative_position,
        layer_scale="blocks.0.ls1.gamma" in tensors,
        final_norm="norm.weight" in tensors,
    )


def pad_positions(pos_embed: Tensor, num_prefix_tokens: int, grid: tuple[int, int]) -> Tensor:
    """Position embeddings (1, P + N, D) with zeros for the prefix tokens that have none in the file.

    timm's networks with registers embed the patches only, DINOv2's the class token and the patches.
    """
    present = pos_embed.shape[1] - grid[0] * grid[1]
    missing = pos_embed.new_zeros(1, num_prefix_tokens - present, pos_embed.shape[2])
    return torch.cat([pos_embed[:, :present], missing, pos_embed[:, present:]], dim=1)


def _grid(pos_embed: Tensor, num_prefix_tokens: int, class_token: bool) -> tuple[int, int]:
    """The square grid of position embeddings for all, the first or none of the prefix tokens, and the patches."""
    if pos_embed.ndim == 3 and len(pos_embed) == 1:
        for present in (num_prefix_tokens, int(class_token), 0):
            side = math.isqrt(max(0, pos_embed.shape[1] - present))
            if side and side**2 + present == pos_embed.shape[1]:
                return side, side
    raise ValueError(f"has position embeddings of shape {tuple(pos_embed.shape)}, which fit no square grid of patches")


def _kind(patches: Tensor, grid: tuple[int, int]) -> str:
    """Whether position embeddings (N, D) of the patches are fixed, and in whose channel order."""
    width = patches.shape[1]
    tolerance = 1e-4 if patches.dtype == torch.float32 else 1e-3  # the official fp32 sines, or a file in half precision
    for kind in ("sincos", "sincos_mae") if width % 4 == 0 else ():
        fixed = sincos_2d(grid, width, columns_first=kind == "sincos_mae")
        if torch.allclose(patches.float(), fixed, rtol=0, atol=tolerance):
            return kind
    return "learned"
