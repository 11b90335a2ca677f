import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import ImageFilter
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from harmonize.data import batched
from harmonize.data.augmentation import Augmentation
from harmonize.data.views import interpolation_mode, to_tensor

NAN = math.nan


def noise(num: int, height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (num, 3, height, width), dtype=torch.uint8)


def photographs(num: int, height: int, width: int) -> Tensor:
    """Smooth colours with a little grain, some saturated, some nearly grey."""
    smooth = F.resize(torch.rand(num, 3, 4, 4), [height, width], interpolation_mode("", "bicubic"))
    smooth = smooth.lerp(smooth.mean(1, keepdim=True), torch.rand(num, 1, 1, 1))
    pixels = (smooth - 0.5) * 400 + 128 + 3 * torch.randn(num, 3, height, width)
    return pixels.clamp(0, 255).byte()


def images_of(num: int, height: int, width: int) -> Tensor:
    flat = torch.tensor([0, 255, 7], dtype=torch.uint8)[:, None, None, None].expand(3, 3, height, width)
    return torch.cat([noise(num, height, width), photographs(num, height, width), flat])


def each_alone(pixels: Tensor, change) -> Tensor:
    """What ``change`` (number, PIL image) makes of each image, as whole numbers in fp32."""
    changed = [change(number, F.to_pil_image(image)) for number, image in enumerate(pixels)]
    return torch.stack([F.pil_to_tensor(image) for image in changed]).float()


def boxes(num: int, height: int, width: int) -> Tensor:
    """Crops of any shape, the first of them the whole image and a single pixel."""
    tall, wide = torch.randint(1, height + 1, (num,)), torch.randint(1, width + 1, (num,))
    tall[:2], wide[:2] = torch.tensor([height, 1]), torch.tensor([width, 1])
    top, left = ((torch.rand(num) * (limit + 1)).long() for limit in (height - tall, width - wide))
    return torch.stack([top, left, tall, wide], dim=1)


def drawn(num: int, height: int, width: int, size: int, interpolation: str) -> Augmentation:
    factors = torch.rand(num, 4) * torch.tensor([1.6, 1.6, 1.6, 1]) + torch.tensor([0.2, 0.2, 0.2, -0.5])
    factors[torch.rand(num, 4) < 0.2] = NAN
    return Augmentation(
        image_size=size,
        interpolation=interpolation,
        box=boxes(num, height, width),
        factors=factors,
        order=torch.stack([torch.randperm(4) for _ in range(num)]),
        gray=torch.rand(num) < 0.2,
        sigma=torch.where(torch.rand(num) < 0.3, 0.0, torch.rand(num) * 3),
        solarize=torch.rand(num) < 0.4,
        threshold=128,
        flip=torch.rand(num) < 0.5,
    )


def pillow_view(pixels: Tensor, augmentation: Augmentation, number: int) -> Tensor:
    image, size = F.to_pil_image(pixels), augmentation.image_size
    box, mode = augmentation.box[number].tolist(), interpolation_mode("", augmentation.interpolation)
    image = F.resized_crop(image, *box, [size, size], mode)
    adjust = F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue
    for place in augmentation.order[number].tolist():
        factor = augmentation.factors[number, place].item()
        if not math.isnan(factor):
            image = adjust[place](image, factor)
    if augmentation.gray[number]:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if augmentation.sigma[number] > 0:
        image = image.filter(ImageFilter.GaussianBlur(augmentation.sigma[number].item()))
    if augmentation.solarize[number]:
        image = F.solarize(image, augmentation.threshold)
    if augmentation.flip[number]:
        image = F.horizontal_flip(image)
    return to_tensor(image)


