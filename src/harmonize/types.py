"""The vocabulary that every part of harmonize shares: plain containers, no behaviour worth a test of its own.

Letters used in shapes throughout the project: B images, H heads, N patch tokens, P prefix tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:  # annotations only: a command line with a typo must not wait for torch to load
    import torch
    from torch import Tensor


IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, per colour: images are normalised with them everywhere in this project."""


@dataclass(frozen=True)
class EncoderSpec:
    """What other parts need to know about an encoder.

    Attributes:
        width: Token dimension D.
        depth: Number of blocks.
        num_heads: Attention heads H of every block.
        image_size: (height, width) of the images, in px.
        patch_size: Side of a square patch, in px.
        grid: (rows, columns) of the patch grid.
        num_prefix_tokens: P, class token and registers, which come before the patch tokens.
        has_class_token: Whether the first prefix token is a class token.
    """

    width: int
    depth: int
    num_heads: int
    image_size: tuple[int, int]
    patch_size: int
    grid: tuple[int, int]
    num_prefix_tokens: int
    has_class_token: bool

    @property
    def num_patches(self) -> int:
        """N, the number of patch tokens."""
        return self.grid[0] * self.grid[1]


@runtime_checkable
class Encoder(Protocol):
    """A Vision Transformer as the objectives and evaluations see it (an ``nn.Module``)."""

    spec: EncoderSpec

    def __call__(self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Tokens (B, P + N, D) after the final norm; patches where ``mask`` (B, N) is True carry ``mask_token``."""

    def encode_visible(self, images: Tensor, keep: Tensor) -> Tensor:
        """Tokens (B, P + K, D) after the final norm when only the patches ``keep`` (B, K) enter the encoder."""

    def iter_blocks(self, images: Tensor) -> Iterator[Tensor]:
        """The tokens (B, P + N, D) after each block, in order, before the final norm."""

    def final_norm(self, tokens: Tensor) -> Tensor:
        """The encoder's final norm."""

    def visit_layers(self, images: Tensor, visit: Callable[[AttentionView | TokensView], None]) -> Tensor:
        """``forward`` of whole images that shows every layer to ``visit``, in order, while it is being computed."""

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        """As every ``nn.Module``."""

    def modules(self) -> Iterator[torch.nn.Module]:
        """As every ``nn.Module``."""


@dataclass(frozen=True)
class AttentionView:
    """One block's self-attention, shown while it is being computed.

    Attributes:
        layer: Block, 1 ... depth.
        query: (B, H, P + N, d).
        key: (B, H, P + N, d).
        output: (B, H, P + N, d), attention times values, per head, before the output projection.
        bias: Added to the logits, broadcastable to (B, H, P + N, P + N), or None.
        scale: Factor of the logits.
    """

    layer: int
    query: Tensor
    key: Tensor
    output: Tensor
    bias: Tensor | None
    scale: float

    def logits(self, first_query: int = 0) -> Tensor:
        """Logits (B, H, P + N - first_query, P + N) of the queries from ``first_query`` on, fp32."""
        query = self.query[:, :, first_query:].float() * self.scale
        logits = query @ self.key.float().transpose(-2, -1)
        if self.bias is not None:
            logits += self.bias[:, :, first_query:] if self.bias.shape[2] > 1 else self.bias
        return logits

    def weights(self) -> Tensor:
        """Attention (B, H, P + N, P + N), after the softmax, fp32."""
        return self.logits().softmax(dim=-1)

    def take(self, images: slice | Tensor) -> AttentionView:
        """The view of some of its images."""
        query, key, output = self.query[images], self.key[images], self.output[images]
        bias = self.bias[images] if self.bias is not None and len(self.bias) > 1 else self.bias
        return AttentionView(self.layer, query, key, output, bias, self.scale)


@dataclass(frozen=True)
class TokensView:
    """The residual stream at one place of the encoder, shown while it is being computed.

    Attributes:
        layer: Block, 1 ... depth; 0 before the first.
        stage: ``embedding`` (layer 0), ``attention`` (after the block's self-attention) or ``mlp`` (after the block).
        tokens: (B, P + N, D).
        before: The block's input (B, P + N, D); None at layer 0.
    """

    layer: int
    stage: str
    tokens: Tensor
    before: Tensor | None = None


@dataclass(frozen=True)
class Quantity:
    """What a number means: the words that stand beside it in every figure and file.

    Attributes:
        title: Name, as on an axis.
        unit: For example ``px``; empty where there is none.
        definition: One or two plain sentences.
        source: Paper, section or official file; says "our definition" or "unverified" where that is so.
        figure: Figure of arXiv:2305.00729 that shows it, for example ``Figure 3``; empty for what goes beyond it.
    """

    title: str
    unit: str
    definition: str
    source: str
    figure: str = ""


@dataclass
class Curve:
    """A quantity over depth, with its standard error over images; NaN where it cannot be had.

    Attributes:
        quantity: What it is.
        layer: Block numbers, 0 for the input of the first block.
        value: One per layer.
        error: Standard error over images, one per layer.
        heads: Per layer the value of each head; None where there are no heads.
        head_errors: Per layer the standard error of each head.
        uniform: The value that uniform attention would give, one per layer; None where that means nothing.
    """

    quantity: Quantity
    layer: list[int]
    value: list[float]
    error: list[float]
    heads: list[list[float]] | None = None
    head_errors: list[list[float]] | None = None
    uniform: list[float] | None = None


@dataclass
class Surface:
    """A quantity over depth and something else (frequency, rank, another layer).

    Attributes:
        quantity: What it is.
        layer: One per row.
        column: Name of the other axis.
        columns: Its values, one per column.
        value: Rows of values.
        error: Rows of standard errors over images; None where there are none.
    """

    quantity: Quantity
    layer: list[float]
    column: str
    columns: list[float]
    value: list[list[float]]
    error: list[list[float]] | None = None


@dataclass
class Picture:
    """Something to look at: arrays from which :mod:`harmonize.reports` draws a picture.

    Attributes:
        quantity: What it shows.
        kind: ``attention_maps``, ``token_colors``, ``token_moves`` or ``token_scatter``.
        arrays: By name; which ones, each kind's drawing function says.
    """

    quantity: Quantity
    kind: str
    arrays: dict[str, Tensor]


@dataclass
class Findings:
    """What diagnostics found in one network.

    Attributes:
        curves: By name, as in ``diagnostics/<name>/layer_<ii>``.
        surfaces: By name.
        pictures: By name.
        num_images: Number of images looked at.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    surfaces: dict[str, Surface] = field(default_factory=dict)
    pictures: dict[str, Picture] = field(default_factory=dict)
    num_images: int = 0

    def merge(self, other: Findings) -> None:
        """Add what another one holds."""
        self.curves |= other.curves
        self.surfaces |= other.surfaces
        self.pictures |= other.pictures


@dataclass(frozen=True)
class Result:
    """One number that an evaluation protocol found: a row of ``results.json``.

    Attributes:
        metric: Its name, for example ``top1``.
        value: The number; shares and accuracies are in [0, 1].
        num_images: Images that it was measured on.
        error: Standard error over these images; None where there is only an interval.
        interval: 95 % interval; None where there is only a standard error.
        feature: The feature that was read, as :class:`FeatureSpec` prints it, or what was fine-tuned.
        series: What tells it from other rows with the same metric, for example ``k=20`` or a corruption's name.
        axis: What ``at`` counts (``block``, ``frequency``, ``severity``); empty for a single number.
        at: Where on that axis.
        note: What a reader must know beyond the configuration, for example how a head was chosen.
    """

    metric: str
    value: float
    num_images: int
    error: float | None = None
    interval: tuple[float, float] | None = None
    feature: str = ""
    series: str = ""
    axis: str = ""
    at: float | None = None
    note: str = ""


@dataclass
class Batch:
    """One batch, already on the device.

    Attributes:
        views: By view name (``"contrastive"``, ``"mim"``, ...) the tuple of its image tensors (B, 3, h, w), normalised.
        image: The clean evaluation view (B, 3, h, w), normalised; None in training batches.
        label: (B,) int64, -1 where there is none.
        index: (B,) int64, position of each image in its split.
        seed: (B,) int64, one number per image, a function of (run seed, epoch, index) alone; masks derive from it.
    """

    views: dict[str, tuple[Tensor, ...]]
    label: Tensor
    index: Tensor
    seed: Tensor
    image: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    def apply(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with ``function`` applied to every tensor."""
        return replace(
            self,
            views={name: tuple(map(function, views)) for name, views in self.views.items()},
            label=function(self.label),
            index=function(self.index),
            seed=function(self.seed),
            image=None if self.image is None else function(self.image),
        )

    def pin_memory(self) -> Batch:
        """Called by the data loader when it pins memory."""
        return self.apply(lambda tensor: tensor.pin_memory())


@dataclass(frozen=True)
class Progress:
    """Where training stands, counted in optimiser steps (never in micro-batches).

    Attributes:
        step: Optimiser steps finished so far.
        total_steps: Optimiser steps of the whole run.
    """

    step: int
    total_steps: int

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1].

        >>> Progress(5, 20).fraction
        0.25
        """
        return min(1.0, self.step / max(1, self.total_steps))


@dataclass
class ObjectiveOutput:
    """What an objective returns.

    Attributes:
        loss: The scalar to minimise.
        terms: The raw loss terms by name (``"contrastive"``, ``"mim"``), unweighted, differentiable scalars.
        stats: Further scalars worth logging (accuracy, q/k statistics, chance level, weights), detached.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    stats: dict[str, Tensor | float] = field(default_factory=dict)


