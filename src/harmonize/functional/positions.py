"""Where a patch is: fixed sin-cos embeddings, relative-position indices, and both at another image size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

RESAMPLING = ("mae", "timm", "dino")


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


def resample_positions(
    pos_embed: Tensor, num_prefix_tokens: int, old_grid: tuple[int, int], new_grid: tuple[int, int], method: str
) -> Tensor:
    """Learned position embeddings for another patch grid.

    Args:
        pos_embed: (1, P + N, D), the prefix tokens' embeddings first; those stay as they are.
        num_prefix_tokens: P.
        old_grid: (rows, columns) that ``pos_embed`` is for.
        new_grid: (rows, columns) wanted.
        method: ``mae`` (bicubic to the new size; also DeiT, BEiT), ``timm`` (the same with antialiasing) or ``dino``
            (bicubic by the factor (new + 0.1) / old; also iBOT). On embeddings of unit variance they differ by
            several tenths.

    Returns:
        (1, P + N', D); ``pos_embed`` itself where the grids are equal.

    Raises:
        ValueError: If the method is unknown or ``pos_embed`` is not for ``old_grid``.

    Source: MAE ``util/pos_embed.py``, timm ``resample_abs_pos_embed``, DINO ``interpolate_pos_encoding``.

    >>> corners = torch.tensor([[[9.0], [0.0], [1.0], [2.0], [3.0]]])
    >>> resample_positions(corners, 1, (2, 2), (1, 1), "mae").flatten().tolist()
    [9.0, 1.5]
    """
    if method not in RESAMPLING:
        raise ValueError(f"resize={method} must be one of {', '.join(RESAMPLING)}")
    if pos_embed.shape[1] != num_prefix_tokens + old_grid[0] * old_grid[1]:
        raise ValueError(
            f"{pos_embed.shape[1]} position embeddings do not fit {num_prefix_tokens} prefix tokens and a grid of "
            f"{old_grid[0]} x {old_grid[1]}"
        )
    if old_grid == new_grid:
        return pos_embed
    patches = pos_embed[:, num_prefix_tokens:].float().unflatten(1, old_grid).permute(0, 3, 1, 2)
    if method == "dino":
        # the tenth of a patch keeps the product from falling below the wanted size; it shifts the sampling as well
        factor = tuple((new + 0.1) / old for new, old in zip(new_grid, old_grid, strict=True))
        patches = F.interpolate(patches, scale_factor=factor, mode="bicubic")
    else:
        patches = F.interpolate(patches, size=new_grid, mode="bicubic", antialias=method == "timm")
    patches = patches.flatten(2).transpose(1, 2).to(pos_embed.dtype)
    return torch.cat([pos_embed[:, :num_prefix_tokens], patches], dim=1)


def resample_relative_table(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """A relative-position-bias table for another patch grid.

    The old offsets are placed at distances that grow geometrically, so that near ones keep their meaning in patches
    and the farthest reaches across the new grid; in between, values are interpolated linearly along rows and columns
    (BEiT's own code does so with cubic splines). A smaller grid takes the offsets that it has.

    Args:
        table: ((2 rows - 1) (2 columns - 1) + 3, H); the last three rows concern prefix tokens and stay.
        old_grid: (rows, columns) that it is for.
        new_grid: (rows, columns) wanted.

    Returns:
        ((2 rows' - 1) (2 columns' - 1) + 3, H); ``table`` itself where the grids are equal.

    Raises:
        ValueError: If ``table`` is not for ``old_grid``.

    Source: BEiT ``run_class_finetuning.py``; timm ``resize_rel_pos_bias_table``.

    >>> table = torch.tensor([[1.0], [2.0], [3.0], [7.0], [8.0], [9.0]])  # one row of two patches: offsets -1, 0, 1
    >>> resample_relative_table(table, (1, 2), (1, 1)).flatten().tolist()
    [2.0, 7.0, 8.0, 9.0]
    """
    old_size = (2 * old_grid[0] - 1, 2 * old_grid[1] - 1)
    if len(table) != old_size[0] * old_size[1] + 3:
        raise ValueError(f"a table of {len(table)} rows does not fit a grid of {old_grid[0]} x {old_grid[1]}")
    if old_grid == new_grid:
        return table
    rows, columns = (_offset_interpolation(*sizes) for sizes in zip(old_grid, new_grid, strict=True))
    offsets = table[:-3].double().unflatten(0, old_size)
    resampled = torch.einsum("ir,jc,rch->ijh", rows.to(table.device), columns.to(table.device), offsets)
    return torch.cat([resampled.flatten(0, 1).to(table.dtype), table[-3:]])


def _offset_interpolation(old: int, new: int) -> Tensor:
    """Weights (2 new - 1, 2 old - 1), fp64, of the old offsets along one axis in each new offset."""
    steps, reach = old - 1, new - 1
    if steps == 0:
        return torch.ones(2 * new - 1, 1, dtype=torch.float64)
    low, high = 1.01, 1.5  # the ratio whose distances 1, 1 + q, 1 + q + q^2, ... end at the farthest new offset
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if (ratio**steps - 1) / (ratio - 1) > reach else (ratio, high)
    distance = torch.cumsum(ratio ** torch.arange(steps, dtype=torch.float64), dim=0)
    source = torch.cat([-distance.flip(0), distance.new_zeros(1), distance])
    wanted = torch.arange(-reach, reach + 1, dtype=torch.float64).clamp(source[0], source[-1])
    right = torch.searchsorted(source, wanted).clamp(1, len(source) - 1)
    share = (wanted - source[right - 1]) / (source[right] - source[right - 1])
    weights = torch.zeros(len(wanted), len(source), dtype=torch.float64)
    weights.scatter_(1, right[:, None] - 1, 1 - share[:, None])
    return weights.scatter_(1, right[:, None], share[:, None])
