"""Which images make a batch: pure functions of (seed, epoch) for training, a fixed list for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from harmonize.functional.seeding import mix_int


def evenly(total: int, num: int | None) -> list[int]:
    """At most ``num`` of ``total`` positions, evenly spaced; None: all.

    >>> evenly(10, 3)
    [0, 3, 6]
    """
    num = total if num is None else min(num, total)
    return [total * i // num for i in range(num)]


def grouped_order(group: Tensor, at_once: int, generator: torch.Generator) -> Tensor:
    """A random order in which images of few groups stand together.

    The groups are shuffled and taken ``at_once`` (or, to share them out evenly, somewhat fewer) at a time; the images
    of those taken are shuffled among each other. Of ``at_once`` groups or fewer this is a random permutation.

    Args:
        group: (n,) int64, the group of each image: any numbers from 0 on.
        at_once: Groups that are taken at a time.
        generator: The only source of chance.

    Returns:
        (n,) int64, every position once.

    >>> group = torch.tensor([0, 0, 1, 1, 2, 2])
    >>> group[grouped_order(group, 1, torch.Generator().manual_seed(0))].tolist()
    [1, 1, 2, 2, 0, 0]
    """
    _, group = group.unique(return_inverse=True)  # some may have no image
    num = int(group.max()) + 1 if len(group) else 0
    num_turns = -(-num // at_once)
    turn = torch.randperm(num, generator=generator) * num_turns // max(num, 1)
    order = torch.randperm(len(group), generator=generator)
    return order[turn[group[order]].argsort(stable=True)]


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Training batches of (epoch, index) pairs, so that workers which live for many epochs know the epoch.

    Every epoch is cut into global batches of ``batch_size * accumulate * world_size`` images; each rank takes a
    contiguous slice of a global batch and cuts it into ``accumulate`` micro-batches. The images of a global batch thus
    do not depend on how many ranks and micro-batches share it. What is left at the end of an epoch is dropped.

    Args:
        num_samples: Size of the training split.
        batch_size: Images per rank and micro-batch.
        seed: Seed of the run.
        rank: This process, 0 ... world_size - 1.
        world_size: Number of processes.
        accumulate: Micro-batches per optimiser step.
        epoch: The epoch to begin with.
        start: Micro-batches of that first epoch to leave out (a run that resumes in mid-epoch has done them).
        positions: (num_samples,) int64, where the samples are in their split; None: all of it, from 0 on.
        order: Generator -> all positions of the split in the order of an epoch; None: any order is as good as another.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        epoch: int = 0,
        start: int = 0,
        positions: Tensor | None = None,
        order: Callable[[torch.Generator], Tensor] | None = None,
    ):
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.epoch = epoch
        self.positions, self.order = positions, order
        self._resume = (epoch, start)

    @property
    def sampler(self) -> EpochBatchSampler:
        """Itself: lightning looks for ``set_epoch`` at ``loader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-batches of a whole epoch on this rank."""
        return self.num_samples // (self.batch_size * self.accumulate * self.world_size) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        generator = torch.Generator().manual_seed(mix_int(self.seed, epoch))
        if self.order is None:
            order = torch.randperm(self.num_samples, generator=generator)
            if self.positions is not None:
                order = self.positions[order]
        else:
            order = self.order(generator)
            if self.positions is not None:
                order = order[torch.isin(order, self.positions)]
        per_rank = self.batch_size * self.accumulate
        for batch in range(self._resume[1] if epoch == self._resume[0] else 0, len(self)):
            step, micro = divmod(batch, self.accumulate)
            first = (step * self.world_size + self.rank) * per_rank + micro * self.batch_size
            yield [(epoch, index) for index in order[first : first + self.batch_size].tolist()]


class ShardedBatchSampler(Sampler[list[int]]):
    """Evaluation batches: every rank takes each ``world_size``-th image of a list; none is repeated, none is left out.

    Ranks may differ by one image, and so in the number of batches: nothing that synchronises ranks belongs in a batch.

    Args:
        indices: The images.
        batch_size: Images per batch.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(self, indices: Sequence[int], batch_size: int, rank: int = 0, world_size: int = 1):
        self.indices, self.batch_size = indices[rank::world_size], batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(0, len(self.indices), self.batch_size):
            yield list(self.indices[first : first + self.batch_size])
