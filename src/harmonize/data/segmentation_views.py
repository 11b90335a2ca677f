"""Images and masks together: the augmentation of segmentation training, and the windows of its evaluation.

Every random number comes from torch's global generator, which the caller seeds.

Source: the ADE20K configurations of BEiT and iBOT for mmsegmentation (scale by U(0.5, 2), crop in which no class fills
more than 75 %, flip, photometric distortion; windows of 512 px every 341 px in the test).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from harmonize.data.segmentation import IGNORE_INDEX
from harmonize.data.views import check_probabilities, check_range, to_tensor
from harmonize.types import ConfigError

MAX_ASPECT = 4
"""An image's longer side is at most this many times the side of the crop before it is scaled (official: 2048 / 512)."""

_TRIES = 10


class SegmentationTraining:
    """A random crop of the image at a random scale, with its mask.

    In this order: scaled so that the shorter side is ``scale`` times that of the crop, cropped, flipped, distorted in
    colour, normalised; what the image does not fill is 0 in the view and ignored in the mask, at the right and below.

    Args:
        image_size: Side of the crop, or (height, width), in px.
        scale: Range of the scale.
        max_class_share: The crop is drawn again, up to ten times, while a class fills more than this share of it, or
            all; 1: never.
        flip_prob: Probability of the horizontal flip.
        photometric: Whether colours are distorted (not where colour is all there is to see).

    Raises:
        ConfigError: An argument is out of range.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        scale: Sequence[float] = (0.5, 2.0),
        max_class_share: float = 0.75,
        flip_prob: float = 0.5,
        photometric: bool = True,
    ):
        check_range("eval.scale", scale)
        check_probabilities("eval.flip_prob", [flip_prob], num=1)
        if not 0 < max_class_share <= 1:
            raise ConfigError(
                f"eval.max_class_share={max_class_share} is not possible: a number above 0 and at most 1 is needed"
            )
        self.size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.scale, self.max_class_share, self.flip_prob = tuple(scale), max_class_share, flip_prob
        self.photometric = photometric

    def __call__(self, image: Image.Image, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The view (3, h, w), normalised, and its mask (h, w) int64."""
        scale = torch.empty(1).uniform_(*self.scale).item()
        width, height = covering_size(image.size, self.size, scale)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        mask = resize_mask(mask, height, width)
        for _ in range(_TRIES):
            top = int(torch.randint(max(0, height - self.size[0]) + 1, ()))
            left = int(torch.randint(max(0, width - self.size[1]) + 1, ()))
            crop = mask[top : top + self.size[0], left : left + self.size[1]]
            if self._is_varied(crop):
                break
        image = image.crop((left, top, left + crop.shape[1], top + crop.shape[0]))
        if torch.rand(()) < self.flip_prob:
            image, crop = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), crop.flip(1)
        if self.photometric:
            image = distort_colours(image)
        border = (0, self.size[1] - crop.shape[1], 0, self.size[0] - crop.shape[0])
        return pad(to_tensor(image), border), pad(crop, border, value=IGNORE_INDEX)

    def _is_varied(self, mask: Tensor) -> bool:
        """Whether there are two classes or more, and none fills too much of what is not ignored."""
        if self.max_class_share == 1:
            return True
        count = torch.bincount(mask[mask != IGNORE_INDEX])
        return int((count > 0).sum()) > 1 and count.max().item() < self.max_class_share * count.sum().item()


def covering_size(size: tuple[int, int], crop: tuple[int, ...], scale: float = 1.0) -> tuple[int, int]:
    """(width, height) of an image that covers the crop (times ``scale``), but for extreme shapes (``MAX_ASPECT``).

    Args:
        size: (width, height) of the image.
        crop: (height, width).
        scale: Factor of the result.

    >>> covering_size((640, 480), (512, 512))
    (683, 512)
    """
    width, height = size
    cover = max(crop[0] / height, crop[1] / width)
    factor = scale * min(cover, MAX_ASPECT * max(crop) / max(size))
    return max(1, round(width * factor)), max(1, round(height * factor))


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """The mask (H, W) in another size: the nearest pixel's class."""
    small = Image.fromarray(mask.numpy().astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(small)).long()


