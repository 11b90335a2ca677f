"""Where a patch is: fixed sin-cos embeddings and relative-position indices."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_2d(grid: tuple[int, int], width: int, *, columns_first: bool = False) -> Tensor:
    """Fixed two-dimensional sin-cos position embedding.

    Half of the channels encode the row, half the column; each half is [sin, cos] of the position times
    ``10000 ** -(k / (width / 4))``.

    Args:
        grid: (rows, columns).
        width: Channels D, divisible by 4.
        columns_first: False gives MoCo v3's channel layout (row, column), True gives MAE's (column, row).

    Returns:
        (rows * columns, D) fp32, row-major.

    Raises:
        ValueError: If ``width`` is not divisible by 4.

    Source: MoCo v3 ``vits.py``, MAE ``util/pos_embed.py``; the two differ by a swap of the halves.

    >>> sincos_2d((1, 2), 4).round(decimals=2).tolist()
    [[0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.8399999737739563, 0.5400000214576721]]
    """
    if width % 4:
        raise ValueError(f"fixed sin-cos positions need a width divisible by 4, not {width}")
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    halves = []
    for position in (columns, rows) if columns_first else (rows, columns):
        angle = position.flatten()[:, None] * omega
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, dim=1).float()


def relative_position_index(grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Row of the relative-position-bias table for every (query, key) pair.

    The table has one row per (row, column) offset, then one each for prefix -> patch, patch -> prefix and
    prefix -> prefix (three rows, present whether or not there are prefix tokens).

    Args:
        grid: (rows, columns) of the patch grid.
        num_prefix_tokens: P.

    Returns:
        (P + N, P + N) int64.

    Source: BEiT, SimMIM ``models/vision_transformer.py``.

    >>> relative_position_index((1, 2), 1).tolist()
    [[5, 3, 3], [4, 1, 0], [4, 2, 1]]
    """
    rows, columns = grid
    position = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    offset = position[:, None] - position[None] + torch.tensor([rows - 1, columns - 1])
    num_offsets = (2 * rows - 1) * (2 * columns - 1)
    num_prefix = num_prefix_tokens
    index = torch.empty((num_prefix + len(position),) * 2, dtype=torch.int64)
    index[num_prefix:, num_prefix:] = offset[..., 0] * (2 * columns - 1) + offset[..., 1]
    index[:num_prefix, num_prefix:] = num_offsets
    index[num_prefix:, :num_prefix] = num_offsets + 1
    index[:num_prefix, :num_prefix] = num_offsets + 2
    return index
