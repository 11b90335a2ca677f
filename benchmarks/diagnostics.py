"""What the diagnostics cost: time and memory against a plain forward pass of the same images, and the training step.

    python -m benchmarks.diagnostics --json diagnostics.json   # ViT-S/16, 224 px, 64 images: minutes on two cores
    python -m benchmarks.diagnostics --images 16 --rounds 1
    python -m benchmarks.diagnostics --quick

The plain forward pass is the ``peer`` of all rows but the last, whose peer is a training step before diagnostics have
looked at the encoder. Memory is the peak resident size of a fresh process that does nothing else. ``diagnostics 1-6``
are those of attention, similarity and frequency; ``all`` is conf/diagnostics/default.yaml without CKA and layer probes,
pictures included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from benchmarks.common import ROOT, Report, Row, interleave, parser, peak_mib, row
from harmonize.analysis import choose_diagnostics
from harmonize.backbones.timm_vit import ViTEncoder
from harmonize.config import compose
from harmonize.diagnostics.base import Diagnostic
from harmonize.diagnostics.measure import measure
from harmonize.objectives.mim import MaskedImageModeling
from harmonize.types import Batch, Progress

BATCH = 16
FIRST_SIX = (
    "attention_distance",
    "mutual_information",
    "attention_entropy",
    "head_diversity",
    "head_similarity",
    "depth_similarity",
    "token_similarity",
    "fourier",
)
GOALS = {"diagnostics 1-6": 1.5, "all": 2.5, "peak memory": 1.2}


def make_encoder(size: int, patch: int, depth: int = 12) -> ViTEncoder:
    """ViT-S."""
    torch.manual_seed(0)
    return ViTEncoder(size, patch, width=384, depth=depth, num_heads=6).eval()


def batches(num: int, size: int, device: str = "cpu") -> Iterator[Batch]:
    """Noise, made batch by batch, so that images take no memory."""
    for start in range(0, num, BATCH):
        index = torch.arange(start, min(start + BATCH, num))
        generator = torch.Generator().manual_seed(start)
        image = torch.randn(len(index), 3, size, size, generator=generator)
        yield Batch(views={}, label=index % 4, index=index, seed=index, image=image).apply(lambda x: x.to(device))


def choose(encoder: ViTEncoder, what: str, num: int) -> dict[str, Diagnostic]:
    """The diagnostics that a row of the table names."""
    cfg = compose([f"diagnostics.num_images={num}", "diagnostics.cka=null"])
    chosen = choose_diagnostics(cfg.diagnostics, encoder.spec)
    assert chosen is not None
    names = {"diagnostics 1-6": FIRST_SIX, "all": tuple(chosen.metrics), "plain": ()}.get(what, (what,))
    return {name: chosen.metrics[name] for name in names}


@torch.no_grad()
def forward(encoder: ViTEncoder, num: int, size: int) -> None:
    """The plain forward pass of the same images."""
    for batch in batches(num, size):
        encoder(batch.image)


def prepare(encoder: ViTEncoder, what: str, num: int, size: int, device: str = "cpu") -> Callable[[], object]:
    """What one row measures, ready to run."""
    if what == "plain":
        return partial(forward, encoder, num, size)
    chosen = choose(encoder, what, num)
    for diagnostic in chosen.values():
        diagnostic.to(device)
    return lambda: measure(encoder, batches(num, size, device), chosen, list(range(num)))


def peak_of(what: str, num: int, options: argparse.Namespace) -> float:
    """Peak resident memory of a fresh process, in MiB."""
    sizes = {"images": num, "size": options.size, "patch": options.patch, "depth": options.depth}
    command = [sys.executable, "-m", "benchmarks.diagnostics", "--child", what]
    command += [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def step_row(options: argparse.Namespace) -> Row:
    """A training step after diagnostics have looked at the encoder over one without."""

    def prepared(look: bool) -> tuple[Callable[[], None], ViTEncoder]:
        encoder = make_encoder(options.size, options.patch, options.depth)
        torch.manual_seed(1)
        objective = MaskedImageModeling(encoder)
        if look:
            chosen = choose(encoder, "diagnostics 1-6", 8)
            measure(encoder, batches(8, options.size), chosen, list(range(8)))
        encoder.train()
        image = next(batches(BATCH, options.size)).image
        assert image is not None
        index = torch.arange(len(image))
        batch = Batch(views={"mim": (image,)}, label=index, index=index, seed=index)

        def step() -> None:
            encoder.zero_grad()
            objective(encoder, batch, Progress(0, 1)).loss.backward()

        return step, encoder

    (plain, a), (watched, b) = prepared(False), prepared(True)
    times = interleave({"plain": plain, "watched": watched}, options.rounds)
    grads = zip(a.parameters(), b.parameters(), strict=True)
    equal = all(x.grad is None or torch.equal(x.grad, y.grad) for x, y in grads)
    note = f"gradients {'bit-identical' if equal else 'DIFFER'}"
    return row("training step after diagnostics", times["watched"], times["plain"], note=note)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    options = parser(__doc__, rounds=3)
    options.add_argument("--images", type=int, default=64)
    options.add_argument("--size", type=int, default=224)
    options.add_argument("--patch", type=int, default=16)
    options.add_argument("--depth", type=int, default=12)
    options.add_argument("--each", action="store_true", help="also every diagnostic alone")
    options.add_argument("--child", help=argparse.SUPPRESS)
    options = options.parse_args(arguments)
    if options.quick:
        vars(options).update(images=4, size=32, patch=8, depth=2, rounds=1)
    encoder = make_encoder(options.size, options.patch, options.depth)
    if options.child:
        prepare(encoder, options.child, options.images, options.size)()
        print(peak_mib())
        return

    report = Report(options)
    names = ["diagnostics 1-6", "all"]
    if options.each:
        names += list(choose(encoder, "all", options.images))
    rows = []
    for what in names:
        actions = {name: prepare(encoder, name, options.images, options.size) for name in (what, "plain")}
        times = interleave(actions, options.rounds)
        rows.append(row(what, times[what], times["plain"], goal=GOALS.get(what)))
    title = f"ViT-S/{options.patch}, {options.size} px"
    report.add(f"{title}, {options.images} images", [*rows, step_row(options)])
    rows = []
    for num in (options.images,) if options.quick else (options.images, 4 * options.images):
        sizes = {what: [peak_of(what, num, options)] for what in ("plain", *names[:2])}
        for what in names[:2]:
            name = f"peak memory, {what}, {num} images"
            rows.append(row(name, sizes[what], sizes["plain"], goal=GOALS["peak memory"], unit="MiB"))
    report.add(f"{title}, peak memory of a fresh process, measured once", rows)


if __name__ == "__main__":
    main()
