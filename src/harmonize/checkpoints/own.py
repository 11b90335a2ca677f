"""The encoder in a checkpoint of harmonize's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonize.types import ConfigError

PREFIX = "encoder."


@dataclass(frozen=True)
class OwnCheckpoint:
    """What a checkpoint says about its encoder.

    Attributes:
        path: The file.
        config: The run's resolved configuration.
        weights: Of the encoder, by its own names.
        step: Optimiser steps finished.
    """

    path: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]
    step: int


def read_checkpoint(name: str) -> OwnCheckpoint:
    """Read a checkpoint file, or ``checkpoints/last.ckpt`` of a run folder; no code in it is run.

    Raises:
        ConfigError: There is none, it cannot be read, or it holds no encoder of harmonize.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    if not path.is_file():
        where = f"{path} does not exist" if str(path) != name else "there is no such file or run folder"
        raise ConfigError(f"checkpoint={name}: {where}; models of timm are written timm:NAME.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file raises one of many errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"checkpoint={name} cannot be read as a checkpoint of harmonize ({reason}).") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    entries = state.items() if isinstance(state, dict) else ()
    weights = {str(k).removeprefix(PREFIX): v for k, v in entries if str(k).startswith(PREFIX)}
    if not weights or not isinstance(content.get("config"), dict) or "backbone" not in content["config"]:
        raise ConfigError(
            f"checkpoint={name} holds no encoder of harmonize (no tensors named {PREFIX}* with a configuration beside "
            "them); other projects' files cannot be read yet."
        )
    return OwnCheckpoint(path, content["config"], weights, int(content.get("global_step", 0)))
