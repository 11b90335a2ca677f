"""Labelled training: the augmentations of the official linear evaluations and fine-tunings, and the mixing of images.

The recipes keep to the protocol of ``views.py``: a PIL image becomes a tuple of one normalised tensor, and every random
number comes from torch's global generator, which the caller seeds.

Sources: MoCo v3 ``main_lincls.py``; MAE ``main_linprobe.py``, ``util/crop.py`` and ``util/datasets.py``; SimMIM
``data/data_finetune.py``. The fine-tuning recipes are defined by timm's RandAugment, RandomErasing and Mixup.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from harmonize.data.views import check_probabilities, interpolation_mode, random_crop, to_tensor
from harmonize.types import IMAGE_MEAN, ConfigError

_RATIO = (3 / 4, 4 / 3)


class SingleDrawCrop:
    """The random resized crop of BYOL and of MAE's linear evaluation: one draw of area and aspect, cut to the image.

    torchvision draws up to ten times until the crop fits. Here the first draw counts, and a side that is longer than
    the image becomes the image's: wide and large crops are as frequent as they were drawn.

    Args:
        image_size: Side of the crop after resizing, or (height, width), in px.
        scale: Range of the crop's share of the image area.
        ratio: Range of the crop's width / height, uniform in its logarithm.
        mode: Interpolation.

    Source: MAE ``util/crop.py``; BYOL (Grill et al. 2020), appendix B.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        scale: Sequence[float],
        ratio: Sequence[float],
        mode: v2.InterpolationMode,
    ):
        self.size = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
        self.scale, self.log_ratio, self.mode = tuple(scale), tuple(map(math.log, ratio)), mode

    def __call__(self, image: Image.Image) -> Image.Image:
        """Crop and resize."""
        area = image.width * image.height * torch.empty(1).uniform_(*self.scale).item()
        aspect = math.exp(torch.empty(1).uniform_(*self.log_ratio).item())
        height = min(max(1, round(math.sqrt(area / aspect))), image.height)
        width = min(max(1, round(math.sqrt(area * aspect))), image.width)
        top = int(torch.randint(image.height - height + 1, ()))
        left = int(torch.randint(image.width - width + 1, ()))
        return F.resized_crop(image, top, left, height, width, self.size, self.mode)


