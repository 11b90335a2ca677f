"""``harmonize export``: the encoder of a checkpoint for other software."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from harmonize.backbones.timm_vit import ViTEncoder
from harmonize.checkpoints import export as files
from harmonize.checkpoints.model_card import NOT_STATED, CardFacts
from harmonize.files import read_rows
from harmonize.networks import Loaded, load_network, short_names
from harmonize.types import ConfigError, Result

PRIVATE = ("run", "logger")
"""Sections of a configuration that say where things lie; the model card leaves them out, and the roots of data."""


def export(cfg: DictConfig) -> None:
    """Write the encoder that a configuration names, and print how to load it.

    Args:
        cfg: A configuration that ``check_config`` has passed.

    Raises:
        ConfigError: The checkpoint cannot be read, or the format cannot hold the encoder.
    """
    if not isinstance(cfg.checkpoint, str):
        raise ConfigError(f"checkpoint={list(cfg.checkpoint)} must be one file or run folder.")
    loaded = load_network(cfg.checkpoint, "encoder", cfg)
    if not isinstance(loaded.encoder, ViTEncoder):
        raise ConfigError(f"checkpoint={cfg.checkpoint} is a network of timm; there is nothing to export.")
    name = cfg.name or re.sub(r"[^\w.+-]+", "-", short_names([cfg.checkpoint])[0]).strip("-.") or "encoder"
    folder = Path(cfg.run.dir or Path(cfg.run.root) / f"{name}-{cfg.format}")
    head = loaded.head if cfg.format in ("timm", "hf") else None
    done = files.export(loaded.encoder, folder, cfg.format, card=_facts(loaded, cfg.licence), head=head, name=name)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"Written to {folder}: {', '.join(path.name for path in done.files)}", markup=False)
    console.print(
        f"Loaded again, its outputs differ from the encoder's by at most {done.difference:.1g}. To load it:\n"
    )
    console.print(done.snippet, markup=False)


def _facts(loaded: Loaded, licence: str | None) -> CardFacts:
    """What the model card says, without where things lie on this machine."""
    objective, _, weight = loaded.objective.partition(" ")
    config = loaded.config or {}
    data = config.get("data") or {}
    public: dict[str, Any] = {key: value for key, value in config.items() if key not in PRIVATE}
    public = _without_paths(public)
    return CardFacts(
        objective=objective,
        weight=float(weight) if weight else None,
        data=str((data.get("dataset") or {}).get("_target_", "")).rpartition(".")[2],
        steps=loaded.step,
        results=_results(loaded),
        config=OmegaConf.to_yaml(OmegaConf.create(public)) if config else "",
        license=licence or NOT_STATED,
        derived_from=loaded.derived_from,
    )


def _without_paths(node: Any) -> Any:
    """A configuration without the values of keys that hold paths."""
    if isinstance(node, dict):
        return {key: _without_paths(value) for key, value in node.items() if key not in ("root", "class_list")}
    return [_without_paths(value) for value in node] if isinstance(node, list) else node


def _results(loaded: Loaded) -> list[Result]:
    """The probes at the last validation of a run, where its folder is there."""
    rows = Path(loaded.checkpoint).expanduser() / "metrics.jsonl"
    latest: dict[str, float] = {}
    for row in read_rows(rows) if rows.is_file() else ():
        latest |= {key: value for key, value in row.items() if key.startswith("val/") and value is not None}
    probe = ((loaded.config or {}).get("callbacks") or {}).get("probe") or {}
    return [
        Result(name, latest[f"val/{name}"], int(probe.get("num_val") or 0), latest.get(f"val/{name}_se"))
        for name in ("knn_top1", "linear_top1")
        if f"val/{name}" in latest
    ]
