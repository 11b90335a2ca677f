"""What each loss term asks of the shared encoder: gradient norms per term, and whether they fight, block by block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from harmonize.functional.distributed import world_size
from harmonize.functional.layers import layer_of
from harmonize.functional.statistics import mean_and_error
from harmonize.training.loggers import record
from harmonize.training.module import PretrainModule
from harmonize.types import Curve, Findings, Quantity

SOURCE = "our definition; the conflict that Layer-Grafted Pre-training (ICLR 2023) reports"
COSINE = Quantity(
    "Cosine between the gradients of L_CL and L_MIM",
    "",
    "Cosine between the two loss terms' gradients on the weights of a block: above 0 they help each other, below 0 "
    "they fight; mean over the measured steps of the epoch, with its standard error over steps.",
    SOURCE,
)
RATIO = Quantity(
    "Gradient norm of L_CL over that of L_MIM",
    "",
    "Ratio of the norms of the two loss terms' gradients, unweighted, on the weights of a block: which term trains "
    "it; mean over the measured steps of the epoch, with its standard error over steps.",
    SOURCE,
)
QUANTITIES = {"gradient_cosine": COSINE, "gradient_ratio": RATIO}
"""The curves over depth, in the order in which they are computed."""


class GradientNorms(pl.Callback):
    """Logs ``train/grad_norm_<term>`` of every raw (unweighted) term on the shared encoder, every so many steps.

    With two terms also the cosine between their gradients (``train/grad_cosine``), and for every block their cosine and
    the ratio of their norms (``diagnostics/gradient_cosine/layer_<ii>`` and ``diagnostics/gradient_ratio/layer_<ii>``;
    layer 0 is all that comes before the first block). Measured on the first micro-batch of a step by
    ``torch.autograd.grad``, which leaves ``.grad`` and so the training alone.

    Args:
        every_n_steps: Distance between measurements, in optimiser steps; the first step is measured as well.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self._layers: list[int] = []  # those that are trained at all
        self._rows: list[Tensor] = []  # (2, layers): cosine and ratio, of one step each

    def state_dict(self) -> dict[str, Any]:
        """What has been measured in this epoch, for a run that is interrupted within it."""
        return {"layers": self._layers, "rows": list(self._rows)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the epoch's mean."""
        self._layers, self._rows = list(state_dict["layers"]), list(state_dict["rows"])

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin a new mean."""
        self._rows.clear()

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
        parameters = {name: p for name, p in module.encoder.named_parameters() if p.requires_grad}
        gradients = {}
        for name, term in module.output.terms.items():
            gradients[name] = _flat_gradient(term, list(parameters.values()), scale)
            module.extra[f"grad_norm_{name}"] = gradients[name].norm()
        if set(gradients) == {"contrastive", "mim"}:
            cl, mim = gradients["contrastive"], gradients["mim"]
            module.extra["grad_cosine"] = torch.nn.functional.cosine_similarity(cl, mim, dim=0)
            self._layers = trained_layers(parameters)
            rows = _by_layer(parameters, cl, mim)[:, self._layers].double().cpu()
            self._rows.append(rows)
            record(
                trainer,
                {
                    f"diagnostics/{name}/layer_{layer:02d}": value
                    for name, values in zip(QUANTITIES, rows.tolist(), strict=True)
                    for layer, value in zip(self._layers, values, strict=True)
                },
                step,
            )

    def findings(self) -> Findings:
        """Curves ``gradient_cosine`` and ``gradient_ratio`` over the steps measured in this epoch, if any."""
        if not self._rows:
            return Findings()
        value, error = mean_and_error(torch.stack(self._rows))
        self._rows.clear()
        return Findings(
            curves={
                name: Curve(quantity, list(self._layers), value[i].tolist(), error[i].tolist())
                for i, (name, quantity) in enumerate(QUANTITIES.items())
            }
        )


def trained_layers(parameters: Iterable[str]) -> list[int]:
    """Blocks that parameters with these names belong to, 0 for what comes before the first.

    >>> trained_layers(["cls_token", "blocks.0.norm1.weight", "blocks.1.norm1.weight", "norm.weight"])
    [0, 1, 2]
    """
    return sorted({layer for name in parameters if (layer := layer_of(name)) is not None})


def _by_layer(parameters: dict[str, nn.Parameter], cl: Tensor, mim: Tensor) -> Tensor:
    """Cosine and norm ratio (2, 1 + depth) of two flat gradients, block by block; the final norm takes no part."""
    layers = [layer_of(name) for name in parameters]
    depth = max((layer for layer in layers if layer is not None), default=0)
    products = cl.new_zeros(3, depth + 1)  # <cl, mim>, |cl|^2, |mim|^2
    start = 0
    for parameter, layer in zip(parameters.values(), layers, strict=True):
        stop = start + parameter.numel()
        a, b = cl[start:stop], mim[start:stop]
        start = stop
        if layer is not None:
            products[:, layer] += torch.stack([a @ b, a @ a, b @ b])
    dot, cl_squared, mim_squared = products
    return torch.stack([dot / (cl_squared * mim_squared).sqrt(), (cl_squared / mim_squared).sqrt()])


def _flat_gradient(term: Tensor, parameters: list[torch.nn.Parameter], scale: float) -> Tensor:
    """Gradient of a term as one fp32 vector, averaged over ranks like the training gradient."""
    parts = torch.autograd.grad(term * scale, parameters, retain_graph=True, allow_unused=True)
    gradient = torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, parts, strict=True)]
    ).float()
    if world_size() > 1:
        dist.all_reduce(gradient)
    return gradient / (scale * world_size())
