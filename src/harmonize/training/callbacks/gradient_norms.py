"""What each loss term asks of the shared encoder: gradient norms per term, and the angle between them."""

from __future__ import annotations

from itertools import combinations

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from harmonize.functional.distributed import world_size
from harmonize.training.module import PretrainModule


class GradientNorms(pl.Callback):
    """Logs ``train/grad_norm_<term>`` of every raw (unweighted) term on the shared encoder, every so many steps.

    With two terms also the cosine between their gradients (``train/grad_cosine``): whether they help or fight. Measured
    on the first micro-batch of a step by ``torch.autograd.grad``, which leaves ``.grad`` and so the training alone.

    Args:
        every_n_steps: Distance between measurements, in optimiser steps; the first step is measured as well.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        """Measure the terms of the micro-batch whose graph is about to be used."""
        assert isinstance(module, PretrainModule)
        step = trainer.global_step + 1
        if (step != 1 and step % self.every_n_steps) or trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches:
            return
        assert module.output is not None
        # In fp16 small gradients vanish unless the loss is scaled, here as in training.
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = scaler.get_scale() if scaler is not None else 1.0
        parameters = [p for p in module.encoder.parameters() if p.requires_grad]
        gradients = {}
        for name, term in module.output.terms.items():
            gradients[name] = _flat_gradient(term, parameters, scale)
            module.extra[f"grad_norm_{name}"] = gradients[name].norm()
        for (_, a), (_, b) in combinations(gradients.items(), 2):
            module.extra["grad_cosine"] = torch.nn.functional.cosine_similarity(a, b, dim=0)


def _flat_gradient(term: Tensor, parameters: list[torch.nn.Parameter], scale: float) -> Tensor:
    """Gradient of a term as one fp32 vector, averaged over ranks like the training gradient."""
    parts = torch.autograd.grad(term * scale, parameters, retain_graph=True, allow_unused=True)
    gradient = torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, parts, strict=True)]
    ).float()
    if world_size() > 1:
        dist.all_reduce(gradient)
    return gradient / (scale * world_size())
