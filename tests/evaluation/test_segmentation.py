"""Segmentation: heads, what is trained and what stays, planted masks, windows, resumption."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from harmonize.backbones.fine_tuning import trainable_copy
from harmonize.config import compose, instantiate
from harmonize.data.segmentation import SegmentationSet
from harmonize.data.segmentation_module import SegmentationBatch
from harmonize.data.shapes import Shapes
from harmonize.evaluation.base import Bench, frozen
from harmonize.evaluation.segmentation import (
    LinearHead,
    Segmentation,
    UperNetHead,
    image_counts,
    segmentation_loss,
    token_maps,
)
from harmonize.functional.hashing import weights_hash
from harmonize.functional.segmentation import mean_iou, pixel_counts
from harmonize.types import ConfigError
from tests.evaluation.benches import killed_after
from tests.helpers import random_batch, tiny_encoder

EASY = {"epochs": 4, "batch_size": 8, "lr": 1e-2, "precision": "32", "scale": [1.0, 1.0]}
UPERNET = partial(UperNetHead, auxiliary_channels=8)


class Halves:
    """Dark and bright fields: which is which can be seen by colour. Patches are whole, images larger than windows."""

    classes = ("dark", "bright", "never")
    photographs = False

    def __init__(self, num=(32, 12)):
        self.num = num

    def split(self, name):
        return HalvesSplit(self.num[name == "val"])


class HalvesSplit:
    def __init__(self, num):
        self.num = num

    def __len__(self):
        return self.num

    def load(self, index):
        columns = 16 + 8 * (index % 2)
        generator = torch.Generator().manual_seed(index)
        mask = torch.randint(2, (4, columns // 4), generator=generator)
        mask = mask.repeat_interleave(4, 0).repeat_interleave(4, 1)
        pixels = (60 + 130 * mask + torch.randint(40, mask.shape, generator=generator)).to(torch.uint8)
        mask[0] = 255
        return Image.fromarray(pixels.numpy()).convert("RGB"), mask

    def name(self, index):
        return f"halves {index}"


def make_bench(folder, dataset=None, encoder=None, **options):
    encoder = (encoder or tiny_encoder()).requires_grad_(False).eval()
    settings = {"trainable": partial(trainable_copy, encoder), "batch_size": 4} | options
    return Bench(
        encoder,
        lambda **_: SimpleNamespace(num_workers=0),
        dataset or Halves(),
        torch.device("cpu"),
        0,
        Path(folder),
        Path(folder),
        **settings,
    )


def by_name(results):
    return {(row.metric, row.series): row for row in results}


def test_a_linear_head_on_frozen_tokens_learns_colours(tmp_path):
    assert isinstance(Halves(), SegmentationSet)
    bench = make_bench(tmp_path)
    before = weights_hash(bench.encoder.state_dict())
    with frozen(bench.encoder):
        rows = by_name(Segmentation(**EASY).run(bench))
    assert weights_hash(bench.encoder.state_dict()) == before
    assert set(rows) == {("miou", ""), ("pixel_accuracy", ""), ("iou", "dark"), ("iou", "bright")}
    miou = rows["miou", ""]
    assert miou.value > 0.8
    assert miou.value == pytest.approx((rows["iou", "dark"].value + rows["iou", "bright"].value) / 2)
    assert miou.interval[0] <= miou.value <= miou.interval[1]
    assert rows["pixel_accuracy", ""].value > miou.value
    assert miou.num_images == 12
    assert miou.feature == "frozen layers 2 pool=none norm=final"
    state = bench.load_state("segmentation")
    assert not any("encoder" in name for name in state["network"])


def test_upernet_trains_a_copy_of_the_encoder(tmp_path):
    bench = make_bench(tmp_path)
    settings = EASY | {"decode_head": UPERNET, "frozen": False, "layers": None, "epochs": 6, "ema": 0.5}
    settings |= {"lr": 5e-3, "layer_decay": 0.7}
    before = weights_hash(bench.encoder.state_dict())
    with frozen(bench.encoder):
        rows = by_name(Segmentation(**settings).run(bench))
    assert weights_hash(bench.encoder.state_dict()) == before
    assert rows["miou", ""].value > 0.8
    assert rows["miou", ""].feature == "fine-tuned layers 1, 1, 1, 2 pool=none norm=final"
    assert ("miou", "EMA") in rows
    state = bench.load_state("segmentation")["network"]
    assert not torch.equal(state["tokens.encoder.blocks.0.attn.qkv.weight"], bench.encoder.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("settings", [{}, {"decode_head": UPERNET, "frozen": False, "layers": None, "drop_path": 0.2}])
def test_interrupted_it_goes_on_to_the_same_result(tmp_path, settings):
    settings = EASY | {"epochs": 2, "scale": [0.5, 2.0]} | settings
    whole = Segmentation(**settings).run(make_bench(tmp_path / "whole"))

    with pytest.raises(KeyboardInterrupt):
        Segmentation(**settings).run(make_bench(tmp_path / "part", track=killed_after(6)))
    said = []
    assert Segmentation(**settings).run(make_bench(tmp_path / "part", say=said.append)) == whole
    assert said == ["segmentation: going on after step 4 of 8."]


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 7), (14, 14)])
def test_shapes_of_upernet(grid):
    head = UperNetHead(8, 4, 5, channels=6, auxiliary_channels=4)
    maps = [torch.randn(2, 8, *grid) for _ in range(4)]
    scores, auxiliary = head(maps)
    assert scores.shape == (2, 5, 4 * grid[0], 4 * grid[1])
    assert auxiliary.shape == (2, 5, *grid)
    assert head.weights == (1.0, 0.4)
    (scores,) = head.eval()(maps)
    assert scores.shape == (2, 5, 4 * grid[0], 4 * grid[1])
    (scores.sum()).backward()
    unused = {name.split(".")[0] for name, p in head.named_parameters() if p.grad is None}
    assert unused == {"auxiliary"}


def test_the_linear_head_by_hand():
    head = LinearHead(3, 2, 4).eval()
    nn.init.normal_(head.linear.weight)
    head.norm.running_mean.uniform_()
    head.norm.running_var.uniform_(0.5, 1)
    maps = [torch.randn(2, 3, 5, 6) for _ in range(2)]
    x = torch.cat(maps, 1).movedim(1, -1)
    x = (x - head.norm.running_mean) / (head.norm.running_var + 1e-5).sqrt()
    expected = x @ head.linear.weight[:, :, 0, 0].T
    torch.testing.assert_close(head(maps)[0].movedim(1, -1), expected)


@pytest.mark.parametrize("norm", [True, False])
def test_maps_are_the_patch_tokens_in_rows_and_columns(norm):
    encoder, images = tiny_encoder(image_size=(16, 24), num_registers=2).eval(), torch.randn(2, 3, 16, 24)
    maps = token_maps(encoder, images, [2, 1, 1], norm)
    blocks = list(encoder.iter_blocks(images))
    for layer, found in zip([2, 1, 1], maps, strict=True):
        tokens = encoder.final_norm(blocks[layer - 1]) if norm else blocks[layer - 1]
        assert found.shape == (2, 24, 4, 6)
        for row in range(4):
            for column in range(6):
                assert torch.equal(found[:, :, row, column], tokens[:, 3 + 6 * row + column])


def test_the_loss_by_hand():
    """A mean over all pixels: parts that ignore different numbers of them add up to the whole."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 3, 8, 8, generator=generator)
    mask = torch.randint(3, (4, 8, 8), generator=generator)
    mask[0] = mask[1, 3] = 255

    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = SimpleNamespace(weights=(1.0, 0.4))

        def forward(self, images):
            index = images[:, 0, 0, 0].long()
            return scores[index], -scores[index]

    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    none = torch.zeros(4, dtype=torch.int64)
    whole = segmentation_loss(Given(), SegmentationBatch(images, mask, none, none), 0)
    log_p, log_n = scores.log_softmax(1), (-scores).log_softmax(1)
    expected = 0.0
    for i, r, c in (mask != 255).nonzero().tolist():
        expected -= (log_p[i, mask[i, r, c], r, c] + 0.4 * log_n[i, mask[i, r, c], r, c]).item() / mask.numel()
    assert whole.item() == pytest.approx(expected, rel=1e-5)
    parts = [
        segmentation_loss(Given(), SegmentationBatch(images[s], mask[s], none[s], none[s]), 0).item()
        for s in (slice(0, 2), slice(2, 4))
    ]
    assert sum(parts) / 2 == pytest.approx(whole.item(), rel=1e-5)


