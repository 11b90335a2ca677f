import itertools

import pytest
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from torch.utils.data import DataLoader

from harmonize.data.sampler import EpochBatchSampler, ShardedBatchSampler


def indices(sampler):
    return [[index for _, index in batch] for batch in sampler]


def test_an_epoch_is_a_permutation_and_the_rest_is_dropped():
    sampler = EpochBatchSampler(103, 10, seed=0)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 10
    assert all(len(batch) == 10 for batch in batches)
    assert len({index for _, index in itertools.chain(*batches)}) == 100
    assert {epoch for epoch, _ in itertools.chain(*batches)} == {0}


def test_epochs_and_seeds_differ_and_repeat():
    order = {}
    for seed, epoch in itertools.product((0, 1), (0, 1)):
        sampler = EpochBatchSampler(50, 5, seed)
        sampler.set_epoch(epoch)
        assert list(sampler) == list(sampler)
        assert list(sampler) == list(EpochBatchSampler(50, 5, seed, epoch=epoch))
        order[seed, epoch] = tuple(itertools.chain(*indices(sampler)))
    assert len(set(order.values())) == 4


def test_the_order_does_not_touch_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(EpochBatchSampler(50, 5, seed=0))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (1, 3), (2, 3), (4, 1), (3, 4)])
def test_global_batches_do_not_depend_on_ranks_and_micro_batches(world_size, accumulate):
    whole = indices(EpochBatchSampler(100, 24, seed=0, epoch=2))
    micro = 24 // (world_size * accumulate)
    ranks = [
        indices(EpochBatchSampler(100, micro, 0, rank, world_size, accumulate, epoch=2)) for rank in range(world_size)
    ]
    for step, expected in enumerate(whole):
        parts = [list(itertools.chain(*rank[step * accumulate : (step + 1) * accumulate])) for rank in ranks]
        assert list(itertools.chain(*parts)) == expected  # each rank has a contiguous slice
    assert {len(rank) for rank in ranks} == {len(whole) * accumulate}


def test_resuming_in_mid_epoch_leaves_out_what_was_done():
    whole = EpochBatchSampler(60, 5, seed=0, accumulate=2, epoch=3)
    resumed = EpochBatchSampler(60, 5, seed=0, accumulate=2, epoch=3, start=5)
    assert len(resumed) == len(whole)
    assert list(resumed) == list(whole)[5:]
    for sampler in (whole, resumed):
        sampler.set_epoch(4)
    assert list(resumed) == list(whole)


def test_lightning_sets_the_epoch():
    sampler = EpochBatchSampler(20, 5, seed=0)
    _set_sampler_epoch(DataLoader(range(20), batch_sampler=sampler), 7)
    assert sampler.epoch == 7
    assert next(iter(sampler))[0][0] == 7


@pytest.mark.parametrize(("num", "world_size"), [(10, 1), (10, 3), (2, 4), (0, 2)])
def test_evaluation_shards_hold_every_image_once(num, world_size):
    images = range(100, 100 + num)
    shards = [ShardedBatchSampler(images, 2, rank, world_size) for rank in range(world_size)]
    assert all(len(list(shard)) == len(shard) for shard in shards)
    assert all(0 < len(batch) <= 2 for shard in shards for batch in shard)
    assert sorted(itertools.chain(*itertools.chain(*shards))) == list(images)
    sizes = [sum(map(len, shard)) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
