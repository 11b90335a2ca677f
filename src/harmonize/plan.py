"""What a run would do, before it costs anything: its length, batch, curves, memory, time and batch script.

One training step's forward and backward pass of two images is computed, to count its FLOPs and what it keeps; nothing
is trained, nothing is written.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harmonize.arguments import Parser
from harmonize.checks.disks import checkpoint_bytes
from harmonize.checks.findings import in_bytes
from harmonize.config import check_config, compose, launcher_of, run_dir
from harmonize.data.batches import RawBatch
from harmonize.functional.schedules import learning_rate
from harmonize.training.optim import trained_parameters
from harmonize.training.run_folder import find_checkpoint
from harmonize.training.setup import Setup, batch_in_words, build, build_data, num_ranks, rate_in_words, shares_weights
from harmonize.types import Batch, Progress

FEW = 2
"""Images of the pass that is measured."""

REACHED = 0.6
"""Share of the rate of large matrix products that a training step reaches (benchmarks/README.md: 0.58 to 0.80)."""

POINTS = (0.0, 0.05, 0.25, 0.5, 0.75, 1.0)
"""Where the curves are shown, as shares of the run."""

BARS = "▁▂▃▄▅▆▇█"


def main(arguments: list[str]) -> int:
    """``harmonize plan [overrides] [--tflops N] [--script]``."""
    parser = Parser(
        prog="harmonize plan", description=__doc__, usage="harmonize plan [key=value ...] [--tflops N] [--script]"
    )
    parser.add_argument("overrides", nargs="*", help="as for harmonize train")
    parser.add_argument("--tflops", type=float, help="rate of another machine's matrix products")
    parser.add_argument("--script", action="store_true", help="also the batch script that SLURM would get")
    options = parser.parse_intermixed_args(arguments)
    cfg = compose(options.overrides)
    check_config(cfg, machine=not (options.script or options.tflops))
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    setup = build(cfg)
    for title, rows in (
        ("Run", _run(cfg, setup)),
        ("Network", _network(setup)),
        ("Cost", _cost(cfg, setup, options.tflops)),
    ):
        grid = Table(title=title, title_justify="left", show_header=False)
        for row in rows:
            grid.add_row(*row)
        console.print(grid)
    console.print(_curves(cfg, setup))
    if options.script:
        from harmonize.slurm import script

        console.print(
            script(cfg, launcher_of([*options.overrides, "hydra/launcher=slurm"]), Path(cfg.run.root) / "slurm")
        )
    return 0


def _run(cfg: DictConfig, setup: Setup) -> list[tuple[str, str]]:
    module, data = setup.module, setup.data
    folder = run_dir(cfg)
    resume = None if cfg.run.fresh else find_checkpoint(folder)
    state = "new" if resume is None else f"goes on at step {resume.step}"
    used = module.steps_per_epoch * cfg.data.batch_size
    left = f", {data.num_train - used:,} left over" if data.num_train > used else ""
    classes = f", {len(data.classes)} classes" if data.classes else ", no labels: no probes"
    rate = rate_in_words(cfg, module.optimization.peak_lr)
    rows = [
        ("run folder", f"{folder} ({state})"),
        ("images", f"{data.num_train:,} to train on{left}{classes}"),
        ("length", f"{module.total_steps:,} steps, {module.steps_per_epoch:,} an epoch"),
        ("batch", batch_in_words(cfg)),
        ("learning rate", f"{rate} at its peak, after {module.schedule.get('warmup', 0):g} of the run"),
        ("images per process at a time", str(data.micro_batch)),
        ("seen in all", f"{module.total_steps * cfg.data.batch_size:,} images"),
    ]
    if "contrastive" in module.objective.required_views:  # type: ignore[operator]
        gathered = cfg.data.batch_size // cfg.trainer.accumulate
        rows.append(("negatives", f"{gathered - 1:,} per query: accumulation adds none"))
    return rows


def _network(setup: Setup) -> list[tuple[str, str]]:
    module = setup.module
    trained = trained_parameters(module.encoder, module.objective)
    encoder = sum(p.numel() for p in module.encoder.parameters())
    frozen = sum(p.numel() for p in module.objective.parameters() if not p.requires_grad)
    heads = sum(p.numel() for name, p in trained.items() if name.startswith("objective."))
    rows = [("encoder", f"{encoder / 1e6:.1f} M parameters"), ("heads and decoders", f"{heads / 1e6:.1f} M")]
    if frozen:
        rows.append(("momentum networks", f"{frozen / 1e6:.1f} M, not trained"))
    return rows


def _cost(cfg: DictConfig, setup: Setup, tflops: float | None) -> list[tuple[str, str]]:
    module = setup.module
    flops, kept = measure(cfg, setup)
    at_once = min(setup.data.micro_batch, cfg.trainer.images_at_once or setup.data.micro_batch)
    half = 0.5 if setup.precision in ("bf16", "fp16") else 1.0
    trained = sum(p.numel() for p in trained_parameters(module.encoder, module.objective).values())
    everything = sum(p.numel() for p in module.parameters())
    states = 4.0 * (everything + 3 * trained)  # weights; gradients and AdamW's two moments
    if shares_weights(cfg):
        states /= num_ranks(cfg)
    activations = kept * at_once * half
    step = flops * cfg.data.batch_size
    rate = (tflops or rate_here(setup) / 1e12) * 1e12
    seconds = step / (rate * REACHED) / num_ranks(cfg)
    where = f"at {tflops:g} TFLOP/s" if tflops else f"here, at {rate / 1e12:.2g} TFLOP/s"
    total = seconds * module.total_steps
    return [
        ("one step", f"{step / 1e12:.3g} TFLOP, {flops / 1e9:.3g} GFLOP an image"),
        ("memory per process", f"{in_bytes(states + activations)} = {in_bytes(states)} of weights, gradients and "
         f"moments + {in_bytes(activations)} of activations ({at_once} images at once)"),
        ("a checkpoint", f"{in_bytes(checkpoint_bytes(module))}, up to three are kept"),
        ("time", f"{seconds:.3g} s a step, {_days(total)} in all, {total * num_ranks(cfg) / 3600:,.1f} device-hours "
         f"({where}, of which steps reach about {REACHED:.0%}; without validation)"),
    ]  # fmt: skip


def measure(cfg: DictConfig, setup: Setup) -> tuple[float, float]:
    """FLOPs of forward and backward pass per image, and bytes that the forward pass keeps per image, in fp32."""
    small = cfg.copy()
    small.data.batch_size = FEW * num_ranks(cfg) * cfg.trainer.accumulate
    data = build_data(small, setup.module.objective)
    data.num_workers = 0
    batch = next(iter(data.train_loader()))
    batch = batch.augment() if isinstance(batch, RawBatch) else batch
    assert isinstance(batch, Batch)
    module = setup.module.train()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    progress = Progress(0, module.total_steps)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module.objective(module.encoder, batch, progress)
    # The counter does not know every fused attention: counted as the products that it is.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module.objective(module.encoder, batch, progress).loss.backward()
    module.zero_grad()
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    return counter.get_total_flops() / FEW, sum(n for place, n in kept.items() if place not in weights) / FEW


def rate_here(setup: Setup, seconds: float = 0.5) -> float:
    """FLOP per second of a large matrix product on this machine's device, in the run's precision."""
    device = "cuda" if setup.on_gpu else "cpu"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(setup.precision, torch.float32)
    size = 8192 if setup.on_gpu else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, end = 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        if setup.on_gpu:
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _curves(cfg: DictConfig, setup: Setup) -> Table:
    """Everything that changes over the run, at some steps and as a line of bars."""
    module, total = setup.module, setup.module.total_steps
    peak, schedule = module.optimization.peak_lr, module.schedule
    curves: dict[str, Any] = {"learning rate": lambda x: learning_rate(x, peak, **schedule)}
    objective: Any = module.objective
    if callable(getattr(objective, "weight", None)):
        curves["lambda"] = objective.weight
    contrastive = getattr(objective, "contrastive", objective)
    if hasattr(contrastive, "momentum_at"):
        curves["momentum"] = lambda x: contrastive.momentum_at(Progress(round(x * total), total))
    grid = Table(title="Curves", title_justify="left")
    grid.add_column("")
    grid.add_column("over the run")
    for point in POINTS:
        grid.add_column(f"step {round(point * total):,}", justify="right")
    for name, curve in curves.items():
        line = _bars([curve(i / 31) for i in range(32)])
        grid.add_row(name, line, *(f"{curve(point):.4g}" for point in POINTS))
    return grid


def _bars(values: Sequence[float]) -> str:
    """A line of bars between the smallest and the largest value.

    >>> _bars([0.0, 0.5, 1.0]), _bars([2.0, 2.0])
    ('▁▅█', '▄▄')
    """
    low, high = min(values), max(values)
    if high == low:
        return BARS[3] * len(values)
    return "".join(BARS[round((v - low) / (high - low) * (len(BARS) - 1))] for v in values)


def _days(seconds: float) -> str:
    """A duration in words.

    >>> _days(90), _days(7200), _days(200_000)
    ('1.5 minutes', '2.0 hours', '2.3 days')
    """
    for name, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= length * (1.5 if name == "days" else 1):
            return f"{seconds / length:.1f} {name}"
    return f"{seconds:.0f} seconds"