@dataclass(frozen=True)
class FeatureSpec:
    """The one name of a feature, used identically for fitting and for scoring.

    Attributes:
        layer: Block whose output is read, 1 ... depth, or -1 (the last block) ... -depth.
        pool: ``cls`` (class token), ``patch_mean`` (mean over patch tokens) or ``cls_patch_mean`` (both, concatenated).
        norm: Whether the encoder's final norm is applied before pooling.
    """

    layer: int = -1
    pool: str = "cls_patch_mean"
    norm: bool = True

    def __str__(self) -> str:
        layer = "last" if self.layer == -1 else str(self.layer)
        return f"layer={layer} pool={self.pool} norm={'final' if self.norm else 'none'} view=clean mode=eval"


class ConfigError(ValueError):
    """A mistake in the configuration: the message is one sentence naming the key, the value and what is allowed."""


class FaultError(RuntimeError):
    """What ends a run although nobody made a mistake; the message says what to do, and one sentence is all of it."""


class NonFiniteLossError(FaultError):
    """The loss or its gradient became NaN or infinite; the message names the step and the terms."""


class WorkerError(FaultError):
    """A process that this one needs was killed."""


@runtime_checkable
class Objective(Protocol):
    """A pre-training objective (an ``nn.Module``)."""

    @property
    def required_views(self) -> Mapping[str, str]:
        """View name -> name of the augmentation recipe that makes it."""

    def before_step(self, encoder: Encoder, progress: Progress) -> None:
        """Called once per optimiser step, before its first forward (the momentum update lives here)."""

    def __call__(self, encoder: Encoder, batch: Batch, progress: Progress) -> ObjectiveOutput:
        """The loss of one micro-batch."""