def test_scores_of_every_pixel_of_images_of_any_size(tmp_path):
    """A network that reads off brightness: perfect but for bilinear edges, in windows and batches of any size."""

    class Bright(nn.Module):
        def forward(self, images):
            return (torch.stack([-images.mean(1), images.mean(1), torch.full_like(images[:, 0], -9)], 1),)

    bench = make_bench(tmp_path)
    data = Segmentation(**EASY)._module(bench, Halves())
    counts = image_counts(bench, Bright().eval(), data, 3)
    split = Halves().split("val")
    for i, row in enumerate(counts):
        image, mask = split.load(i)
        bright = (torch.tensor(list(image.convert("L").get_flattened_data())).view(mask.shape) > 125).long()
        assert torch.equal(row, pixel_counts(bright, mask, 3))
    assert mean_iou(counts.sum(0)).item() == 1.0
    assert torch.equal(image_counts(make_bench(tmp_path, batch_size=1), Bright().eval(), data, 3), counts)
    few = image_counts(make_bench(tmp_path, num_val=4), Bright().eval(), data, 3)
    assert torch.equal(few, counts[[0, 3, 6, 9]])


def test_as_many_training_images_as_asked_for(tmp_path):
    bench = make_bench(tmp_path, num_train=16)
    data = Segmentation(**EASY)._module(bench, Halves())
    assert data.num_train == 16
    assert data.steps_per_epoch == 2
    assert torch.equal(data.dataset.split("train").load(3)[1], Halves().split("train").load(6)[1])
    assert len(data.dataset.split("val")) == 12


