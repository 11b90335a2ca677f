"""``harmonize analyze``: every diagnostic on any checkpoint, without training, and a report."""

from __future__ import annotations

import hashlib
import json
import re
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

from harmonize.backbones.timm_models import TimmEncoder
from harmonize.checkpoints.own import read_checkpoint
from harmonize.config import composer, instantiate, locate, to_plain
from harmonize.data.module import DataModule
from harmonize.diagnostics.base import Diagnostic
from harmonize.diagnostics.health import Health
from harmonize.diagnostics.measure import measure
from harmonize.diagnostics.token_tsne import IMAGES_PER_CLASS, NUM_CLASSES, TokenTSNE
from harmonize.evaluation.features import extract
from harmonize.evaluation.layer_probe import LayerProbe
from harmonize.functional.seeding import mix_int
from harmonize.reports.html import Network, write_report
from harmonize.types import Batch, ConfigError, EncoderSpec, Findings

TIMM = "timm:"


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


@dataclass
class Loaded:
    """An encoder to analyse.

    Attributes:
        name: What figures call it.
        checkpoint: As the user wrote it.
        encoder: In eval mode.
        untrained: The same architecture at its random initialisation, in eval mode.
        architecture: Equal for encoders whose untrained networks are the same.
        details: For the report's table.
        warnings: What a reader must know.
        data: The ``data`` section that it was trained with, or None.
    """

    name: str
    checkpoint: str
    encoder: nn.Module
    untrained: nn.Module | None
    architecture: str
    details: dict[str, str]
    warnings: list[str]
    data: dict[str, Any] | None = None

    @property
    def spec(self) -> EncoderSpec:
        """The encoder's."""
        return self.encoder.spec  # type: ignore[return-value]


def analyze(cfg: DictConfig) -> None:
    """Measure the encoders that a configuration names, and write a report.

    Args:
        cfg: A configuration that ``check_config`` has passed.

    Raises:
        ConfigError: A checkpoint cannot be read or has no attention to look at, or there are too few images.
    """
    console = Console(soft_wrap=True, highlight=False)
    device = _device(str(cfg.accelerator))
    checkpoints = [cfg.checkpoint] if isinstance(cfg.checkpoint, str) else list(cfg.checkpoint)
    names = list(cfg.names) if cfg.names else _short_names(checkpoints)
    networks = [_load(c, n, cfg) for c, n in zip(checkpoints, names, strict=True)]
    sections = {loaded.name: _data_section(cfg, networks, loaded) for loaded in networks}
    folder = Path(cfg.run.dir).expanduser() if cfg.run.dir else _default_folder(cfg, names)
    for loaded in networks:
        for warning in loaded.warnings:
            console.print(f"Warning: {warning}")

    untrained: dict[str, Findings] = {}
    results = []
    for loaded in networks:
        section = sections[loaded.name]
        data = DataModule(
            instantiate(section.dataset),
            {},
            {},
            image_size=loaded.spec.image_size,
            batch_size=1,
            num_workers=section.num_workers,
            seed=cfg.seed,
            eval_crop=section.eval_crop,
        )
        console.print(f"{loaded.name}: {cfg.num_images} images of {loaded.details['data']} ...")
        found = _look(loaded.encoder, data, cfg, device, console)
        baseline = None
        if loaded.untrained is not None:
            key = f"{loaded.architecture} {OmegaConf.to_yaml(section)}"
            if key not in untrained:
                console.print(f"{loaded.name}: the same network untrained ...")
                untrained[key] = _look(loaded.untrained, data, cfg, device, console, pictures=False)
            baseline = untrained[key]
        results.append(Network(loaded.name, found, baseline, loaded.spec, loaded.details, loaded.warnings))
        _say_alarms(results[-1], cfg, console)
    folder.mkdir(parents=True, exist_ok=True)
    console.print("Drawing ...")
    heading = "What the network has learnt" if len(results) == 1 else "What the networks have learnt"
    write_report(folder, results, heading, shlex.join(sys.argv))
    _print_summary(results, console)
    console.print(f"Report: {folder / 'report.html'}")


def _look(
    encoder: nn.Module, data: DataModule, cfg: DictConfig, device: torch.device, console: Console, pictures: bool = True
) -> Findings:
    """All that the configuration asks for, of one encoder."""
    encoder.to(device)
    spec: EncoderSpec = encoder.spec  # type: ignore[assignment]
    chosen = choose_diagnostics(cfg.diagnostics, spec) or Chosen()
    available = len(data.spread("val"))
    if cfg.num_images > available:
        raise ConfigError(
            f"num_images must be at most {available}, which is how many validation images the data have, "
            f"not {cfg.num_images}."
        )

    def batches(split: Any, images: int | list[int], what: str) -> Iterable[Batch]:
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


def _load(checkpoint: str, name: str, cfg: DictConfig) -> Loaded:
    """The encoder that an entry of ``checkpoint`` names.

    Raises:
        ConfigError: It cannot be read, or is no encoder.
    """
    loaded = _load_timm(checkpoint, name, cfg) if checkpoint.startswith(TIMM) else _load_own(checkpoint, name, cfg)
    for encoder in (loaded.encoder, loaded.untrained):
        if encoder is not None:
            encoder.requires_grad_(False).eval()
    return loaded


