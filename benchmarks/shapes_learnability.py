"""What can and what cannot be learnt from the data set `shapes`: the numbers of docs/shapes.md.

Command: OMP_NUM_THREADS=1 python benchmarks/shapes_learnability.py --clutter 0.1 --image-size 32 \
             --checkpoint outputs/hybrid-shapes-vit_tiny-*/checkpoints/last.ckpt

Every row is top-1 accuracy in percent on images of `val`, for both labels: linear probes on raw pixels, on colour
statistics and on the features of an untrained, a supervised and a self-supervised ViT-Tiny; a small convolutional
network trained end to end.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor

from harmonize.backbones.timm_vit import ViTEncoder
from harmonize.data.shapes import NUM_KINDS, Shapes, ShapesSplit
from harmonize.data.views import to_tensor
from harmonize.functional.linear_probe import fit_linear_probe


def load(split: ShapesSplit) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised images (B, 3, H, W), raw ones in [-1, 1], and factors (B, 2): shape, texture."""
    pictures = [split.load(i)[0] for i in range(len(split))]
    normalised = torch.stack([to_tensor(picture) for picture in pictures])
    raw = torch.stack([pil_to_tensor(picture) for picture in pictures]).float() / 127.5 - 1
    return normalised, raw, torch.tensor([split.factors(i) for i in range(len(split))])


def colour_statistics(images: Tensor) -> Tensor:
    """Per channel: histogram of 16 bins, mean and standard deviation; joint histogram of 4 x 4 x 4 bins; (B, 118)."""
    pixels = images.flatten(2)
    fine = F.one_hot(((pixels + 1) * 7.99).long(), 16).float().mean(2).flatten(1)
    red, green, blue = ((pixels + 1) * 1.999).long().unbind(1)
    joint = F.one_hot(red * 16 + green * 4 + blue, 64).float().mean(1)
    return torch.cat([fine, joint, pixels.mean(2), pixels.std(2)], 1)


class Pooled(nn.Module):
    """Class token and mean patch token of a ViT-Tiny, (B, 384)."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = ViTEncoder(image_size, 8, width=192, depth=12, num_heads=3)

    def forward(self, images: Tensor) -> Tensor:
        """The features of images (B, 3, H, W)."""
        tokens = self.encoder(images)
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)


def small_cnn() -> nn.Module:
    """Four convolutions and a linear layer for both factors, 0.3 M parameters."""
    layers: list[nn.Module] = []
    width = 3
    for out in (32, 64, 128, 128):
        layers += [nn.Conv2d(width, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        width = out
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(2 * NUM_KINDS))


def train(model: nn.Module, images: Tensor, factors: Tensor, minutes: float, lr: float) -> int:
    """Cross-entropy on both factors, AdamW, one-cycle learning rate by processor time, random flips; images seen."""
    model(images[:2])  # lazy layers take their sizes
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=0.05)
    start, seen = time.process_time(), 0
    while (done := (time.process_time() - start) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = lr * min(1.0, done / 0.1, (1 - done) / 0.9 + 1e-3)
        choice = torch.randint(len(images), (64,))
        batch = images[choice]
        batch = torch.where(torch.rand(64, 1, 1, 1) < 0.5, batch.flip(3), batch)
        shape, texture = model(batch).split(NUM_KINDS, 1)
        loss = F.cross_entropy(shape, factors[choice, 0]) + F.cross_entropy(texture, factors[choice, 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += 64
    return seen


@torch.no_grad()
def infer(model: nn.Module, images: Tensor) -> Tensor:
    """What a network says of all images, in eval mode."""
    model.eval()
    return torch.cat([model(chunk) for chunk in images.split(256)])


def report(name: str, logits: list[Tensor], factors: Tensor) -> None:
    """One row of the table."""
    shape, texture = ((logits[k].argmax(1) == factors[:, k]).float().mean().item() for k in (0, 1))
    print(f"{name:56s} {100 * shape:5.1f} {100 * texture:5.1f}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clutter", type=float, default=1.0)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--num-train", type=int, default=12_000)
    parser.add_argument("--num-probe", type=int, default=3_000, help="training images of the linear probes")
    parser.add_argument("--minutes", type=float, default=3, help="processor time for each supervised network")
    parser.add_argument("--checkpoint", type=Path, help="of a ViT-Tiny with patches of 8 px, pre-trained at this size")
    args = parser.parse_args()
    shapes = Shapes(args.num_train, num_val=2_000, image_size=args.image_size, clutter=args.clutter)
    images, raw, factors = load(shapes.split("train"))
    val_images, val_raw, val_factors = load(shapes.split("val"))

    def probe(name: str, fit: Tensor, score: Tensor) -> None:
        fit = fit[: args.num_probe]
        probes = [fit_linear_probe(fit, factors[: args.num_probe, k], NUM_KINDS) for k in (0, 1)]
        report(name, [probe.logits(score) for probe in probes], val_factors)

    vit = Pooled(args.image_size)
    probe("raw pixels, linear probe", raw[: args.num_probe].flatten(1), val_raw.flatten(1))
    probe("colour statistics, linear probe", colour_statistics(raw[: args.num_probe]), colour_statistics(val_raw))
    probe("untrained ViT-Tiny, linear probe", infer(vit, images[: args.num_probe]), infer(vit, val_images))
    if args.checkpoint:
        state = torch.load(args.checkpoint, weights_only=True)["state_dict"]
        vit.encoder.load_state_dict({k[8:]: v for k, v in state.items() if k.startswith("encoder.")})
        name = "self-supervised ViT-Tiny (the checkpoint), linear probe"
        probe(name, infer(vit, images[: args.num_probe]), infer(vit, val_images))
    for name, model, lr in (
        ("small CNN, supervised", small_cnn(), 2e-3),
        ("ViT-Tiny, supervised", nn.Sequential(Pooled(args.image_size), nn.Linear(384, 2 * NUM_KINDS)), 1e-3),
    ):
        seen = train(model, images, factors, args.minutes, lr)
        name = f"{name}, {seen} images"
        report(name, list(infer(model, val_images).split(NUM_KINDS, 1)), val_factors)


if __name__ == "__main__":
    main()