def distort_colours(image: Image.Image) -> Image.Image:
    """Brightness, contrast, saturation and hue, each changed with probability 1/2.

    Brightness by up to 32 of 255, contrast and saturation by a factor in [0.5, 1.5], hue by up to a tenth of a turn;
    contrast comes second or last, either with probability 1/2.

    Source: Liu et al. 2016 (SSD, arXiv:1512.02325), as in mmsegmentation's ``PhotoMetricDistortion``.
    """
    happens = (torch.rand(5) < 0.5).tolist()
    brightness, hue = torch.empty(2).uniform_(-1, 1).tolist()
    contrast, saturation = torch.empty(2).uniform_(0.5, 1.5).tolist()
    contrast_last = happens[4]
    if happens[0]:
        image = image.point(lambda value: value + 32 * brightness)
    if happens[1] and not contrast_last:
        image = image.point(lambda value: value * contrast)
    if happens[2] or happens[3]:
        h, s, v = image.convert("HSV").split()
        if happens[2]:
            s = s.point(lambda value: value * saturation)
        if happens[3]:
            h = h.point(lambda value: (value + round(25.6 * hue)) % 256)  # a turn is 256
        image = Image.merge("HSV", (h, s, v)).convert("RGB")
    if happens[1] and contrast_last:
        image = image.point(lambda value: value * contrast)
    return image


@dataclass(frozen=True)
class Windows:
    """An image in overlapping windows.

    Attributes:
        image: (n, 3, h, w), the windows, normalised.
        places: (n, 2) int64, top and left of each in the resized image, in px.
        size: (height, width) of the resized image, in px. Smaller than a window where that is padded below or right.
    """

    image: Tensor
    places: Tensor
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.places)

    def merge(self, logits: Tensor) -> Tensor:
        """The mean over the windows that show a pixel.

        Args:
            logits: (n, C, h, w) of the windows.

        Returns:
            (C, height, width) fp32 in the resized image's size.
        """
        height, width = self.size
        h, w = logits.shape[-2:]
        logits = logits.float()
        total = logits.new_zeros(logits.shape[1], max(height, h), max(width, w))
        count = logits.new_zeros(max(height, h), max(width, w))
        for window, (top, left) in zip(logits, self.places.tolist(), strict=True):
            total[:, top : top + h, left : left + w] += window
            count[top : top + h, left : left + w] += 1
        return (total / count)[:, :height, :width]

    def without_images(self) -> Windows:
        """The places alone, which merging needs."""
        return replace(self, image=self.image[:0])


class SlidingWindows:
    """The image resized to cover a window, and cut into windows that overlap by a third or more.

    The network sees images of the size that it is made for, and of the image everything, at its own aspect ratio.

    Args:
        image_size: Side of a window, or (height, width), in px.
        stride: Step from window to window, as a share of its side; the official 341 of 512 px is 2/3.

    Raises:
        ConfigError: The stride is out of range.
    """

    def __init__(self, image_size: int | tuple[int, int], stride: float = 2 / 3):
        if not 0 < stride <= 1:
            raise ConfigError(f"eval.stride={stride} is not possible: a number above 0 and at most 1 is needed")
        self.size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.stride = stride

    def __call__(self, image: Image.Image) -> Windows:
        """Resize, normalise and cut."""
        width, height = covering_size(image.size, self.size)
        view = to_tensor(image.resize((width, height), Image.Resampling.BILINEAR))
        h, w = self.size
        view = pad(view, (0, max(0, w - width), 0, max(0, h - height)))
        places = [(top, left) for top in self._starts(height, h) for left in self._starts(width, w)]
        windows = torch.stack([view[:, top : top + h, left : left + w] for top, left in places])
        return Windows(windows, torch.tensor(places), (height, width))

    def _starts(self, length: int, side: int) -> list[int]:
        """Where the windows begin; the last one ends with the image.

        >>> SlidingWindows(512)._starts(1000, 512)
        [0, 341, 488]
        """
        step = max(1, int(self.stride * side))
        last = max(0, length - side)
        return [*range(0, last, step), last]


def label_map(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The most probable class of every pixel of the original image.

    Args:
        logits: (C, h, w), for example from :meth:`Windows.merge`; resized bilinearly.
        size: (H, W) of the original image.

    Returns:
        (H, W) int64. A few classes at a time are resized: 150 of them at full size would take gigabytes.
    """
    best = logits.new_full(size, -torch.inf)
    winner = torch.zeros(size, dtype=torch.int64, device=logits.device)
    for first, part in zip(range(0, len(logits), 16), logits.split(16), strict=True):
        value, index = interpolate(part[None], size, mode="bilinear", align_corners=False)[0].max(dim=0)
        winner = torch.where(value > best, index + first, winner)
        best = torch.maximum(best, value)
    return winner
