"""What becomes of every tensor of a file: the weights under our names, and an account that leaves none out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harmonize.checkpoints.formats import DROPPED
from harmonize.checkpoints.recognition import Recognized
from harmonize.checkpoints.shapes import pad_positions
from harmonize.functional.positions import relative_position_index

# Names of a classifier's tensors: one linear layer, or MAE's probe (BatchNorm without affine, linear layer), and the
# norm of pooled tokens before it.
LINEAR = {"head.weight", "head.bias"}
NORMALIZED_LINEAR = {"head.0.running_mean", "head.0.running_var", "head.1.weight", "head.1.bias"}
POOLED_NORM = {"fc_norm.weight", "fc_norm.bias"}


@dataclass(frozen=True)
class KeyRow:
    """What has become of one tensor of a file, or of one entry beside the weights.

    Attributes:
        entry: The top-level entry that it is in; empty for a bare state dict and for the entries themselves.
        key: Its name in the file, or ours if it is missing there.
        shape: Of the tensor; empty for an entry.
        outcome: ``mapped``, ``dropped``, ``missing`` or ``unexplained``.
        detail: Our name of it, or the reason.
    """

    entry: str
    key: str
    shape: tuple[int, ...]
    outcome: str
    detail: str


@dataclass(frozen=True)
class Account:
    """Weights, and where every tensor went.

    Attributes:
        weights: Of the encoder, by our names, fp32.
        classifier: What else of the file belongs to its classifier, by name, fp32.
        rows: One per tensor of the file, then one per weight without a source.
    """

    weights: dict[str, Tensor]
    classifier: dict[str, Tensor]
    rows: list[KeyRow]


def account(
    tensors: Mapping[str, Tensor], found: Recognized, ours: Mapping[str, Tensor], grid: tuple[int, int]
) -> Account:
    """Sort the tensors of a file.

    Args:
        tensors: By path.
        found: The encoder among them.
        ours: ``state_dict`` of a ``ViTEncoder`` of its sizes; the shapes alone matter.
        grid: (rows, columns) of its patches.
    """
    sources: dict[str, dict[str, str]] = {}  # our name -> part of it -> path
    outcomes: dict[str, tuple[str, str]] = {}  # path -> outcome and detail
    classifier = {}
    for path, tensor in tensors.items():
        name = found.names[path]
        target, _, part = name.partition("#")
        if target in ours and part not in sources.get(target, {}):
            sources.setdefault(target, {})[part] = path
            outcomes[path] = ("mapped", f"{target} ({part})" if part else target)
        elif reason := _reason(path, name, tensor, found, grid):
            outcomes[path] = ("dropped", reason)
        elif name in LINEAR | NORMALIZED_LINEAR | POOLED_NORM:
            classifier[name] = tensor.to(torch.float32, copy=True)
            outcomes[path] = ("mapped", f"the classifier's {name}")
        else:
            outcomes[path] = ("unexplained", "no part of this layout")

    weights, missing = {}, []
    for target, wanted in ours.items():
        parts = sources.get(target, {})
        joined = _join({part: tensors[path] for part, path in parts.items()})
        if joined is None:
            missing.append(KeyRow("", target, tuple(wanted.shape), "missing", "no source in the file"))
            continue
        if target == "pos_embed":
            joined = pad_positions(joined, found.shapes.num_prefix_tokens, grid)
        if joined.shape == wanted.shape:
            weights[target] = joined.to(torch.float32, copy=True)
            continue
        for path in parts.values():
            outcomes[path] = ("unexplained", f"{target} has shape {tuple(wanted.shape)}")
    rows = [row(path, tuple(tensors[path].shape), *outcome) for path, outcome in outcomes.items()]
    return Account(weights, classifier, rows + missing)


def row(path: str, shape: tuple[int, ...], outcome: str, detail: str) -> KeyRow:
    """A row for a tensor's path or an entry."""
    entry, _, key = path.rpartition("/")
    return KeyRow(entry, key, shape, outcome, detail)


def _reason(path: str, name: str, tensor: Tensor, found: Recognized, grid: tuple[int, int]) -> str | None:
    """Why a tensor is left out; None if nothing is known against it."""
    if name.endswith("relative_position_index"):
        index = relative_position_index(grid, found.shapes.num_prefix_tokens)
        return "computed from the patch grid" if torch.equal(index, tensor.long()) else None
    for pattern, reason in (*found.format.dropped.items(), *DROPPED.items()):
        if re.match(pattern, name):
            return reason
    for branch, pattern in found.format.branches.items():
        if branch != found.branch and re.match(pattern, path):
            return f"the {branch} encoder; branch={branch} reads it"
    return None


def _join(parts: Mapping[str, Tensor]) -> Tensor | None:
    """A tensor from its parts: itself, query, key and value one below the other; None if they do not make one.

    BEiT and SimMIM have no bias of the keys: attention would not change with one, so it is zero.
    """
    if "" in parts:
        return parts[""]
    alike = len({part.shape[1:] for part in parts.values()}) == 1 and all(part.ndim for part in parts.values())
    if {"q", "v"} <= parts.keys() and alike:
        return torch.cat([parts["q"], parts.get("k", torch.zeros_like(parts["q"])), parts["v"]])
    return None
