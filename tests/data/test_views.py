import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision import transforms as v1
from torchvision.transforms import v2

from harmonize.data.augmentation import Augmentation, RandomView
from harmonize.data.views import MAE, Evaluation, MoCoV3, SimMIM, augment_image, normalise, to_tensor
from harmonize.functional.seeding import mix
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


def sizes(image, num):
    return torch.full((num,), image.height), torch.full((num,), image.width)


def draw(recipe, image, num, seed=0):
    """Parameters of every view for ``num`` images like this one."""
    return recipe.draw(mix(seed, torch.arange(num)), *sizes(image, num))


def views_of(recipe, image, num, seed=0):
    """[view][row]: normalised tensors."""
    return [[augment_image(image, view, row) for row in range(num)] for view in draw(recipe, image, num, seed)]


# ---- one row of parameters, applied --------------------------------------------------------------------------------


def jitter_by_hand(image, step, factor):
    if step < 3:
        return (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[step](image).enhance(factor)
    h, s, v = image.convert("HSV").split()
    turned = np.asarray(h).astype(int) + int(factor * 255)
    return Image.merge("HSV", (Image.fromarray((turned % 256).astype(np.uint8)), s, v)).convert("RGB")


def view_by_hand(image, parameters, row):
    """A view with PIL alone, from the description of the parameters."""
    top, left, height, width = parameters.box[row].tolist()
    resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[parameters.interpolation]
    size = (parameters.image_size, parameters.image_size)
    image = image.crop((left, top, left + width, top + height)).resize(size, resample)
    for step in parameters.order[row].tolist():
        if not parameters.factors[row, step].isnan():
            image = jitter_by_hand(image, step, parameters.factors[row, step].item())
    if parameters.gray[row]:
        image = image.convert("L").convert("RGB")
    if parameters.sigma[row] > 0:
        image = image.filter(ImageFilter.GaussianBlur(radius=parameters.sigma[row].item()))
    if parameters.solarize[row]:
        image = ImageOps.solarize(image, parameters.threshold)
    return normalised(ImageOps.mirror(image) if parameters.flip[row] else image)


@pytest.mark.parametrize("recipe", [MoCoV3(32), SimMIM(32), MAE(32)])
def test_views_equal_a_pil_pipeline_by_hand(photo, recipe):
    for view in draw(recipe, photo, 60):
        for row in range(60):
            ours = augment_image(photo, view, row)
            assert ours.dtype == torch.float32
            np.testing.assert_allclose(ours.numpy(), view_by_hand(photo, view, row), rtol=0, atol=2e-6)


def test_views_equal_the_first_torchvision_functions_bit_for_bit(photo):
    """Those that the official code was written with (``ToTensor``, ``Normalize`` included)."""
    f = v1.functional
    jitter = (f.adjust_brightness, f.adjust_contrast, f.adjust_saturation, f.adjust_hue)
    for recipe in (MoCoV3(32), SimMIM(32), MAE(32)):
        for view in draw(recipe, photo, 30, seed=1):
            mode = v1.InterpolationMode(view.interpolation)
            for row in range(30):
                image = f.resized_crop(photo, *view.box[row].tolist(), [32, 32], mode)
                for step in view.order[row].tolist():
                    factor = view.factors[row, step].item()
                    image = image if math.isnan(factor) else jitter[step](image, factor)
                image = f.to_grayscale(image, 3) if view.gray[row] else image
                if view.sigma[row]:
                    image = image.filter(ImageFilter.GaussianBlur(radius=view.sigma[row].item()))
                image = f.solarize(image, view.threshold) if view.solarize[row] else image
                image = f.hflip(image) if view.flip[row] else image
                theirs = f.normalize(f.to_tensor(image), IMAGE_MEAN, IMAGE_STD)
                assert torch.equal(augment_image(photo, view, row), theirs)


def test_a_batch_is_normalised_as_its_images_are(photo):
    squares = [photo.crop((left, 0, left + 40, 40)) for left in (0, 30, 60)]
    batch = torch.from_numpy(np.stack([np.asarray(image) for image in squares]))
    for layout in (batch.permute(0, 3, 1, 2), batch.permute(0, 3, 1, 2).contiguous()):
        assert torch.equal(normalise(layout), torch.stack(list(map(to_tensor, squares))))
        assert normalise(layout).is_contiguous()


# ---- what is drawn -------------------------------------------------------------------------------------------------


def kolmogorov(first, second):
    """Largest distance of two empirical distribution functions, in units of what 1 in 1,000 pairs exceed."""
    first, second = (np.sort(np.asarray(values, float).ravel()) for values in (first, second))
    everything = np.concatenate([first, second])
    apart = np.abs(
        np.searchsorted(first, everything, "right") / len(first)
        - np.searchsorted(second, everything, "right") / len(second)
    ).max()
    return apart / (1.95 * math.sqrt(1 / len(first) + 1 / len(second)))


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        ((80, 100), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((64, 64), (0.67, 1.0), (3 / 4, 4 / 3)),
        ((30, 100), (0.2, 1.0), (3 / 4, 4 / 3)),  # in a third of the images no try fits
        ((7, 5), (0.08, 1.0), (0.5, 3.0)),
    ],
)
def test_crops_are_drawn_as_torchvision_does(size, scale, ratio):
    num, image = 3000, Image.new("RGB", size[::-1])
    box = RandomView(8, "bilinear", scale, ratio).draw(mix(3, torch.arange(num)), *sizes(image, num)).box.numpy()
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(8, scale, ratio)
    theirs = np.array([list(crop.make_params([image]).values()) for _ in range(num)])
    assert (box[:, :2] >= 0).all()
    assert (box[:, 2:] >= 1).all()
    assert (box[:, :2] + box[:, 2:] <= size).all()
    for measure in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 0] + b[:, 2] / 2,
        lambda b: b[:, 1] + b[:, 3] / 2,
        lambda b: b[:, 0] * 1000 + b[:, 1],
        lambda b: (b[:, 0] > b[:, 1]) * b[:, 2],
    ):
        assert kolmogorov(measure(box), measure(theirs)) < 1


