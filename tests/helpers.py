"""Small networks and batches that several tests need."""

import torch

from harmonize.backbones.timm_vit import ViTEncoder
from harmonize.types import Batch


def tiny_encoder(seed: int = 0, **options) -> ViTEncoder:
    torch.manual_seed(seed)
    sizes = {"image_size": 16, "patch_size": 4, "width": 24, "depth": 2, "num_heads": 3} | options
    return ViTEncoder(**sizes)


def random_batch(num_images: int = 6, image_size: int = 16, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def images():
        return torch.randn(num_images, 3, image_size, image_size, generator=generator)

    index = torch.arange(num_images)
    return Batch(
        views={"contrastive": (images(), images()), "mim": (images(),)},
        label=index % 2,
        index=index,
        seed=torch.randint(1 << 40, (num_images,), generator=generator),
        image=images(),
    )
