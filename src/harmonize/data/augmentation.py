"""What augmentation does to the images of a view, as numbers: drawn once, applied by Pillow or by tensor operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harmonize.functional.seeding import uniform


@dataclass(frozen=True)
class Augmentation:
    """The parameters of one view of a batch of images; tensors on the CPU, one row per image.

    In this order: crop and resize, colour jitter, greyscale, blur, solarisation, horizontal flip, normalisation.

    Attributes:
        image_size: Side of the view, in px.
        interpolation: ``bilinear`` or ``bicubic``, of the resizing.
        box: (B, 4) int64: top, left, height and width of the crop, in px of the image.
        factors: (B, 4) fp32: brightness, contrast, saturation and hue; NaN: this operation is left out. The first
            three are factors (1 changes nothing), the hue is a shift in [-0.5, 0.5].
        order: (B, 4) int64, a permutation of 0 ... 3 (positions in ``factors``): which operation comes first.
        gray: (B,) bool.
        sigma: (B,) fp32, radius of Pillow's Gaussian blur in px; 0: no blur.
        solarize: (B,) bool: values from ``threshold`` up are inverted.
        threshold: In [0, 256].
        flip: (B,) bool.
    """

    image_size: int
    interpolation: str
    box: Tensor
    factors: Tensor
    order: Tensor
    gray: Tensor
    sigma: Tensor
    solarize: Tensor
    threshold: float
    flip: Tensor

    def __len__(self) -> int:
        return len(self.box)

    def take(self, rows: slice | Tensor) -> Augmentation:
        """The parameters of some of the images."""
        tensors: dict[str, Any] = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def without_crop(self) -> Augmentation:
        """The same for images that have been cropped and resized already."""
        whole = torch.tensor([0, 0, self.image_size, self.image_size])
        return replace(self, box=whole.expand(len(self), 4))

    @staticmethod
    def join(parts: Sequence[Augmentation]) -> Augmentation:
        """The parameters of several batches of the same view, one after the other."""
        fields = [name for name, value in vars(parts[0]).items() if isinstance(value, Tensor)]
        tensors: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in fields}
        return replace(parts[0], **tensors)


@dataclass(frozen=True)
class RandomView:
    """What the parameters of one view are drawn from; by default nothing but the crop is random.

    The distributions are those of torchvision's RandomResizedCrop, ColorJitter within RandomApply, RandomGrayscale,
    RandomSolarize and RandomHorizontalFlip, and of MoCo v3's blur, whose radius is uniform.

    Attributes:
        image_size: Side of the view, in px.
        interpolation: ``bilinear`` or ``bicubic``.
        crop_scale: Range of the crop's share of the image area.
        crop_ratio: Range of the crop's width / height, uniform in its logarithm.
        flip_prob: Probability of the horizontal flip.
        jitter: Strength of brightness, contrast, saturation and hue jitter; 0: this operation is left out.
        jitter_prob: Probability of the jitter.
        gray_prob: Probability of greyscale.
        blur_sigma: Range of the blur radius, in px.
        blur_prob: Probability of the blur.
        solarize_threshold: Values from here up to 255 are inverted.
        solarize_prob: Probability of solarisation.
    """

    image_size: int
    interpolation: str
    crop_scale: Sequence[float]
    crop_ratio: Sequence[float]
    flip_prob: float = 0.0
    jitter: Sequence[float] = (0.0, 0.0, 0.0, 0.0)
    jitter_prob: float = 0.0
    gray_prob: float = 0.0
    blur_sigma: Sequence[float] = (1.0, 1.0)
    blur_prob: float = 0.0
    solarize_threshold: float = 256.0
    solarize_prob: float = 0.0

    def draw(self, seed: Tensor, height: Tensor, width: Tensor) -> Augmentation:
        """Parameters that are a function of each image's seed and size alone, whatever else is in the batch.

        Args:
            seed: (B,) int64.
            height: (B,) int64, of the images, in px.
            width: (B,) int64, of the images, in px.
        """
        # Each number has its own column: another probability changes that one step and no other.
        numbers = uniform(seed, 4 * CROP_TRIES + 14).double()
        crop, rest = numbers[:, : 4 * CROP_TRIES].unflatten(1, (CROP_TRIES, 4)), numbers[:, 4 * CROP_TRIES :]
        flip, jitter, gray, blur, sigma, solarize = rest[:, :6].unbind(1)
        strength = torch.tensor(self.jitter, dtype=torch.float64)
        centre = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
        lowest = (centre - strength).clamp(min=torch.tensor([0.0, 0.0, 0.0, -0.5], dtype=torch.float64))
        factors = lowest + (centre + strength - lowest) * rest[:, 10:]
        left_out = (strength == 0) | (jitter >= self.jitter_prob)[:, None]
        low, high = self.blur_sigma
        return Augmentation(
            image_size=self.image_size,
            interpolation=self.interpolation,
            box=random_boxes(crop, height, width, self.crop_scale, self.crop_ratio),
            factors=factors.masked_fill(left_out, math.nan).float(),
            order=rest[:, 6:10].argsort(dim=1),
            gray=gray < self.gray_prob,
            sigma=torch.where(blur < self.blur_prob, low + (high - low) * sigma, 0.0).float(),
            solarize=solarize < self.solarize_prob,
            threshold=float(self.solarize_threshold),
            flip=flip < self.flip_prob,
        )


CROP_TRIES = 10
"""How often torchvision draws a crop before it takes the centre."""


def random_boxes(
    numbers: Tensor, height: Tensor, width: Tensor, scale: Sequence[float], ratio: Sequence[float]
) -> Tensor:
    """Random resized crops as torchvision draws them: the first try that fits into the image, else the centre.

    Args:
        numbers: (B, tries, 4) fp64 in [0, 1), for area, aspect ratio, top and left.
        height: (B,) int64, of the images, in px.
        width: (B,) int64, of the images, in px.
        scale: Range of the crop's share of the image area.
        ratio: Range of the crop's width / height, uniform in its logarithm.

    Returns:
        (B, 4) int64: top, left, height and width, in px.

    >>> half = torch.full((1, 10, 4), 0.5, dtype=torch.float64)
    >>> random_boxes(half, torch.tensor([8]), torch.tensor([12]), (0.25, 0.25), (1.0, 1.0)).tolist()
    [[2, 4, 5, 5]]
    """
    h, w = height.double()[:, None], width.double()[:, None]
    area = h * w * (scale[0] + (scale[1] - scale[0]) * numbers[..., 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * numbers[..., 1]).exp()
    tall, wide = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (tall > 0) & (tall <= h) & (wide > 0) & (wide <= w)
    first = fits.int().argmax(1, keepdim=True)
    size = torch.cat([tall.gather(1, first), wide.gather(1, first)], 1)
    room = torch.cat([h, w], 1) - size
    place = numbers.gather(1, first[..., None].expand(-1, -1, 4))[:, 0, 2:]
    found = torch.cat([(place * (room + 1)).floor(), size], 1)
    # The whole image if its own ratio is possible, else the largest part with the nearest ratio, in the centre.
    size = torch.cat([torch.minimum(h, (w / ratio[0]).round()), torch.minimum(w, (h * ratio[1]).round())], 1)
    centre = torch.cat([torch.div(torch.cat([h, w], 1) - size, 2, rounding_mode="floor"), size], 1)
    return torch.where(fits.any(1, keepdim=True), found, centre).long()