@pytest.mark.parametrize("size", [(10, 40), (41, 10), (1, 30_000), (3, 3)])
def test_where_no_crop_fits_it_is_torchvisions_centre(size):
    image = Image.new("RGB", size[::-1])
    scale = (1.0, 1.0) if size != (3, 3) else (1e-9, 1e-9)  # a whole strip has no possible ratio; a side of 0 is none
    theirs = list(v2.RandomResizedCrop(8, scale).make_params([image]).values())
    view = RandomView(8, "bilinear", scale, (3 / 4, 4 / 3)).draw(torch.arange(5), *sizes(image, 5))
    assert view.box.tolist() == [theirs] * 5


@pytest.mark.parametrize("strength", [(0.4, 0.4, 0.2, 0.1), (1.5, 0.0, 0.8, 0.5)])
def test_jitter_is_drawn_as_torchvision_does(photo, strength):
    num = 3000
    first, second = draw(MoCoV3(8, jitter=strength, jitter_prob=0.6), photo, num)
    torch.manual_seed(0)
    jitter = v2.ColorJitter(*strength)
    theirs = [jitter.make_params([photo]) for _ in range(num)]
    applied = ~first.factors.isnan()
    assert abs(applied[:, 0].float().mean() - 0.6) < 4 * math.sqrt(0.24 / num)
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        if strength[column] == 0:
            assert theirs[0][f"{name}_factor"] is None
            assert not applied[:, column].any()
        else:
            assert torch.equal(applied[:, column], applied[:, 0])
            ours = first.factors[applied[:, column], column]
            assert kolmogorov(ours, [parameters[f"{name}_factor"] for parameters in theirs]) < 1
    assert kolmogorov(first.order @ torch.tensor([64, 16, 4, 1]), [
        int(parameters["fn_idx"] @ torch.tensor([64, 16, 4, 1])) for parameters in theirs
    ]) < 1  # fmt: skip
    orders, counts = np.unique(first.order.numpy(), axis=0, return_counts=True)
    assert len(orders) == 24
    assert ((counts - num / 24) ** 2).sum() / (num / 24) < 49.7  # chi-square with 23 degrees of freedom, 1 in 1,000
    assert abs((applied[:, 0] & ~second.factors[:, 0].isnan()).float().mean() - 0.36) < 4 * math.sqrt(0.23 / num)


@pytest.mark.parametrize(
    ("field", "expected"),
    [("gray", (0.2, 0.2)), ("sigma", (1.0, 0.1)), ("solarize", (0.0, 0.2)), ("flip", (0.5, 0.5))],
)
def test_each_step_happens_as_often_as_it_should_and_independently(photo, field, expected):
    num = 4000
    views = draw(MoCoV3(8), photo, num)
    for view, prob in zip(views, expected, strict=True):
        share = (getattr(view, field) > 0).float().mean().item()
        assert abs(share - prob) <= 4 * math.sqrt(prob * (1 - prob) / num)
    columns = [view.box.float() for view in views]
    columns += [
        getattr(view, name)[:, None].float() for view in views for name in ("gray", "sigma", "solarize", "flip")
    ]
    columns += [view.factors.nan_to_num(0.9)[:, :3] for view in views] + [view.order[:, :1].float() for view in views]
    table = torch.cat(columns, dim=1).T
    related = torch.corrcoef(table[table.std(dim=1) > 0]).fill_diagonal_(0)
    related[0:4, 0:4] = related[4:8, 4:8] = 0  # the sides of one crop have to do with one another
    jitters = slice(len(related) - 8, len(related) - 5), slice(len(related) - 5, len(related) - 2)
    for columns_of_one in jitters:  # applied together or not at all
        related[columns_of_one, columns_of_one] = 0
    assert related.abs().max() < 5 / math.sqrt(num)