def _load_timm(checkpoint: str, name: str, cfg: DictConfig) -> Loaded:
    model = checkpoint.removeprefix(TIMM)
    torch.manual_seed(mix_int(cfg.seed))
    encoder = TimmEncoder(model, image_size=cfg.image_size)
    untrained = None
    if cfg.untrained:
        torch.manual_seed(mix_int(cfg.seed, 1))  # other random weights than those that stand in for missing ones
        untrained = TimmEncoder(model.partition(".")[0], pretrained=False, image_size=cfg.image_size)
    warnings = [encoder.warning] if encoder.warning else []
    return Loaded(name, checkpoint, encoder, untrained, model.partition(".")[0], {"checkpoint": checkpoint}, warnings)


def _load_own(checkpoint: str, name: str, cfg: DictConfig) -> Loaded:
    content = read_checkpoint(checkpoint)
    node = content.config["backbone"]
    _refuse_foreign(node, "backbone", checkpoint)
    if cfg.image_size is not None and cfg.image_size != node["image_size"]:
        raise ConfigError(
            f"image_size must be null or {node['image_size']}, as {checkpoint} was trained with, not {cfg.image_size}."
        )

    def build() -> nn.Module:
        torch.manual_seed(mix_int(content.config.get("seed", 0)))  # as training began
        return instantiate(node)

    encoder, untrained = build(), build() if cfg.untrained else None
    try:
        encoder.load_state_dict(content.weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"checkpoint={checkpoint} does not fit its own configuration: {reason}") from error
    details = {"checkpoint": f"{checkpoint} (step {content.step})"}
    architecture = json.dumps([node, content.config.get("seed", 0)], sort_keys=True)
    return Loaded(name, checkpoint, encoder, untrained, architecture, details, [], content.config.get("data"))


def _refuse_foreign(node: Any, place: str, checkpoint: str) -> None:
    """Refuse to build what a checkpoint describes, unless that is a class of harmonize's own.

    A file from elsewhere could name any function of any package to be called.
    """
    package = f"harmonize.{PACKAGE_OF[place]}."
    target = str(node.get("_target_") or "") if isinstance(node, Mapping) else ""
    try:
        built = locate(target) if target.startswith(package) else None
    except ImportError:
        built = None
    nested = json.dumps(node, default=str).count('"_target_"') > 1
    if not isinstance(built, type) or not built.__module__.startswith(package) or nested:
        raise ConfigError(
            f"checkpoint={checkpoint}: its {place} is {target or node!r}, which is no class of {package[:-1]}; nothing "
            "else is built from a file."
        )


PACKAGE_OF = {"backbone": "backbones", "data.dataset": "data"}


def _data_section(cfg: DictConfig, networks: list[Loaded], loaded: Loaded) -> DictConfig:
    """The ``data`` section for a network, at its image size: chosen, or the first network's own, or shapes."""
    if cfg.data is not None:
        section, what = OmegaConf.create(to_plain(cfg)["data"]), "the chosen data"
    elif own := next((n for n in networks if n.data is not None), None):
        assert own.data is not None
        _refuse_foreign(own.data.get("dataset"), "data.dataset", own.checkpoint)
        section, what = OmegaConf.create(own.data), "the data that it was trained on"
    else:
        with composer("analyze") as conf:
            section, what = conf.load(["data=shapes"]).data, "shapes"
    size = loaded.spec.image_size
    for node in (section, section.dataset):
        if "image_size" in node:
            node.image_size = max(size)
    loaded.details["data"] = f"{what}: {section.dataset['_target_'].rpartition('.')[2]}"
    return section


def _short_names(checkpoints: list[str]) -> list[str]:
    """Names for figures: the part of the paths that tells them apart.

    >>> _short_names(["outputs/a/checkpoints/last.ckpt", "outputs/b", "timm:vit_tiny_patch16_224"])
    ['a', 'b', 'vit_tiny_patch16_224']
    """
    names = []
    for checkpoint in checkpoints:
        parts = [p for p in Path(checkpoint.removeprefix(TIMM)).parts if p not in ("checkpoints", "last.ckpt")]
        names.append(Path(parts[-1]).stem if parts and parts[-1].endswith((".ckpt", ".pth")) else "".join(parts[-1:]))
    return [n if names.count(n) == 1 else f"{n} {i}" for i, n in enumerate(names, start=1)]


def _default_folder(cfg: DictConfig, names: list[str]) -> Path:
    """A pure function of the configuration: the same command writes the same folder."""
    plain = {key: value for key, value in to_plain(cfg).items() if key not in ("run", "hydra")}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]
    return Path(cfg.run.root).expanduser() / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', '-'.join(names))[:80]}-{digest}"


def _device(accelerator: str) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if accelerator == "gpu" and not has_gpu:
        raise ConfigError("accelerator must be cpu or auto, not gpu: there is no GPU here.")
    return torch.device("cuda" if has_gpu and accelerator != "cpu" else "cpu")


def _say_alarms(network: Network, cfg: DictConfig, console: Console) -> None:
    chosen = choose_diagnostics(cfg.diagnostics, network.spec)
    if chosen is not None and chosen.health is not None:
        for alarm in chosen.health.check(network.findings, network.spec):
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
