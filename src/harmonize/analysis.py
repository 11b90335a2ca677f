"""``harmonize analyze``: every diagnostic on any checkpoint, without training, and a report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track
from torch import nn

from harmonize.config import instantiate, locate
from harmonize.data.module import DataModule
from harmonize.diagnostics.base import Diagnostic
from harmonize.diagnostics.health import Health
from harmonize.diagnostics.measure import measure
from harmonize.diagnostics.token_tsne import IMAGES_PER_CLASS, NUM_CLASSES, TokenTSNE
from harmonize.evaluation.features import extract
from harmonize.evaluation.layer_probe import LayerProbe
from harmonize.networks import choose_device, data_module, data_section, default_folder, load_network, short_names
from harmonize.reports.html import Network, write_report
from harmonize.types import Batch, ConfigError, EncoderSpec, Findings


@dataclass
class Chosen:
    """What a ``diagnostics`` section asks for.

    Attributes:
        metrics: The diagnostics, by name.
        layer_probe: Probes of every block, or None.
        health: The alarms, or None.
    """

    metrics: dict[str, Diagnostic] = field(default_factory=dict)
    layer_probe: LayerProbe | None = None
    health: Health | None = None


def choose_diagnostics(section: DictConfig | None, spec: EncoderSpec) -> Chosen | None:
    """Build what a ``diagnostics`` section names; None if that is nothing.

    Args:
        section: Its entries with a ``_target_`` are built, null ones are left out.
        spec: The encoder's.
    """
    chosen = Chosen()
    for name, node in ({} if section is None else section).items():
        if not isinstance(node, DictConfig) or "_target_" not in node:
            continue
        target = locate(node["_target_"])
        built = instantiate(node, spec=spec) if issubclass(target, Diagnostic) else instantiate(node)
        if isinstance(built, Diagnostic):
            chosen.metrics[str(name)] = built
        elif isinstance(built, LayerProbe):
            chosen.layer_probe = built
        elif isinstance(built, Health):
            chosen.health = built
        else:
            raise ConfigError(f"diagnostics.{name!s}._target_={node['_target_']} is no diagnostic.")
    return chosen if chosen.metrics or chosen.layer_probe else None


def analyze(cfg: DictConfig) -> None:
    """Measure the encoders that a configuration names, and write a report.

    Args:
        cfg: A configuration that ``check_config`` has passed.

    Raises:
        ConfigError: A checkpoint cannot be read or has no attention to look at, or there are too few images.
    """
    console = Console(soft_wrap=True, highlight=False)
    device = choose_device(str(cfg.accelerator))
    checkpoints = [cfg.checkpoint] if isinstance(cfg.checkpoint, str) else list(cfg.checkpoint)
    names = list(cfg.names) if cfg.names else short_names(checkpoints)
    networks = [load_network(c, n, cfg, cfg.untrained) for c, n in zip(checkpoints, names, strict=True)]
    sections = {loaded.name: data_section(cfg, networks, loaded) for loaded in networks}
    folder = Path(cfg.run.dir).expanduser() if cfg.run.dir else default_folder(cfg, names)
    for loaded in networks:
        for warning in loaded.warnings:
            console.print(f"Warning: {warning}")

    untrained: dict[str, Findings] = {}
    results = []
    for loaded in networks:
        section = sections[loaded.name]
        data = data_module(section, instantiate(section.dataset), loaded.spec.image_size, cfg.seed)
        console.print(f"{loaded.name}: {cfg.num_images} images of {loaded.details['data']} ...")
        chosen = choose_diagnostics(cfg.diagnostics, loaded.spec) or Chosen()
        found = _look(loaded.encoder, chosen, data, cfg, device, console)
        baseline = None
        if loaded.untrained is not None:
            key = f"{loaded.architecture} {OmegaConf.to_yaml(section)}"
            if key not in untrained:
                console.print(f"{loaded.name}: the same network untrained ...")
                untrained[key] = _look(loaded.untrained, chosen, data, cfg, device, console, pictures=False)
            baseline = untrained[key]
        results.append(Network(loaded.name, found, baseline, loaded.spec, loaded.details, loaded.warnings))
        _say_alarms(results[-1], chosen, console)
    folder.mkdir(parents=True, exist_ok=True)
    console.print("Drawing ...")
    heading = "What the network has learnt" if len(results) == 1 else "What the networks have learnt"
    write_report(folder, results, heading, shlex.join(sys.argv))
    _print_summary(results, console)
    console.print(f"Report: {folder / 'report.html'}")


def _look(
    encoder: nn.Module,
    chosen: Chosen,
    data: DataModule,
    cfg: DictConfig,
    device: torch.device,
    console: Console,
    pictures: bool = True,
) -> Findings:
    """All that was chosen, of one encoder."""
    encoder.to(device)
    spec: EncoderSpec = encoder.spec  # type: ignore[assignment]
    available = len(data.spread("val"))
    if cfg.num_images > available:
        raise ConfigError(
            f"num_images must be at most {available}, which is how many validation images the data have, "
            f"not {cfg.num_images}."
        )

    def batches(split: Any, images: int | list[int] | None, what: str) -> Iterable[Batch]:
        loader = data.feature_loader(split, images, cfg.batch_size)
        return track(loader, f"  {what}", console=console, transient=True, disable=not console.is_terminal)

    indices = data.spread("val", cfg.num_images)
    found = measure(encoder, batches("val", indices, "diagnostics"), chosen.metrics, indices, device)
    if chosen.layer_probe is not None and data.classes is not None:
        probe, specs = chosen.layer_probe, chosen.layer_probe.specs(spec)
        train = extract(encoder, batches("train", probe.num_images, "probes, train"), specs, device)
        val = extract(encoder, batches("val", probe.num_images, "probes, val"), specs, device)
        found.merge(probe.score(train, val, len(data.classes)))
    if cfg.tsne and pictures and data.classes is not None and find_spec("sklearn") is None:
        console.print("t-SNE is left out: it needs scikit-learn (pip install 'harmonize[analysis]').")
    elif cfg.tsne and pictures and data.classes is not None:
        indices = data.by_class("val", NUM_CLASSES, IMAGES_PER_CLASS)
        if len(indices) == NUM_CLASSES * IMAGES_PER_CLASS:
            tsne = {"token_tsne": TokenTSNE(spec)}
            found.merge(measure(encoder, batches("val", indices, "t-SNE"), tsne, indices, device))
        else:
            console.print(f"t-SNE is left out: it takes {IMAGES_PER_CLASS} images of each of {NUM_CLASSES} classes.")
    encoder.cpu()
    return found


def _say_alarms(network: Network, chosen: Chosen, console: Console) -> None:
    for alarm in chosen.health.check(network.findings, network.spec) if chosen.health is not None else ():
        network.warnings.append(str(alarm))
        console.print(f"Health: {network.name}: {alarm}")


def _print_summary(networks: list[Network], console: Console) -> None:
    """The first and the last block's value of some curves."""
    from rich.table import Table

    table = Table(title="first block ... last block", title_justify="left")
    table.add_column("")
    for network in networks:
        table.add_column(network.name, justify="right")
    for name, label in _SUMMARY.items():
        curves = [network.findings.curves.get(name) for network in networks]
        if any(curves):
            table.add_row(label, *("" if c is None else f"{c.value[0]:.3g} ... {c.value[-1]:.3g}" for c in curves))
    console.print(table)


_SUMMARY: Mapping[str, str] = {
    "attention_distance": "attention distance, px",
    "nmi": "mutual information",
    "attention_entropy": "attention entropy",
    "token_similarity": "token similarity",
    "fourier": "relative log amplitude",
    "image_effective_rank": "effective rank, images",
    "layer_probe_linear": "linear probe",
}
