"""What all diagnostics share: per-image rows, gathered over ranks, and their means with standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from harmonize.functional.attention import attention_entropy, mean_log_products
from harmonize.functional.distributed import unique_rows
from harmonize.functional.statistics import mean_and_error
from harmonize.types import AttentionView, Curve, EncoderSpec, Findings, Quantity


class AttentionMaps:
    """The attention of one block for a few images, and what several diagnostics need of it, computed once.

    Attention among patches, renormalised, is the softmax over patches alone, so that its logarithm comes with it and no
    epsilon is needed. In memory the heads of a query lie side by side, which is how they are compared.

    Args:
        view: The block's attention.
        num_prefix_tokens: P.
    """

    def __init__(self, view: AttentionView, num_prefix_tokens: int) -> None:
        self.view, self.layer, self.num_prefix_tokens = view, view.layer, num_prefix_tokens
        logits = view.logits(num_prefix_tokens)
        by_query = logits[..., num_prefix_tokens:].transpose(1, 2)  # (B, N, H, N)
        largest = by_query.amax(dim=-1, keepdim=True)
        logs = torch.sub(by_query, largest, out=torch.empty(by_query.shape, device=logits.device))
        weights = logs.exp()
        mass = weights.sum(dim=-1, keepdim=True)
        self.patches = weights.div_(mass).transpose(1, 2)
        """Attention among patches (B, H, N, N), rows summing to 1."""
        logs.sub_(mass.log())
        if view.bias is not None:
            logs.clamp_(min=-100.0)  # a mask's minus infinity times its attention of 0 would be no number
        self.log_patches = logs.transpose(1, 2)
        """Its logarithm."""
        patches = (largest + mass.log()).squeeze(-1).transpose(1, 2)  # log of the sum of exponentials; so is the other
        self.prefix_mass = (logits[..., :num_prefix_tokens].logsumexp(dim=-1) - patches).sigmoid().mean(dim=-1)
        """Share (B, H) of the patches' attention that goes to prefix tokens, mean over patches."""

    @cached_property
    def log_products(self) -> Tensor:
        """(B, H, H), see :func:`~harmonize.functional.attention.mean_log_products`."""
        return mean_log_products(self.patches, self.log_patches)

    @cached_property
    def entropy(self) -> Tensor:
        """(B, H) in nats, mean over queries."""
        return attention_entropy(self.log_products)


class Images:
    """The images of one batch, which some pictures show.

    Args:
        image: (B, 3, h, w), normalised.
        label: (B,) int64, -1 where there is none.
    """

    def __init__(self, image: Tensor, label: Tensor) -> None:
        self.image, self.label = image, label


class Diagnostic(Metric):
    """A diagnostic: ``update`` is shown one layer of one batch at a time, ``describe`` says what came out.

    What is kept are rows: one per image, at each of several places in the network. They are put in the order of the
    images before anything is computed, so that neither batches nor ranks change a result.

    Subclasses declare their rows (:meth:`prepare`), add to them (:meth:`add`) and describe them (:meth:`describe`).

    Args:
        spec: The encoder's.
        num_images: Look at that many of the images, evenly spaced; None: all.
        every_n_epochs: During training, look at every n-th validation epoch only.
    """

    full_state_update = False
    sees: ClassVar[tuple[type, ...]] = ()
    """Kinds of views that ``update`` wants: ``AttentionMaps``, ``AttentionView``, ``TokensView``, ``Images``."""
    sees_second_view: ClassVar[bool] = False
    """Whether ``update`` also wants to see the images mirrored and enlarged (with ``second=True``)."""
    min_images: ClassVar[int] = 2

    def __init__(self, spec: EncoderSpec, num_images: int | None = None, every_n_epochs: int = 1) -> None:
        super().__init__()
        self.spec, self.num_images, self.every_n_epochs = spec, num_images, every_n_epochs
        self.blocks = list(range(1, spec.depth + 1))
        self._places: dict[str, int] = {}
        self.index: list[Tensor]
        self.add_state("index", [], dist_reduce_fx="cat")
        self.prepare(spec)

    def prepare(self, spec: EncoderSpec) -> None:
        """Declare the rows; called once, at the end of the constructor, which subclasses leave as it is."""
        raise NotImplementedError

    def declare(self, name: str, num_places: int) -> None:
        """Keep rows called ``name`` at places 0 ... num_places - 1."""
        self._places[name] = num_places
        for place in range(num_places):
            self.add_state(f"{name}_{place}", [], dist_reduce_fx="cat")

    def add(self, name: str, place: int, rows: Tensor, index: Tensor) -> None:
        """Keep rows (B, ...) of the images ``index`` (B,)."""
        if (name, place) == (next(iter(self._places)), 0):
            self.index.append(index)
        self._rows(name, place).append(rows)

    def _rows(self, name: str, place: int) -> list[Tensor]:
        return getattr(self, f"{name}_{place}")

    def compute(self) -> dict[str, Tensor]:
        """All rows of all ranks by name, (images, places, ...), in the order of the images, each image once."""
        index = dim_zero_cat(self.index)
        order = unique_rows(index)
        rows = {"index": index[order]}
        for name, num_places in self._places.items():
            rows[name] = torch.stack([dim_zero_cat(self._rows(name, p))[order] for p in range(num_places)], dim=1)
        return rows

    def describe(self, rows: dict[str, Tensor]) -> Findings:
        """What the rows say; see :meth:`compute` for them."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Not offered: a value for one layer of one batch means nothing."""
        raise NotImplementedError("call update, then describe(compute())")


def curve(
    quantity: Quantity, layers: Sequence[int], rows: Tensor, uniform: float | None = None, scale: float = 1.0
) -> Curve:
    """Mean over images with standard error.

    Args:
        quantity: What it is.
        layers: L block numbers.
        rows: (images, L), or (images, L, H) with a value for each head; the curve is then their mean.
        uniform: The value of uniform attention.
        scale: Factor of all rows.
    """
    rows = rows.double() * scale
    value, error = mean_and_error(rows if rows.dim() == 2 else rows.mean(dim=2))
    heads = head_errors = None
    if rows.dim() == 3:
        heads, head_errors = (x.tolist() for x in mean_and_error(rows))
    baseline = None if uniform is None else [uniform * scale] * len(layers)
    return Curve(quantity, list(layers), value.tolist(), error.tolist(), heads, head_errors, baseline)
