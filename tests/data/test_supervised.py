# ruff: noqa: NPY002 (the global generators, which timm draws from, are what is tested)
import math
import pickle
import random

import numpy as np
import pytest
import timm.data.mixup
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torchvision import transforms as v1

from harmonize.data.supervised import (
    CropFlip,
    FineTuning,
    Mix,
    Mixing,
    cut_box,
    mix_images,
    posterize,
    python_and_numpy_seeded,
)
from harmonize.data.views import to_tensor
from harmonize.types import ConfigError


@pytest.fixture(scope="module")
def photo():
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((100, 80))
    return Image.fromarray((np.asarray(coarse) + rng.normal(0, 20, (80, 100, 3))).clip(0, 255).astype(np.uint8))


def seeded(recipe, image, seed=0):
    torch.manual_seed(seed)
    (view,) = recipe(image)
    return view


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_posterize_is_pillows_but_for_0_bits_which_are_black(photo):
    for bits in range(1, 9):
        assert np.array_equal(posterize(photo, bits), ImageOps.posterize(photo, bits))
    assert not np.asarray(posterize(photo, 0)).any()
    strongest = FineTuning(32, randaugment="rand-m10-n2-inc1", erasing_prob=0.0)
    for seed in range(60):  # some of these draw 0 bits
        seeded(strongest, photo, seed)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_flip_is_torchvisions(photo, interpolation):
    theirs = v1.Compose(
        [v1.RandomResizedCrop(32, interpolation=v1.InterpolationMode(interpolation)), v1.RandomHorizontalFlip()]
    )
    recipe = CropFlip(32, interpolation=interpolation)
    for seed in range(20):
        view = seeded(recipe, photo, seed)
        torch.manual_seed(seed)
        assert torch.equal(view, to_tensor(theirs(photo)))


def test_the_crop_of_mae_by_hand(photo):
    """One draw of area and log ratio, sides cut to those of the image."""
    recipe, cut = CropFlip(32, (0.5, 1.0), "bicubic", "mae"), 0
    for seed in range(60):
        view = seeded(recipe, photo, seed)
        torch.manual_seed(seed)
        area = 100 * 80 * torch.empty(1).uniform_(0.5, 1.0).item()
        ratio = math.exp(torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3)).item())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        cut += w > 100 or h > 80
        w, h = min(w, 100), min(h, 80)
        top = torch.randint(0, 80 - h + 1, ()).item()
        left = torch.randint(0, 100 - w + 1, ()).item()
        image = photo.crop((left, top, left + w, top + h)).resize((32, 32), Image.Resampling.BICUBIC)
        image = ImageOps.mirror(image) if torch.rand(1) < 0.5 else image
        assert torch.equal(view, to_tensor(image))
    assert cut > 5  # torchvision would have drawn again in these cases


def test_the_steps_of_fine_tuning_are_those_of_timms_own_recipe():
    """timm's ``create_transform``, by which all official fine-tuning recipes make theirs, has the same parameters."""
    theirs = create_transform(
        input_size=48, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic",
        re_prob=0.25, re_mode="pixel", re_count=1, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    by_type = {type(step).__name__: step for step in theirs.transforms}
    ours = FineTuning(48)
    assert len(ours.augment.ops) == len(by_type["RandAugment"].ops) == 15
    for mine, other in zip(ours.augment.ops, by_type["RandAugment"].ops, strict=True):
        replaced = {"aug_fn": posterize} if mine.name.startswith("Posterize") else {}
        assert vars(mine) == vars(other) | replaced
    assert ours.augment.num_layers == by_type["RandAugment"].num_layers
    assert ours.augment.ops[0].hparams["translate_const"] == 21
    assert ours.augment.ops[0].hparams["img_mean"] == (124, 116, 104)
    mine, other = vars(ours.erase), vars(by_type["RandomErasing"])
    assert mine == other
    crop = by_type["RandomResizedCropAndInterpolation"]
    assert (crop.scale, crop.ratio) == (ours.cut.transforms[0].scale, ours.cut.transforms[0].ratio)


@pytest.mark.parametrize("size", [32, 64, (32, 48)])
def test_translations_scale_with_the_image(photo, size):
    """Every operation moves the image by 45 % of its side at most."""
    recipe = FineTuning(size, erasing_prob=0.0)
    shift = next(op for op in recipe.augment.ops if op.name == "TranslateXRel")
    width = size if isinstance(size, int) else size[1]
    image = Image.new("RGB", (width, width), "white")
    shift.prob, shift.magnitude_std, shift.magnitude = 1.0, 0, 10
    random.seed(0)
    filled = (np.asarray(shift(image))[0, :, 0] == 124).mean()
    assert filled == pytest.approx(0.45, abs=1.5 / width)


@pytest.mark.parametrize(
    "recipe",
    [
        CropFlip(32),
        CropFlip((24, 40), crop="mae"),
        FineTuning(32),
        FineTuning(32, randaugment=None, color_jitter=0.4, erasing_prob=1.0),
    ],
)
def test_recipes_are_functions_of_torchs_generator_alone(photo, recipe):
    random.seed(1)
    np.random.seed(1)
    states = random.getstate(), np.random.get_state()
    views = [seeded(recipe, photo, seed) for seed in range(20)]
    assert random.getstate() == states[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))
    random.seed(2)
    np.random.seed(2)
    again = pickle.loads(pickle.dumps(recipe))
    for seed, view in enumerate(views):
        assert torch.equal(seeded(again, photo, seed), view)
        assert view.dtype == torch.float32
        assert view.shape in {(3, 32, 32), (3, 24, 40)}
    assert not torch.equal(views[0], views[1])


