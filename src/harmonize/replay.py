"""Where a loss stopped being finite: the batch and the network that a run kept, computed once more, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from harmonize.arguments import Parser
from harmonize.config import instantiate
from harmonize.functional.seeding import mix_int
from harmonize.types import Batch, ConfigError, Progress


def main(arguments: list[str]) -> int:
    """``harmonize replay FILE``."""
    parser = Parser(prog="harmonize replay", description=__doc__)
    parser.add_argument("file", type=Path, help="nonfinite_rank0.pt of a run folder")
    options = parser.parse_args(arguments)
    try:
        kept = torch.load(options.file, map_location="cpu", weights_only=True)
        batch = Batch(**kept["batch"])
    except Exception as error:  # a damaged file raises one of many errors, depending on where it is damaged
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{options.file} is no file of a run that stopped: {reason}") from error
    Console(highlight=False, soft_wrap=True).print(replay(kept, batch))
    return 0


def replay(kept: Mapping[str, Any], batch: Batch) -> Table:
    """Losses, and the first parts of the network whose weights, outputs and gradients are not finite."""
    config = OmegaConf.create(kept["config"])
    encoder = instantiate(config.backbone)
    objective = instantiate(config.loss, encoder=encoder)
    network = nn.ModuleDict({"encoder": encoder, "objective": objective})
    network.load_state_dict(kept["state_dict"])
    network.train()
    bad: list[str] = []
    for name, module in network.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _, __, output, name=name: _look(bad, name, output))
    torch.manual_seed(mix_int(config.seed, kept["step"], kept["micro_batch"], kept["rank"]))
    output = objective(encoder, batch, Progress(kept["step"], kept["total_steps"]))
    output.loss.backward()

    grid = Table(
        title=f"Optimiser step {kept['step'] + 1}, rank {kept['rank']}", title_justify="left", show_header=False
    )
    grid.add_row("loss", f"{output.loss.item():g}")
    for name, term in output.terms.items():
        grid.add_row(f"  {name}", f"{term.item():g}")
    for name, views in batch.views.items():
        largest = max(view.abs().max().item() for view in views)
        grid.add_row(f"views of {name}", f"largest value {largest:g}")
    weights = dict(network.named_parameters())
    broken = [name for name, p in weights.items() if not p.isfinite().all()]
    largest_name = max(weights, key=lambda name: weights[name].abs().max().item())
    grid.add_row("weights that are not finite", ", ".join(broken[:3]) or "none")
    grid.add_row("largest weight", f"{weights[largest_name].abs().max().item():g} in {largest_name}")
    grid.add_row(
        "first output that is not finite", bad[0] if bad else "none in fp32: try the run with trainer.precision=32"
    )
    gradients = [name for name, p in weights.items() if p.grad is not None and not p.grad.isfinite().all()]
    grid.add_row(
        "gradients that are not finite",
        f"{len(gradients)} of {len(weights)}" + (f", as in {gradients[0]}" if gradients else ""),
    )
    return grid


def _look(bad: list[str], name: str, output: Any) -> None:
    for tensor in output if isinstance(output, (tuple, list)) else (output,):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
            bad.append(name)
