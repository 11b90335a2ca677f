"""Which of the known layouts a checkpoint file has, and where its encoder lies in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from harmonize.checkpoints.formats import ENTRIES, FORMATS, Evidence, Format, our_name
from harmonize.checkpoints.reading import CheckpointFile
from harmonize.checkpoints.shapes import Shapes, read_shapes
from harmonize.types import ConfigError


@dataclass(frozen=True)
class Recognized:
    """An encoder found in a file.

    Attributes:
        format: The file's layout.
        branch: Which of its encoders; empty if there is one only.
        names: Path of every tensor (top-level entry, slash, name) -> our name if it is the encoder's.
        shapes: The encoder's sizes.
    """

    format: Format
    branch: str
    names: dict[str, str]
    shapes: Shapes


def take_apart(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """What may be weights, and what lies beside them.

    Args:
        content: Of a file.

    Returns:
        Tensors by path (top-level entry, slash, name; the name alone in a bare state dict), path -> reason of all that
        is left out, and the entries that hold tensors for no reason known.
    """
    tensors: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    unknown = []
    for entry, value in content.items():
        if reason := next((why for pattern, why in ENTRIES.items() if re.fullmatch(pattern, entry)), None):
            left_out[entry] = reason
        elif isinstance(value, Tensor):
            tensors[entry] = value
        elif isinstance(value, dict) and any(isinstance(inner, Tensor) for inner in value.values()):
            for name, inner in value.items():
                if isinstance(inner, Tensor):
                    tensors[f"{entry}/{name}"] = inner
                else:
                    left_out[f"{entry}/{name}"] = "no tensor"
        elif _has_tensors(value):
            unknown.append(entry)
        else:
            left_out[entry] = "no tensors in it"
    return tensors, left_out, unknown


def recognize(file: CheckpointFile, tensors: Mapping[str, Tensor], branch: str) -> Recognized:
    """Find the encoder in a file.

    Args:
        file: The file.
        tensors: By path.
        branch: Which of its encoders, or ``auto``.

    Raises:
        ConfigError: There is none that can be read, or not this branch.
    """
    for form in FORMATS:
        prefixes = {name: _prefix(pattern, tensors) for name, pattern in form.branches.items()}
        present = {name: prefix for name, prefix in prefixes.items() if prefix is not None}
        if not present:
            continue
        chosen = branch if branch in present else next(iter(present))
        prefix = present[chosen]
        names = {path: our_name(path.removeprefix(prefix)) for path in tensors}
        encoder = {names[path]: tensor for path, tensor in tensors.items()}
        try:
            shapes = read_shapes(encoder)
        except ValueError as error:
            raise ConfigError(f"checkpoint={file.name} {error}.") from error
        if form.when(Evidence(prefix, encoder.keys(), file.content.keys(), shapes.positions, bool(file.beside))):
            if branch not in ("auto", chosen):
                allowed = ", ".join(["auto", *(name for name in present if name)])
                raise ConfigError(
                    f"branch={branch} must be {allowed}: checkpoint={file.name} ({form.family}) has no other."
                )
            return Recognized(form, chosen, names, shapes)
    stem = next((path for path in tensors if re.search(r"patch_embed\.proj\.\d+\.", path)), None)
    if stem is not None:
        raise ConfigError(
            f"checkpoint={file.name} has a stem of several convolutions ({stem}), as MoCo v3's vit_conv_small; only "
            "patch embeddings of one convolution can be read."
        )
    strange = next((path for path in tensors if path.endswith("patch_embed.proj.weight")), None)
    some = ", ".join([*list(tensors)[:3], "..."][: len(tensors)]) or "there are none"
    raise ConfigError(
        f"checkpoint={file.name} has an encoder where no known layout has one ({strange})."
        if strange
        else f"checkpoint={file.name} holds no Vision Transformer of a known layout: none of its {len(tensors)} "
        f"tensors ({some}) is a patch_embed.proj.weight."
    )


def _prefix(pattern: str, tensors: Mapping[str, Tensor]) -> str | None:
    """What stands before the encoder's names, if the pattern fits what stands before its patch embedding."""
    for path in tensors:
        found = re.match(pattern, path)
        if found and our_name(path[found.end() :]) == "patch_embed.proj.weight":
            return found.group()
    return None


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_tensors(inner) for inner in value.values())
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(_has_tensors(v) for v in value))
