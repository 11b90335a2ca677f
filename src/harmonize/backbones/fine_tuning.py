"""A pre-trained encoder made ready for fine-tuning."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import DropPath
from torch import nn

from harmonize.types import ConfigError


def trainable_copy(encoder: nn.Module, drop_path: float = 0.0, per_block: bool = False) -> nn.Module:
    """A copy of an encoder in which everything is trained, in train mode.

    What pre-training had frozen (MoCo v3's patch embedding, fixed positions) is trained as well, as MAE does.

    Args:
        encoder: A ``ViTEncoder`` or ``TimmEncoder``; stays as it is.
        drop_path: Stochastic-depth rate of the last block, rising linearly from 0 at the first; what the encoder had in
            pre-training is replaced.
        per_block: Give each block its own copy of a relative-position table that all share, as SimMIM does. An encoder
            without such a table is left alone.

    Raises:
        ConfigError: ``drop_path`` is out of range, or the encoder's blocks have no place for it.

    Source: MAE ``main_finetune.py``; SimMIM ``utils.py`` (``remap_pretrained_keys_vit``).
    """
    if not 0 <= drop_path < 1:
        raise ConfigError(f"eval.drop_path={drop_path} is not possible: a number from 0 up to, but not, 1 is needed")
    trained: Any = copy.deepcopy(encoder).requires_grad_(True)
    blocks = getattr(trained, "model", trained).blocks
    for block, rate in zip(blocks, torch.linspace(0, drop_path, len(blocks)).tolist(), strict=True):
        branches = [name for name in ("drop_path1", "drop_path2") if isinstance(getattr(block, name, None), nn.Module)]
        if drop_path and not branches:
            raise ConfigError(f"eval.drop_path={drop_path} must be 0: this encoder's blocks have no stochastic depth")
        for name in branches:
            setattr(block, name, DropPath(rate) if rate else nn.Identity())
    if per_block and getattr(trained, "relative_position", "none") == "shared":
        for block in blocks:
            block.rel_pos_bias = copy.deepcopy(trained.rel_pos_bias)
        del trained.rel_pos_bias
        trained.relative_position = "per_block"
    return trained.train()