def assert_same(result: Tensor, expected: Tensor) -> None:
    assert result.dtype == torch.float32
    assert result.shape == expected.shape
    different = result != expected
    assert not different.any(), f"{different.float().mean():.2e} differ, by up to {(result - expected).abs().max()}"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 32), (48, 31, 32), (20, 90, 24), (13, 9, 40), (200, 150, 7)]
)
def test_crop_resize(height, width, size, interpolation):
    torch.manual_seed(0)
    pixels = images_of(12, height, width)
    box = boxes(len(pixels), height, width)
    mode = interpolation_mode("", interpolation)
    expected = each_alone(pixels, lambda i, image: F.resized_crop(image, *box[i].tolist(), [size, size], mode))
    assert_same(batched.crop_resize(pixels, box, size, interpolation), expected)
    assert_same(batched.crop_resize(pixels.float(), box, size, interpolation), expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_weights_of_every_reduction_are_exact(interpolation):
    # A white image shows the sum of the weights, a pixel alone each of them: 255 times all, to 8 bits.
    torch.manual_seed(1)
    lengths = torch.arange(1, 97)
    pixels = images_of(47, 1, 96)[: len(lengths)].expand(-1, -1, 4, -1)
    box = torch.stack([0 * lengths, 96 - lengths, 4 + 0 * lengths, lengths], dim=1)
    for size in (4, 16, 33):
        mode = interpolation_mode("", interpolation)
        expected = each_alone(pixels, lambda i, image: F.resized_crop(image, *box[i].tolist(), [size, size], mode))  # noqa: B023
        assert_same(batched.crop_resize(pixels, box, size, interpolation), expected)


def test_whole_images_of_the_right_size_are_only_converted(monkeypatch):
    monkeypatch.setattr(batched, "_resample", None)
    pixels = noise(3, 16, 16)
    box = torch.tensor([0, 0, 16, 16]).expand(3, 4)
    assert_same(batched.crop_resize(pixels, box, 16, "bicubic"), pixels.float())


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_blends(name):
    torch.manual_seed(2)
    pixels = images_of(16, 33, 20)
    factors = torch.cat([torch.tensor([0, 1, 0.5, 1e-3, 0.999, 1.001, 2, 1.5, 100, -1]), torch.rand(25) * 2])
    change = getattr(F, f"adjust_{name}")
    expected = each_alone(pixels, lambda i, image: change(image, factors[i].item()))
    assert_same(getattr(batched, f"adjust_{name}")(pixels.float(), factors), expected)


def test_contrast_of_an_image_whose_sum_is_more_than_fp32_holds():
    pixels = torch.full((1, 3, 300, 400), 254, dtype=torch.uint8)
    pixels[..., :200] = 253
    pixels[..., 0, -1] = 253  # the mean is just less than 253.5
    expected = each_alone(pixels, lambda i, image: F.adjust_contrast(image, 0.3))
    assert_same(batched.adjust_contrast(pixels.float(), torch.tensor([0.3])), expected)


def test_hue_of_every_colour():
    colours = torch.cartesian_prod(torch.arange(256), torch.arange(256)).byte()
    # Each image has one red and all greens and blues. 37 is coprime to 256: every shift meets other colours.
    for red in range(0, 256, 15):
        pixels = torch.cat([torch.full((65536, 1), red, dtype=torch.uint8), colours], dim=1).T.reshape(1, 3, 256, 256)
        shift = torch.tensor([(red * 37 % 256 - 128) / 256])
        expected = each_alone(pixels, lambda i, image: F.adjust_hue(image, shift[i].item()))  # noqa: B023
        assert_same(batched.adjust_hue(pixels.float(), shift), expected)


def test_hue_shifts():
    torch.manual_seed(3)
    shifts = torch.cat([torch.tensor([0, 0.5, -0.5, 1e-3, -1e-3, 1 / 255, -1 / 255]), torch.rand(30) - 0.5])
    pixels = images_of(17, 16, 24)
    expected = each_alone(pixels, lambda i, image: F.adjust_hue(image, shifts[i].item()))
    assert_same(batched.adjust_hue(pixels.float(), shifts), expected)
    assert (expected[0] != pixels[0]).any()  # a shift of 0 is not nothing


def test_grayscale():
    pixels = images_of(4, 30, 20)
    expected = each_alone(pixels, lambda i, image: F.rgb_to_grayscale(image, num_output_channels=3))
    assert_same(batched.grayscale(pixels.float()), expected)


@pytest.mark.parametrize(("height", "width"), [(24, 24), (17, 40), (3, 1), (1, 6)])
def test_gaussian_blur(height, width):
    torch.manual_seed(4)
    extreme = torch.tensor([0, 1e-4, 0.01, 0.1, math.sqrt(2), 1.4142, 1.4143, 2.4494, 2.4495, 5, 12.3, 40])
    sigma = torch.cat([extreme, torch.rand(25) * 3])
    pixels = images_of(17, height, width)
    blur = [ImageFilter.GaussianBlur(each) for each in sigma.tolist()]
    expected = each_alone(pixels, lambda i, image: image.filter(blur[i]))
    given = pixels.float()
    assert_same(batched.gaussian_blur(given, sigma), expected)
    assert_same(given, pixels.float())


def test_the_weights_of_the_boxes_are_those_of_c():
    # Number by number in the types of BoxBlur.c: a unit more or less shows in a pixel only once in a while.
    torch.manual_seed(11)
    sigmas = torch.cat([torch.rand(300) * 3, torch.rand(100) * 40])
    one, three, six = np.float32(1), np.float32(3), np.float32(6)
    radii, weights = batched._box_weights(sigmas)
    for sigma, radius, (inside, border, half) in zip(sigmas.numpy(), radii.tolist(), weights.tolist(), strict=True):
        variance = sigma * sigma / three
        length = np.float32(np.sqrt(12.0 * float(variance) + 1.0))
        whole = np.float32(np.floor((float(length) - 1.0) / 2.0))
        fraction = (2 * whole + one) * (whole * (whole + one) - three * variance)
        box = whole + fraction / (six * (variance - (whole + one) * (whole + one)))
        assert isinstance(box, np.float32)
        assert radius == int(box)
        assert inside == int(np.float32(1 << 24) / (box * 2 + one))
        assert border == ((1 << 24) - (2 * radius + 1) * inside) // 2
        assert half == (1 << 23) - 128 * ((1 << 24) - (2 * radius + 1) * inside - 2 * border)


@pytest.mark.parametrize("threshold", [0, 100, 127.5, 128, 255, 256])
def test_solarize(threshold):
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    expected = each_alone(pixels, lambda i, image: F.solarize(image, threshold))
    assert_same(batched.solarize(pixels.float(), threshold), expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (40, 64, 24), (24, 17, 48)])