def test_the_states_come_back_after_an_error():
    states = random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(ZeroDivisionError), python_and_numpy_seeded():
        random.random() / (0 * np.random.random())
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])


def test_what_comes_after_the_recipe_does_not_depend_on_what_it_drew(photo):
    """timm draws a varying number of values: torch's generator must be left alone between images."""
    recipe = FineTuning(32, erasing_prob=0.5)
    erased = [seeded(recipe, Image.new("RGB", (32, 32), "white"), seed).std() > 0.3 for seed in range(100)]
    assert 20 < sum(erased) < 90


def test_erasing_is_noise_of_its_own_in_every_pixel():
    recipe = FineTuning(64, randaugment=None, erasing_prob=1.0, flip_prob=0.0)
    view = seeded(recipe, Image.new("RGB", (64, 64)), 3)
    black = to_tensor(Image.new("RGB", (1, 1)))
    erased = (view != black).all(0)
    assert 0.015 < erased.float().mean() < 0.34
    rows, columns = erased.any(1), erased.any(0)
    assert erased.sum() == rows.sum() * columns.sum()  # one rectangle
    values = view[:, erased]
    assert values.std().item() == pytest.approx(1, abs=0.1)
    assert len(values.unique()) > 0.99 * values.numel()


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1)])
def test_extreme_shapes_are_fine(size):
    for recipe in (CropFlip(16), CropFlip(16, crop="mae"), FineTuning(16)):
        assert seeded(recipe, Image.new("RGB", size)).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CropFlip(32, crop="byol"), "eval.augment.crop=byol is not known: torchvision or mae"),
        (lambda: CropFlip(32, interpolation="box"), "eval.augment.interpolation=box"),
        (lambda: CropFlip(32, crop_scale=(0, 1)), "eval.augment.crop_scale"),
        (lambda: CropFlip(32, flip_prob=2), "eval.augment.flip_prob=2"),
        (lambda: FineTuning(32, erasing_prob=-1), "eval.erasing_prob=-1"),
        (lambda: FineTuning(32, randaugment="m9"), "eval.randaugment=m9 is not known"),
        (lambda: FineTuning(32, randaugment="rand-x9"), "eval.randaugment=rand-x9 is not known"),
        (lambda: FineTuning(32, color_jitter=0.4), "eval.color_jitter=0.4 is not possible beside"),
        (lambda: FineTuning(32, None, color_jitter=-0.4), "eval.color_jitter=-0.4"),
        (lambda: Mixing(10, mixup=-1), "eval.mixup=-1"),
        (lambda: Mixing(10, cutmix=math.inf), "eval.cutmix=inf"),
        (lambda: Mixing(10, prob=1.5), "eval.mix_prob=1.5"),
        (lambda: Mixing(10, smoothing=-0.1), "eval.smoothing=-0.1"),
    ],
)
def test_impossible_parameters_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# ---- mixing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 12, 16, generator=generator), torch.tensor([0, 4, 2, 2, 1, 3])


