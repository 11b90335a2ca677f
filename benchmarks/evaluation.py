"""What k-NN and the grid of linear heads cost, against the bare matrix products and against one head.

    python -m benchmarks.evaluation --json evaluation.json      # some minutes on two cores
    python -m benchmarks.evaluation --quick                     # seconds, sizes that show nothing but that it runs

Ratios are medians over rounds in which the things compared take turns; other work on the machine slows them alike.

``knn``: top-1 and top-5 for four k and two temperatures, over the products of the same tiles into the same buffer.

``grid``: DINOv2's 52 heads, 13 learning rates on each of 4 features (class token of the last block, with the mean patch
token, class tokens of the last four blocks, with the mean patch token), on features in memory. ``peer`` is one head on
class and mean patch token, ``limit`` the products that 52 heads cannot do without. ``grid, alone`` has the same heads
one after the other as its peer. ``grid, protocol`` adds the encoder: features of all images extracted once, then all
epochs of heads. ``grid, augmented`` has a pass of the encoder in every epoch, as the official protocols do with
their random crops. In these two the times are put together from those of one batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from harmonize.backbones.timm_vit import ViTEncoder
from harmonize.evaluation.features import pooled_features
from harmonize.functional.knn import MAX_BYTES, knn_correct, tile_shape
from harmonize.functional.probe_heads import HeadStack
from harmonize.types import FeatureSpec

KNN_GOAL, GRID_GOAL = 2.0, 1.3
KS, TEMPERATURES = (10, 20, 100, 200), (0.04, 0.07)
LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
# Of the columns [class tokens of the last 4 blocks, mean patch token], in units of the encoder's width.
FEATURES = ((3, 4), (3, 5), (0, 4), (0, 5))
ONE_FEATURE = (3, 5)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: What was measured.
        ours: Median seconds.
        peer: Median seconds of what it is compared with, if any.
        limit: Median seconds of what no implementation can do without.
        ratio_peer: Median of ours over peer, round by round.
        ratio_limit: Median of ours over limit.
        goal: Upper bound of the ratio that the goal is about.
        met: Whether it is kept.
    """

    name: str
    ours: float
    peer: float | None = None
    limit: float | None = None
    ratio_peer: float | None = None
    ratio_limit: float | None = None
    goal: float | None = None
    met: bool | None = None


def row(name: str, ours: list[float], peer: list[float], limit: list[float], goal: float | None, of: str) -> Row:
    """A row from the times of all rounds; empty lists where there is no peer or no limit. The goal is about ``of``."""

    def ratio(other: list[float]) -> float | None:
        return statistics.median(a / b for a, b in zip(ours, other, strict=True)) if other else None

    ratios = {"peer": ratio(peer), "limit": ratio(limit)}
    chosen = ratios[of]
    return Row(
        name,
        statistics.median(ours),
        statistics.median(peer) if peer else None,
        statistics.median(limit) if limit else None,
        ratios["peer"],
        ratios["limit"],
        goal,
        None if goal is None or chosen is None else chosen <= goal,
    )


