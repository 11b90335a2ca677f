"""The augmentations of the official pre-training recipes, and the clean view of evaluation.

A recipe draws the parameters of its views, for a batch at a time, as a function of one seed per image; they are applied
by Pillow (:func:`augment_image`) or as tensor operations on the device (``batched.py``), with the same result, bit for
bit. Views are normalised fp32 tensors (3, image_size, image_size).

Sources: MoCo v3 ``moco/loader.py`` and ``main_moco.py``; SimMIM ``data/data_simmim.py``; MAE ``main_pretrain.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from harmonize.data.augmentation import Augmentation, RandomView
from harmonize.data.batched import normalise_
from harmonize.functional.seeding import mix
from harmonize.types import ConfigError


def to_tensor(image: Image.Image) -> Tensor:
    """(3, h, w) fp32 with the channel mean and standard deviation of ImageNet taken out.

    >>> to_tensor(Image.new("RGB", (1, 1), "white")).flatten()
    tensor([2.2489, 2.4286, 2.6400])
    """
    return normalise(F.pil_to_tensor(image))


def normalise(pixels: Tensor) -> Tensor:
    """The same for uint8 pixels (..., 3, h, w)."""
    return normalise_(pixels.to(torch.float32, memory_format=torch.contiguous_format))


def crop_image(image: Image.Image, augmentation: Augmentation, row: int = 0) -> Image.Image:
    """The crop of one row of parameters, resized by Pillow, which smooths when it reduces."""
    size = [augmentation.image_size, augmentation.image_size]
    mode = v2.InterpolationMode(augmentation.interpolation)
    return F.resized_crop(image, *augmentation.box[row].tolist(), size, mode)


def augment_image(image: Image.Image, augmentation: Augmentation, row: int = 0) -> Tensor:
    """One view of one image by Pillow, as the official code makes it.

    Args:
        image: In mode RGB.
        augmentation: Parameters of a batch.
        row: Which of them.

    Returns:
        (3, image_size, image_size) fp32, normalised.
    """
    view = crop_image(image, augmentation, row)
    factors = augmentation.factors[row].tolist()
    for step in augmentation.order[row].tolist():
        if not math.isnan(factors[step]):
            view = _JITTER[step](view, factors[step])
    if augmentation.gray[row]:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    if augmentation.sigma[row]:
        view = view.filter(ImageFilter.GaussianBlur(radius=augmentation.sigma[row].item()))  # torchvision's differs
    if augmentation.solarize[row]:
        view = F.solarize(view, augmentation.threshold)
    if augmentation.flip[row]:
        view = F.horizontal_flip(view)
    return to_tensor(view)


_JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


class Drawn:
    """A recipe whose parameters are drawn for a whole batch, and applied by Pillow or by tensor operations.

    Args:
        views: What the parameters of each view are drawn from.
    """

    def __init__(self, *views: RandomView):
        self.views = views

    def draw(self, seed: Tensor, height: Tensor, width: Tensor) -> tuple[Augmentation, ...]:
        """Parameters of each view, a function of each image's seed and size alone.

        Args:
            seed: (B,) int64.
            height: (B,) int64, of the images, in px.
            width: (B,) int64, of the images, in px.
        """
        return tuple(view.draw(mix(seed, number), height, width) for number, view in enumerate(self.views))


class MoCoV3(Drawn):
    """The two views of MoCo v3, which differ in blur and solarisation.

    In this order: random resized crop (bilinear), colour jitter, greyscale, blur, solarisation, horizontal flip.

    Args:
        image_size: Side of the views, in px.
        crop_scale: Range of the crop's share of the image area.
        crop_ratio: Range of the crop's width / height.
        jitter: Strength of brightness, contrast, saturation and hue jitter.
        jitter_prob: Probability of the jitter.
        gray_prob: Probability of greyscale.
        blur_sigma: Range of the blur radius, in px.
        blur_prob: Probability of the blur, for view 1 and view 2.
        solarize_threshold: Values from here up to 255 are inverted.
        solarize_prob: Probability of solarisation, for view 1 and view 2.
        flip_prob: Probability of the horizontal flip.
    """

    def __init__(
        self,
        image_size: int,
        crop_scale: Sequence[float] = (0.08, 1.0),
        crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
        jitter: Sequence[float] = (0.4, 0.4, 0.2, 0.1),
        jitter_prob: float = 0.8,
        gray_prob: float = 0.2,
        blur_sigma: Sequence[float] = (0.1, 2.0),
        blur_prob: Sequence[float] = (1.0, 0.1),
        solarize_threshold: float = 128,
        solarize_prob: Sequence[float] = (0.0, 0.2),
        flip_prob: float = 0.5,
    ):
        key = "views.moco_v3"
        for name, prob in {"jitter": jitter_prob, "gray": gray_prob, "flip": flip_prob}.items():
            check_probabilities(f"{key}.{name}_prob", [prob], num=1)
        for name, probs in {"blur": blur_prob, "solarize": solarize_prob}.items():
            check_probabilities(f"{key}.{name}_prob", probs, num=2)
        check_range(f"{key}.blur_sigma", blur_sigma)
        if len(jitter) != 4 or min(jitter) < 0 or jitter[3] > 0.5:
            raise ConfigError(f"{key}.jitter={list(jitter)} is not possible: 4 numbers from 0 up, the last at most 0.5")
        check_crop(key, crop_scale, crop_ratio)
        super().__init__(
            *(
                RandomView(
                    image_size=image_size,
                    interpolation="bilinear",
                    crop_scale=tuple(crop_scale),
                    crop_ratio=tuple(crop_ratio),
                    flip_prob=flip_prob,
                    jitter=tuple(jitter),
                    jitter_prob=jitter_prob,
                    gray_prob=gray_prob,
                    blur_sigma=tuple(blur_sigma),
                    blur_prob=blur_prob[view],
                    solarize_threshold=solarize_threshold,
                    solarize_prob=solarize_prob[view],
                )
                for view in (0, 1)
            )
        )


class SimMIM(Drawn):
    """The one view of SimMIM: a mild random resized crop and a horizontal flip.

    Args:
        image_size: Side of the view, in px.
        crop_scale: Range of the crop's share of the image area.
        crop_ratio: Range of the crop's width / height.
        interpolation: ``bilinear`` or ``bicubic``.
        flip_prob: Probability of the horizontal flip.
    """

    _key = "views.simmim"

    def __init__(
        self,
        image_size: int,
        crop_scale: Sequence[float] = (0.67, 1.0),
        crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
        interpolation: str = "bilinear",
        flip_prob: float = 0.5,
    ):
        check_probabilities(f"{self._key}.flip_prob", [flip_prob], num=1)
        check_crop(self._key, crop_scale, crop_ratio)
        interpolation_mode(f"{self._key}.interpolation", interpolation)
        super().__init__(RandomView(image_size, interpolation, tuple(crop_scale), tuple(crop_ratio), flip_prob))


class MAE(SimMIM):
    """The one view of MAE: a random resized crop (bicubic) and a horizontal flip; arguments as in ``SimMIM``."""

    _key = "views.mae"

    def __init__(
        self,
        image_size: int,
        crop_scale: Sequence[float] = (0.2, 1.0),
        crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
        interpolation: str = "bicubic",
        flip_prob: float = 0.5,
    ):
        super().__init__(image_size, crop_scale, crop_ratio, interpolation, flip_prob)


class Evaluation:
    """The clean view: the shorter side resized, the centre cropped.

    Args:
        image_size: Side of the view, or (height, width), in px.
        eval_crop: Share of the resized shorter side that the crop keeps; 0.875 is the usual 224 of 256.
        interpolation: ``bicubic``, or ``bilinear`` as in MoCo v3's linear evaluation.
    """

    _MAX_ASPECT = 16  # a 1 x 30,000 px image would otherwise be resized to gigabytes before the crop

    def __init__(self, image_size: int | tuple[int, int], eval_crop: float, interpolation: str = "bicubic"):
        mode = interpolation_mode("data.eval_interpolation", interpolation)
        if not 0 < eval_crop <= 1:
            raise ConfigError(f"data.eval_crop={eval_crop} is not possible: a number above 0 and at most 1 is needed")
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.resize = v2.Resize(int(max(height, width) / eval_crop + 1e-6), mode)
        self.crop = v2.CenterCrop((height, width))

    def __call__(self, image: Image.Image) -> Tensor:
        """The view (3, height, width) of the image."""
        longest = self._MAX_ASPECT * min(image.size)
        if max(image.size) > longest:
            image = F.center_crop(image, [min(image.height, longest), min(image.width, longest)])
        return to_tensor(self.crop(self.resize(image)))

    def is_whole(self, height: int, width: int) -> bool:
        """Whether images of this size, in px, are seen as they are: then only :func:`normalise` is left to do."""
        return tuple(self.crop.size) == (height, width) and self.resize.size == [height] == [width]


def random_crop(
    key: str, image_size: int | tuple[int, int], scale: Sequence[float], ratio: Sequence[float], interpolation: str
) -> v2.RandomResizedCrop:
    """Torchvision's random resized crop, after a check of its parameters; ``key`` names them in an error."""
    check_crop(key, scale, ratio)
    return v2.RandomResizedCrop(
        image_size, tuple(scale), tuple(ratio), interpolation_mode(f"{key}.interpolation", interpolation)
    )


