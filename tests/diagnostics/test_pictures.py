"""What people look at: the right patch, the right colours, the right order."""

import pytest
import torch

from harmonize.diagnostics.measure import measure
from harmonize.diagnostics.pictures import AttentionPictures, TokenColors
from harmonize.diagnostics.token_translation import TokenMoves
from harmonize.diagnostics.token_tsne import TokenTSNE
from harmonize.types import IMAGE_MEAN, IMAGE_STD
from tests.diagnostics.probes import Player, clean_batch, maps_view, opinionated, randn, stream


@pytest.mark.parametrize("grid", [(4, 6), (2, 2), (1, 3), (9, 9), (14, 14), (16, 8)])
@pytest.mark.parametrize("num_prefix", [0, 1])
def test_a_query_that_attends_to_itself_is_the_one_bright_patch(grid, num_prefix):
    def play(images, call):
        for layer in range(1, 6):
            yield maps_view(layer, torch.eye(num_prefix + grid[0] * grid[1]).expand(len(images), 2, -1, -1))

    player = Player(play, depth=5, grid=grid, num_prefix=num_prefix)
    batch = clean_batch(player.spec, 2)
    found = measure(player, [batch], {"maps": AttentionPictures(player.spec)}, range(2))
    assert list(found.pictures) == ["attention_maps_1", "attention_maps_2"]
    for picture in found.pictures.values():
        maps, queries = picture.arrays["maps"], picture.arrays["queries"]
        assert picture.kind == "attention_maps"
        assert picture.arrays["layers"].tolist() == [1, 2, 3, 5]
        assert maps.shape == (4, 2, *grid)
        assert len(queries) == 2
        for k, (row, column) in enumerate(queries.tolist()):
            assert 0 <= row < grid[0]
            assert 0 <= column < grid[1]
            want = torch.zeros(grid)
            want[row, column] = 1
            torch.testing.assert_close(maps[:, k], want.expand(4, -1, -1), rtol=0, atol=1e-5)
    centre, corner = queries.tolist()
    assert centre == [grid[0] // 2, grid[1] // 2]
    assert max(corner[0] / grid[0], corner[1] / grid[1]) <= 1 / 8


def test_attention_pictures_show_each_image_with_its_own_maps():
    encoder = opinionated()
    batch = clean_batch(encoder.spec, 3)
    found = measure(encoder, [batch], {"maps": AttentionPictures(encoder.spec, num_images=2)}, range(3))
    views = []
    with torch.no_grad():
        encoder.visit_layers(batch.image, views.append)
    for number, image in ((1, 0), (2, 1)):  # the evenly spaced ones
        arrays = found.pictures[f"attention_maps_{number}"].arrays
        for k, view in enumerate(v for v in views if hasattr(v, "query")):
            patches = view.weights()[image, :, 1:, 1:]
            mean = (patches / patches.sum(-1, keepdim=True)).mean(0)
            for q, (row, column) in enumerate(arrays["queries"].tolist()):
                torch.testing.assert_close(arrays["maps"][k, q].flatten(), mean[6 * row + column])
        raw = batch.image[image] * torch.tensor(IMAGE_STD).view(3, 1, 1) + torch.tensor(IMAGE_MEAN).view(3, 1, 1)
        torch.testing.assert_close(arrays["image"], raw.clamp(0, 1).permute(1, 2, 0))
        assert arrays["image"].shape == (16, 24, 3)


def played_tokens(places, depth=2, num_prefix=0, width=24):
    def play(images, call):
        yield from stream([x[: len(images)] for x in places])

    return Player(play, depth=depth, num_prefix=num_prefix, width=width)


def test_colors():
    """Four kinds of tokens at the corners of a square have four colours, wherever they lie; and they are colours."""
    corners = 9 * torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    kinds = torch.arange(3 * 24).view(3, 24) % 4
    tokens = torch.zeros(3, 1 + 24, 24)
    tokens[:, 1:, :2] = corners[kinds]
    tokens[:, 1:, 2:] = 0.01 * randn(3, 24, 22)
    tokens[:, 0] = 1000  # the class token plays no part
    blank = 0 * tokens
    player = played_tokens([blank, blank, randn(*tokens.shape), blank, tokens], num_prefix=1)
    batch = clean_batch(player.spec, 3)
    arrays = measure(player, [batch], {"colors": TokenColors(player.spec)}, range(3)).pictures["token_colors"].arrays
    colors = arrays["colors"]
    assert colors.shape == (3, 2, 4, 6, 3)
    assert arrays["images"].shape == (3, 16, 24, 3)
    assert arrays["layers"].tolist() == [1, 2]
    for array in (colors, arrays["images"]):
        assert array.min() == 0
        assert array.max() == 1
    last = colors[:, 1, ..., :2].reshape(3, 24, 2)
    means = torch.stack([last[kinds == k].mean(0) for k in range(4)])
    assert torch.pdist(means).min() > 0.5
    assert max(last[kinds == k].std(0).max().item() for k in range(4)) < 0.05


def test_moves():
    """Tokens that move within a plane: their picture is that plane, up to a turn, so that all distances are kept."""
    plane = torch.linalg.qr(randn(24, 2, seed=5))[0].T
    before, step = 5 * randn(3, 24, 2, seed=6) @ plane, randn(3, 1, 2, seed=7) @ plane
    player = played_tokens([before, before + step, before, before - 2 * step, before])
    batch = clean_batch(player.spec, 3)
    arrays = measure(player, [batch], {"moves": TokenMoves(player.spec)}, range(3)).pictures["token_moves"].arrays
    assert arrays["before"].shape == arrays["after"].shape == (2, 72, 2)
    assert arrays["image"].tolist() == [0] * 24 + [1] * 24 + [2] * 24
    assert arrays["layers"].tolist() == [1, 2]
    for k, after in enumerate((before + step, before - 2 * step)):
        points = torch.cat([arrays["before"][k], arrays["after"][k]])
        tokens = torch.cat([before.flatten(0, 1), after.flatten(0, 1)])
        torch.testing.assert_close(torch.cdist(points, points), torch.cdist(tokens, tokens), rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(points.mean(0), torch.zeros(2), rtol=0, atol=1e-4)


# --- t-SNE -----------------------------------------------------------------------------------------------------------


def clouds(num_images=6):
    """Tokens of 3 kinds, one per class, far from each other, as those of the last block; others are in its way."""
    batch_labels = torch.arange(num_images) % 3
    tokens = randn(num_images, 1 + 24, 24, seed=1)
    tokens[:, 1:] += 30 * torch.eye(24)[batch_labels][:, None]
    return played_tokens([randn(num_images, 25, 24, seed=k) for k in range(4)] + [tokens], num_prefix=1), batch_labels


def test_tsne_keeps_kinds_together():
    pytest.importorskip("sklearn")
    player, labels = clouds()
    batch = clean_batch(player.spec, 6)
    assert torch.equal(batch.label, labels)
    state = torch.get_rng_state()
    arrays = [
        measure(player, [batch], {"tsne": TokenTSNE(player.spec)}, range(6)).pictures["token_tsne"].arrays
        for _ in range(2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    points, label = arrays[0]["points"][0], arrays[0]["label"]
    assert torch.equal(points, arrays[1]["points"][0])
    assert points.shape == (6 * 24, 2)
    assert label.tolist() == labels.repeat_interleave(24).tolist()
    assert arrays[0]["layers"].tolist() == [2]
    nearest = torch.cdist(points, points).fill_diagonal_(torch.inf).argmin(dim=1)
    assert (label[nearest] == label).float().mean() > 0.95


def test_tsne_of_broken_tokens_raises_nothing():
    pytest.importorskip("sklearn")
    encoder = opinionated()
    with torch.no_grad():
        encoder.blocks[2].mlp.fc2.weight.fill_(torch.nan)
    batch = clean_batch(encoder.spec, 3)
    found = measure(encoder, [batch], {"tsne": TokenTSNE(encoder.spec)}, range(3))
    assert found.pictures["token_tsne"].arrays["points"].shape == (1, 72, 2)
