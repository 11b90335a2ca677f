"""What can and what cannot be learnt from the data set `shapes`: the numbers of docs/shapes.md.

Command: OMP_NUM_THREADS=1 python benchmarks/shapes_learnability.py   (about 10 minutes on one core)

Every row is top-1 accuracy in percent on validation images, for both labels: linear classifiers on raw pixels, on
colour statistics and on features of an untrained ViT-Tiny; a small convolutional network and a ViT-Tiny trained end to
end, for which the split `conflict` is shown too.
"""

from __future__ import annotations

import argparse
import time

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor

from harmonize.data.shapes import NUM_KINDS, Shapes, ShapesSplit


def load(split: ShapesSplit) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) in [-1, 1] and factors (B, 2): shape, texture."""
    images = torch.stack([pil_to_tensor(split.load(i)[0]) for i in range(len(split))])
    return images.float() / 127.5 - 1, torch.tensor([split.factors(i) for i in range(len(split))])


def colour_statistics(images: Tensor) -> Tensor:
    """Per channel: histogram of 16 bins, mean and standard deviation; joint histogram of 4 x 4 x 4 bins; (B, 118)."""
    pixels = images.flatten(2)
    fine = F.one_hot(((pixels + 1) * 7.99).long(), 16).float().mean(2).flatten(1)
    red, green, blue = ((pixels + 1) * 1.999).long().unbind(1)
    joint = F.one_hot(red * 16 + green * 4 + blue, 64).float().mean(1)
    return torch.cat([fine, joint, pixels.mean(2), pixels.std(2)], 1)


def linear_probe(train: Tensor, train_label: Tensor, val: Tensor, val_label: Tensor) -> float:
    """Logistic regression on standardised features; the best of three weight decays ON `val`, an upper bound."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, val = (train - mean) / std, (val - mean) / std
    best = 0.0
    for decay in (0.01, 0.3, 3):
        torch.manual_seed(0)
        probe = nn.Linear(train.shape[1], NUM_KINDS)
        nn.init.zeros_(probe.weight)
        optimizer = torch.optim.AdamW(probe.parameters(), 2e-3, weight_decay=decay)
        for step in range(250):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 250)
            choice = torch.randint(len(train), (512,))
            loss = F.cross_entropy(probe(train[choice]), train_label[choice])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        best = max(best, (probe(val).argmax(1) == val_label).float().mean().item())
    return 100 * best


def vit_tiny(image_size: int, **kwargs: int) -> nn.Module:
    """A ViT-Tiny with patches of 8 px."""
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=image_size, patch_size=8, **kwargs)


def untrained_vit(images: Tensor) -> Tensor:
    """Class token and mean patch token of an untrained ViT-Tiny, (B, 384)."""
    vit = vit_tiny(images.shape[-1]).eval()
    with torch.no_grad():
        tokens = torch.cat([vit.forward_features(chunk) for chunk in images.split(256)])
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)


def small_cnn() -> nn.Module:
    """Four convolutions and a linear layer for both factors, 0.3 M parameters."""
    layers: list[nn.Module] = []
    width = 3
    for out in (32, 64, 128, 128):
        layers += [nn.Conv2d(width, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        width = out
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(2 * NUM_KINDS))


def train(model: nn.Module, images: Tensor, factors: Tensor, minutes: float, lr: float) -> None:
    """Cross-entropy on both factors, AdamW, one-cycle learning rate by processor time, random flips."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
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
    print(f"  ({seen} images in {minutes:g} minutes)")


def accuracy(model: nn.Module, images: Tensor, factors: Tensor) -> list[float]:
    """Top-1 accuracy for shape and texture, in percent."""
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(chunk) for chunk in images.split(256)]).unflatten(1, (2, NUM_KINDS))
    return (100 * (logits.argmax(2) == factors).float().mean(0)).tolist()


def report(name: str, shape: float, texture: float) -> None:
    """One row of the table."""
    print(f"{name:44s} {shape:5.1f} {texture:5.1f}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-train", type=int, default=12_000)
    parser.add_argument("--num-probe", type=int, default=3_000, help="training images of the linear classifiers")
    parser.add_argument("--minutes", type=float, default=3, help="processor time for each network")
    args = parser.parse_args()
    torch.manual_seed(0)
    shapes = Shapes(num_train=args.num_train, num_val=2_000)
    images, factors = load(shapes.split("train"))
    val_images, val_factors = load(shapes.split("val"))
    conflict_images, conflict_factors = load(shapes.split("conflict"))

    print(f"{'':44s} shape texture")
    report("chance", 100 / NUM_KINDS, 100 / NUM_KINDS)
    for name, features in (
        ("raw pixels, logistic regression", lambda x: x.flatten(1)),
        ("colour statistics, logistic regression", colour_statistics),
        ("untrained ViT-Tiny, logistic regression", untrained_vit),
    ):
        fit, score = features(images[: args.num_probe]), features(val_images)
        report(name, *(linear_probe(fit, factors[: args.num_probe, k], score, val_factors[:, k]) for k in (0, 1)))
    for name, model, lr in (
        ("small CNN, supervised", small_cnn(), 2e-3),
        ("ViT-Tiny, supervised", vit_tiny(images.shape[-1], num_classes=2 * NUM_KINDS), 5e-4),
    ):
        model(images[:2])  # lazy layers take their sizes
        train(model, images, factors, args.minutes, lr)
        report(name, *accuracy(model, val_images, val_factors))
        report(f"{name}, conflict split", *accuracy(model, conflict_images, conflict_factors))


if __name__ == "__main__":
    main()
