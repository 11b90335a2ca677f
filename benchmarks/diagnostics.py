"""What the diagnostics cost: time and memory against a plain forward pass of the same images, and the training step.

    python benchmarks/diagnostics.py                      # ViT-S/16, 224 px, 64 images: some minutes on two cores
    python benchmarks/diagnostics.py --images 16 --pairs 1

Times are ratios, median (least ... most) over interleaved pairs of one run. Memory is the peak resident size of a fresh
process that does nothing else. ``diagnostics 1-6`` are those of attention, similarity and frequency; ``all`` is
conf/diagnostics/default.yaml without CKA and layer probes, pictures included.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

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
LIMITS = {"diagnostics 1-6": 1.5, "all": 2.5, "peak memory": 1.2}


def make_encoder(size: int, patch: int) -> ViTEncoder:
    """ViT-S."""
    torch.manual_seed(0)
    return ViTEncoder(size, patch, width=384, depth=12, num_heads=6).eval()


def batches(num: int, size: int) -> Iterator[Batch]:
    """Noise, made batch by batch, so that images take no memory."""
    for start in range(0, num, BATCH):
        index = torch.arange(start, min(start + BATCH, num))
        generator = torch.Generator().manual_seed(start)
        image = torch.randn(len(index), 3, size, size, generator=generator)
        yield Batch(views={}, label=index % 4, index=index, seed=index, image=image)


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


def prepare(encoder: ViTEncoder, what: str, num: int, size: int) -> Callable[[], object]:
    """What one row measures, ready to run."""
    if what == "plain":
        return partial(forward, encoder, num, size)
    chosen = choose(encoder, what, num)
    return lambda: measure(encoder, batches(num, size), chosen, list(range(num)))


def seconds(action: Callable[[], object]) -> float:
    """How long something takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def ratios(action: Callable[[], object], base: Callable[[], object], pairs: int) -> list[float]:
    """Time of an action over that of the base, of interleaved pairs, sorted."""
    base()
    found = []
    for i in range(pairs):
        order = [(0, base), (1, action)][:: 1 if i % 2 else -1]
        times = {k: seconds(f) for k, f in order}
        found.append(times[1] / times[0])
    return sorted(found)


def peak_mib(what: str, num: int, size: int, patch: int) -> float:
    """Peak resident memory of a fresh process."""
    command = [
        sys.executable,
        __file__,
        "--child",
        what,
        "--images",
        str(num),
        "--size",
        str(size),
        "--patch",
        str(patch),
    ]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def step_ratio(size: int, patch: int, pairs: int) -> tuple[list[float], bool]:
    """A training step after diagnostics have looked at the encoder over one without; whether gradients are equal."""

    def prepared(look: bool) -> tuple[Callable[[], None], ViTEncoder]:
        encoder = make_encoder(size, patch)
        torch.manual_seed(1)
        objective = MaskedImageModeling(encoder)
        if look:
            measure(encoder, batches(8, size), choose(encoder, "diagnostics 1-6", 8), list(range(8)))
        encoder.train()
        image = next(batches(BATCH, size)).image
        assert image is not None
        index = torch.arange(len(image))
        batch = Batch(views={"mim": (image,)}, label=index, index=index, seed=index)

        def step() -> None:
            encoder.zero_grad()
            objective(encoder, batch, Progress(0, 1)).loss.backward()

        return step, encoder

    (plain, a), (watched, b) = prepared(False), prepared(True)
    found = ratios(watched, plain, pairs)
    grads = zip(a.parameters(), b.parameters(), strict=True)
    return found, all(x.grad is None or torch.equal(x.grad, y.grad) for x, y in grads)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--each", action="store_true", help="also every diagnostic alone")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    encoder = make_encoder(options.size, options.patch)
    if options.child:
        prepare(encoder, options.child, options.images, options.size)()
        status = Path("/proc/self/status").read_text()  # getrusage would count the parent's memory before exec
        print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)  # type: ignore[index]
        return

    title = f"ViT-S/{options.patch}, {options.size} px, {options.images} images, {torch.get_num_threads()} threads"
    print(f"{title}; ratios to a plain forward pass, median (least ... most) of {options.pairs} pairs\n")
    results: dict[str, object] = {"setting": title}

    def show(name: str, found: list[float], limit: float | None = None) -> None:
        median = found[len(found) // 2]
        goal = "" if limit is None else f"   goal <= {limit}"
        print(f"{name:<34}{median:6.2f} ({found[0]:.2f} ... {found[-1]:.2f}){goal}", flush=True)
        results[name] = found

    base = prepare(encoder, "plain", options.images, options.size)
    rows = ["diagnostics 1-6", "all"]
    if options.each:
        rows += list(choose(encoder, "all", options.images))
    for what in rows:
        show(
            what,
            ratios(prepare(encoder, what, options.images, options.size), base, options.pairs),
            LIMITS.get(what),
        )
    found, equal = step_ratio(options.size, options.patch, options.pairs)
    show("training step after diagnostics", found)
    print(f"{'':<34}gradients bit-identical: {equal}")
    results["gradients bit-identical"] = equal
    for num in (options.images, 4 * options.images):
        sizes = {what: peak_mib(what, num, options.size, options.patch) for what in ("plain", "diagnostics 1-6", "all")}
        for what in ("diagnostics 1-6", "all"):
            name = f"peak memory, {what}, {num} images"
            show(name, [sizes[what] / sizes["plain"]], LIMITS["peak memory"])
        results[f"peak memory MiB, {num} images"] = sizes
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
