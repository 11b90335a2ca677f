"""Positions at another image size: each method is the one it is named after."""

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch.nn import functional as F

from harmonize.functional.positions import RESAMPLING, resample_positions, resample_relative_table

GRIDS = [
    ((4, 4), (7, 7)),
    ((7, 7), (4, 4)),
    ((14, 14), (24, 24)),
    ((3, 5), (6, 4)),
    ((4, 6), (6, 4)),
    ((14, 14), (14, 28)),
]


def embedding(grid, prefix=1, width=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, prefix + grid[0] * grid[1], width, generator=generator)


@pytest.mark.parametrize(("old", "new"), GRIDS)
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("method", ["mae", "timm"])
def test_mae_and_timm(old, new, prefix, method):
    pos_embed = embedding(old, prefix)
    theirs = resample_abs_pos_embed(pos_embed, list(new), list(old), prefix, antialias=method == "timm")
    torch.testing.assert_close(resample_positions(pos_embed, prefix, old, new, method), theirs)


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_dino(old, new):
    pos_embed = embedding(old)
    patches = torch.stack([pos_embed[0, 1:, channel].view(old) for channel in range(6)])[None]
    scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
    resized = F.interpolate(patches, scale_factor=scale, mode="bicubic")
    ours = resample_positions(pos_embed, 1, old, new, "dino")
    assert ours.shape == (1, 1 + new[0] * new[1], 6)
    assert ours[:, 0].equal(pos_embed[:, 0])
    for channel in range(6):
        torch.testing.assert_close(ours[0, 1:, channel].view(new), resized[0, channel])


def test_the_methods_differ():
    pos_embed = embedding((14, 14))
    found = [resample_positions(pos_embed, 1, (14, 14), (24, 24), method) for method in RESAMPLING]
    assert (found[0] - found[2]).abs().max() > 0.05
    found = [resample_positions(pos_embed, 1, (14, 14), (7, 7), method) for method in RESAMPLING]
    assert (found[0] - found[1]).abs().max() > 0.05


@pytest.mark.parametrize("method", RESAMPLING)
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_the_same_grid_changes_nothing(method, grid):
    pos_embed = embedding(grid)
    assert resample_positions(pos_embed, 1, grid, grid, method) is pos_embed


@pytest.mark.parametrize("method", RESAMPLING)
def test_rows_stay_rows(method):
    """A ramp along the rows of a grid that is not square is still one, constant along the columns."""
    ramp = torch.arange(3.0)[:, None].expand(3, 5).reshape(1, 15, 1)
    resized = resample_positions(ramp, 0, (3, 5), (6, 10), method).view(6, 10)
    torch.testing.assert_close(resized, resized[:, :1].expand(6, 10))
    assert (resized[1:, 0] > resized[:-1, 0]).all()


def test_half_precision_stays():
    assert resample_positions(embedding((4, 4)).half(), 1, (4, 4), (6, 6), "mae").dtype == torch.float16


def test_mistakes():
    with pytest.raises(ValueError, match="resize=linear must be one of mae, timm, dino"):
        resample_positions(embedding((4, 4)), 1, (4, 4), (6, 6), "linear")
    with pytest.raises(ValueError, match="17 position embeddings do not fit 0 prefix tokens and a grid of 4 x 4"):
        resample_positions(embedding((4, 4)), 0, (4, 4), (6, 6), "mae")
    with pytest.raises(ValueError, match="a table of 52 rows does not fit a grid of 4 x 5"):
        resample_relative_table(torch.ones(52, 3), (4, 5), (6, 6))


@pytest.mark.filterwarnings("ignore::UserWarning:timm")
@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_relative_tables_as_timm(old, new):
    rows = [(2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 for grid in (old, new)]
    table = torch.randn(rows[0], 3, generator=torch.Generator().manual_seed(0))
    ours = resample_relative_table(table, old, new)
    torch.testing.assert_close(ours, resize_rel_pos_bias_table(table, new, (rows[1], 3), old), rtol=1e-4, atol=1e-5)
    assert ours[-3:].equal(table[-3:])


def test_relative_tables_of_one_patch():
    table = torch.tensor([[5.0], [1.0], [2.0], [3.0]])
    assert resample_relative_table(table, (1, 1), (2, 2)).flatten().tolist() == [5.0] * 9 + [1.0, 2.0, 3.0]
    assert resample_relative_table(table, (1, 1), (1, 1)) is table
