"""Benches for protocols: small data sets in memory, encoders that read what is planted, and work on several ranks."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import nn

from harmonize.data.module import DataModule
from harmonize.evaluation.base import Bench
from harmonize.functional.distributed import rank, world_size
from harmonize.types import IMAGE_MEAN, IMAGE_STD, EncoderSpec
from tests.helpers import tiny_encoder

STEP = 20
"""Between two levels of a colour, of 255."""


class Memory:
    """A data set of arrays: ``train`` and ``val`` are (images (n, h, w, 3) uint8, labels (n,)) each."""

    def __init__(self, train, val, classes):
        self.parts, self.classes = {"train": train, "val": val}, classes

    def split(self, name):
        return MemorySplit(name, *self.parts[name])

    def relabelled(self, name, change):
        """The same images, with labels of one split changed."""
        images, labels = self.parts[name]
        return Memory(**self.parts | {name: (images, change(np.array(labels)))}, classes=self.classes)

    def only(self, name, rows):
        """Some of the images of one split."""
        images, labels = self.parts[name]
        return Memory(**self.parts | {name: (images[rows], np.array(labels)[rows])}, classes=self.classes)


class MemorySplit:
    def __init__(self, name, images, labels):
        self._name, self.images, self.labels = name, images, labels

    def __len__(self):
        return len(self.images)

    def load(self, index):
        return Image.fromarray(self.images[index]), int(self.labels[index])

    def name(self, index):
        return f"memory/{self._name}/{index}"


def patterns(num_train=40, num_val=30, num_classes=3, size=16, visible=0.25, seed=0):
    """Noise, and a faint pattern that tells its class: easy to learn in part."""
    generator = np.random.default_rng(seed)
    means = generator.normal(size=(num_classes, size, size, 3))
    parts = []
    for num in (num_train, num_val):
        labels = generator.permutation(np.arange(num) % num_classes)
        pixels = 128 + 50 * (generator.normal(size=(num, size, size, 3)) + visible * means[labels])
        parts.append((pixels.clip(0, 255).astype(np.uint8), labels))
    return Memory(*parts, classes=[f"class{i}" for i in range(num_classes)])


def plain(levels, size=16):
    """Images of one colour each: (n, 3) levels -> (n, size, size, 3), see :func:`read_level`."""
    return np.broadcast_to((STEP * np.asarray(levels))[:, None, None], (len(levels), size, size, 3)).astype(np.uint8)


def read_level(images, channel):
    """The level of a colour of plain images, as normalised for a network, (B,) int64."""
    colour = images[:, channel].mean(dim=(1, 2)) * IMAGE_STD[channel] + IMAGE_MEAN[channel]
    return (255 * colour / STEP).round().long()


class Reader(nn.Module):
    """An encoder of one block and one token: its feature is a given function of the images."""

    def __init__(self, function, width, image_size=16):
        super().__init__()
        size = (image_size, image_size)
        self.spec = EncoderSpec(width, 1, 1, size, image_size, (1, 1), num_prefix_tokens=0, has_class_token=False)
        self.function = function

    def iter_blocks(self, images):
        yield self.function(images)[:, None].float()

    def final_norm(self, tokens):
        return tokens


def killed_after(num):
    """A progress display under which an evaluation ends after so many items of a loop."""

    def track(items, what):
        for i, item in enumerate(items):
            if i == num:
                raise KeyboardInterrupt
            yield item

    return track


def make_bench(folder, dataset=None, encoder=None, data_options=None, **options):
    """What a protocol works with; ``data_options`` are arguments of ``DataModule``."""
    dataset = dataset or patterns()
    encoder = (encoder or tiny_encoder()).requires_grad_(False).eval()
    folder = Path(folder)

    def make_data(recipes=None, required_views=None, batch_size=None, **more):
        ranks = {"world_size": world_size(), "rank": rank()}
        settings = {"eval_crop": 1.0} | ranks | (data_options or {}) | more
        size = encoder.spec.image_size
        return DataModule(dataset, recipes or {}, required_views or {}, size, batch_size or world_size(), **settings)

    settings = {"seed": 0, "folder": folder / "state", "cache": folder / "features", "batch_size": 16} | options
    return Bench(encoder, make_data, dataset, torch.device("cpu"), **settings)


def count_images(monkeypatch, encoder):
    """A list that receives the number of images of every forward pass."""
    seen, forward = [], encoder.iter_blocks

    def iter_blocks(images):
        seen.append(len(images))
        return forward(images)

    monkeypatch.setattr(encoder, "iter_blocks", iter_blocks)
    return seen


def on_ranks(folder, work, num=2):
    """What ``work()`` returns on each of several ranks."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mp.start_processes(_rank, (str(folder), work, num), nprocs=num, start_method="fork")
    return [torch.load(folder / f"{i}.pt", weights_only=False) for i in range(num)]


def _rank(number, folder, work, num):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=num)
    torch.save(work(), f"{folder}/{number}.pt")
    dist.destroy_process_group()