def rounds(actions: dict[str, Callable[[], object]], num: int) -> dict[str, list[float]]:
    """Seconds of each action in each round; who begins changes from round to round."""
    for action in actions.values():
        action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    for i in range(num):
        for name in list(actions)[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            actions[name]()
            times[name].append(time.perf_counter() - start)
    return times


def measure_knn(num_bank: int, num_queries: int, num_features: int, num_classes: int, num_rounds: int) -> Row:
    """All of k-NN over the matrix products in it."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(num_classes, num_features, generator=generator)
    labels = torch.randint(num_classes, (num_bank + num_queries,), generator=generator)
    x = centres[labels] + 2 * torch.randn(len(labels), num_features, generator=generator)
    bank, queries = x[:num_bank], x[num_bank:]
    rows, columns = tile_shape(num_queries, num_bank, min(max(KS), num_bank), x.element_size(), MAX_BYTES)
    buffer = x.new_empty(rows * columns)

    def products() -> None:
        for chunk in queries.split(rows):
            for tile in bank.split(columns):
                torch.mm(chunk, tile.T, out=buffer[: len(chunk) * len(tile)].view(len(chunk), len(tile)))

    def knn() -> None:
        knn_correct(bank, labels[:num_bank], queries, labels[num_bank:], num_classes, KS, TEMPERATURES, (1, 5))

    times = rounds({"knn": knn, "products": products}, num_rounds)
    name = f"knn, {num_queries} x {num_bank} x {num_features}, {num_classes} classes"
    return row(name, times["knn"], [], times["products"], KNN_GOAL, "limit")


class Heads:
    """Stacks of heads on some features of a cache, trained on random batches of it.

    Args:
        cache: (N, 5 * width).
        labels: (N,).
        num_classes: C.
        features: First and last column of each stack, in units of the width.
        lrs: One head per learning rate and feature.
        batch: Images per step.
    """

    def __init__(
        self,
        cache: Tensor,
        labels: Tensor,
        num_classes: int,
        features: Sequence[tuple[int, int]],
        lrs: Sequence[float],
        batch: int,
    ) -> None:
        width = cache.shape[1] // 5
        first, last = min(a for a, _ in features), max(b for _, b in features)
        # Only what these heads read, so that few of them do not pay for columns of others.
        self.cache, self.labels, self.batch = cache[:, first * width : last * width].contiguous(), labels, batch
        self.columns = [slice((a - first) * width, (b - first) * width) for a, b in features]
        self.stacks = [HeadStack((b - a) * width, num_classes, lrs) for a, b in features]
        self.order = torch.randperm(len(cache))
        self.at = 0

    def step(self) -> None:
        """One batch, read once for all stacks."""
        self.at = self.at if self.at + self.batch <= len(self.order) else 0
        index = self.order[self.at : self.at + self.batch]
        self.at += self.batch
        x, labels = self.cache[index], self.labels[index]
        for stack, columns in zip(self.stacks, self.columns, strict=True):
            stack.step(x[:, columns], labels)

    def products(self) -> Callable[[], None]:
        """The matrix products of one step: logits and gradients."""
        x = self.cache[: self.batch]
        weights = [stack.weight.view(-1, stack.weight.shape[2]) for stack in self.stacks]
        logits = [x.new_empty(len(x), len(weight)) for weight in weights]
        gradients = [torch.empty_like(weight) for weight in weights]

        def run() -> None:
            for columns, weight, out, gradient in zip(self.columns, weights, logits, gradients, strict=True):
                torch.mm(x[:, columns], weight.T, out=out)
                torch.mm(out.T, x[:, columns], out=gradient)

        return run


def repeat(action: Callable[[], object], times: int) -> Callable[[], None]:
    """The action several times over."""

    def run() -> None:
        for _ in range(times):
            action()

    return run


def encoder_pass(width: int, num_images: int) -> Callable[[], object]:
    """All features of some images of 64 px by a ViT of 12 blocks with patches of 8 px (ViT-Ti: width 192)."""
    torch.manual_seed(0)
    encoder = ViTEncoder(64, 8, width=width, depth=12, num_heads=max(1, width // 64)).eval()
    images = torch.randn(num_images, 3, 64, 64)
    specs = [FeatureSpec(layer, "cls") for layer in range(9, 13)] + [FeatureSpec(12, "patch_mean")]
    return lambda: torch.cat(pooled_features(encoder, images, specs), dim=1)


def measure_grid(options: argparse.Namespace, num_classes: int, batch: int) -> list[Row]:
    """All rows about the grid for one number of classes and one batch size."""
    torch.manual_seed(0)
    cache = torch.randn(options.images, 5 * options.width)
    labels = torch.randint(num_classes, (options.images,))
    grid = Heads(cache, labels, num_classes, FEATURES, LRS, batch)
    one = Heads(cache, labels, num_classes, (ONE_FEATURE,), LRS[:1], batch)
    alone = [Heads(cache, labels, num_classes, (feature,), LRS[:1], batch) for feature in FEATURES]
    steps, passes = options.steps, min(options.encoder_images, batch)
    times = rounds(
        {
            "grid": repeat(grid.step, steps),
            "one": repeat(one.step, steps),
            "products": repeat(grid.products(), steps),
            "alone": repeat(lambda: [heads.step() for heads in alone], steps),
            "encoder": encoder_pass(options.width, passes),
        },
        options.rounds,
    )
    ours, peer, limit, each = ([t / steps for t in times[name]] for name in ("grid", "one", "products", "alone"))
    image = [t / passes for t in times["encoder"]]
    num_steps = options.images // batch

    def protocol(heads: list[float], encoder_passes: int) -> list[float]:
        return [
            encoder_passes * options.images * e + options.epochs * num_steps * h
            for e, h in zip(image, heads, strict=True)
        ]

    setting = f"{num_classes} classes, batch {batch}"
    return [
        row(f"grid, {setting}", ours, peer, limit, GRID_GOAL, "peer"),
        row(f"grid, alone, {setting}", ours, [len(LRS) * t for t in each], limit, None, "peer"),
        row(f"grid, protocol, {setting}", protocol(ours, 1), protocol(peer, 1), [], GRID_GOAL, "peer"),
        row(
            f"grid, augmented, {setting}",
            protocol(ours, options.epochs),
            protocol(peer, options.epochs),
            [],
            GRID_GOAL,
            "peer",
        ),
    ]


def show(line: Row) -> None:
    """Print one row."""

    def text(value: float | None, width: int, digits: int) -> str:
        return " " * width if value is None else f"{value:{width}.{digits}f}"

    verdict = "" if line.met is None else f"  goal {line.goal}: {'met' if line.met else 'missed'}"
    columns = [text(value, 11, 4) for value in (line.ours, line.peer, line.limit)]
    columns += [text(value, 9, 2) for value in (line.ratio_peer, line.ratio_limit)]
    print(f"{line.name:<42}{''.join(columns)}{verdict}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=int, default=50_000, help="features that are neighbours")
    parser.add_argument("--queries", type=int, default=5_000, help="features whose neighbours are sought")
    parser.add_argument("--features", type=int, default=384, help="width of these features")
    parser.add_argument("--images", type=int, default=20_000, help="cached features of the grid")
    parser.add_argument(
        "--width", type=int, default=192, help="of the encoder; features are 1, 2, 4 and 5 times as wide"
    )
    parser.add_argument("--classes", type=int, nargs="+", default=[12, 100, 1000])
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=3, help="of the heads in one round")
    parser.add_argument("--encoder-images", type=int, default=64, help="that the encoder sees in one round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="tiny sizes instead of all of these")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args(arguments)
    if options.quick:
        tiny = {"bank": 2_000, "queries": 300, "features": 64, "images": 512, "width": 64, "classes": [12]}
        vars(options).update(tiny, batches=[256], steps=1, encoder_images=4, rounds=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        title = f"seconds, medians of {options.rounds} rounds, {options.threads} threads"
        heading = [f"{name:>11}" for name in ("ours", "peer", "limit")] + [f"{name:>9}" for name in ("/peer", "/limit")]
        print(f"{title:<42}{''.join(heading)}", flush=True)
        lines = [measure_knn(options.bank, options.queries, options.features, 100, options.rounds)]
        show(lines[0])
        for num_classes in options.classes:
            for batch in options.batches:
                found = measure_grid(options, num_classes, batch)
                for line in found:
                    show(line)
                lines += found
    finally:
        torch.set_num_threads(threads)
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=2) + "\n")


if __name__ == "__main__":
    main()
