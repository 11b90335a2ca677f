"""A tiny network, batches in memory and a bare trainer."""

import warnings
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from harmonize.objectives.contrastive import Contrastive
from harmonize.objectives.hybrid import Hybrid
from harmonize.objectives.mim import MaskedImageModeling
from harmonize.training.callbacks.checkpoint import AtomicCheckpointIO
from harmonize.training.callbacks.metrics import StepMetrics
from harmonize.training.loggers import JsonLogger
from harmonize.training.module import PretrainModule
from tests.helpers import random_batch, tiny_encoder

CONTRASTIVE = partial(Contrastive, hidden_dim=16, out_dim=8)
OBJECTIVES = {
    "contrastive": CONTRASTIVE,
    "mim": MaskedImageModeling,
    "hybrid": lambda encoder: Hybrid(encoder, CONTRASTIVE, MaskedImageModeling, 0.2),
}
OPTIMIZER = {"lr": 1e-3, "lr_batch": None, "weight_decay": 0.05, "no_decay": ["1d"], "clip": 1.0}


def make_module(objective="hybrid", total_steps=4, steps_per_epoch=4, optimizer=None, seed=0, encoder=None, **options):
    encoder = encoder or tiny_encoder()
    torch.manual_seed(1)
    return PretrainModule(
        encoder,
        OBJECTIVES[objective](encoder) if isinstance(objective, str) else objective,
        optimizer=OPTIMIZER | (optimizer or {}),
        schedule={"warmup": 0.25},
        global_batch=6,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        log_every_n_steps=1,
        seed=seed,
        **options,
    )


def make_batches(num=4, size=6):
    return [random_batch(size, seed=i) for i in range(num)]


@pytest.fixture
def fit(tmp_path):
    """fit(module, batches, callbacks, **trainer options) -> trainer; metrics go to tmp_path/metrics.jsonl."""

    def run(module, batches, callbacks=(), val=None, folder=tmp_path, ckpt_path=None, metrics=None, **options):
        settings = {
            "accelerator": "cpu",
            "max_epochs": -1,
            "num_sanity_val_steps": -1,
            "logger": [JsonLogger(folder)],
            "callbacks": [metrics or StepMetrics(), *callbacks],
            "plugins": [AtomicCheckpointIO()],
            "default_root_dir": folder,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": True,
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            trainer = pl.Trainer(**settings | options)
            loaders = [None if b is None else DataLoader(b, batch_size=None) for b in (batches, val)]
            trainer.fit(module, *loaders, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    return run
