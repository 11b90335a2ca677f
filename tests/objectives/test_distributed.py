"""1 rank == 2 ranks: a step on the whole batch equals one on the split batch: loss, gradients, weights after it."""

import os
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from harmonize.objectives.contrastive import Contrastive
from harmonize.objectives.hybrid import Hybrid
from harmonize.objectives.mim import MaskedAutoencoder, MaskedImageModeling
from harmonize.training.optim import build_optimizer
from harmonize.types import Progress
from tests.helpers import random_batch, tiny_encoder

CONTRASTIVE = partial(Contrastive, hidden_dim=16, out_dim=8)
MAE = partial(MaskedAutoencoder, decoder_width=16, decoder_depth=1, decoder_heads=2)
BY_DEPTH = {"schedule": "linear", "start": 0.1, "end": 0.5}
OBJECTIVES = {
    "contrastive": CONTRASTIVE,
    "mim": MaskedImageModeling,
    "mae": MAE,
    **{
        f"hybrid {weight}": lambda encoder, weight=weight: Hybrid(encoder, CONTRASTIVE, MaskedImageModeling, weight)
        for weight in (0.0, 0.2, 1.0)
    },
    "hybrid mae": lambda encoder: Hybrid(encoder, CONTRASTIVE, MAE, 0.2),
    "by depth": lambda encoder: Hybrid(encoder, CONTRASTIVE, MAE, 0.2, lambda_by_depth=BY_DEPTH),
    "shared": lambda encoder: Hybrid(encoder, CONTRASTIVE, MaskedImageModeling, 0.2, share_views=True),
    "in chunks": partial(CONTRASTIVE, images_at_once=2),
}


def step(name, rank=0, world=1):
    """Loss, gradients (averaged over ranks as DDP does), buffers, and the weights after an optimiser step."""
    encoder = tiny_encoder()
    torch.manual_seed(1)
    objective = OBJECTIVES[name](encoder)
    module = torch.nn.ModuleDict({"encoder": encoder, "objective": objective})
    batch = random_batch(8)
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    batch = replace(
        batch,
        views={view: tuple(x[part] for x in images) for view, images in batch.views.items()},
        seed=batch.seed[part],
        index=batch.index[part],
        label=batch.label[part],
    )
    # Adam magnifies rounding by lr / eps, and the gradients of the class token, which is small, are in the hundreds.
    options = {"lr": 1e-2, "lr_batch": None, "weight_decay": 0.05, "eps": 1.0, "global_batch": 8}
    optimizer = build_optimizer(encoder, objective, **options).optimizer
    loss = objective(encoder, batch, Progress(0, 1)).loss
    loss.backward()
    state = {"loss": loss.detach().clone()}
    state |= {f"{n} grad": p.grad for n, p in module.named_parameters() if p.grad is not None}
    if world > 1:
        for value in state.values():
            dist.all_reduce(value)
            value /= world
    state = {key: value.clone() for key, value in state.items()}
    optimizer.step()
    objective.before_step(encoder, Progress(0, 1))
    buffers = {n: b for n, b in module.named_buffers() if "running" in n}
    return state | buffers | {n: p.detach() for n, p in module.named_parameters()}


def work(rank, folder):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name in OBJECTIVES:
        torch.save(step(name, rank, 2), f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Two processes, started once for all objectives."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_ranks_equal_one(name, ranks):
    whole = step(name)
    for rank in (0, 1):
        split = torch.load(ranks / f"{name}-{rank}.pt", weights_only=True)
        assert set(split) == set(whole)
        for key, value in whole.items():
            atol = 1e-6 + 1e-5 * value.abs().max().item()  # elements near zero carry the rounding of the large ones
            assert torch.allclose(split[key], value, rtol=1e-4, atol=atol), key
