"""Which block of an encoder a parameter belongs to."""

from __future__ import annotations

import re


def layer_of(name: str) -> int | None:
    """Block of an encoder's parameter, 0 for what comes before the first, None for what comes after the last.

    >>> layer_of("blocks.3.attn.qkv.weight"), layer_of("patch_embed.proj.bias"), layer_of("norm.weight")
    (4, 0, None)
    """
    if found := re.match(r"blocks\.(\d+)\.", name):
        return int(found[1]) + 1
    return None if name.startswith("norm.") else 0
