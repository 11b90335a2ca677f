"""A batch whose activations do not fit: encoded some images at a time, with the gradients of the whole batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_chunks(function: Callable[..., tuple[Tensor, ...]], size: int | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Apply a function to some rows of its arguments at a time and keep only what it returns.

    The activations of a chunk are computed a second time when its gradient is due, and dropped again. Losses over all
    rows, such as InfoNCE over the negatives of the whole batch, then cost the memory of one chunk and of the function's
    results: the gradient cache of Gao et al. 2021 (GradCache, arXiv:2101.06983).

    Args:
        function: Rows of each argument -> a tuple of tensors: one row per row of the arguments, or a scalar, the mean
            over these rows. No row's result may depend on other rows (batch statistics belong outside).
        size: Rows at a time; None: all at once, without any of this.
        *tensors: (B, ...) each.

    Returns:
        What the function returns for all rows: rows concatenated, scalars averaged. Random numbers that the function
        draws (DropPath) are drawn chunk by chunk.

    >>> [x.tolist() for x in in_chunks(lambda x: (2 * x, x.mean()), 2, torch.tensor([1.0, 2.0, 6.0]))]
    [[2.0, 4.0, 12.0], 3.0]
    """
    num = len(tensors[0])
    if size is None or size >= num:
        return function(*tensors)
    parts = [
        checkpoint(function, *chunk, use_reentrant=False)
        for chunk in zip(*(tensor.split(size) for tensor in tensors), strict=True)
    ]
    shares = [len(rows) / num for rows in tensors[0].split(size)]
    return tuple(
        torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum()
        if values[0].dim() == 0
        else torch.cat(values)
        for values in zip(*parts, strict=True)
    )
