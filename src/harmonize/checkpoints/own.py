"""Checkpoints of harmonize's own: those of training, and networks that an evaluation has fine-tuned."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harmonize.checkpoints.keys import KeyRow, row
from harmonize.checkpoints.reading import CheckpointFile, read_file
from harmonize.files import write_whole
from harmonize.types import ConfigError

ENCODER, HEAD = "encoder.", "head."


@dataclass(frozen=True)
class OwnCheckpoint:
    """What a checkpoint says about its encoder.

    Attributes:
        path: The file.
        config: The run's resolved configuration.
        weights: Of the encoder, by its own names.
        step: Optimiser steps finished.
        head: Tensors of a classifier, by its own names; empty where there is none.
        head_facts: What else it takes to build that classifier.
        keys: What has become of every tensor of the file and of every entry beside them.
    """

    path: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]
    step: int
    head: dict[str, Tensor]
    head_facts: dict[str, Any]
    keys: list[KeyRow]


def find_file(name: str) -> str:
    """The file that a name means: itself, ``checkpoints/last.ckpt`` of a run folder, or what an export has written.

    Raises:
        ConfigError: There is none.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        raise ConfigError(
            f"checkpoint={name}: there is no such file or run folder; models of timm are written timm:NAME."
        )
    if not folder.is_dir():
        return name
    last, exported = folder / "checkpoints" / "last.ckpt", sorted(folder.glob("*.safetensors"))
    if last.is_file():
        return str(last)
    if len(exported) == 1:
        return str(exported[0])
    raise ConfigError(f"checkpoint={name}: {last} does not exist, and there is no single safetensors file either.")


def read_checkpoint(name: str) -> OwnCheckpoint:
    """Read a checkpoint file, or ``checkpoints/last.ckpt`` of a run folder; no code in it is run.

    Raises:
        ConfigError: There is none, it cannot be read, or it holds no encoder of harmonize.
    """
    return interpret(replace(read_file(find_file(name)), name=name))


def interpret(file: CheckpointFile) -> OwnCheckpoint:
    """:func:`read_checkpoint` of a file that has been read.

    Raises:
        ConfigError: It holds no encoder of harmonize.
    """
    content = file.content
    state, config = content.get("state_dict"), content.get("config")
    tensors = {str(k): v for k, v in state.items()} if isinstance(state, Mapping) else {}
    weights, head = (
        {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        for prefix in (ENCODER, HEAD)
    )
    if not weights or not isinstance(config, Mapping) or "backbone" not in config:
        raise ConfigError(
            f"checkpoint={file.name} holds no encoder of harmonize (no tensors named {ENCODER}* with a configuration "
            "beside them)."
        )
    rows = [_row(key, tensor) for key, tensor in tensors.items()]
    rows += [row(entry, (), "dropped", "no weights of the encoder") for entry in content if entry != "state_dict"]
    step, facts = int(content.get("global_step", 0)), dict(content.get("head") or {})
    return OwnCheckpoint(file.path, dict(config), weights, step, head if facts else {}, facts, rows)


def save(
    path: Path,
    encoder: nn.Module,
    head: nn.Module,
    head_facts: Mapping[str, Any],
    config: Mapping[str, Any],
) -> None:
    """Write a fine-tuned encoder and its classifier as a checkpoint that :func:`interpret` reads.

    Args:
        path: Written whole or not at all.
        encoder: Its tensors.
        head: The classifier's.
        head_facts: What it takes to build the classifier.
        config: With a ``backbone`` that builds the encoder.
    """
    tensors = {f"{ENCODER}{name}": tensor for name, tensor in encoder.state_dict().items()}
    tensors |= {f"{HEAD}{name}": tensor for name, tensor in head.state_dict().items()}
    content = io.BytesIO()
    state = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    torch.save({"state_dict": state, "config": dict(config), "head": dict(head_facts)}, content)
    write_whole(path, content.getvalue())


def _row(key: str, tensor: Tensor) -> KeyRow:
    outcome, detail = "dropped", "of the pre-training objective, not of the encoder"
    if key.startswith(ENCODER):
        outcome, detail = "mapped", key.removeprefix(ENCODER)
    elif key.startswith(HEAD):
        outcome, detail = "mapped", f"classifier, {key.removeprefix(HEAD)}"
    return KeyRow("state_dict", key, tuple(tensor.shape), outcome, detail)
