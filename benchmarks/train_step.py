"""How long a training step takes, against the hardware's limit and against other projects.

    python -m benchmarks.train_step --json train_step.json        # about half an hour on two cores
    python -m benchmarks.train_step --model vit_base --precision bf16 --compile --peak-tflops 989       # on a GPU
    python -m benchmarks.train_step --quick                       # seconds, sizes that show nothing but that it runs

A step: move the momentum network, forward, backward, clip, AdamW, on a batch that is on the device already. ``limit``
is the time that the step's FLOPs (matrix products and convolutions, forward and backward) take at the rate of the
fastest of some large matrix products of a Transformer's shapes, measured in the same rounds at the same precision.
``peer`` is another project's step, or for the hybrids the sum of their parts, each measured alone in the same rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks.common import Report, Row, devices, interleave, parser, repeat, row, skipped
from benchmarks.peers import LESS_WORK, PEERS, MissingPeerError
from benchmarks.steps import Size, Step, our_step

OBJECTIVES = {
    "contrastive": ["loss=contrastive"],
    "mim": ["loss=mim"],
    "mae": ["loss=mae"],
    "hybrid": ["loss=hybrid"],
    "hybrid, shared": ["loss=hybrid", "loss.share_views=true"],
    "hybrid mae": ["loss=hybrid", "loss@loss.mim=mae"],
    "hybrid mae, shared": ["loss=hybrid", "loss@loss.mim=mae", "loss.share_views=true"],
}
PARTS: dict[str, list[tuple[tuple[str, ...], float | None]]] = {
    "hybrid": [(("contrastive", "mim"), 1.02)],
    "hybrid, shared": [(("contrastive", "mim"), 0.80)],
    "hybrid mae": [(("contrastive", "mae"), None), (("contrastive",), 1.35)],
    "hybrid mae, shared": [(("contrastive", "mae"), None), (("contrastive",), 1.35)],
}
"""Hybrid -> the steps that it is compared with, and the goal."""

SIZES = {
    "vit_tiny": Size("vit_tiny", 32, 4, 256),
    "vit_small": Size("vit_small", 224, 16, 16),
    "vit_base": Size("vit_base", 224, 16, 16),
}
GPU_BATCH = {"vit_tiny": 2048, "vit_small": 256, "vit_base": 128}
QUICK = Size("vit_tiny", 32, 8, 4, head=64, depth=2)

LIMIT_GOAL = 1 / 0.92  # contrastive, fp32, ViT-S on a CPU
UTILISATION_GOAL = 1 / 0.45  # ViT-S and ViT-B, bf16 on a GPU: 45 % of the measured rate of matrix products
BF16_GOAL = 0.62  # of fp32, ViT-S on a CPU that computes in bf16


def product(shape: tuple[int, int, int], device: str, precision: str) -> Callable[[], object]:
    """One matrix product (m, k) x (k, n)."""
    m, k, n = shape
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    return lambda: torch.mm(a, b, out=out)


def fastest_product(size: Size, step: Step, device: str, precision: str) -> tuple[Callable[[], object], int, str]:
    """The products with the highest rate, some 0.3 s of them; their FLOPs, and their shape in words."""
    width = step.module.encoder.spec.width
    tokens = 2 * size.batch * (size.image_size // size.patch_size) ** 2
    shapes = [(tokens, width, 4 * width), (tokens, 4 * width, width), (tokens, width, 3 * width), (4096, 4096, 4096)]
    rates = {}
    for shape in shapes if size is not QUICK else shapes[:1]:
        run = product(shape, device, precision)
        seconds = min(interleave({"": run}, 3, device)[""])
        rates[2 * shape[0] * shape[1] * shape[2] / seconds] = shape, run
    rate = max(rates)
    shape, run = rates[rate]
    flops = 2 * shape[0] * shape[1] * shape[2]
    times = max(1, round((0.01 if size is QUICK else 0.3) * rate / flops))
    return repeat(run, times), times * flops, " x ".join(map(str, shape))


def measure(size: Size, device: str, precisions: Sequence[str], options: argparse.Namespace) -> list[Row]:
    """All rows of one network on one device."""
    ours, others, rows = {}, {}, []
    for objective in options.objectives:
        ours[objective] = our_step(OBJECTIVES[objective], size, device)
        for name, make in PEERS.get(objective, {}).items():
            try:
                others[objective, name] = make(size, device)
            except MissingPeerError as reason:
                rows.append(skipped(f"{objective} / {name}", reason))
    flops = {key: step.flops() for key, step in (ours | others).items()}
    parameters = {key: step.num_trained() for key, step in (ours | others).items()}
    if options.compile:
        for step in ours.values():
            from harmonize.training.compilation import compile_blocks

            compile_blocks(step.module.encoder, step.module.objective)

    actions: dict[object, Callable[[], object]] = {}
    rate, shape = {}, {}
    for precision in precisions:
        for key, step in (ours | others).items():
            actions[precision, key] = repeat(partial(step.run, precision), options.steps)
        found = fastest_product(size, next(iter(ours.values())), device, precision)
        actions[precision, "products"], rate[precision], shape[precision] = found
    times = interleave(actions, options.rounds, device)
    times = {key: [t / options.steps for t in found] if key[1] != "products" else found for key, found in times.items()}

    for precision in precisions:
        found = {key: times[precision, key] for key in ours | others}
        products = times[precision, "products"]
        limit = {key: [flops[key] * t / rate[precision] for t in products] for key in found}
        tflops = [rate[precision] / t / 1e12 for t in products]
        rows.append(row(f"matrix products, {precision}", tflops, unit="TFLOP/s", note=shape[precision]))
        on_gpu = device == "cuda"
        for key in ours:
            goal = None
            if key == "contrastive" and size.model == "vit_small" and precision == "fp32" and not on_gpu:
                goal = LIMIT_GOAL
            elif size.model != "vit_tiny" and precision == "bf16" and on_gpu:
                goal = UTILISATION_GOAL
            counts = {"GFLOP": flops[key] / 1e9, "M_parameters": parameters[key] / 1e6}
            line = row(f"{key}, {precision}", found[key], [], limit[key], goal, "limit", **counts)
            line.more["utilisation"] = 1 / line.ratio_limit
            if options.peak_tflops:
                line.more["utilisation_of_nominal"] = flops[key] / line.ours / options.peak_tflops / 1e12
            rows.append(line)
            for (objective, name), seconds in ((k, found[k]) for k in others if k[0] == key):
                goal = None if name in LESS_WORK else 1.0
                line = row(f"{key}, {precision} / {name}", found[key], seconds, limit[key], goal, **counts)
                line.more["peer_GFLOP"] = flops[objective, name] / 1e9
                line.more["peer_M_parameters"] = parameters[objective, name] / 1e6
                line.more["ratio_per_flop"] = line.ratio_peer * flops[objective, name] / flops[key]
                rows.append(line)
            for parts, goal in PARTS.get(key, []):
                if all(part in ours for part in parts):
                    total = [sum(t) for t in zip(*(found[part] for part in parts), strict=True)]
                    work = {"flop_ratio": flops[key] / sum(flops[part] for part in parts)}
                    rows.append(row(f"{key}, {precision} / {' + '.join(parts)}", found[key], total, [], goal, **work))
    if {"fp32", "bf16"} <= set(precisions):
        goal = BF16_GOAL if device == "cpu" and size.model == "vit_small" and has_bf16() else None
        rows += [row(f"{key}, bf16 / fp32", times["bf16", key], times["fp32", key], goal=goal) for key in ours]
    return rows


def has_bf16() -> bool:
    """Whether this CPU computes in bf16."""
    return torch.cpu._is_avx512_bf16_supported()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--model", nargs="+", choices=SIZES, default=["vit_small", "vit_tiny"])
    options.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    options.add_argument("--batch", type=int, help="images of a step, instead of each model's own number")
    options.add_argument("--device", nargs="+", choices=("cpu", "cuda"), default=devices())
    options.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), help="what the device computes in")
    options.add_argument("--steps", type=int, help="of each in a round: 1 on a CPU, 5 on a GPU")
    options.add_argument("--compile", action="store_true", help="our Transformer blocks through torch.compile")
    options.add_argument("--peak-tflops", type=float, help="nominal peak of the device, for one more utilisation")
    options = options.parse_args(arguments)
    chosen_precision, chosen_steps = options.precision, options.steps
    if options.quick:
        options.rounds = 2
    report = Report(options)
    for device in options.device:
        bf16 = device == "cuda" or has_bf16()
        precisions = chosen_precision or (["fp32", "bf16"] if bf16 else ["fp32"])
        options.steps = chosen_steps or (5 if device == "cuda" and not options.quick else 1)
        for size in [QUICK] if options.quick else [SIZES[model] for model in options.model]:
            if size is not QUICK:
                batch = GPU_BATCH[size.model] if device == "cuda" else size.batch
                size = replace(size, batch=options.batch or batch)
            start = time.perf_counter()
            rows = measure(size, device, precisions, options)
            how = "compiled" if options.compile else "eager"
            report.add(f"{size.title}, {device}, {how} ({time.perf_counter() - start:.0f} s)", rows)


if __name__ == "__main__":
    main()
