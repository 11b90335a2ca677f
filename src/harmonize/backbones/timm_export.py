"""An encoder as a model that timm builds by name, so that timm alone is enough to load it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from harmonize.backbones.timm_vit import ViTEncoder
from harmonize.types import ConfigError

_NAMES = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 1024: "vit_large_patch16_224"}
"""By width: every size is given explicitly, the name only tells a reader what to expect."""


@dataclass(frozen=True)
class TimmModel:
    """What ``timm.create_model`` needs to build an encoder.

    Attributes:
        architecture: Registered name.
        model_args: Keyword arguments, plain values.
        weights: By timm's names, contiguous.
        through_hub: Whether timm's loaders for the hub and for local folders keep the weights as they are; where not,
            only ``checkpoint_path`` does.
    """

    architecture: str
    model_args: dict[str, Any]
    weights: dict[str, Tensor]
    through_hub: bool


@dataclass(frozen=True)
class TimmHead:
    """A linear classifier, as timm's models have one.

    Attributes:
        pool: ``cls`` or ``patch_mean``.
        linear: Pooled features (B, D) -> class scores.
        norm: Norm after pooling, in place of the encoder's final norm; None: that one, before pooling.
    """

    pool: str
    linear: nn.Linear
    norm: nn.LayerNorm | None = None


def to_timm(encoder: ViTEncoder, head: TimmHead | None = None) -> TimmModel:
    """Describe an encoder in timm's terms.

    ``forward_features`` of that model gives the encoder's tokens (before the final norm, where the head has a norm of
    its own); the model itself gives the head's class scores or, without a head, the class token or the mean of the
    patch tokens where there is none.

    Raises:
        ConfigError: timm has no class for this combination of relative positions, registers, class token and head.
    """
    spec, relative = encoder.spec, encoder.relative_position != "none"
    cls, absolute = spec.has_class_token, encoder.pos_embed is not None
    pool = head.pool if head else ("cls" if cls else "patch_mean")
    own_norm = head is not None and head.norm is not None
    if relative and spec.num_prefix_tokens > cls:
        raise _impossible("with both registers and relative positions")
    if relative and absolute and not cls:
        raise _impossible("with relative and absolute positions but no class token")
    if relative and cls and own_norm != (pool == "patch_mean"):
        raise _impossible(
            f"with relative positions whose classifier reads {pool} {'before' if own_norm else 'after'} the final norm"
        )
    final_norm = not isinstance(encoder.norm, nn.Identity)
    if relative and not final_norm and not own_norm:
        raise _impossible("with relative positions and without any norm after the last block")
    weights = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    args: dict[str, Any] = {
        "img_size": list(spec.image_size),
        "patch_size": spec.patch_size,
        "embed_dim": spec.width,
        "depth": spec.depth,
        "num_heads": spec.num_heads,
        # 0 is none: timm drops arguments that are None, and then its own default would hold
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in weights else 0.0,
        "global_pool": "token" if pool == "cls" else "avg",
    }
    if not relative:
        architecture = _NAMES.get(spec.width, "vit_base_patch16_224")
        args |= {"class_token": cls, "reg_tokens": spec.num_prefix_tokens - cls}
        args |= {"pos_embed": "learn" if absolute else "none", "fc_norm": own_norm}
        args |= {} if final_norm or own_norm else {"final_norm": False}
    elif cls:
        architecture = "beit_base_patch16_224"
        weights = _beit_weights(weights)
        shared = encoder.relative_position == "shared"
        args |= {"use_abs_pos_emb": absolute, "use_shared_rel_pos_bias": shared, "use_rel_pos_bias": not shared}
    else:
        architecture = "vit_relpos_base_patch16_224"
        weights = _relpos_weights(weights)
        args |= {"class_token": False, "rel_pos_type": "bias", "shared_rel_pos": encoder.relative_position == "shared"}
        args |= {"qkv_bias": True, "fc_norm": own_norm}
    if head is not None:
        weights |= {f"head.{name}": tensor.contiguous() for name, tensor in head.linear.state_dict().items()}
        if head.norm is not None:
            weights = {name: tensor for name, tensor in weights.items() if not name.startswith("norm.")}
            weights |= {f"fc_norm.{name}": tensor.contiguous() for name, tensor in head.norm.state_dict().items()}
    # timm's loaders take a table for one of a square grid, and resample it, unless the model's grid is square
    return TimmModel(architecture, args, weights, through_hub=not relative or spec.grid[0] == spec.grid[1])


def _impossible(what: str) -> ConfigError:
    return ConfigError(
        f"timm has no Vision Transformer {what}; format=safetensors and format=onnx can hold this encoder."
    )


def _beit_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names in timm's BEiT."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith("attn.qkv.bias"):
            # The keys' bias b adds the same q.b to all logits of a query, which the softmax cancels; BEiT has none.
            query, _, value = tensor.chunk(3)
            block = name.removesuffix("qkv.bias")
            renamed |= {f"{block}q_bias": query.contiguous(), f"{block}v_bias": value.contiguous()}
            continue
        name = name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        if name.startswith("blocks."):
            name = name.replace("rel_pos_bias.", "attn.")
        renamed[name] = tensor
    return renamed


def _relpos_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names in timm's Vision Transformer with relative positions."""
    renamed = {}
    for name, tensor in weights.items():
        if name.endswith("relative_position_bias_table"):
            tensor = tensor[:-3].contiguous()  # without prefix tokens the last rows are never read
            place = "attn.rel_pos." if name.startswith("blocks.") else "shared_rel_pos."
            name = name.replace("rel_pos_bias.", place)
        renamed[name] = tensor
    return renamed


def load_timm(folder: Path, through_hub: bool) -> nn.Module:
    """The model in a folder with ``config.json`` and ``model.safetensors``, built and loaded by timm alone.

    Args:
        folder: The folder.
        through_hub: Load as timm loads from the hub and from local folders, not by ``checkpoint_path``.
    """
    if through_hub:
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = json.loads((folder / "config.json").read_text())
    return timm.create_model(
        config["architecture"],
        checkpoint_path=str(folder / "model.safetensors"),
        pretrained_cfg=config["pretrained_cfg"],
        num_classes=config["num_classes"],
        **config["model_args"],
    ).eval()


@torch.no_grad()
def timm_outputs(model: Any, images: Tensor) -> list[Tensor]:
    """Tokens (B, P + N, D) of a model of timm, and what the model returns: pooled features or class scores."""
    return [model.forward_features(images), model(images)]
