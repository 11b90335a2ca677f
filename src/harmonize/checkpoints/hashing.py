"""A fingerprint of weights: equal for equal weights, whatever file they came in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """The first 16 hex digits of the SHA-256 over names, types, shapes and bytes, in the order of the names.

    >>> weights_hash({"bias": torch.zeros(2)})
    'ba0b67743bc9545b'
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
