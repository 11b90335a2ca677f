"""An encoder's weights for images of another size."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from harmonize.checkpoints.shapes import TABLE
from harmonize.functional.positions import resample_positions, resample_relative_table, sincos_2d


def resize_state(
    state: Mapping[str, Tensor],
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    num_prefix_tokens: int,
    positions: str,
    method: str = "mae",
) -> dict[str, Tensor]:
    """The weights of a ``ViTEncoder`` for another patch grid.

    Fixed sin-cos positions are computed for the new grid, learned ones resampled, and so are relative-position tables;
    everything else is as it was.

    Args:
        state: ``state_dict`` of a ``ViTEncoder``.
        old_grid: (rows, columns) of its patch grid.
        new_grid: (rows, columns) wanted.
        num_prefix_tokens: P.
        positions: Its kind of positions: ``learned``, ``sincos``, ``sincos_mae`` or ``none``.
        method: For learned positions, see :func:`~harmonize.functional.positions.resample_positions`.

    Raises:
        ValueError: If the method is unknown or the weights are not for ``old_grid``.
    """
    resized = dict(state)
    if old_grid == new_grid:
        return resized
    if positions != "none":
        pos_embed = resample_positions(state["pos_embed"], num_prefix_tokens, old_grid, new_grid, method)
        if positions.startswith("sincos"):
            fixed = sincos_2d(new_grid, pos_embed.shape[2], columns_first=positions == "sincos_mae")
            pos_embed[:, num_prefix_tokens:] = fixed.to(pos_embed)
        resized["pos_embed"] = pos_embed
    for name, value in state.items():
        if name.endswith(TABLE):
            resized[name] = resample_relative_table(value, old_grid, new_grid)
    return resized
