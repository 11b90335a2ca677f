"""Figure 11 of arXiv:2305.00729: the frequencies of an MAE decoder's tokens, block by block.

    python experiments/components/decoder.py experiments/components/decoder.csv RUN ...

takes finished MAE runs and writes one row per run and block (0: the decoder's input).
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonize.config import load_config
from harmonize.functional.fourier import diagonal, log_amplitude
from harmonize.training.setup import build

NUM_IMAGES = 64


def frequencies(run: Path) -> list[float]:
    """Relative log amplitude of the highest frequency (as the diagnostic ``fourier``), before and after the blocks.

    Mean over channels and validation images, which are masked as in training.
    """
    cfg = load_config(run / "config.yaml")
    setup = build(cfg)
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    setup.module.load_state_dict(checkpoint["state_dict"])
    module: Any = setup.module.eval()
    mae = getattr(module.objective, "mim", module.objective)
    found: dict[int, list[Tensor]] = {}

    def look(place: int, tokens: Tensor) -> None:
        patches = tokens[:, module.encoder.spec.num_prefix_tokens :]
        cut = diagonal(log_amplitude(patches, module.encoder.spec.grid), module.encoder.spec.grid)
        found.setdefault(place, []).append(cut[:, -1] - cut[:, 0])

    blocks = mae.decoder.blocks
    blocks[0].register_forward_pre_hook(lambda _, inputs: look(0, inputs[0]))
    for i, block in enumerate(blocks, start=1):
        block.register_forward_hook(lambda _, __, output, place=i: look(place, output))
    indices = setup.data.spread("val", NUM_IMAGES)
    with torch.no_grad():
        for batch in setup.data.feature_loader("val", indices, 16):
            mae.reconstruct(module.encoder, batch.image, mae.mask(batch.seed))
    return [torch.cat(found[place]).double().mean().item() for place in sorted(found)]


def main() -> None:
    """Write the rows of all runs."""
    path, *runs = map(Path, sys.argv[1:])
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["group", "seed", "quantity", "at", "value"])
        for run in runs:
            seed = load_config(run / "config.yaml").seed
            for place, value in enumerate(frequencies(run)):
                writer.writerow(["MIM (MAE)", seed, "decoder_fourier", place, f"{value:.6g}"])


if __name__ == "__main__":
    main()
