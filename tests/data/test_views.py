import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision import transforms as v1

from harmonize.data.views import MAE, Evaluation, GaussianBlur, MoCoV3, SimMIM
from harmonize.types import IMAGE_MEAN, IMAGE_STD, ConfigError


@pytest.fixture(scope="module")
def photo():
    """An image with structure at all scales and in all colours, larger than the views."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (100, 80), Image.Resampling.BICUBIC
    )
    fine = rng.normal(0, 20, (80, 100, 3))
    return Image.fromarray((np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8))


def pixels(view):
    """What the view was before normalisation, uint8 (h, w, 3)."""
    mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
    return (view.permute(1, 2, 0) * std + mean).mul(255).round().to(torch.uint8).numpy()


def normalised(image):
    """Straight from the definition, in fp64."""
    return (np.asarray(image).transpose(2, 0, 1) / 255 - np.array(IMAGE_MEAN)[:, None, None]) / np.array(IMAGE_STD)[
        :, None, None
    ]


def draw(low, high):
    return torch.empty(1).uniform_(low, high).item()


def crop_by_hand(image, size, scale, resample, ratio=(3 / 4, 4 / 3)):
    """Random resized crop, from its description: ten tries, then (not reached here) the centre."""
    width, height = image.size
    for _ in range(10):
        area = width * height * draw(*scale)
        aspect = math.exp(draw(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(0, height - h + 1, (1,)).item()
            left = torch.randint(0, width - w + 1, (1,)).item()
            return image.crop((left, top, left + w, top + h)).resize((size, size), resample)
    raise AssertionError("no crop fits")


def jitter_by_hand(image, brightness, contrast, saturation, hue):
    order = torch.randperm(4).tolist()
    factors = [draw(1 - strength, 1 + strength) for strength in (brightness, contrast, saturation)]
    shift = draw(-hue, hue)
    for step in order:
        if step < 3:
            image = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[step](image).enhance(
                factors[step]
            )
        else:
            h, s, v = image.convert("HSV").split()
            turned = np.asarray(h).astype(int) + int(shift * 255)
            image = Image.merge("HSV", (Image.fromarray((turned % 256).astype(np.uint8)), s, v)).convert("RGB")
    return image


def moco_view_by_hand(image, size, blur_prob, solarize_prob):
    image = crop_by_hand(image, size, (0.08, 1.0), Image.Resampling.BILINEAR)
    if torch.rand(1) < 0.8:
        image = jitter_by_hand(image, 0.4, 0.4, 0.2, 0.1)
    if torch.rand(1) < 0.2:
        image = image.convert("L").convert("RGB")
    if torch.rand(1) < blur_prob:
        image = image.filter(ImageFilter.GaussianBlur(radius=draw(0.1, 2.0)))
    if torch.rand(1) < solarize_prob:
        image = ImageOps.solarize(image, 128)
    if torch.rand(1) < 0.5:
        image = ImageOps.mirror(image)
    return normalised(image)


def test_moco_views_equal_a_pil_pipeline_by_hand(photo):
    recipe = MoCoV3(32)
    for seed in range(100):
        torch.manual_seed(seed)
        views = recipe(photo)
        torch.manual_seed(seed)
        expected = [moco_view_by_hand(photo, 32, 1.0, 0.0), moco_view_by_hand(photo, 32, 0.1, 0.2)]
        for view, by_hand in zip(views, expected, strict=True):
            assert view.dtype == torch.float32
            np.testing.assert_allclose(view.numpy(), by_hand, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("recipe", "scale", "resample"),
    [(SimMIM(32), (0.67, 1.0), Image.Resampling.BILINEAR), (MAE(32), (0.2, 1.0), Image.Resampling.BICUBIC)],
)
def test_mim_views_equal_a_pil_pipeline_by_hand(photo, recipe, scale, resample):
    for seed in range(50):
        torch.manual_seed(seed)
        (view,) = recipe(photo)
        torch.manual_seed(seed)
        image = crop_by_hand(photo, 32, scale, resample)
        image = ImageOps.mirror(image) if torch.rand(1) < 0.5 else image
        np.testing.assert_allclose(view.numpy(), normalised(image), rtol=0, atol=2e-6)


def test_views_equal_the_first_torchvision_transforms_bit_for_bit(photo):
    """The classes that the official code was written with (``ToTensor``, ``Normalize`` included)."""
    normalise = v1.Compose([v1.ToTensor(), v1.Normalize(IMAGE_MEAN, IMAGE_STD)])
    moco = [
        v1.Compose(
            [
                v1.RandomResizedCrop(32, scale=(0.08, 1.0)),
                v1.RandomApply([v1.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v1.RandomGrayscale(p=0.2),
                GaussianBlur((0.1, 2.0), blur),
                v1.RandomSolarize(128, p=solarize),
                v1.RandomHorizontalFlip(),
                normalise,
            ]
        )
        for blur, solarize in ((1.0, 0.0), (0.1, 0.2))
    ]
    bicubic = v1.InterpolationMode.BICUBIC
    official = {
        MoCoV3(32): moco,
        SimMIM(32): [v1.Compose([v1.RandomResizedCrop(32, scale=(0.67, 1.0)), v1.RandomHorizontalFlip(), normalise])],
        MAE(32): [
            v1.Compose(
                [
                    v1.RandomResizedCrop(32, scale=(0.2, 1.0), interpolation=bicubic),
                    v1.RandomHorizontalFlip(),
                    normalise,
                ]
            )
        ],
    }
    for recipe, views in official.items():
        for seed in range(30):
            torch.manual_seed(seed)
            ours = recipe(photo)
            torch.manual_seed(seed)
            for view, theirs in zip(ours, views, strict=True):
                assert torch.equal(view, theirs(photo))


def without(**options):
    """MoCo v3 with everything random turned off except what is named."""
    off = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "jitter_prob": 0.0, "gray_prob": 0.0}
    off |= {"blur_prob": (0.0, 0.0), "solarize_prob": (0.0, 0.0), "flip_prob": 0.0}
    return MoCoV3(16, **{**off, **options})


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("jitter_prob", 0.8, (0.8, 0.8)),
        ("gray_prob", 0.2, (0.2, 0.2)),
        ("blur_prob", (1.0, 0.1), (1.0, 0.1)),
        ("solarize_prob", (0.0, 0.2), (0.0, 0.2)),
        ("flip_prob", 0.5, (0.5, 0.5)),
    ],
)
def test_each_step_happens_as_often_as_it_should(photo, option, value, expected):
    square = photo.crop((0, 0, 16, 16))
    recipe, untouched, draws = (
        without(blur_sigma=(1.0, 2.0), **{option: value}),
        torch.from_numpy(normalised(square)).float(),
        600,
    )
    torch.manual_seed(0)
    changed = np.mean(
        [[not torch.allclose(view, untouched, atol=1e-5) for view in recipe(square)] for _ in range(draws)], 0
    )
    for share, prob in zip(changed, expected, strict=True):
        assert abs(share - prob) <= 4 * math.sqrt(prob * (1 - prob) / draws) + (0.01 if option == "jitter_prob" else 0)


def test_solarisation_comes_after_blur_and_grey_after_jitter(photo):
    square = photo.crop((0, 0, 16, 16))
    recipe = without(
        gray_prob=1.0, jitter_prob=1.0, blur_prob=(1.0, 1.0), blur_sigma=(1.5, 1.5), solarize_prob=(1.0, 1.0)
    )
    for seed in range(20):
        torch.manual_seed(seed)
        view = pixels(recipe(square)[0])
        assert (view[..., 0] == view[..., 1]).all()  # jitter after grey would bring colour back
        assert (view[..., 1] == view[..., 2]).all()
        assert view.max() < 128  # blur after solarisation keeps this too, the following does not
    black_and_white = Image.fromarray(np.kron([[0, 255], [255, 0]], np.ones((8, 8))).astype(np.uint8)).convert("RGB")
    recipe = without(blur_prob=(1.0, 1.0), blur_sigma=(1.5, 1.5), solarize_prob=(1.0, 1.0))
    # Solarised first, black and white would be black everywhere; blurred first, their borders stay.
    assert pixels(recipe(black_and_white)[0]).max() > 60


def test_blur_is_pils_and_its_radius_uniform(photo):
    square = photo.crop((0, 0, 64, 64))
    blur, radii = GaussianBlur((0.1, 2.0), 1.0), []
    torch.manual_seed(0)
    for _ in range(400):
        state = torch.get_rng_state()
        blurred = blur(square)
        torch.set_rng_state(state)
        torch.rand(1)
        radii.append(draw(0.1, 2.0))
        assert blurred.tobytes() == square.filter(ImageFilter.GaussianBlur(radius=radii[-1])).tobytes()
    assert np.mean(radii) == pytest.approx(1.05, abs=0.1)
    assert min(radii) < 0.2
    assert max(radii) > 1.9


def test_recipes_are_functions_of_the_seed(photo):
    for recipe in (MoCoV3(32), SimMIM(32), MAE(32)):
        results = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            results.append(torch.stack(recipe(photo)))
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])


def test_evaluation_view_is_resize_and_centre_crop(photo):
    view = Evaluation(28, 0.875)(photo)
    image = photo.resize((40, 32), Image.Resampling.BICUBIC).crop((6, 2, 34, 30))
    np.testing.assert_allclose(view.numpy(), normalised(image), rtol=0, atol=2e-6)
    square = photo.crop((0, 0, 32, 32))
    np.testing.assert_allclose(Evaluation(32, 1.0)(square).numpy(), normalised(square), rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 2), (1, 1), (5, 400)])
def test_extreme_shapes_are_fine(size):
    image = Image.new("RGB", size, "white")
    for recipe in (MoCoV3(32), SimMIM(32), MAE(32)):
        assert all(view.shape == (3, 32, 32) for view in recipe(image))
    assert Evaluation(32, 0.875)(image).amin().item() == pytest.approx((1 - IMAGE_MEAN[0]) / IMAGE_STD[0], rel=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoCoV3(32, crop_scale=(0.5, 1.5)), r"views.moco_v3.crop_scale=\[0.5, 1.5\]"),
        (lambda: MoCoV3(32, blur_prob=(1.0, 2.0)), "views.moco_v3.blur_prob=1.0, 2.0"),
        (lambda: MoCoV3(32, gray_prob=-1), "views.moco_v3.gray_prob=-1"),
        (lambda: MoCoV3(32, jitter=(0.4, 0.4)), "views.moco_v3.jitter"),
        (lambda: MoCoV3(32, blur_sigma=(2.0, 0.1)), "views.moco_v3.blur_sigma"),
        (lambda: SimMIM(32, interpolation="nearest"), "views.simmim.interpolation=nearest"),
        (lambda: MAE(32, flip_prob=float("nan")), "views.mae.flip_prob=nan"),
        (lambda: Evaluation(32, 0.0), "data.eval_crop=0.0"),
    ],
)
def test_impossible_parameters_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
