"""Write validation images of a data set under other conditions, in the layout of ImageNet-C.

python experiments/evaluation_first_look/corrupt.py FOLDER data=shapes data.image_size=32 ... (any setting of data)

The corruptions are ours, simple and for small images; they are named like those of ImageNet-C but are not the same.
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from harmonize.config import compose, instantiate
from harmonize.data.module import DataModule
from harmonize.functional.seeding import mix_int
from harmonize.types import IMAGE_MEAN, IMAGE_STD

NUM_IMAGES = 500
SEVERITIES = (1, 3, 5)


def gaussian_noise(image: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    return image + 0.05 * severity * torch.randn(image.shape, generator=generator)


def gaussian_blur(image: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    return F.gaussian_blur(image, [9, 9], [0.5 * severity])


def contrast(image: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    return image.mean() + (image - image.mean()) * (1 - 0.17 * severity)


def pixelate(image: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    side = image.shape[-1]
    small = F.resize(image, [max(4, side * 2 // (2 + severity))], antialias=True)
    return F.resize(small, [side], interpolation=F.InterpolationMode.NEAREST)


def main(folder: str, *overrides: str) -> None:
    cfg = compose(overrides)
    dataset = instantiate(cfg.data.dataset)
    data = DataModule(dataset, {}, {}, cfg.data.image_size, 1, eval_crop=cfg.data.eval_crop)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    for batch in data.feature_loader("val", NUM_IMAGES, 50):
        for image, label, index in zip(batch.image, batch.label.tolist(), batch.index.tolist(), strict=True):
            for corruption in (gaussian_noise, gaussian_blur, contrast, pixelate):
                for severity in SEVERITIES:
                    generator = torch.Generator().manual_seed(mix_int(index, severity))
                    changed = corruption(image * std + mean, severity, generator).clamp(0, 1)
                    place = Path(folder) / corruption.__name__ / str(severity) / data.classes[label]
                    place.mkdir(parents=True, exist_ok=True)
                    pixels = (changed * 255).round().byte().permute(1, 2, 0).numpy()
                    Image.fromarray(pixels).save(place / f"{index}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
