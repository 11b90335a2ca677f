"""harmonize's own exported file: one ``.safetensors`` with an encoder's weights and all that it takes to build it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from harmonize import __version__
from harmonize.backbones.timm_vit import ViTEncoder
from harmonize.checkpoints.fingerprint import MAX_DEVIATION, matches
from harmonize.checkpoints.model_card import CardFacts
from harmonize.files import finite
from harmonize.functional.positions import sincos_2d
from harmonize.types import ConfigError


class StoredEncoder(NamedTuple):
    """What an exported file holds.

    Attributes:
        architecture: Arguments of :class:`~harmonize.backbones.timm_vit.ViTEncoder`.
        weights: By the encoder's names.
        metadata: ``harmonize_version``, ``architecture``, ``fingerprint``, ``license`` and ``facts``, see
            :class:`~harmonize.checkpoints.model_card.CardFacts`.
    """

    architecture: dict[str, Any]
    weights: dict[str, Tensor]
    metadata: dict[str, Any]


def architecture_of(encoder: ViTEncoder) -> dict[str, Any]:
    """The arguments that build an encoder of the same function; what only matters in training is left out."""
    spec = encoder.spec
    return {
        "image_size": list(spec.image_size),
        "patch_size": spec.patch_size,
        "width": spec.width,
        "depth": spec.depth,
        "num_heads": spec.num_heads,
        "positions": _positions(encoder),
        "relative_position": encoder.relative_position,
        # the initial value is SimMIM's; what was learnt is among the weights
        "layer_scale": 0.1 if "blocks.0.ls1.gamma" in encoder.state_dict() else None,
        "class_token": spec.has_class_token,
        "num_registers": spec.num_prefix_tokens - spec.has_class_token,
        "final_norm": not isinstance(encoder.norm, nn.Identity),
    }


def _positions(encoder: ViTEncoder) -> str:
    """Whether positions are fixed, so that they stay fixed where the encoder is trained on."""
    spec = encoder.spec
    if encoder.pos_embed is None:
        return "none"
    prefix, patches = encoder.pos_embed.detach().cpu().float()[0].split([spec.num_prefix_tokens, spec.num_patches])
    for kind in ("sincos", "sincos_mae"):
        if spec.width % 4 or prefix.any():
            break
        fixed = sincos_2d(spec.grid, spec.width, columns_first=kind == "sincos_mae")
        if torch.allclose(patches, fixed, rtol=0, atol=1e-6):
            return kind
    return "learned"


def save_encoder(encoder: ViTEncoder, path: Path, facts: CardFacts, fingerprint: list[float]) -> None:
    """Write an encoder in fp32; see :class:`StoredEncoder` for what is in the file."""
    metadata = {
        "harmonize_version": __version__,
        "architecture": architecture_of(encoder),
        "fingerprint": fingerprint,
        "license": facts.weights_license,
        "facts": asdict(facts),
    }
    weights = {name: tensor.float().contiguous() for name, tensor in encoder.state_dict().items()}
    # safetensors holds strings only; format=pt is what other readers look for
    strings = {key: json.dumps(finite(value)) for key, value in metadata.items()}
    save_file(weights, path, metadata={"format": "pt"} | strings)


def read_exported(path: str | Path) -> StoredEncoder:
    """What a file that :func:`save_encoder` wrote holds; see :func:`open_exported` for what is checked."""
    return open_exported(path)[1]


def load_exported(path: str | Path) -> ViTEncoder:
    """The encoder in a file that :func:`save_encoder` wrote, in eval mode; see :func:`open_exported`."""
    return open_exported(path)[0]


def open_exported(path: str | Path) -> tuple[ViTEncoder, StoredEncoder]:
    """The encoder in a file that :func:`save_encoder` wrote, in eval mode, and what else the file holds.

    Raises:
        ConfigError: There is no such file, it cannot be read, weights and architecture do not fit, or the features are
            not those that the weights were saved with.
    """
    stored = _read(Path(path).expanduser())
    return _build(stored, path), stored


def _read(path: Path) -> StoredEncoder:
    if not path.is_file():
        raise ConfigError(f"checkpoint={path}: there is no such file.")
    try:
        with safe_open(path, framework="pt") as file:
            strings = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except Exception as error:  # a damaged or foreign file raises one of many errors
        raise ConfigError(f"checkpoint={path} cannot be read as a safetensors file ({_short(error)}).") from error
    try:
        metadata = {key: json.loads(value) for key, value in strings.items() if key != "format"}
        architecture = {**metadata["architecture"]}
        metadata["fingerprint"] = [float(number) for number in metadata["fingerprint"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"checkpoint={path} holds no encoder that harmonize has exported: its metadata tell no architecture and "
            "fingerprint."
        ) from error
    return StoredEncoder(architecture, weights, metadata)


def _build(stored: StoredEncoder, path: str | Path) -> ViTEncoder:
    arguments = dict(stored.architecture)
    blocks = {name.split(".")[1] for name in stored.weights if name.startswith("blocks.")}
    try:
        if arguments["depth"] != len(blocks):  # before a file asks for a billion blocks
            raise ValueError(f"depth is {arguments['depth']}, but there are {len(blocks)} blocks")
        arguments["image_size"] = tuple(arguments["image_size"])
        encoder = ViTEncoder(**arguments)
        encoder.load_state_dict(stored.weights)
    except (ValueError, TypeError, LookupError, AssertionError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise ConfigError(f"checkpoint={path}: weights and architecture do not fit ({_short(error)}).") from error
    deviation = matches(encoder, stored.metadata["fingerprint"])
    if deviation > MAX_DEVIATION:
        raise ConfigError(
            f"checkpoint={path}: the file's weights do not give the features they were saved with (they deviate by "
            f"{deviation:.1g}, at most {MAX_DEVIATION:g} is rounding)."
        )
    return encoder.eval()


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
