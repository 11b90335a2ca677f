"""How fast images come, and whether a training step waits for them.

    python -m benchmarks.input_pipeline --json input_pipeline.json      # about half an hour on two cores
    python -m benchmarks.input_pipeline --quick

First, seconds per image from the data module to a batch of augmented views on the device, without a network: from
encoded files (JPEG and PNG of 256 px, smooth noise with the spectrum of photographs), from the decoded cache of these
files and from the rendered data set, which lies in memory; augmented by Pillow in the workers, and on the device.
``peer`` is what a user would write: the same recipe in torchvision's v2 transforms, on PIL images or on tensors, in a
plain data loader with as many workers, from the same files. For the cache it reads the files all the same, which is
what the cache saves.

Then real runs of ``harmonize train`` with a ViT-Ti: the share of the time that goes by between two steps, waiting for
the loader or augmenting on the device, and the part of it that is the latter. On a GPU, which works behind the
program's back, the host's waiting is not the device's. The run's beginning, in which workers start, is left out.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.common import Report, Row, devices, interleave, own_cache, parser, quietly, row
from harmonize.config import compose, instantiate
from harmonize.data.batches import RawBatch
from harmonize.data.module import DataModule
from harmonize.files import read_rows
from harmonize.training.run import train
from harmonize.types import IMAGE_MEAN, IMAGE_STD

WAIT_GOAL = 0.05  # of the time of a step
VIEWS = {
    "contrastive": {"contrastive": "moco_v3"},
    "mim": {"mim": "simmim"},
    "mae": {"mim": "mae"},
    "hybrid": {"contrastive": "moco_v3", "mim": "simmim"},
}
"""Objective -> the views that it needs, and their recipes."""

MODES = ("workers", "device")
WINDOW = 4
"""Training steps that a logged number covers."""


def write_images(folder: Path, num: int, side: int = 256) -> None:
    """Files of smooth noise whose amplitude falls with the frequency, as in photographs: JPEG and PNG in turn."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    for i in range(num):
        noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, side, side))) / frequency)
        noise = noise[:1] + 0.3 * noise  # colours go together
        pixels = np.clip(128 + 50 * noise / noise.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0)
        name, options = (f"{i:05}.png", {}) if i % 2 else (f"{i:05}.jpg", {"quality": 90})
        Image.fromarray(pixels).save(folder / name, **options)


# ---- loaders ---------------------------------------------------------------------------------------------------------


def our_loader(objective: str, mode: str, overrides: Sequence[str]) -> DataLoader:
    """The training loader of a run."""
    cfg = compose([*overrides, f"data.augment={mode}"])
    data = DataModule(
        instantiate(cfg.data.dataset),
        {name: instantiate(recipe) for name, recipe in cfg.views.items()},
        VIEWS[objective],
        image_size=cfg.data.image_size,
        batch_size=cfg.data.batch_size,
        num_workers=cfg.data.num_workers,
        augment=cfg.data.augment,
    )
    return data.train_loader()


class PlainImages(Dataset):
    """Image files as a user would read them.

    Args:
        folder: Holds the files.
        views: What makes each view.
    """

    def __init__(self, folder: Path, views: Sequence[Callable[[Any], Tensor]]) -> None:
        self.files, self.views = sorted(folder.iterdir()), views

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> list[Tensor]:
        with Image.open(self.files[index]) as file:
            image = file.convert("RGB")
        return [view(image) for view in self.views]


