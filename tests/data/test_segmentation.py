import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from harmonize.data.datasets import Folder
from harmonize.data.segmentation import ADE20K, IGNORE_INDEX, PascalVOC, SegmentationSet, ShapesMasks
from harmonize.data.segmentation_module import SegmentationModule
from harmonize.data.segmentation_views import (
    SegmentationTraining,
    SlidingWindows,
    covering_size,
    distort_colours,
    label_map,
)
from harmonize.data.shapes import SHAPES, Shapes
from harmonize.data.views import to_tensor
from harmonize.types import ConfigError


def mask_of(index, height=20, width=30):
    """Values 0 ... 150 that tell where they are."""
    return ((np.arange(height)[:, None] + np.arange(width) * 5 + index) % 151).astype(np.uint8)


def image_of(index, height=20, width=30):
    """Its red channel is the mask."""
    rng = np.random.default_rng(index)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[..., 0] = mask_of(index, height, width)
    return Image.fromarray(pixels)


@pytest.fixture
def ade(tmp_path):
    """In the format of ADEChallengeData2016: JPEG images, one-channel PNG masks."""
    root = tmp_path / "ADEChallengeData2016"
    for part, letter, num in (("training", "train", 6), ("validation", "val", 5)):
        for kind in ("images", "annotations"):
            (root / kind / part).mkdir(parents=True)
        for i in range(1, num + 1):
            name = f"ADE_{letter}_{i:08d}"
            image_of(i).save(root / "images" / part / f"{name}.jpg", quality=95)
            Image.fromarray(mask_of(i)).save(root / "annotations" / part / f"{name}.png")
    return root


def palette():
    colours = np.random.default_rng(0).integers(0, 256, 768).tolist()
    colours[-3:] = [224, 224, 192]
    return colours


