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
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.common import Report, Row, interleave, parser, repeat, row
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

    times = interleave({"knn": knn, "products": products}, num_rounds)
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
    times = interleave(
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    options = parser(__doc__, rounds=7)
    options.add_argument("--bank", type=int, default=50_000, help="features that are neighbours")
    options.add_argument("--queries", type=int, default=5_000, help="features whose neighbours are sought")
    options.add_argument("--features", type=int, default=384, help="width of these features")
    options.add_argument("--images", type=int, default=20_000, help="cached features of the grid")
    options.add_argument(
        "--width", type=int, default=192, help="of the encoder; features are 1, 2, 4 and 5 times as wide"
    )
    options.add_argument("--classes", type=int, nargs="+", default=[12, 100, 1000])
    options.add_argument("--batches", type=int, nargs="+", default=[256, 1024])
    options.add_argument("--epochs", type=int, default=100)
    options.add_argument("--steps", type=int, default=3, help="of the heads in one round")
    options.add_argument("--encoder-images", type=int, default=64, help="that the encoder sees in one round")
    options.add_argument("--threads", type=int, default=2)
    options = options.parse_args(arguments)
    if options.quick:
        tiny = {"bank": 2_000, "queries": 300, "features": 64, "images": 512, "width": 64, "classes": [12]}
        vars(options).update(tiny, batches=[256], steps=1, encoder_images=4, rounds=3)
    torch.set_num_threads(options.threads)
    report = Report(options)
    report.add("k-NN", [measure_knn(options.bank, options.queries, options.features, 100, options.rounds)])
    for num_classes in options.classes:
        for batch in options.batches:
            report.add(f"{num_classes} classes, batch {batch}", measure_grid(options, num_classes, batch))


if __name__ == "__main__":
    main()