class CropFlip:
    """What linear heads are trained on: a random resized crop and a horizontal flip.

    Args:
        image_size: Side of the view, or (height, width), in px.
        crop_scale: Range of the crop's share of the image area.
        interpolation: ``bilinear`` (MoCo v3, DINO) or ``bicubic`` (MAE, DINOv2).
        crop: ``torchvision``, or ``mae`` for :class:`SingleDrawCrop`.
        flip_prob: Probability of the horizontal flip.
        crop_ratio: Range of the crop's width / height.

    Raises:
        ConfigError: An argument is out of range.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        crop_scale: Sequence[float] = (0.08, 1.0),
        interpolation: str = "bilinear",
        crop: str = "torchvision",
        flip_prob: float = 0.5,
        crop_ratio: Sequence[float] = _RATIO,
    ):
        key = "eval.augment"
        check_probabilities(f"{key}.flip_prob", [flip_prob], num=1)
        if crop not in ("torchvision", "mae"):
            raise ConfigError(f"{key}.crop={crop} is not known: torchvision or mae is needed")
        fitting = random_crop(key, image_size, crop_scale, crop_ratio, interpolation)
        mode = interpolation_mode(f"{key}.interpolation", interpolation)
        self.view = v2.Compose(
            [
                fitting if crop == "torchvision" else SingleDrawCrop(image_size, crop_scale, crop_ratio, mode),
                v2.RandomHorizontalFlip(flip_prob),
                to_tensor,
            ]
        )

    def __call__(self, image: Image.Image) -> tuple[Tensor]:
        """The view of the image."""
        return (self.view(image),)


class FineTuning:
    """What whole networks are fine-tuned on in MAE, SimMIM, BEiT and DeiT.

    In this order: random resized crop, horizontal flip, RandAugment, normalisation, random erasing with noise.

    Args:
        image_size: Side of the view, or (height, width), in px.
        randaugment: timm's description, ``rand-m9-mstd0.5-inc1`` in all official recipes; None: off.
        interpolation: ``bilinear`` or ``bicubic``, of the crop and within RandAugment.
        crop_scale: Range of the crop's share of the image area.
        color_jitter: Strength of brightness, contrast and saturation jitter, in the place of RandAugment.
        erasing_prob: Probability that one rectangle is filled with normal noise, a value of its own for every pixel.
        flip_prob: Probability of the horizontal flip.
        crop_ratio: Range of the crop's width / height.

    Raises:
        ConfigError: An argument is out of range, or there is jitter beside RandAugment.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        randaugment: str | None = "rand-m9-mstd0.5-inc1",
        interpolation: str = "bicubic",
        crop_scale: Sequence[float] = (0.08, 1.0),
        color_jitter: float = 0.0,
        erasing_prob: float = 0.25,
        flip_prob: float = 0.5,
        crop_ratio: Sequence[float] = _RATIO,
    ):
        key = "eval"
        check_probabilities(f"{key}.flip_prob", [flip_prob], num=1)
        check_probabilities(f"{key}.erasing_prob", [erasing_prob], num=1)
        if not color_jitter >= 0:
            raise ConfigError(f"{key}.color_jitter={color_jitter} is not possible: a number from 0 up is needed")
        if color_jitter and randaugment:
            # timm, and with it SimMIM's recipe, would leave the jitter out without a word.
            raise ConfigError(
                f"{key}.color_jitter={color_jitter} is not possible beside {key}.randaugment={randaugment}: "
                "set one of them to 0 or null"
            )
        self.cut = v2.Compose(
            [
                random_crop(key, image_size, crop_scale, crop_ratio, interpolation),
                v2.RandomHorizontalFlip(flip_prob),
                *([v2.ColorJitter(color_jitter, color_jitter, color_jitter)] if color_jitter else []),
            ]
        )
        self.augment = _randaugment(key, randaugment, image_size, interpolation) if randaugment else None
        self.erase = RandomErasing(erasing_prob, mode="pixel", max_count=1, device="cpu")

    def __call__(self, image: Image.Image) -> tuple[Tensor]:
        """The view of the image."""
        image = self.cut(image)
        with python_and_numpy_seeded():
            if self.augment is not None:
                image = self.augment(image)
            return (self.erase(to_tensor(image)),)


def _randaugment(
    key: str, description: str, image_size: int | tuple[int, int], interpolation: str
) -> Callable[[Image.Image], Image.Image]:
    side = image_size if isinstance(image_size, int) else min(image_size)
    parameters = {
        "translate_const": int(0.45 * side),
        "img_mean": tuple(round(255 * mean) for mean in IMAGE_MEAN),  # fills what a rotation or shift leaves open
        "interpolation": getattr(Image.Resampling, interpolation.upper()),
    }
    try:
        augment = rand_augment_transform(description, parameters)
    except (AssertionError, ValueError) as error:
        raise ConfigError(
            f"{key}.randaugment={description} is not known: a description such as rand-m9-mstd0.5-inc1 is needed"
        ) from error
    for operation in augment.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = posterize
    return augment


def posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """The highest bits of every colour; 0 bits, which RandAugment may draw and Pillow 13 refuses, leave black.

    Args:
        image: The image.
        bits: How many, 0 ... 8.
    """
    return image.point(lambda value: value & ~((1 << (8 - bits)) - 1))


