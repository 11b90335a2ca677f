"""Augmentation of a whole batch by tensor operations, bit for bit what torchvision and Pillow do to each image alone.

Images are held as fp32 tensors (B, 3, h, w) of whole numbers in [0, 255] until the last step. Every operation rounds
where Pillow rounds, and the sums in between are exact (whole numbers below 2^24 in fp32, or int32): the result depends
neither on the device, nor on TF32, nor on the other images. This matters because solarisation turns a difference of
one level into one of 255.

The parameters are on the CPU: which images an operation concerns is decided there, and nobody waits for the device.

Sources, for the facts: Pillow ``src/libImaging/`` ``Resample.c``, ``Blend.c``, ``Convert.c`` and ``BoxBlur.c``,
``ImageEnhance.py`` and ``ImageOps.py``; torchvision ``transforms/_functional_pil.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import PIL
import torch
import torch.nn.functional as F
from torch import Tensor

from harmonize.data.augmentation import Augmentation
from harmonize.types import IMAGE_MEAN, IMAGE_STD

_CPU_CHUNK = 1 << 20  # values (B x 3 x S x S) that a CPU augments together: as many as its caches hold

Step = tuple[Tensor, Callable[..., Tensor], tuple[Tensor, ...]]
"""Which images (B,) bool on the CPU; the operation; its parameters, of all B images, on the device."""


@torch.no_grad()
def augment(pixels: Tensor, augmentation: Augmentation) -> Tensor:
    """The view of every image, normalised.

    Args:
        pixels: (B, 3, h, w) uint8, on any device.
        augmentation: Parameters of the B images, on the CPU.

    Returns:
        (B, 3, S, S) fp32 with S = ``augmentation.image_size``, on the device of ``pixels``: ``views.to_tensor`` of
        what torchvision and Pillow make of each image.

    >>> off = torch.tensor([False])
    >>> halved = Augmentation(
    ...     image_size=4, interpolation="bilinear", box=torch.tensor([[0, 0, 8, 8]]),
    ...     factors=torch.tensor([[0.5, math.nan, math.nan, math.nan]]), order=torch.tensor([[0, 1, 2, 3]]),
    ...     gray=off, sigma=torch.zeros(1), solarize=off, threshold=128, flip=off)
    >>> augment(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8), halved)[0, :, 0, 0]  # of 127, 255 / 2 truncated
    tensor([0.0569, 0.1877, 0.4091])
    """
    if pixels.dtype != torch.uint8 or len(pixels) != len(augmentation):
        raise ValueError(
            f"pixels of {pixels.dtype} and shape {tuple(pixels.shape)} are not possible: uint8 of shape "
            f"({len(augmentation)}, 3, h, w), as many images as there are parameters, is needed"
        )
    size = augmentation.image_size
    chunk = len(pixels) if pixels.is_cuda else max(1, _CPU_CHUNK // (3 * size * size))
    if len(pixels) <= chunk:
        return _augment(pixels, augmentation)
    views = torch.empty(len(pixels), 3, size, size, device=pixels.device)
    for first in range(0, len(pixels), chunk):
        part = slice(first, first + chunk)
        views[part] = _augment(pixels[part], augmentation.take(part))
    return views


def crop_resize(pixels: Tensor, box: Tensor, size: int, interpolation: str) -> Tensor:
    """Crop each image and resize the crop, with antialiasing (``F.resized_crop`` of a PIL image).

    A pass along the rows and one along the columns, each rounded.

    Args:
        pixels: (B, 3, h, w), uint8 or fp32.
        box: (B, 4) int64 on the CPU: top, left, height and width in px, inside the images.
        size: S, in px.
        interpolation: ``bilinear`` or ``bicubic``.

    Returns:
        (B, 3, S, S) fp32.

    >>> row = torch.tensor([0.0, 80, 160, 240]).expand(1, 3, 4, 4)
    >>> crop_resize(row, torch.tensor([[0, 0, 4, 4]]), 2, "bilinear")[0, 0, 0]
    tensor([ 57., 183.])
    """
    height, width = pixels.shape[2:]
    if (height, width) == (size, size) and bool((box == torch.tensor([0, 0, size, size])).all()):
        return pixels.float()
    downwards = _columns_first(box, size)
    groups = [mask.nonzero().flatten() for mask in (~downwards, downwards)]
    if not all(map(len, groups)):
        return _resample(pixels, box, size, interpolation, columns_first=not len(groups[0]))
    views = torch.empty(*pixels.shape[:2], size, size, device=pixels.device)
    for rows, columns_first in zip(groups, (False, True), strict=True):
        on_device = rows.to(pixels.device, non_blocking=True)
        chosen = pixels.index_select(0, on_device)
        views.index_copy_(0, on_device, _resample(chosen, box[rows], size, interpolation, columns_first))
    return views


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with black: ``factor`` (B,) is the share of the image (``ImageEnhance.Brightness``).

    >>> adjust_brightness(torch.full((1, 3, 1, 1), 101.0), torch.tensor([0.5])).flatten()
    tensor([50., 50., 50.])
    """
    return images.mul(_per_image(factor)).clamp_(0, 255).floor_()


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean grey of the image: ``factor`` (B,) is the share of the image (``ImageEnhance.Contrast``).

    >>> adjust_contrast(torch.tensor([0.0, 101]).expand(1, 3, 1, 2), torch.tensor([0.5]))[0, 0, 0]
    tensor([25., 76.])
    """
    sums = _gray(images).sum(dim=3).sum(dim=(1, 2), dtype=torch.float64)  # a row's is exact in fp32, an image's may not
    mean = sums.div_(_constant(images.shape[2] * images.shape[3], sums.dtype, sums.device)).add_(0.5).floor_()
    return _blend(_per_image(mean.float()), images, factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey image: ``factor`` (B,) is the share of the image (``ImageEnhance.Color``).

    >>> adjust_saturation(torch.tensor([200.0, 100, 0]).view(1, 3, 1, 1), torch.tensor([0.5])).flatten()
    tensor([159., 109.,  59.])
    """
    return _blend(_gray(images), images, factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by ``shift`` (B,), in turns, [-0.5, 0.5]; on the way through 8-bit HSV even 0 changes colours.

    The formulas give what Pillow gives for each of the 2^24 colours, in both directions.

    >>> adjust_hue(torch.tensor([200.0, 100, 0]).view(1, 3, 1, 1), torch.tensor([0.25])).flatten()
    tensor([  5., 200.,   0.])
    """
    red, green, blue = images.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    above = (value + value).add_(least).sub_(red).sub_(green).sub_(blue)  # of the value, above the third colour
    saturation = (chroma / value.clamp(min=1)).mul_(255).floor_()

    # In sixths of a turn the hue is 2k + 1 - q or 2k - 1 + q, with k = 0, 1, 2 where red, green, blue is the largest,
    # and + 1 where red >= green >= blue or a rotation of it. The fp32 roundings of q, of the sum and of the sixth
    # decide what becomes of a hue on the border of two levels. (torch.where is slow on a CPU.)
    sign = (red - green).add_(0.5).mul_((green - blue).add_(0.5)).mul_((red - blue).add_(0.5)).sign_()
    not_red, not_green = (torch.ne(each, value, out=torch.empty_like(value)) for each in (red, green))
    hue = not_green.add_(1).mul_(not_red).mul_(2).add_(sign)
    hue.sub_(above.div_(chroma.clamp_(min=1)).mul_(sign))
    hue.div_(_constant(6, torch.float32, images.device))
    hue.sub_(hue.floor())
    hue.mul_(255).floor_().add_(_per_image(((shift.double() * 255).trunc_() % 256).float()))
    hue.sub_((hue * (1 / 256)).floor_(), alpha=256)

    # How far each colour stays behind the value, in 255ths of the chroma: a trapezium over the turn.
    center, slope, offset = _constant(_TRAPEZIUM, torch.float32, images.device).view(3, 3, 1, 1)
    behind = hue.mul_(6).sub(center).abs_().mul_(slope).add_(offset).clamp_(0, 255)
    return behind.mul_(saturation.mul_(value).mul_(1 / 65025)).round_().neg_().add_(value)


_TRAPEZIUM = (765.0, 510.0, 1020.0), (-1.0, 1.0, 1.0), (510.0, -255.0, -255.0)  # for red, green, blue


def grayscale(images: Tensor) -> Tensor:
    """The grey image, (B, 3, h, w), with the weights of ITU-R 601-2 (PIL's mode L).

    >>> grayscale(torch.tensor([200.0, 100, 0]).view(1, 3, 1, 1)).flatten()
    tensor([118., 118., 118.])
    """
    return _gray(images).repeat(1, 3, 1, 1)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Three box blurs along the rows and three along the columns, each rounded (``ImageFilter.GaussianBlur``).

    Args:
        images: (B, 3, h, w) fp32.
        sigma: (B,) fp32 on the CPU, in px; 0: no blur. The time grows with the largest.

    Returns:
        (B, 3, h, w) fp32.

    >>> dot = torch.tensor([0.0, 0, 255, 0, 0]).expand(1, 3, 5, 5)
    >>> gaussian_blur(dot, torch.tensor([0.8]))[0, 0, 0]
    tensor([  7.,  52., 138.,  52.,   7.])
    """
    return _run(images.clone(), _blur_steps(sigma, images.device))


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Invert the values from ``threshold`` up (``ImageOps.solarize``).

    >>> solarize(torch.tensor([100.0, 127, 128]), 128)
    tensor([100., 127., 127.])
    """
    inverted = torch.ge(images, threshold, out=torch.empty_like(images))  # 0 or 1; torch.where is slow on a CPU
    return (255 - 2 * images).mul_(inverted).add_(images)


def normalise_(images: Tensor) -> Tensor:
    """Take the channel mean and standard deviation of ImageNet out of fp32 images (..., 3, h, w), in place.

    >>> normalise_(torch.full((3, 1, 1), 255.0)).flatten()
    tensor([2.2489, 2.4286, 2.6400])
    """
    most, mean, std = _constant(_NORMALISATION, torch.float32, images.device).view(3, 3, 1, 1)
    return images.div_(most).sub_(mean).div_(std)  # divides by 255, as the recipes' ToTensor did


def _augment(pixels: Tensor, augmentation: Augmentation) -> Tensor:
    """``augment`` of images that are few enough."""
    images = crop_resize(pixels, augmentation.box, augmentation.image_size, augmentation.interpolation)
    steps = _jitter_steps(augmentation.factors, augmentation.order, images.device)
    steps.append((augmentation.gray, grayscale, ()))
    steps += _blur_steps(augmentation.sigma, images.device)
    steps.append((augmentation.solarize, partial(solarize, threshold=augmentation.threshold), ()))
    steps.append((augmentation.flip, partial(torch.flip, dims=(-1,)), ()))
    return normalise_(_run(images, steps))


def _run(images: Tensor, steps: list[Step]) -> Tensor:
    """Apply each step to the images that it concerns, in place where these are not all."""
    if not steps:
        return images
    # One copy to the device for all steps.
    which = torch.stack([mask for mask, _, _ in steps])
    counts = which.sum(1).tolist()
    rows = which.nonzero()[:, 1].to(images.device, non_blocking=True).split(counts)
    for (_, operation, parameters), row, count in zip(steps, rows, counts, strict=True):
        if count == len(images):
            images = operation(images, *parameters)
        elif count:
            chosen = operation(images.index_select(0, row), *(each.index_select(0, row) for each in parameters))
            images.index_copy_(0, row, chosen)
    return images


_NORMALISATION = (255.0,) * 3, IMAGE_MEAN, IMAGE_STD

_JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
# Every order of the four is a subsequence of this, and the hue, which takes the longest, is in it once.
_SCHEDULE = (0, 1, 2, 0, 1, 2, 0, 3, 0, 1, 2, 0, 1, 2, 0)
# The first place from ... on where an operation is in the schedule.
_NEXT = torch.tensor(
    [[(*_SCHEDULE, number)[start:].index(number) + start for number in range(4)] for start in range(16)]
)


def _jitter_steps(factors: Tensor, order: Tensor, device: torch.device) -> list[Step]:
    """Colour jitter, every image in its own order: each operation waits for its next place in the schedule."""
    wanted = ~factors.isnan()
    if not wanted.any():
        return []
    places = torch.empty_like(order)
    place = torch.full_like(order[:, :1], -1)
    for number in order.split(1, dim=1):
        place = _NEXT[place + 1, number]
        places.scatter_(1, number, place)
    due = (places[:, _SCHEDULE] == torch.arange(len(_SCHEDULE))) & wanted[:, _SCHEDULE]
    columns = factors.to(device, non_blocking=True).unbind(1)
    return [(mask, _JITTER[number], (columns[number],)) for mask, number in zip(due.unbind(1), _SCHEDULE, strict=True)]


def _blur_steps(sigma: Tensor, device: torch.device) -> list[Step]:
    """Gaussian blur: a step for each whole radius of the boxes."""
    blurred = sigma > 0
    if not blurred.any():
        return []
    radius, weights = _box_weights(sigma)
    on_device = weights.to(device, non_blocking=True)
    return [
        ((radius == each) & blurred, partial(_box_blurs, radius=each), (on_device,))
        for each in radius[blurred].unique().tolist()
    ]


def _box_weights(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The boxes whose threefold blur has the standard deviation ``sigma`` (Gwosdek et al. 2011, equations 7 to 14).

    Returns:
        Whole radius r (B,) int64, and int32 (B, 3): the weight of each of the 2r + 1 pixels inside and of the 2
        pixels at the border, in units of 2^-24, and what is to be added before the rounding.
    """
    variance = sigma * sigma / 3
    length = (12.0 * variance.double() + 1.0).sqrt().float()
    whole = ((length.double() - 1.0) / 2.0).floor().float()
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    fraction = fraction / (6 * (variance - (whole + 1) * (whole + 1)))
    exact = whole + fraction
    radius = exact.long()
    inside = ((1 << 24) / (exact * 2 + 1)).long()
    border = ((1 << 24) - (2 * radius + 1) * inside) // 2
    missing = (1 << 24) - (2 * radius + 1) * inside - 2 * border  # 0 or 1; of all pixels, which are held minus 128
    return radius, torch.stack([inside, border, (1 << 23) - 128 * missing], dim=1).int()


def _box_blurs(images: Tensor, weights: Tensor, radius: int) -> Tensor:
    """Three box blurs along the rows, then three along the columns, edge pixels repeated; ``weights`` (B, 3) int32."""
    # In int32, and minus 128, so that 2^24 times a pixel fits. Two buffers serve all passes: on a CPU, to be given
    # fresh memory takes longer than to compute.
    inside, border, half = weights.split(1, dim=1)
    pad = radius + 1
    num, channels, height, width = images.shape
    buffers = [
        images.new_empty(num * channels * (height * width + 2 * pad * max(height, width)), dtype=torch.int32)
        for _ in range(2)
    ]
    for dim in (3, 2):
        shape, size = list(images.shape), images.shape[dim]
        shape[dim] += 2 * pad
        padded = buffers[0][: math.prod(shape)].view(shape)
        before, middle, after = padded.split([pad, size, pad], dim=dim)
        first, last = middle.narrow(dim, 0, 1), middle.narrow(dim, size - 1, 1)
        middle.copy_(images)
        if dim == 3:
            middle.sub_(128)
        # A shift along rows or columns is one of the flat image; what it makes of the padding is overwritten.
        flat = padded.flatten(1)
        step = 1 if dim == 3 else width
        length = flat.shape[1] - 2 * pad * step
        left, *others, right = (flat.narrow(1, shift * step, length) for shift in range(2 * pad + 1))
        center = others[radius]
        total = buffers[1][: num * length].view(num, length)
        for _ in range(3):
            before.copy_(first)
            after.copy_(last)
            torch.add(left, right, out=total)
            total.mul_(border).addcmul_(center if radius == 0 else sum(others[1:], others[0]), inside).add_(half)
            torch.bitwise_right_shift(total, 24, out=center)
        images = middle
        buffers.reverse()
    blurred = buffers[0][: images.numel()].view(torch.float32).view(images.shape)
    return blurred.copy_(images).add_(128)


def _blend(start: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """``start`` + ``factor`` * (``images`` - ``start``) within [0, 255], truncated (``Image.blend``)."""
    # Two roundings, as in C: neither torch.lerp nor addcmul.
    return images.sub(start).mul_(_per_image(factor)).add_(start).clamp_(0, 255).floor_()


def _gray(images: Tensor) -> Tensor:
    """PIL's mode L, (B, 1, h, w): the weights are multiples of 2^-16, and the sum is exact."""
    red, green, blue = images.split(1, dim=1)
    return (red * (19595 / 65536)).add_(green, alpha=38470 / 65536).add_(blue, alpha=7471 / 65536).add_(0.5).floor_()


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


@cache
def _constant(
    numbers: float | tuple[float, ...] | tuple[tuple[float, ...], ...], kind: torch.dtype, device: torch.device
) -> Tensor:
    """Kept on the device: a GPU multiplies by the reciprocal where it is to divide by a number of the host."""
    return torch.tensor(numbers, dtype=kind).to(device, non_blocking=True)


def _columns_first(box: Tensor, size: int) -> Tensor:
    """Whose columns Pillow resizes before its rows, (B,) bool: since version 13, where more than twice as many go."""
    if int(PIL.__version__.split(".")[0]) < 13:
        return torch.zeros(len(box), dtype=torch.bool)
    return box[:, 2] - size > 2 * (box[:, 3] - size).clamp(min=0)


def _resample(pixels: Tensor, box: Tensor, size: int, interpolation: str, columns_first: bool) -> Tensor:
    """``crop_resize`` of images that all go the same way."""
    intervals = torch.cat([box[:, 0::2], box[:, 1::2]])  # along the columns, along the rows
    bags = [part.chunk(2) for part in _resampling_bags(intervals, size, interpolation, pixels.device)]
    columns, rows = zip(*bags, strict=True)
    if columns_first:
        images = _weighted_sums(pixels.permute(0, 2, 1, 3), *columns)
        images = _weighted_sums(images.permute(0, 3, 2, 1), *rows)
        return images.permute(0, 2, 3, 1).contiguous()
    images = _weighted_sums(pixels.permute(0, 3, 1, 2), *rows)
    images = _weighted_sums(images.permute(0, 3, 2, 1), *columns)
    return images.permute(0, 2, 1, 3).contiguous()


def _resampling_bags(
    intervals: Tensor, size: int, interpolation: str, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Which pixels contribute to each of ``size``, and how much.

    Pillow's weights are multiples of 2^-22. They come in two parts, whose products with pixels add up without
    rounding in fp32: the multiple of 2^-10, and the rest, times 2^10. (Of more than 32 pixels, at reductions beyond
    1/16, the rests might in theory add up to more than fp32 holds; they never come close.)

    Args:
        intervals: (B, 2) int64 on the CPU: first pixel and length of the crop.
        size: Pixels of the result, S.
        interpolation: ``bilinear`` or ``bicubic``.
        device: Where the result is needed.

    Returns:
        With T pixels that contribute at most: (B, S, T) int64, their numbers, which may lie beyond the crop where
        fewer do; and the two parts of their weights, (B, S, T) fp32.
    """
    reach = {"bilinear": 1.0, "bicubic": 2.0}[interpolation]
    num_taps = 2 * math.ceil(reach * max(1.0, int(intervals[:, 1].max()) / size)) + 1
    start, length = intervals.to(device, non_blocking=True).view(-1, 2, 1, 1).unbind(1)
    # In double, in the order of Pillow's operations.
    scale = length.double() / _constant(size, torch.float64, device)
    stretch = scale.clamp(min=1)
    support = reach * stretch
    center = torch.arange(0.5, size, device=device, dtype=torch.float64).view(-1, 1) * scale
    first = (center - support + 0.5).long().clamp_(min=0)
    last = torch.minimum((center + support + 0.5).long(), length)
    taps = first + torch.arange(num_taps, device=device)
    distance = (taps - center).add_(0.5).mul_(1.0 / stretch).abs_()
    if interpolation == "bilinear":
        weights = (1 - distance).clamp_(min=0)
    else:
        near = ((1.5 * distance - 2.5) * distance * distance).add_(1)
        far = (((distance - 5) * distance + 8) * distance - 4) * -0.5
        weights = torch.where(distance < 1, near, far).masked_fill_(distance >= 2, 0)
    weights.masked_fill_(taps >= last, 0)
    weights.div_(weights.sum(dim=2, keepdim=True)).mul_(1 << 22)
    weights.add_(weights.sign(), alpha=0.5).trunc_()
    high = (weights + 2048).mul_(1 / 4096).floor_()
    low = weights.sub_(high, alpha=4096).mul_(1 / 4096).float()
    return taps.add_(start), high.mul_(2.0**-10).float(), low


def _weighted_sums(images: Tensor, taps: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Weighted sums along dimension 1, with the ``_resampling_bags`` (B, S, T), rounded half up to [0, 255].

    (B, n, ...) to (B, S, ...) fp32.
    """
    # A bag is a weighted sum of lines. A matrix product would mostly multiply zeros, and in bf16 where it is allowed.
    num, source = images.shape[:2]
    lines = images.contiguous().float().flatten(2).flatten(0, 1)
    numbers = taps.clamp(max=source - 1).add_(torch.arange(0, num * source, source, device=taps.device).view(-1, 1, 1))
    sums, rest = (
        F.embedding_bag(numbers.flatten(0, 1), lines, per_sample_weights=part.flatten(0, 1), mode="sum")
        for part in (high, low)
    )
    sums.add_(rest.floor_(), alpha=2.0**-10).add_(0.5).floor_().clamp_(0, 255)
    return sums.view(num, -1, *images.shape[2:])