def test_augment_equals_pillow(height, width, size, interpolation):
    torch.manual_seed(5)
    pixels = images_of(40, height, width)
    augmentation = drawn(len(pixels), height, width, size, interpolation)
    before = pixels.clone()
    expected = torch.stack([pillow_view(image, augmentation, number) for number, image in enumerate(pixels)])
    assert_same(batched.augment(pixels, augmentation), expected)
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("everywhere", ["gray", "blur", "solarize", "flip", "order"])
def test_augment_where_all_images_have_an_operation(everywhere):
    torch.manual_seed(6)
    pixels = images_of(5, 20, 20)
    augmentation = drawn(len(pixels), 20, 20, 20, "bilinear").without_crop()
    num = len(pixels)
    augmentation = {
        "gray": replace(augmentation, gray=torch.ones(num, dtype=torch.bool)),
        "blur": replace(augmentation, sigma=torch.full((num,), 0.7)),
        "solarize": replace(augmentation, solarize=torch.ones(num, dtype=torch.bool)),
        "flip": replace(augmentation, flip=torch.ones(num, dtype=torch.bool)),
        "order": replace(
            augmentation, order=torch.tensor([2, 0, 3, 1]).expand(num, 4), factors=torch.full((num, 4), 0.3)
        ),
    }[everywhere]
    expected = torch.stack([pillow_view(image, augmentation, number) for number, image in enumerate(pixels)])
    assert_same(batched.augment(pixels, augmentation), expected)


def test_every_order_of_the_jitter():
    torch.manual_seed(7)
    order = torch.cartesian_prod(*[torch.arange(4)] * 4)
    order = order[torch.tensor([len(set(row.tolist())) == 4 for row in order])]
    assert len(order) == 24
    pixels = photographs(24, 12, 12)
    augmentation = drawn(24, 12, 12, 12, "bilinear").without_crop()
    augmentation = replace(augmentation, order=order, factors=torch.rand(24, 4) * torch.tensor([1, 1, 1, 0.5]) + 0.6)
    augmentation.factors[:, 3] -= 0.6
    expected = torch.stack([pillow_view(image, augmentation, number) for number, image in enumerate(pixels)])
    assert_same(batched.augment(pixels, augmentation), expected)


def test_an_image_does_not_depend_on_the_others(monkeypatch):
    torch.manual_seed(8)
    pixels = images_of(15, 40, 28)
    augmentation = drawn(len(pixels), 40, 28, 24, "bicubic")
    together = batched.augment(pixels, augmentation)
    alone = [batched.augment(pixels[i : i + 1], augmentation.take(slice(i, i + 1))) for i in range(len(pixels))]
    assert_same(together, torch.cat(alone))
    monkeypatch.setattr(batched, "_CPU_CHUNK", 4 * 3 * 24 * 24)
    assert_same(batched.augment(pixels, augmentation), together)


def test_neither_autocast_nor_low_precision_changes_anything():
    torch.manual_seed(9)
    pixels = images_of(8, 30, 30)
    augmentation = drawn(len(pixels), 30, 30, 24, "bicubic")
    expected = batched.augment(pixels, augmentation)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(batched.augment(pixels, augmentation), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_pixels_that_are_not_possible():
    augmentation = drawn(4, 8, 8, 8, "bilinear")
    with pytest.raises(ValueError, match=r"torch.float32 and shape \(4, 3, 8, 8\) are not possible"):
        batched.augment(noise(4, 8, 8).float(), augmentation)
    with pytest.raises(ValueError, match=r"\(4, 3, h, w\), as many images as there are parameters"):
        batched.augment(noise(3, 8, 8), augmentation)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_gpu_gives_the_same_and_is_not_waited_for(interpolation, precision):
    torch.manual_seed(10)
    pixels = images_of(60, 100, 80)
    augmentation = drawn(len(pixels), 100, 80, 64, interpolation)
    expected = batched.augment(pixels, augmentation)
    on_device = pixels.cuda()
    batched.augment(on_device, augmentation)  # cuBLAS starts
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = batched.augment(on_device, augmentation)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_float32_matmul_precision(before)
    assert_same(result.cpu(), expected)