def test_blur_radius_is_uniform(photo):
    sigma = draw(MoCoV3(8), photo, 3000)[0].sigma
    assert kolmogorov(sigma, np.linspace(0.1, 2.0, 3000)) < 1


def test_parameters_depend_on_the_seed_and_size_of_their_own_image_alone(photo):
    seeds, height, width = mix(5, torch.arange(40)), torch.arange(20, 60), torch.arange(90, 50, -1)
    for recipe in (MoCoV3(32), SimMIM(32), MAE(32)):
        for number, whole in enumerate(recipe.draw(seeds, height, width)):
            rows = torch.tensor([7, 3, 39])
            part = recipe.draw(seeds[rows], height[rows], width[rows])[number]
            alone = [recipe.draw(seeds[i : i + 1], height[i : i + 1], width[i : i + 1])[number] for i in rows]
            expected = whole.take(rows)
            for other in (part, Augmentation.join(alone)):
                for name, value in vars(expected).items():
                    theirs = getattr(other, name)
                    if isinstance(value, torch.Tensor):
                        assert torch.equal(value.nan_to_num(-9), theirs.nan_to_num(-9)), name
                    else:
                        assert value == theirs


def test_views_and_seeds_differ(photo):
    first, second = draw(MoCoV3(32), photo, 50)
    assert (first.box != second.box).any(dim=1).all()
    assert (first.box != draw(MoCoV3(32), photo, 50, seed=1)[0].box).any(dim=1).all()
    assert len({tuple(row) for row in first.box.tolist()}) == 50


def test_another_probability_changes_no_other_step(photo):
    usual, other = draw(MoCoV3(32), photo, 200), draw(MoCoV3(32, jitter_prob=0.1, blur_prob=(0.5, 0.5)), photo, 200)
    for before, after in zip(usual, other, strict=True):
        for name in ("box", "order", "gray", "solarize", "flip"):
            assert torch.equal(getattr(before, name), getattr(after, name))
        both = ~before.factors.isnan() & ~after.factors.isnan()
        assert torch.equal(before.factors[both], after.factors[both])


def test_draws_leave_torchs_generator_alone(photo):
    state = torch.get_rng_state()
    draw(MoCoV3(8), photo, 10)
    assert torch.equal(torch.get_rng_state(), state)


def without(**options):
    """MoCo v3 with everything random turned off except what is named."""
    off = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "jitter_prob": 0.0, "gray_prob": 0.0}
    off |= {"blur_prob": (0.0, 0.0), "solarize_prob": (0.0, 0.0), "flip_prob": 0.0}
    return MoCoV3(16, **{**off, **options})


def test_nothing_random_is_the_image(photo):
    square = photo.crop((0, 0, 16, 16))
    assert all(torch.equal(view[0], to_tensor(square)) for view in views_of(without(), square, 1))
    flipped = views_of(without(flip_prob=1.0), square, 1)
    assert all(torch.equal(view[0], to_tensor(ImageOps.mirror(square))) for view in flipped)


def test_solarisation_comes_after_blur_and_grey_after_jitter(photo):
    square = photo.crop((0, 0, 16, 16))
    recipe = without(
        gray_prob=1.0, jitter_prob=1.0, blur_prob=(1.0, 1.0), blur_sigma=(1.5, 1.5), solarize_prob=(1.0, 1.0)
    )
    for tensor in views_of(recipe, square, 20)[0]:
        view = pixels(tensor)
        assert (view[..., 0] == view[..., 1]).all()  # jitter after grey would bring colour back
        assert (view[..., 1] == view[..., 2]).all()
        assert view.max() < 128  # blur after solarisation keeps this too, the following does not
    black_and_white = Image.fromarray(np.kron([[0, 255], [255, 0]], np.ones((8, 8))).astype(np.uint8)).convert("RGB")
    recipe = without(blur_prob=(1.0, 1.0), blur_sigma=(1.5, 1.5), solarize_prob=(1.0, 1.0))
    # Solarised first, black and white would be black everywhere; blurred first, their borders stay.
    assert pixels(views_of(recipe, black_and_white, 1)[0][0]).max() > 60


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
        assert all(view.shape == (3, 32, 32) for (view,) in views_of(recipe, image, 1))
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
