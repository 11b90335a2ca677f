"""The encoder, and the classifier if there is one, in a checkpoint of another project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonize.backbones.timm_vit import ViTEncoder
from harmonize.checkpoints.keys import LINEAR, NORMALIZED_LINEAR, POOLED_NORM, KeyRow, account, row
from harmonize.checkpoints.reading import CheckpointFile, read_file
from harmonize.checkpoints.recognition import Recognized, recognize, take_apart
from harmonize.checkpoints.resizing import resize_state
from harmonize.checkpoints.shapes import Shapes
from harmonize.functional.positions import RESAMPLING
from harmonize.types import IMAGE_MEAN, IMAGE_STD, ConfigError

UNKNOWN_HEADS = "unknown"
LAYER_SCALE = 0.1  # a new network's, as in SimMIM; a file's own values replace it
# Where files say their number of heads, and how images are normalised.
STATED_HEADS = (
    ("args", "num_heads"),
    ("config", "MODEL", "VIT", "NUM_HEADS"),
    ("config.json", "model_args", "num_heads"),
    ("config.json", "num_attention_heads"),
)
STATED_MEAN = (("config.json", "pretrained_cfg", "mean"), ("preprocessor_config.json", "image_mean"))
STATED_STD = (("config.json", "pretrained_cfg", "std"), ("preprocessor_config.json", "image_std"))


@dataclass(frozen=True)
class ClassifierHead:
    """A linear classifier that a file brings along: class scores = weight @ norm(pooled) + bias.

    Attributes:
        pool: ``cls`` or ``patch_mean``, of the tokens that the encoder returns.
        weight: (C, D).
        bias: (C,).
        norm: Weight and bias (D,) of a LayerNorm (eps 1e-6) of the pooled features, None where there is none.
    """

    pool: str
    weight: Tensor
    bias: Tensor
    norm: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class OfficialCheckpoint:
    """The encoder in a file of another project.

    Attributes:
        path: The file.
        family: The layout, for example ``MoCo v3, pre-trained``.
        note: What the file is.
        architecture: Arguments of ``ViTEncoder``.
        heads_from: Where the number of heads is from; it is in no tensor's shape.
        weights: Of the encoder, by its own names, fp32.
        keys: What has become of every tensor of the file and of every entry beside them.
        head: The classifier in the file.
        mean: Per colour, with which its images are normalised.
        std: Per colour.
    """

    path: Path
    family: str
    note: str
    architecture: dict[str, Any]
    heads_from: str
    weights: dict[str, Tensor]
    keys: list[KeyRow]
    head: ClassifierHead | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


def read_official(
    name: str,
    branch: str = "auto",
    image_size: int | None = None,
    resize: str = "mae",
    num_heads: int | None = None,
) -> OfficialCheckpoint:
    """Read the encoder in a file of MoCo v3, SimMIM, MAE, DINO, iBOT, BEiT, DeiT, timm or Hugging Face.

    Args:
        name: The file.
        branch: Which of its encoders: ``base`` or ``momentum`` (MoCo v3), ``teacher`` or ``student`` (DINO, iBOT);
            ``auto`` is the first of each pair.
        image_size: Side in px of the images that it is to take, None for those that it was trained with.
        resize: How learned positions are adapted to them: ``mae``, ``timm`` or ``dino``.
        num_heads: Number of heads, needed where neither the file nor a publication tells it.

    Raises:
        ConfigError: The file cannot be read, is no Vision Transformer, or not all of its tensors are explained.
    """
    return interpret(read_file(name), branch, image_size, resize, num_heads)


def interpret(
    file: CheckpointFile,
    branch: str = "auto",
    image_size: int | None = None,
    resize: str = "mae",
    num_heads: int | None = None,
    heads_needed: bool = True,
) -> OfficialCheckpoint:
    """:func:`read_official` of a file that has been read.

    With ``heads_needed=False`` a number of heads that cannot be known is 1, and ``heads_from`` says so: enough to
    account for the tensors, not to use the encoder.
    """
    if resize not in RESAMPLING:
        raise ConfigError(f"resize={resize} must be one of {', '.join(RESAMPLING)}.")
    if kind_of(file) != "official":
        raise ConfigError(f"checkpoint={file.name} is harmonize's own, not another project's.")
    tensors, left_out, unknown = take_apart(file.content)
    found = recognize(file, tensors, branch)
    form, shapes = found.format, found.shapes
    what = f"checkpoint={file.name} ({form.family})"
    heads, heads_from = _num_heads(file, found, num_heads, what, heads_needed)
    grid, new_grid = _grids(shapes, image_size, what)
    architecture: dict[str, Any] = {
        "image_size": grid[0] * shapes.patch_size,
        "patch_size": shapes.patch_size,
        "width": shapes.width,
        "depth": shapes.depth,
        "num_heads": heads,
        "positions": shapes.positions,
        "relative_position": shapes.relative_position,
        "layer_scale": LAYER_SCALE if shapes.layer_scale else None,
        "class_token": shapes.class_token,
        "num_registers": shapes.num_registers,
        "final_norm": shapes.final_norm,
        "initialization": form.initialization,
    }
    with torch.device("meta"):
        ours = ViTEncoder(**architecture).state_dict()
    sorted_out = account(tensors, found, ours, grid)
    rows = [
        *sorted_out.rows,
        *(row(path, (), "dropped", reason) for path, reason in left_out.items()),
        *(row(entry, (), "unexplained", "tensors in an unknown entry") for entry in unknown),
    ]
    _refuse_unexplained(rows, what)
    head = _classifier(sorted_out.classifier, shapes, what)

    note = form.note.format(branch=f"{found.branch} encoder")
    weights = sorted_out.weights
    if new_grid != grid:
        weights = resize_state(weights, grid, new_grid, shapes.num_prefix_tokens, shapes.positions, resize)
        architecture["image_size"] = new_grid[0] * shapes.patch_size
        note += f"; positions adapted from {grid[0]} x {grid[1]} patches to {new_grid[0]} x {new_grid[1]}"
    if head is not None:
        pooled = "class token" if head.pool == "cls" else "mean of the patch tokens"
        note += f"; linear classifier head found ({len(head.weight)} classes, on the {pooled})"
    mean, std = _per_colour(file, STATED_MEAN) or form.mean, _per_colour(file, STATED_STD) or form.std
    return OfficialCheckpoint(file.path, form.family, note, architecture, heads_from, weights, rows, head, mean, std)


def build(official: OfficialCheckpoint) -> ViTEncoder:
    """The encoder of a file, with its weights, in eval mode, for images normalised as everywhere in this project.

    Where the file's images were normalised otherwise, the difference is folded into the patch embedding. That is exact:
    patches do not overlap and are not padded.
    """
    with torch.random.fork_rng(devices=[]):  # initial values are replaced, no caller's random numbers used
        encoder = ViTEncoder(**official.architecture)
    encoder.load_state_dict(official.weights)
    if (official.mean, official.std) != (IMAGE_MEAN, IMAGE_STD):
        mean, std, our_mean, our_std = (
            torch.tensor(values) for values in (official.mean, official.std, IMAGE_MEAN, IMAGE_STD)
        )
        projection = encoder.patch_embed.proj
        with torch.no_grad():
            projection.bias += (projection.weight * ((our_mean - mean) / std)[:, None, None]).sum((1, 2, 3))
            projection.weight *= (our_std / std)[:, None, None]
    return encoder.eval()


def kind_of(file: CheckpointFile) -> str:
    """Who can read a file.

    Returns:
        ``own`` (a checkpoint of a run, for :mod:`harmonize.checkpoints.own`), ``exported`` (harmonize's single file,
        for :mod:`harmonize.checkpoints.single_file`) or ``official`` (:func:`interpret`).
    """
    if {"architecture", "fingerprint"} <= file.metadata.keys():
        return "exported"
    state, config = file.content.get("state_dict"), file.content.get("config")
    has_encoder = isinstance(state, dict) and any(str(name).startswith("encoder.") for name in state)
    return "own" if has_encoder and isinstance(config, dict) and "backbone" in config else "official"


def _num_heads(file: CheckpointFile, found: Recognized, given: int | None, what: str, needed: bool) -> tuple[int, str]:
    """Number of heads, and where it is from: relative-position tables, the caller, the file, a publication."""
    width = found.shapes.width
    # timm's networks without a class token have 12 or 16 heads at one width
    published = found.format.num_heads if found.shapes.class_token else {}
    stated, place = file.stated(*STATED_HEADS)
    if (heads := found.shapes.num_heads) is not None:
        source = "relative-position table"
        if given not in (None, heads):
            raise ConfigError(f"num_heads={given} must be {heads}, as the relative-position table of {what} says.")
    elif given is not None:
        heads, source = given, "given"
    elif isinstance(stated, int):
        heads, source = stated, f"the file's {place}"
    elif width in published:
        heads, source = published[width], found.format.heads_from
    elif not needed:
        heads, source = 1, UNKNOWN_HEADS
    else:
        raise ConfigError(
            f"{what}: the number of heads of an encoder of width {width} is neither in the file nor published; give it "
            "as num_heads=N."
        )
    if heads < 1 or width % heads:
        raise ConfigError(f"num_heads={heads} must divide the width {width} of {what}.")
    return heads, source


def _per_colour(file: CheckpointFile, places: Sequence[tuple[str, ...]]) -> tuple[float, ...] | None:
    """Three numbers that are stated beside a file."""
    value, _ = file.stated(*places)
    is_colours = isinstance(value, list) and len(value) == 3 and all(isinstance(v, (int, float)) for v in value)
    return tuple(map(float, value)) if is_colours else None


def _grids(shapes: Shapes, image_size: int | None, what: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """The patch grid of the file, and the one for the wanted images."""
    if image_size is not None and (image_size < 1 or image_size % shapes.patch_size):
        raise ConfigError(
            f"image_size={image_size} must be a multiple of the patch size {shapes.patch_size} of {what}."
        )
    wanted = None if image_size is None else (image_size // shapes.patch_size,) * 2
    if shapes.grid is None and wanted is None:
        raise ConfigError(f"{what} has no positions and so takes images of any size; give image_size=N.")
    grid = shapes.grid or wanted
    assert grid is not None
    return grid, wanted or grid


def _refuse_unexplained(rows: Sequence[KeyRow], what: str) -> None:
    problems = []
    for outcome, verb in (("unexplained", "not explained"), ("missing", "missing")):
        keys = [f"{r.entry}/{r.key}".lstrip("/") for r in rows if r.outcome == outcome]
        if keys:
            some = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
            problems.append(f"{len(keys)} {'is' if len(keys) == 1 else 'are'} {verb} ({some})")
    if problems:
        raise ConfigError(f"{what} is refused because of its tensors, {' and '.join(problems)}.")


def _classifier(parts: Mapping[str, Tensor], shapes: Shapes, what: str) -> ClassifierHead | None:
    """The classifier from its tensors, if there is a linear layer among them."""
    names = parts.keys() - POOLED_NORM
    if not names:
        return None
    linear = "head" if names == LINEAR else "head.1"
    if names not in (LINEAR, NORMALIZED_LINEAR) or len(parts.keys() & POOLED_NORM) == 1:
        raise ConfigError(f"{what} has an incomplete classifier ({', '.join(sorted(parts))}).")
    weight, bias = parts[f"{linear}.weight"], parts[f"{linear}.bias"]
    wanted = dict.fromkeys(parts, (shapes.width,))
    wanted |= {f"{linear}.weight": (*bias.shape, shapes.width), f"{linear}.bias": (bias.numel(),)}
    for name, tensor in parts.items():
        if tensor.shape != wanted[name]:
            raise ConfigError(f"{what}: the classifier's {name} has shape {tuple(tensor.shape)}, not {wanted[name]}.")
    if names == NORMALIZED_LINEAR:
        weight = weight * (parts["head.0.running_var"] + 1e-6).rsqrt()  # MAE's eps
        bias = bias - weight @ parts["head.0.running_mean"]
    norm = (parts["fc_norm.weight"], parts["fc_norm.bias"]) if parts.keys() >= POOLED_NORM else None
    return ClassifierHead("patch_mean" if norm or not shapes.class_token else "cls", weight, bias, norm)