@pytest.fixture
def voc(tmp_path):
    """In the format of Pascal VOC 2012: palette PNG masks with 255 for borders, and lists of names."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    names = {"train": ["2007_000032", "2007_000039", "2007_000063"], "val": ["2007_000033", "2007_000042"]}
    for split, listed in names.items():
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(listed) + "\n")
        for i, name in enumerate(listed):
            image_of(i).save(root / "JPEGImages" / f"{name}.jpg")
            values = (mask_of(i) % 21).astype(np.uint8)
            values[:2] = 255
            mask = Image.fromarray(values)
            mask.putpalette(palette())
            assert mask.mode == "P"
            mask.save(root / "SegmentationClass" / f"{name}.png")
    image_of(9).save(root / "JPEGImages" / "2008_000001.jpg")  # of the detection task, without a mask
    return root


# ---- data sets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("above", [False, True])
def test_ade20k(ade, above):
    data = ADE20K(str(ade.parent if above else ade))
    assert isinstance(data, SegmentationSet)
    assert data.classes[0] == "class 1"
    assert len(data.classes) == 150
    assert [len(data.split(name)) for name in ("train", "val")] == [6, 5]
    split = pickle.loads(pickle.dumps(data.split("val")))
    image, mask = split.load(1)
    assert split.name(1).endswith("images/validation/ADE_val_00000002.jpg")
    assert (image.mode, image.size, mask.shape, mask.dtype) == ("RGB", (30, 20), (20, 30), torch.int64)
    stored = torch.from_numpy(mask_of(2)).long()
    assert torch.equal(mask, torch.where(stored == 0, IGNORE_INDEX, stored - 1))
    assert (stored == 0).any()
    assert (stored == 150).any()


def test_ade20k_takes_the_names_of_its_own_table(ade):
    rows = [f"{i}\t0.1\t10\t1\t1\tthing {i}, other" for i in range(1, 151)]
    (ade / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]) + "\n")
    assert ADE20K(str(ade)).classes[:2] == ["thing 1, other", "thing 2, other"]


@pytest.mark.parametrize("above", [0, 1, 2])
def test_pascal_voc(voc, above):
    data = PascalVOC(str([voc, voc.parent, voc.parent.parent][above]))
    assert isinstance(data, SegmentationSet)
    assert (len(data.classes), data.classes[0], data.classes[15], data.classes[20]) == (
        21,
        "background",
        "person",
        "tvmonitor",
    )
    assert [len(data.split(name)) for name in ("train", "val")] == [3, 2]
    image, mask = data.split("val").load(1)
    assert image.size == (30, 20)
    assert (mask[:2] == IGNORE_INDEX).all()
    assert torch.equal(mask[2:], torch.from_numpy(mask_of(1) % 21).long()[2:])


def test_shapes_have_a_background_and_a_class_per_silhouette():
    shapes = Shapes(num_train=12, num_val=12, image_size=32)
    data = ShapesMasks(shapes)
    assert data.classes == ["background", *SHAPES]
    split = data.split("val")
    for index in range(12):
        image, mask = split.load(index)
        assert np.array_equal(image, shapes.split("val").load(index)[0])
        assert torch.equal(mask, shapes.split("val").mask(index))
        assert set(mask.unique().tolist()) == {0, 1 + shapes.split("val").factors(index)[0]}
    assert split.name(3) == shapes.split("val").name(3)


def test_other_data_have_no_masks(tmp_path):
    image_of(0).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="data has no masks: data=shapes has, or give a folder in the layout of"):
        ShapesMasks(Folder(str(tmp_path)))


@pytest.mark.parametrize("kind", [ADE20K, PascalVOC])
def test_a_missing_folder_is_named(kind, tmp_path):
    with pytest.raises(ConfigError, match=r"^eval.data.root=null is not possible: give the unpacked (ADE|VOC)"):
        kind(None)
    with pytest.raises(ConfigError, match=r"^eval.data.root=/nowhere does not exist: give the unpacked"):
        kind("/nowhere")
    with pytest.raises(ConfigError, match=r"has no folder (images/training|JPEGImages): give the unpacked .* holds"):
        kind(str(tmp_path))


def test_missing_parts_of_ade20k_are_named(ade):
    (ade / "annotations/training/ADE_train_00000004.png").unlink()
    with pytest.raises(
        ConfigError, match=r"holds 1 images without a mask: .*00000004.png is needed for .*00000004.jpg"
    ):
        ADE20K(str(ade)).split("train")
    for path in (ade / "images" / "validation").iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match=r"holds no image in .*images/validation: give the unpacked"):
        ADE20K(str(ade)).split("val")
    for path in (ade / "annotations" / "validation").iterdir():
        path.unlink()
    (ade / "annotations" / "validation").rmdir()
    with pytest.raises(ConfigError, match="has no folder annotations/validation: give"):
        ADE20K(str(ade))


def test_missing_parts_of_pascal_voc_are_named(voc):
    (voc / "SegmentationClass" / "2007_000039.png").unlink()
    with pytest.raises(ConfigError, match=r"holds 1 images without a mask: .*SegmentationClass/2007_000039.png"):
        PascalVOC(str(voc)).split("train")
    (voc / "JPEGImages" / "2007_000033.jpg").unlink()
    with pytest.raises(ConfigError, match=r"lacks 1 images of .*val.txt: .*2007_000033.jpg is needed"):
        PascalVOC(str(voc)).split("val")
    (voc / "ImageSets" / "Segmentation" / "train.txt").write_text("\n")
    with pytest.raises(ConfigError, match=r"holds an empty .*train.txt"):
        PascalVOC(str(voc)).split("train")
    (voc / "ImageSets" / "Segmentation" / "val.txt").unlink()
    with pytest.raises(ConfigError, match=r"has no ImageSets/Segmentation/val.txt: give"):
        PascalVOC(str(voc))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_wrong_masks_are_one_sentence(ade, voc, num_workers):
    def message(data, index):
        loader = SegmentationModule(data, 16, 1, num_workers=num_workers).window_loader("train", [index])
        with pytest.raises(ConfigError) as error:
            next(iter(loader))
        assert "\n" not in str(error.value)
        return str(error.value)

    annotations = ade / "annotations" / "training"
    Image.fromarray(np.full((20, 30), 151, np.uint8)).save(annotations / "ADE_train_00000001.png")
    Image.fromarray(mask_of(0, 20, 20)).save(annotations / "ADE_train_00000002.png")
    Image.new("RGB", (30, 20)).save(annotations / "ADE_train_00000003.png")
    (annotations / "ADE_train_00000004.png").write_bytes(b"damaged")
    (ade / "images" / "training" / "ADE_train_00000005.jpg").write_bytes(b"damaged")
    data, root = ADE20K(str(ade)), f"eval.data.root={ade} holds"
    masks = [annotations / f"ADE_train_{i:08d}.png" for i in range(1, 6)]
    assert message(data, 0) == f"{root} a mask with the value 151, {masks[0]}: 0 to 150 are allowed"
    assert message(data, 1) == f"{root} {masks[1]} of 20 x 20 px for an image of 30 x 20 px"
    assert message(data, 2) == f"{root} the mask {masks[2]}, which is in mode RGB: one 8-bit number per pixel is needed"
    assert message(data, 3).startswith(f"{root} the mask {masks[3]}, which cannot be read (")
    assert message(data, 4).startswith(f"{root} {ade}/images/training/ADE_train_00000005.jpg, which cannot be read: ")
    mask = Image.fromarray(np.full((20, 30), 21, np.uint8))
    mask.save(voc / "SegmentationClass" / "2007_000032.png")
    assert "value 21" in message(PascalVOC(str(voc)), 0)
    assert message(PascalVOC(str(voc)), 0).endswith("0 to 20, and 255 for borders, are allowed")


# ---- views -----------------------------------------------------------------------------------------------------------


def test_image_and_mask_stay_together():
    """Where the red channel was the class, it still is, after scaling, cropping and flipping."""
    height = width = 120
    blocks = (np.arange(height)[:, None] // 40 * 3 + np.arange(width) // 40).astype(np.uint8)
    pixels = np.stack([blocks * 20, np.tile(np.arange(width), (height, 1)), np.zeros_like(blocks)], -1)
    image, mask = Image.fromarray(pixels.astype(np.uint8)), torch.from_numpy(blocks).long()
    augment, flipped, padded = SegmentationTraining(48, photometric=False), 0, 0
    for seed in range(60):
        torch.manual_seed(seed)
        view, target = augment(image, mask)
        assert (view.shape, view.dtype) == ((3, 48, 48), torch.float32)
        assert (target.shape, target.dtype) == ((48, 48), torch.int64)
        inside = target != IGNORE_INDEX
        red, green = (view[:2] * torch.tensor([0.229, 0.224])[:, None, None]).add(
            torch.tensor([0.485, 0.456])[:, None, None]
        ) * 255
        away = torch.ones_like(inside)  # from the borders of the blocks, where bilinear and nearest differ
        for shift in (-1, 1):
            for dim in (0, 1):
                away &= target.roll(shift, dim) == target
        agree = (red / 20).round().long() == target
        assert agree[inside & away].float().mean() > 0.97
        assert (view[:, ~inside] == 0).all()
        flipped += (green[0, 1] > green[0, 5]).item()
        padded += (~inside).any().item()
        rows = inside.any(1)
        assert rows[: int(rows.sum())].all()  # padding is below and at the right
    assert 15 < flipped < 45
    assert 10 < padded < 35  # scales below 1: a third of U(0.5, 2)


def test_no_class_fills_the_crop_where_that_can_be_helped():
    mask = torch.zeros(100, 400, dtype=torch.int64)
    mask[:, 300:] = torch.arange(100) // 10 + 1
    image = Image.new("RGB", (400, 100))
    shares = {}
    for limit in (0.75, 1.0):
        augment, dull = SegmentationTraining(50, (1, 1), limit), 0
        for seed in range(100):
            torch.manual_seed(seed)
            target = augment(image, mask)[1]
            dull += torch.bincount(target.flatten()).max().item() >= 0.75 * target.numel()
        shares[limit] = dull
    assert shares[1.0] > 50
    assert shares[0.75] < 10
    only = torch.full((50, 50), IGNORE_INDEX)
    assert (SegmentationTraining(50)(Image.new("RGB", (50, 50)), only)[1] == IGNORE_INDEX).all()


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1), (37, 500)])
@pytest.mark.parametrize("crop", [32, (32, 48)])
def test_extreme_shapes_are_fine(size, crop):
    image, mask = Image.new("RGB", size), torch.zeros(size[1], size[0], dtype=torch.int64)
    h, w = (crop, crop) if isinstance(crop, int) else crop
    view, target = SegmentationTraining(crop)(image, mask)
    assert (view.shape, target.shape) == ((3, h, w), (h, w))
    windows = SlidingWindows(crop)(image)
    assert len(windows) < 20
    assert windows.image.shape == (len(windows), 3, h, w)
    assert windows.merge(torch.ones(len(windows), 2, h, w)).shape == (2, *windows.size)


def test_the_views_are_functions_of_the_seed():
    image, mask = image_of(1, 60, 90), torch.from_numpy(mask_of(1, 60, 90)).long()
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(SegmentationTraining(32)(image, mask))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not torch.equal(results[0][0], results[2][0])


def test_colours_are_distorted_within_their_ranges():
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    reached, unchanged = [], 0
    for seed in range(400):
        torch.manual_seed(seed)
        pixel = np.asarray(distort_colours(grey))[0, 0].tolist()
        assert max(pixel) - min(pixel) <= 1  # grey has no hue and no saturation
        reached.append(pixel[0])
        unchanged += pixel[0] == 100
    assert min(reached) >= (100 - 32) / 2 - 1
    assert max(reached) <= (100 + 32) * 1.5 + 1
    assert min(reached) < 50
    assert max(reached) > 150
    assert 70 < unchanged < 130  # neither brightness nor contrast: a quarter
    bright = Image.new("RGB", (4, 4), (250, 3, 250))
    hues = set()
    for seed in range(200):
        torch.manual_seed(seed)
        distorted = np.asarray(distort_colours(bright).convert("HSV"))[0, 0]
        hues.add(int(distorted[0]))
        assert distorted[2] > 100  # clipped, not wrapped round
    assert min(hues) == pytest.approx(213 - 26, abs=5)
    assert max(hues) == pytest.approx(213 + 26, abs=5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SegmentationTraining(32, scale=(2, 1)), r"eval.scale=\[2, 1\]"),
        (lambda: SegmentationTraining(32, flip_prob=2), r"eval.flip_prob=2"),
        (lambda: SegmentationTraining(32, max_class_share=0), r"eval.max_class_share=0 is not possible"),
        (lambda: SlidingWindows(32, stride=0), r"eval.stride=0 is not possible"),
    ],
)
def test_impossible_parameters_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# ---- windows ---------------------------------------------------------------------------------------------------------


def test_windows_of_the_official_size():
    windows = SlidingWindows(512)(Image.new("RGB", (1000, 600)))
    assert windows.size == (512, 853)
    assert windows.places.tolist() == [[0, 0], [0, 341]]
    assert SlidingWindows(512)(Image.new("RGB", (600, 600))).places.tolist() == [[0, 0]]
    # the height is capped at 4 x 512: the width is then less than a window
    windows = SlidingWindows(512)(Image.new("RGB", (100, 1000)))
    assert windows.size == (2048, 205)
    assert windows.places[:, 0].tolist() == [0, 341, 682, 1023, 1364, 1536]


def test_merging_gives_the_image_back():
    image = image_of(0, 37, 90)
    windows = SlidingWindows(24)(image)
    width, height = covering_size(image.size, (24, 24))
    assert windows.size == (height, width) == (24, 58)
    resized = to_tensor(image.resize((width, height), Image.Resampling.BILINEAR))
    torch.testing.assert_close(windows.merge(windows.image), resized)
    strip = Image.new("RGB", (400, 10), (9, 99, 199))
    torch.testing.assert_close((cut := SlidingWindows(24)(strip)).merge(cut.image)[:, 0, 0], cut.image[0, :, 0, 0])


def test_overlaps_are_averaged():
    windows = SlidingWindows(6)(Image.new("RGB", (10, 6)))
    assert windows.places.tolist() == [[0, 0], [0, 4]]
    logits = torch.stack([torch.full((1, 6, 6), 1.0), torch.full((1, 6, 6), 3.0)])
    assert windows.merge(logits)[0, 0].tolist() == [1, 1, 1, 1, 2, 2, 3, 3, 3, 3]


@pytest.mark.parametrize("num_classes", [2, 16, 40])
def test_label_maps_are_argmax_at_full_size(num_classes):
    logits = torch.randn(num_classes, 7, 9, generator=torch.Generator().manual_seed(0))
    full = torch.nn.functional.interpolate(logits[None], (31, 50), mode="bilinear", align_corners=False)[0]
    assert torch.equal(label_map(logits, (31, 50)), full.argmax(0))


# ---- loaders ---------------------------------------------------------------------------------------------------------


def module(ade, **options):
    return SegmentationModule(ADE20K(str(ade)), 16, **{"batch_size": 2, **options})


def same(first, second):
    return len(first) == len(second) > 0 and all(
        torch.equal(getattr(a, field), getattr(b, field))
        for a, b in zip(first, second, strict=True)
        for field in ("image", "mask", "index", "seed")
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_batches_are_functions_of_seed_epoch_and_index(ade, num_workers):
    data = module(ade, num_workers=num_workers, seed=4)
    assert (data.num_train, data.steps_per_epoch, len(data.classes)) == (6, 3, 150)
    state = torch.get_rng_state()
    batches = list(data.train_loader(epoch=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(batches, list(module(ade, seed=4).train_loader(epoch=1)))
    assert same(batches[1:], list(module(ade, seed=4).train_loader(epoch=1, start=1)))
    assert not same(batches, list(module(ade, seed=4).train_loader(epoch=0)))
    assert not same(batches, list(module(ade, seed=5).train_loader(epoch=1)))
    assert sorted(index for batch in batches for index in batch.index.tolist()) == list(range(6))
    assert batches[0].image.shape == (2, 3, 16, 16)
    assert batches[0].mask.shape == (2, 16, 16)
    assert len(batches[0].apply(lambda tensor: tensor[:1])) == 1


@pytest.mark.parametrize("options", [{"world_size": 2}, {"accumulate": 2}])
def test_ranks_and_micro_batches_share_a_batch(ade, options):
    whole = list(module(ade).train_loader())
    parts = [list(module(ade, rank=rank, **options).train_loader()) for rank in range(options.get("world_size", 1))]
    if "accumulate" in options:
        parts = [parts[0][::2], parts[0][1::2]]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(batch.image, torch.cat([share.image for share in shares]))
        assert torch.equal(batch.mask, torch.cat([share.mask for share in shares]))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_windows_of_every_image_once_over_the_ranks(ade, batch_size):
    seen = []
    for rank in (0, 1):
        data = module(ade, world_size=2, rank=rank)
        for batch in data.window_loader("val", batch_size=batch_size):
            assert len(batch.image) == sum(map(len, batch.windows))
            assert len(batch) == len(batch.mask) <= batch_size
            for merged, mask, index in zip(batch.merge(batch.image), batch.mask, batch.index.tolist(), strict=True):
                image, expected = data.dataset.split("val").load(index)
                assert torch.equal(mask, expected)
                assert merged.shape == (3, 16, 24)
                torch.testing.assert_close(merged, to_tensor(image.resize((24, 16), Image.Resampling.BILINEAR)))
            assert torch.equal(batch.apply(lambda tensor: tensor + 1).index, batch.index + 1)
            seen += batch.index.tolist()
    assert sorted(seen) == list(range(5))
    chosen = [batch.index.tolist() for batch in module(ade).window_loader("train", [4, 1])]
    assert chosen == [[4], [1]]


def test_shapes_train_without_distorted_colours():
    data = SegmentationModule(ShapesMasks(Shapes(num_train=24, num_val=12, image_size=32)), 32, 12)
    assert not data._augment.photometric
    batch = next(iter(data.train_loader()))
    assert batch.image.shape == (12, 3, 32, 32)
    assert set(batch.mask.unique().tolist()) <= {*range(13), IGNORE_INDEX}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 8}, "data.batch_size=8 is too large: the training split has 6 images"),
        ({"batch_size": 3, "world_size": 2}, "data.batch_size=3 is not possible: a multiple of 2"),
        ({"num_workers": -1}, "data.num_workers=-1"),
    ],
)
def test_impossible_settings_are_named(ade, options, message):
    with pytest.raises(ConfigError, match=message):
        module(ade, **options)