def plain_views(recipe: str, size: int, on_tensors: bool) -> list[v2.Compose]:
    """An official recipe in torchvision's transforms."""
    first = [v2.ToImage()] if on_tensors else []
    last = [
        v2.RandomHorizontalFlip(),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGE_MEAN, IMAGE_STD),
    ]
    bicubic = v2.InterpolationMode.BICUBIC
    if recipe == "simmim":
        return [v2.Compose([*first, v2.RandomResizedCrop(size, (0.67, 1.0)), *last])]
    if recipe == "mae":
        return [v2.Compose([*first, v2.RandomResizedCrop(size, (0.2, 1.0), interpolation=bicubic), *last])]
    return [
        v2.Compose(
            [
                *first,
                v2.RandomResizedCrop(size, (0.08, 1.0)),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(2 * (size // 20) + 1, (0.1, 2.0))], blur),
                v2.RandomSolarize(128, solarize),
                *last,
            ]
        )
        for blur, solarize in ((1.0, 0.0), (0.1, 0.2))
    ]


def plain_loader(objective: str, folder: Path, on_tensors: bool, options: argparse.Namespace) -> DataLoader:
    """The loader that a user would write."""
    views = [v for recipe in VIEWS[objective].values() for v in plain_views(recipe, options.image_size, on_tensors)]
    workers = {"num_workers": options.workers, "persistent_workers": options.workers > 0}
    pin = torch.cuda.is_available()
    images = PlainImages(folder, views)
    return DataLoader(images, options.batch, shuffle=True, drop_last=True, pin_memory=pin, **workers)


def one_epoch(loader: DataLoader, device: str) -> Callable[[], None]:
    """All batches of a loader, as views on the device."""

    def run() -> None:
        for batch in loader:
            if isinstance(batch, RawBatch):
                batch.to(device).augment()
            elif isinstance(batch, list):
                [view.to(device, non_blocking=True) for view in batch]
            else:
                batch.apply(lambda tensor: tensor.to(device, non_blocking=True))

    return run


def throughput(source: str, objective: str, folder: Path, options: argparse.Namespace) -> list[Row]:
    """Rows of one source of images and one objective."""
    device = devices()[0]
    common = [f"data.batch_size={options.batch}", f"data.num_workers={options.workers}"]
    if source == "rendered":
        overrides = ["data=shapes", f"data.image_size={options.shapes_size}", f"data.num_train={options.images}"]
    else:
        overrides = ["data=folder", f"data.root={folder}", f"data.image_size={options.image_size}", "data.num_val=1"]
        overrides.append(f"data.cache={str(source == 'cache').lower()}")
    loaders = {mode: our_loader(objective, mode, [*overrides, *common]) for mode in MODES}
    if source != "rendered":
        loaders |= {
            name: plain_loader(objective, folder, on_tensors, options)
            for name, on_tensors in (("v2, PIL", False), ("v2, tensors", True))
        }
    images = {name: len(loader) * options.batch for name, loader in loaders.items()}
    times = interleave({name: one_epoch(loader, device) for name, loader in loaders.items()}, options.rounds, device)
    found = {name: [t / images[name] for t in seconds] for name, seconds in times.items()}
    rows = []
    for mode in MODES:
        for peer in [name for name in found if name not in MODES] or [None]:
            name = f"{source}, {objective}, {mode}" + (f" / {peer}" if peer else "")
            line = row(name, found[mode], found[peer] if peer else [], unit="s/image")
            line.more["images_per_second"] = round(1 / line.ours)
            rows.append(line)
    return rows


# ---- waiting in real runs --------------------------------------------------------------------------------------------


def waiting(objective: str, size: int, mode: str, folder: Path, options: argparse.Namespace) -> list[Row]:
    """Rows of one real run."""
    windows, batch = options.windows + 1, options.train_batch
    place = folder / f"{objective}-{size}-{mode}"
    overrides = [
        *(f"loss={objective}", "data=shapes", "backbone=vit_tiny", "diagnostics=none", "logger=csv"),
        *("callbacks.probe=null", "callbacks.gradient_norms=null", "trainer.sanity=false"),
        *(f"data.image_size={size}", f"data.patch_size={size // 8}", f"data.augment={mode}"),
        *(f"data.batch_size={batch}", f"data.num_train={batch * WINDOW * windows}"),
        *(f"trainer.max_steps={WINDOW * windows}", f"trainer.log_every_n_steps={WINDOW}"),
        *(f"data.num_workers={options.workers}", f"run.dir={place}", *options.overrides),
    ]
    with quietly():
        train(compose(overrides))
    logged = read_rows(place / "metrics.jsonl")
    # The first step is logged by itself; it and the rest of its window are the run's beginning.
    logged = [found for found in logged if "train/data_wait" in found and found["step"] > WINDOW]
    more = {"images_per_second": round(statistics.median(found["train/images_per_second"] for found in logged))}
    name = f"{objective}, ViT-Ti/{size // 8}, {size} px, {mode}"
    waits, augmenting = ([found[f"train/{key}"] for found in logged] for key in ("data_wait", "augmentation"))
    both = [a + b for a, b in zip(waits, augmenting, strict=True)]
    return [
        row(f"waiting or augmenting, {name}", both, goal=WAIT_GOAL, of="ours", unit="share of time", **more),
        row(f"of which augmenting on the device, {name}", augmenting, unit="share of time"),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--objectives", nargs="+", choices=VIEWS, default=list(VIEWS))
    options.add_argument("--images", type=int, default=512, help="files, and rendered images")
    options.add_argument("--image-size", type=int, default=224, help="of the views from files, in px")
    options.add_argument("--shapes-size", type=int, default=64, help="of rendered images and their views, in px")
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--train-sizes", type=int, nargs="+", default=[32, 64], help="image sizes of real runs, in px")
    options.add_argument("--train-batch", type=int, default=64, help="of real runs")
    options.add_argument("--windows", type=int, default=8, help=f"of {WINDOW} steps in a real run")
    options = options.parse_args(arguments)
    options.overrides = []
    if options.quick:
        vars(options).update(images=16, image_size=32, shapes_size=32, batch=4, workers=1, rounds=1, windows=1)
        vars(options).update(objectives=["hybrid"], train_sizes=[32], train_batch=4)
        options.overrides = ["backbone.depth=1", "loss.contrastive.hidden_dim=32"]
    report = Report(options)
    with TemporaryDirectory() as folder, own_cache():
        files, runs = Path(folder) / "images", Path(folder) / "runs"
        files.mkdir()
        write_images(files, options.images)
        for source in ("files", "cache", "rendered"):
            rows = [line for name in options.objectives for line in throughput(source, name, files, options)]
            size = options.shapes_size if source == "rendered" else options.image_size
            report.add(f"{source}, views of {size} px, batch {options.batch}, {options.workers} workers", rows)
        rows = [
            line
            for size in options.train_sizes
            for name in options.objectives
            for mode in MODES
            for line in waiting(name, size, mode, runs, options)
        ]
        report.add(f"Real runs, windows of {WINDOW} steps in place of rounds", rows)


if __name__ == "__main__":
    main()