@contextmanager
def python_and_numpy_seeded() -> Iterator[None]:
    """Seed the global generators of Python and NumPy from torch's, and put their states back afterwards.

    timm draws from all three; inside, its draws are a function of torch's generator alone.
    """
    seeds = torch.randint(2**32, (2,)).tolist()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (timm's generator, not ours)
    random.seed(seeds[0])
    np.random.seed(seeds[1])  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@dataclass(frozen=True)
class Mix:
    """How one batch is mixed.

    Attributes:
        share: What an image keeps of itself, in [0, 1]; 1: nothing is mixed.
        box: (top, bottom, left, right) that comes from the other image, in px; None: the pixels are averaged.
    """

    share: float
    box: tuple[int, int, int, int] | None = None


class Mixing:
    """Mixup or CutMix of a batch with itself in reverse order, and the soft targets that belong to it.

    One draw holds for the whole batch. With an odd number of images the middle one is mixed with itself.

    Args:
        num_classes: C.
        mixup: Both parameters of the Beta distribution of the share in mixup; 0: never mixup.
        cutmix: The same for CutMix; 0: never CutMix.
        prob: Probability that a batch is mixed at all.
        switch_prob: Probability of CutMix where both are possible.
        smoothing: Label smoothing: every class gets smoothing / C, and the label 1 - smoothing on top.

    Raises:
        ConfigError: An argument is out of range.

    Source: Zhang et al. 2018 (arXiv:1710.09412); Yun et al. 2019 (arXiv:1905.04899); timm ``data/mixup.py``, mode
    ``batch``.
    """

    def __init__(
        self,
        num_classes: int,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        smoothing: float = 0.1,
    ):
        for name, value in {"mixup": mixup, "cutmix": cutmix}.items():
            if not 0 <= value < math.inf:
                raise ConfigError(f"eval.{name}={value} is not possible: a number from 0 (never) up is needed")
        for name, value in {"mix_prob": prob, "switch_prob": switch_prob, "smoothing": smoothing}.items():
            check_probabilities(f"eval.{name}", [value], num=1)
        self.num_classes, self.mixup, self.cutmix = num_classes, mixup, cutmix
        self.prob, self.switch_prob, self.smoothing = prob, switch_prob, smoothing

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Mix.

        Args:
            images: (B, 3, h, w), left as they are.
            labels: (B,) int64 in [0, C).
            seed: The draw is a function of it alone, on every device. To be different on every rank and in every step.

        Returns:
            Images (B, 3, h, w) and targets (B, C), fp32, whose rows sum to 1.
        """
        mix = self.draw(seed, *images.shape[-2:])
        return mix_images(images, mix), self.targets(labels, mix.share)

    def draw(self, seed: int, height: int, width: int) -> Mix:
        """How a batch of images of this size, in px, is mixed."""
        generator = np.random.default_rng(seed % 2**64)
        apply, switch, cy, cx = generator.random(4)
        if apply >= self.prob or not (self.mixup or self.cutmix):
            return Mix(1.0)
        cut = self.cutmix > 0 and (not self.mixup or switch < self.switch_prob)
        concentration = self.cutmix if cut else self.mixup
        share = float(generator.beta(concentration, concentration))
        return cut_box(share, int(cy * height), int(cx * width), height, width) if cut else Mix(share)

    def targets(self, labels: Tensor, share: float = 1.0) -> Tensor:
        """Smoothed targets (B, C), fp32, in which a label has ``share`` and that of its partner the rest."""
        rest = self.smoothing / self.num_classes
        target = torch.full((len(labels), self.num_classes), rest, device=labels.device)
        target.scatter_(1, labels[:, None], 1 - self.smoothing + rest)
        return target if share == 1 else target * share + target.flip(0) * (1 - share)


def mix_images(images: Tensor, mix: Mix) -> Tensor:
    """The batch (B, 3, h, w), each image with its partner from the reversed batch."""
    if mix.share == 1:
        return images
    other = images.flip(0)
    if mix.box is None:
        return images * mix.share + other * (1 - mix.share)
    top, bottom, left, right = mix.box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
    return mixed


def cut_box(share: float, cy: int, cx: int, height: int, width: int) -> Mix:
    """CutMix's box around a centre, with the sides of the image times sqrt(1 - share), cut at the borders.

    Args:
        share: What an image is to keep.
        cy: Row of the centre.
        cx: Column of the centre.
        height: Of the images, in px.
        width: Of the images, in px.

    Returns:
        The box, and the share that the image keeps once the box is cut.

    >>> cut_box(0.75, cy=0, cx=4, height=8, width=8)
    Mix(share=0.875, box=(0, 2, 2, 6))
    """
    side = math.sqrt(1 - share)
    h, w = int(height * side), int(width * side)
    top, bottom = max(0, cy - h // 2), min(height, cy + (h + 1) // 2)
    left, right = max(0, cx - w // 2), min(width, cx + (w + 1) // 2)
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))