def check_crop(key: str, scale: Sequence[float], ratio: Sequence[float]) -> None:
    """Raise a sentence naming ``key`` unless these are ranges of a crop's area and ratio."""
    check_range(f"{key}.crop_scale", scale, highest=1)
    check_range(f"{key}.crop_ratio", ratio)


def interpolation_mode(key: str, name: str) -> v2.InterpolationMode:
    """``bilinear`` or ``bicubic`` as torchvision's mode; ``key`` names it in an error."""
    if name not in ("bilinear", "bicubic"):
        raise ConfigError(f"{key}={name} is not known: bilinear or bicubic is needed")
    return v2.InterpolationMode(name)


def check_range(key: str, value: Sequence[float], highest: float = float("inf")) -> None:
    """Raise a sentence naming ``key`` unless ``value`` is (lowest, highest), both above 0."""
    if len(value) != 2 or not 0 < value[0] <= value[1] <= highest:
        limit = "" if highest == float("inf") else f" and at most {highest}"
        raise ConfigError(f"{key}={list(value)} is not possible: [lowest, highest] above 0{limit} is needed")


def check_probabilities(key: str, values: Sequence[float], num: int) -> None:
    """Raise a sentence naming ``key`` unless ``values`` are ``num`` probabilities."""
    if len(values) != num or not all(0 <= prob <= 1 for prob in values):
        needed = "a probability is" if num == 1 else f"{num} probabilities, one for each view, are"
        raise ConfigError(f"{key}={', '.join(map(str, values))} is not possible: {needed} needed")