def test_the_embedded_data_set_brings_its_masks(tmp_path):
    dataset = Shapes(num_train=16, num_val=4, image_size=16)
    rows = by_name(Segmentation(**EASY | {"epochs": 1}).run(make_bench(tmp_path, dataset)))
    assert rows["miou", ""].num_images == 4
    assert ("iou", "background") in rows


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 33}, r"eval\.batch_size=33 is too large"),
        ({"batch_size": 4, "accumulate": 4}, r"eval\.batch_size=4 is too small: BatchNorm"),
        ({"layers": [3]}, r"layer=3 .* 1 \.\.\. 2"),
        ({"decode_head": UPERNET, "layers": [1, 2]}, r"eval\.layers names 2 blocks"),
    ],
)
def test_mistakes_are_sentences(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        Segmentation(**EASY | settings).run(make_bench(tmp_path))


def test_data_without_masks_is_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="masks"):
        Segmentation(**EASY).run(make_bench(tmp_path, dataset=SimpleNamespace(classes=["a", "b"])))


@pytest.mark.parametrize(("depth", "expected"), [(12, [4, 6, 8, 12]), (24, [8, 12, 16, 24]), (1, [1, 1, 1, 1])])
def test_blocks_of_upernet_are_the_official_ones(depth, expected):
    spec = tiny_encoder(depth=1).spec
    spec = type(spec)(**vars(spec) | {"depth": depth})
    assert Segmentation(**EASY | {"layers": None})._layers(spec) == expected


@pytest.mark.parametrize("name", ["segmentation_linear", "segmentation_upernet"])
def test_the_recipes_fit_together(name, tmp_path):
    config = compose([f"eval={name}", "checkpoint=x"], "evaluate").eval
    recipe = instantiate(config)
    assert isinstance(recipe, Segmentation)
    assert recipe.frozen == (name == "segmentation_linear")
    network = recipe._network(make_bench(tmp_path), 5).train()
    assert len(network(random_batch(2).image)) == len(network.head.weights)


def test_the_official_recipes():
    """Steps, warm-up and peak of mmsegmentation's configurations for ADE20K's 20,210 training images."""
    for name, steps in (("linear", 40_000), ("upernet", 160_000)):
        config = compose([f"eval=segmentation_{name}_ade20k", "checkpoint=x"], "evaluate").eval
        with pytest.raises(ConfigError, match=r"data\.root=null .* ADEChallengeData2016"):
            instantiate(config)
        config.data = None
        recipe = instantiate(config)
        per_epoch = 20_210 // recipe.batch_size
        assert recipe.epochs * per_epoch == pytest.approx(steps, rel=0.02)
        assert recipe.warmup_epochs * per_epoch == pytest.approx(1500, rel=0.02)
        assert recipe.peak_lr == {"linear": 1e-3, "upernet": 7e-4}[name]


def test_other_masks_can_be_named(tmp_path):
    target = "harmonize.data.segmentation.PascalVOC"
    config = compose(
        ["eval=segmentation_linear", "checkpoint=x", f"eval.data={{_target_: {target}, root: {tmp_path}}}"], "evaluate"
    )
    with pytest.raises(ConfigError, match=r"data\.root=.* has no folder JPEGImages"):
        instantiate(config.eval)
