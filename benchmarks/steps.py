"""One training step, of harmonize or of another project, ready to be repeated and timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harmonize.config import compose, instantiate, to_plain
from harmonize.memory import keep_freed_memory
from harmonize.training.module import PretrainModule
from harmonize.types import Batch, Progress


@dataclass(frozen=True)
class Size:
    """A network and what it is trained on.

    Attributes:
        model: Name of ``conf/backbone``.
        image_size: In px.
        patch_size: In px.
        batch: Images of a step.
        head: Hidden width of projector and predictor.
        depth: Blocks; None: as the model says.
    """

    model: str
    image_size: int
    patch_size: int
    batch: int
    head: int = 4096
    depth: int | None = None

    @property
    def overrides(self) -> list[str]:
        """As on the command line of ``harmonize train``."""
        depth = [] if self.depth is None else [f"backbone.depth={self.depth}"]
        data = {"image_size": self.image_size, "patch_size": self.patch_size, "batch_size": self.batch}
        return [f"backbone={self.model}", *depth, *(f"data.{key}={value}" for key, value in data.items())]

    @property
    def title(self) -> str:
        """For tables."""
        return f"{self.model}/{self.patch_size}, {self.image_size} px, batch {self.batch}"


class Step:
    """A network, its loss on a batch that is on the device already, and its optimiser.

    Args:
        module: Everything with parameters.
        loss: Images (views, each (B, 3, h, w)) -> loss.
        optimizer: Of what is trained.
        images: The views.
        before: What precedes the forward pass (the momentum update).
        clip: What comes between the backward pass and the optimiser.
        after: What follows the optimiser.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[Sequence[Tensor]], Tensor],
        optimizer: torch.optim.Optimizer,
        images: Sequence[Tensor],
        before: Callable[[], object] = lambda: None,
        clip: Callable[[], object] = lambda: None,
        after: Callable[[], object] = lambda: None,
    ) -> None:
        self.module, self.loss, self.optimizer, self.images = module, loss, optimizer, images
        self.before, self.clip, self.after = before, clip, after

    def run(self, precision: str = "fp32") -> None:
        """The whole step. Gradients are let go at its end, so that networks that wait their turn hold none."""
        self.before()
        with autocast(self.images[0].device, precision):
            loss = self.loss(self.images)
        loss.backward()
        self.clip()
        self.optimizer.step()
        self.after()
        self.optimizer.zero_grad()

    def flops(self) -> int:
        """Of a forward and a backward pass, counted on a few images: matrix products and convolutions.

        Attention is counted as the products that it is: not every fused kernel is known to the counter, and those that
        are count what they compute twice.
        """
        few = min(4, len(self.images[0]))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.loss([view[:few] for view in self.images]).backward()
        self.optimizer.zero_grad()
        return counter.get_total_flops() * len(self.images[0]) // few

    def num_trained(self) -> int:
        """Trained parameters."""
        return sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context of a forward pass in ``fp32`` or ``bf16``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def images(size: Size, num_views: int, device: str) -> list[Tensor]:
    """Noise in place of normalised views."""
    generator = torch.Generator().manual_seed(0)
    shape = (size.batch, 3, size.image_size, size.image_size)
    return [torch.randn(shape, generator=generator).to(device) for _ in range(num_views)]


def our_step(loss: Sequence[str], size: Size, device: str) -> Step:
    """A step of harmonize, built from its configuration as ``harmonize train`` builds it.

    Args:
        loss: Overrides that choose the objective.
        size: Of network and batch.
        device: ``cpu`` or ``cuda``.
    """
    cfg = compose([*loss, *size.overrides])
    for part in (cfg.loss, cfg.loss.get("contrastive")):
        if part is not None and "hidden_dim" in part:
            part.hidden_dim = size.head
    config = to_plain(cfg)
    if device == "cpu":
        keep_freed_memory()  # of the whole process: the peers have it as well
    torch.manual_seed(0)
    encoder = instantiate(cfg.backbone)
    objective = instantiate(cfg.loss, encoder=encoder)
    module = PretrainModule(
        encoder.to(device),
        objective.to(device),
        optimizer=config["optimizer"],
        schedule=config["schedule"],
        global_batch=size.batch,
        steps_per_epoch=100,
        total_steps=1000,
        fused=True,
    ).train()
    progress = Progress(1, 1000)
    count = {"contrastive": 2, "mim": 1}
    needed = {view: count[view] for view in objective.required_views}
    index = torch.arange(size.batch, device=device)

    def loss_of(views: Sequence[Tensor]) -> Tensor:
        left = iter(views)
        by_name = {view: tuple(next(left) for _ in range(number)) for view, number in needed.items()}
        few = index[: len(views[0])]
        return objective(encoder, Batch(views=by_name, label=few, index=few, seed=few), progress).loss

    optimizer = module.optimization.optimizer
    return Step(
        module,
        loss_of,
        optimizer,
        images(size, sum(needed.values()), device),
        before=lambda: objective.before_step(encoder, progress),
        clip=lambda: module.configure_gradient_clipping(optimizer),
    )