@pytest.mark.parametrize("cutmix", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.37, 0.9, 1.0])
def test_mixing_is_timms_for_the_same_draw(batch, monkeypatch, cutmix, share):
    images, labels = batch
    mix = cut_box(share, 3, 9, 12, 16) if cutmix else Mix(share)
    monkeypatch.setattr(timm.data.mixup.Mixup, "_params_per_batch", lambda self: (share, cutmix))
    centre = iter([3, 9])
    monkeypatch.setattr(timm.data.mixup.np.random, "randint", lambda *a, **k: next(centre))
    expected, targets = timm.data.mixup.Mixup(label_smoothing=0.1, num_classes=5)(images.clone(), labels)
    mixing, before = Mixing(5), images.clone()
    monkeypatch.setattr(mixing, "draw", lambda *_: mix)
    mixed, soft = mixing(images, labels, seed=0)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=0)
    torch.testing.assert_close(soft, targets, rtol=0, atol=1e-7)
    assert torch.equal(images, before)
    torch.testing.assert_close(soft.sum(1), torch.ones(6))


def test_the_share_is_that_of_the_pixels(batch):
    images, _ = batch
    for seed in range(200):
        mix = Mixing(5, mixup=0).draw(seed, 12, 16)
        kept = (mix_images(images, mix) == images).float().mean().item()
        assert kept == pytest.approx(mix.share, abs=1e-6)
        top, bottom, left, right = mix.box
        assert 0 <= top <= bottom <= 12
        assert 0 <= left <= right <= 16


def test_draws_follow_the_beta_distributions():
    draws = [Mixing(5).draw(seed, 32, 32) for seed in range(4000)]
    mixup = np.array([mix.share for mix in draws if mix.box is None])
    assert len(mixup) == pytest.approx(2000, abs=130)
    assert mixup.mean() == pytest.approx(0.5, abs=0.03)
    assert mixup.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01)  # of Beta(.8, .8)
    boxes = [mix.box for mix in draws if mix.box is not None]
    inside = [(b - t) * (r - w) for t, b, w, r in boxes if t > 0 and b < 32 and w > 0 and r < 32]
    assert min(inside) < 30
    assert {mix.box is None for mix in draws[:20]} == {True, False}
    always = [Mixing(5, mixup=0).draw(seed, 32, 32).box for seed in range(50)]
    never = [Mixing(5, cutmix=0).draw(seed, 32, 32).box for seed in range(50)]
    assert None not in always
    assert set(never) == {None}
    seldom = [Mixing(5, prob=0.25).draw(seed, 32, 32).share < 1 for seed in range(2000)]
    assert np.mean(seldom) == pytest.approx(0.25, abs=0.04)


def test_mixing_is_a_function_of_the_seed_alone(batch):
    images, labels = batch
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first, again, other = (Mixing(5)(images, labels, seed) for seed in (2**63 - 1, 2**63 - 1, 5))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("num", [1, 5])
@pytest.mark.parametrize("options", [{"mixup": 0}, {"cutmix": 0}])
def test_odd_batches(batch, num, options):
    images, labels = batch[0][:num], batch[1][:num]
    mixed, targets = Mixing(5, **options)(images, labels, seed=0)
    middle = num // 2
    torch.testing.assert_close(mixed[middle], images[middle])
    torch.testing.assert_close(targets[middle], Mixing(5).targets(labels)[middle])
    torch.testing.assert_close(targets.sum(1), torch.ones(num))


@pytest.mark.parametrize("options", [{"prob": 0}, {"mixup": 0, "cutmix": 0}])
def test_without_mixing_smoothing_is_left(batch, options):
    images, labels = batch
    mixed, targets = Mixing(5, smoothing=0.2, **options)(images, labels, seed=1)
    assert mixed is images
    expected = torch.full((6, 5), 0.04)
    expected[torch.arange(6), labels] = 0.84
    torch.testing.assert_close(targets, expected)
    plain = Mixing(5, smoothing=0.0, **options)(images, labels, seed=1)[1]
    assert torch.equal(plain, torch.nn.functional.one_hot(labels, 5).float())
