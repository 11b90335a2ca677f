"""What ranks tell each other. Without a process group everything here is the identity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks, (world * B, ...), rank by rank; no gradient passes. Every rank must hold the same shape."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def whole(x: Tensor) -> Tensor:
    """The tensor of which ranks hold shares, on every rank, which must all call it; any other tensor is itself."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over ranks, through which the gradient passes (its backward sums the ranks' gradients)."""
    return x if world_size() == 1 else _AllReduceSum.apply(x)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _AllReduceSum.forward(_, gradient)


def average_(tensors: Sequence[Tensor]) -> None:
    """Replace tensors, all of one type, by their means over ranks, with one message; no gradient passes."""
    if world_size() > 1:
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= world_size()
        with torch.no_grad():
            for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(mean.view_as(tensor))


def from_rank_0(value: T) -> T:
    """Rank 0's value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def copy_from_rank_0_(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by those of rank 0."""
    for tensor in tensors if world_size() > 1 else ():
        dist.broadcast(tensor, 0)


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks, in rank order; ranks may hold different numbers of them. No gradient passes."""
    if world_size() == 1:
        return rows
    lengths = gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[: len(rows)] = rows
    if not max(lengths):
        return rows
    parts = gather(padded).split(max(lengths))
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def wait_for_all() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def gather_images(index: Tensor, *columns: Tensor) -> list[Tensor]:
    """Rows about images, of all ranks: each image once, in the order of the images.

    Args:
        index: (M,) int64, the position of the image that each row is about.
        *columns: (M, ...), rows in the same order.

    Returns:
        The positions, ascending, then each of the columns; every rank must call it and receives the same.

    >>> gather_images(torch.tensor([7, 3, 7]), torch.tensor([0.7, 0.3, 0.7]))
    [tensor([3, 7]), tensor([0.3000, 0.7000])]
    """
    gathered = [gather_rows(column) for column in (index, *columns)]
    keep = unique_rows(gathered[0])
    return [column[keep] for column in gathered]


def unique_rows(index: Tensor) -> Tensor:
    """Positions of the rows of a gathered table, in the order of ``index`` (M,), the first of equal ones alone.

    What two ranks have both seen counts once.

    >>> unique_rows(torch.tensor([7, 3, 7])).tolist()
    [1, 0]
    """
    order = index.argsort(stable=True)
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = index[order][1:] != index[order][:-1]
    return order[first]
