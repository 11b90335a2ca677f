"""A fingerprint of weights: equal for equal weights, whatever file they came in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of tensors, in the order of the names, as hexadecimal digits.

    >>> weights_hash({"a": torch.zeros(2)}) == weights_hash({"a": torch.zeros(2)}) != weights_hash({"a": torch.ones(2)})
    True
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
