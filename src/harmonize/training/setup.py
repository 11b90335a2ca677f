"""From a configuration to the parts of a run: encoder, objective, data, module; what ``auto`` means on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from torch import nn

from harmonize.config import instantiate, to_plain
from harmonize.data.module import DataModule
from harmonize.functional.seeding import mix_int
from harmonize.training.compilation import should_compile
from harmonize.training.module import PretrainModule
from harmonize.types import ConfigError


@dataclass(frozen=True)
class Setup:
    """The parts of a run, ready to train.

    Attributes:
        module: Encoder, objective and optimiser; also the length of an epoch and of the run, in optimiser steps.
        data: Its images.
        precision: ``32``, ``bf16`` or ``fp16``.
        compiled: Whether the Transformer blocks go through torch.compile.
        on_gpu: Whether it computes on a GPU.
        has_probe: Whether frozen features are probed; that takes labels.
    """

    module: PretrainModule
    data: DataModule
    precision: str
    compiled: bool
    on_gpu: bool
    has_probe: bool


def build(cfg: DictConfig) -> Setup:
    """Build what a configuration describes; nothing is written, no image is read.

    Raises:
        ConfigError: It contradicts itself, the data or the machine.
    """
    on_gpu = computes_on_gpu(cfg)
    precision = choose_precision(cfg)  # refused before anything is built
    as_written = shares_weights(cfg) or cfg.loss.get("lambda_by_depth") is not None
    compiled = not as_written and should_compile(cfg.trainer.compile, on_gpu)
    config = to_plain(cfg)
    torch.manual_seed(mix_int(cfg.seed))
    encoder = instantiate(cfg.backbone)
    if cfg.trainer.activation_checkpointing:
        encoder.set_grad_checkpointing()
    objective = instantiate(cfg.loss, encoder=encoder)
    data = build_data(cfg, objective)
    num_classes = getattr(objective, "num_classes", None)
    if num_classes is not None and num_classes < len(data.classes or ()):
        raise ConfigError(
            f"loss.num_classes must be at least {len(data.classes or ())}, the classes of the data, not {num_classes}."
        )
    steps_per_epoch, total_steps = length(data.steps_per_epoch, config["trainer"])
    module = PretrainModule(
        encoder,
        objective,
        optimizer=config["optimizer"],
        schedule=config["schedule"],
        global_batch=cfg.data.batch_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        seed=cfg.seed,
        fused=precision != "fp16",
        log_every_n_steps=cfg.trainer.log_every_n_steps,
        config=config,
    )
    has_probe = bool(cfg.callbacks.get("probe")) and data.classes is not None
    return Setup(module, data, precision, compiled, on_gpu, has_probe)


def build_data(cfg: DictConfig, objective: nn.Module) -> DataModule:
    """The images of a run, with the views that its objective wants."""
    return DataModule(
        instantiate(cfg.data.dataset),
        {name: instantiate(recipe) for name, recipe in cfg.views.items()},
        objective.required_views,  # type: ignore[arg-type]
        image_size=cfg.data.image_size,
        batch_size=cfg.data.batch_size,
        num_workers=cfg.data.num_workers,
        seed=cfg.seed,
        eval_crop=cfg.data.eval_crop,
        accumulate=cfg.trainer.accumulate,
        labelled=hasattr(objective, "num_classes"),
        world_size=num_ranks(cfg),
        rank=rank(),
        augment=cfg.data.augment,
        on_gpu=computes_on_gpu(cfg),
    )


def length(data_steps: int, trainer: Mapping[str, Any]) -> tuple[int, int]:
    """Optimiser steps of an epoch and of the whole run.

    >>> length(100, {"limit_train_batches": None, "accumulate": 1, "max_epochs": 3, "max_steps": None})
    (100, 300)
    """
    limit = trainer["limit_train_batches"]
    steps = data_steps if limit is None else min(data_steps, -(-limit // trainer["accumulate"]))
    return steps, trainer["max_steps"] or trainer["max_epochs"] * steps


def num_ranks(cfg: DictConfig) -> int:
    """Processes of a run, over all nodes."""
    return cfg.trainer.devices * cfg.trainer.num_nodes


def shares_weights(cfg: DictConfig) -> bool:
    """Whether every process keeps its share of the weights alone."""
    return cfg.trainer.strategy == "fsdp" and num_ranks(cfg) > 1


def batch_in_words(cfg: DictConfig) -> str:
    """What makes the images of one optimiser step.

    >>> from harmonize.config import compose
    >>> batch_in_words(compose(["data.batch_size=256", "trainer.devices=2", "trainer.accumulate=4"]))
    '256 images a step = 2 processes x 4 micro-batches x 32'
    """
    processes, accumulate = num_ranks(cfg), cfg.trainer.accumulate
    factors = [f"{n} {name}" for n, name in ((processes, "processes"), (accumulate, "micro-batches")) if n > 1]
    parts = " x ".join([*factors, str(cfg.data.batch_size // (processes * accumulate))])
    return f"{cfg.data.batch_size} images a step" + (f" = {parts}" if factors else "")


def rate_in_words(cfg: DictConfig, peak: float) -> str:
    """How the largest learning rate follows from the batch.

    >>> from harmonize.config import compose
    >>> rate_in_words(compose(["optimizer.lr=1e-4", "optimizer.lr_batch=256", "data.batch_size=512"]), 2e-4)
    '0.0001 x 512 / 256 = 0.0002'
    """
    optimizer = cfg.optimizer
    rule = f"{optimizer.lr:g} x {cfg.data.batch_size} / {optimizer.lr_batch} = " if optimizer.lr_batch else ""
    return f"{rule}{peak:g}"


def rank() -> int:
    """This process's rank before there is a process group, from the launcher's environment."""
    return getattr(rank_zero_only, "rank", 0)


def computes_on_gpu(cfg: DictConfig) -> bool:
    """Whether a run of this configuration computes on a GPU here."""
    return cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()


def choose_precision(cfg: DictConfig) -> str:
    """``32``, ``bf16`` or ``fp16``; ``auto`` is the fastest safe one: bf16 where the hardware computes in it, else 32.

    Raises:
        ConfigError: fp16 on a CPU, where lightning would compute in bf16.
    """
    name, on_gpu = str(cfg.trainer.precision), computes_on_gpu(cfg)
    if name == "fp16" and not on_gpu:
        raise ConfigError("trainer.precision=fp16 needs a GPU; use bf16, 32 or auto.")
    if name == "auto":
        bf16 = torch.cuda.is_bf16_supported() if on_gpu else torch.cpu._is_avx512_bf16_supported()
        name = "bf16" if bf16 else "32"
    return name
