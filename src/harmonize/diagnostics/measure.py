"""One pass over a fixed list of images that feeds every diagnostic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmonize.diagnostics.base import AttentionMaps, Diagnostic, Images
from harmonize.memory import give_back_freed_memory
from harmonize.types import AttentionView, Batch, ConfigError, EncoderSpec, Findings, TokensView

CHUNK = 1 << 20
"""Elements of attention maps that are alive at a time (4 MB): more would leave the processor's cache."""


@torch.no_grad()
def measure(
    encoder: nn.Module,
    batches: Iterable[Batch],
    diagnostics: Mapping[str, Diagnostic],
    indices: Sequence[int],
    device: torch.device | str = "cpu",
) -> Findings:
    """What the diagnostics find in an encoder: one forward pass over the images, in fp32, in eval mode.

    Args:
        encoder: An :class:`~harmonize.types.Encoder` in eval mode, on ``device``; nothing in it changes.
        batches: Batches with a clean view; each rank its own share of the images, perhaps none.
        diagnostics: By name; they are reset first. Every rank must take part and gets the same result.
        indices: The list of all images, over all ranks, that the batches hold.
        device: Where to compute.

    Raises:
        ConfigError: The images are fewer than a diagnostic needs, or the network has no attention that can be read.
        RuntimeError: Some part of the encoder is in train mode.
    """
    if any(module.training for module in encoder.modules()):
        raise RuntimeError("Diagnostics look at a network in eval mode: call encoder.eval() first.")
    spec: EncoderSpec = encoder.spec  # type: ignore[assignment]
    for name, diagnostic in diagnostics.items():
        available = min(len(indices), diagnostic.num_images or len(indices))
        if available < diagnostic.min_images:
            raise ConfigError(
                f"The list of images for the diagnostics holds {available}, and {name} needs at least "
                f"{diagnostic.min_images}: raise num_images, use more data, or leave {name} out."
            )
        diagnostic.reset()
        diagnostic.to(device)
    if not diagnostics:
        return Findings()

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32: small differences between large numbers are measured
    try:
        _run(encoder, batches, _Feed(spec, diagnostics, indices), device)
    finally:
        torch.set_float32_matmul_precision(precision)

    found = Findings(num_images=len(indices))
    for name, diagnostic in diagnostics.items():
        rows = diagnostic.compute()
        readable = rows.pop("index").numel()  # torchmetrics squeezes what has a single element
        if readable < diagnostic.min_images:
            raise ConfigError(f"Only {readable} images for the diagnostic {name} can be read; it needs more.")
        found.merge(diagnostic.describe(rows))
        if diagnostic.num_images is None or diagnostic.num_images >= len(indices):
            found.num_images = readable  # without those that cannot be read
        diagnostic.reset()
    return found


def _run(encoder: nn.Module, batches: Iterable[Batch], feed: _Feed, device: torch.device | str) -> None:
    """Show all batches."""
    seen = False
    for batch in batches:
        if batch.image is None:
            raise ValueError("Diagnostics look at Batch.image, the clean view, which this batch lacks.")
        batch = batch.apply(lambda tensor: tensor.to(device))
        assert batch.image is not None
        feed.run(encoder, batch.image.float(), batch.label, batch.index)
        seen = True
        give_back_freed_memory()  # holes that large temporaries leave between the small rows that stay: 50 MB a batch
    if not seen:  # more ranks than batches: this one has nothing to add but must take part
        empty = torch.empty(0, dtype=torch.int64, device=device)
        feed.run(encoder, torch.empty(0, 3, *feed.spec.image_size, device=device), empty, empty)


def second_view(images: Tensor) -> Tensor:
    """Images (B, 3, h, w) mirrored, their central 80 % enlarged to the whole: a fixed second view, without chance."""
    height, width = images.shape[-2:]
    y, x = round(height * 0.1), round(width * 0.1)
    centre = images[..., y : height - y, x : width - x].flip(-1)
    return F.interpolate(centre, size=(height, width), mode="bilinear", align_corners=False)


class _Feed:
    """Hands views on to the diagnostics that want to see them, each with its own share of the images."""

    def __init__(self, spec: EncoderSpec, diagnostics: Mapping[str, Diagnostic], indices: Sequence[int]) -> None:
        self.spec, self.diagnostics = spec, diagnostics
        self.index, self.second = torch.empty(0, dtype=torch.int64), False
        self.keep: dict[str, Tensor] = {}
        # By name: a metric's hash changes with its state.
        self.chosen: dict[str, Tensor] = {
            name: torch.tensor([indices[len(indices) * i // num] for i in range(num)])
            for name, d in diagnostics.items()
            if (num := d.num_images) is not None and num < len(indices)
        }

    def run(self, encoder: Any, images: Tensor, label: Tensor, index: Tensor) -> None:
        """Show one batch."""
        with torch.autocast(images.device.type, enabled=False):
            self._begin(index, second=False)
            self.show(Images(images, label))
            encoder.visit_layers(images, self.show)
            self._begin(index, second=True)
            if not self.keep:
                return
            some = torch.stack(list(self.keep.values())).any(dim=0)  # the second view of these alone
            self.index, self.keep = index[some], {name: keep[some] for name, keep in self.keep.items()}
            encoder.visit_layers(second_view(images[some]), self.show)

    def _begin(self, index: Tensor, second: bool) -> None:
        """Which images of a batch each diagnostic looks at, (B,) bool."""
        self.index, self.second = index, second
        self.keep = {
            name: torch.isin(index, chosen.to(index.device))
            if (chosen := self.chosen.get(name)) is not None
            else torch.ones_like(index, dtype=torch.bool)
            for name, diagnostic in self.diagnostics.items()
            if diagnostic.sees_second_view or not second
        }

    def show(self, view: Any) -> None:
        """Show one view to all diagnostics that want it; of attention also the maps, a chunk of images at a time."""
        self._hand_on(view, slice(None))
        if not isinstance(view, AttentionView) or not any(AttentionMaps in self.diagnostics[n].sees for n in self.keep):
            return
        num_images, num_heads, num_tokens, _ = view.query.shape
        size = max(1, CHUNK // (num_heads * num_tokens**2))
        for start in range(0, max(1, num_images), size):
            some = slice(start, start + size)
            self._hand_on(AttentionMaps(view.take(some), self.spec.num_prefix_tokens), some)

    def _hand_on(self, view: Any, some: slice) -> None:
        """Show a view of the images ``some`` of the batch, to each diagnostic those that it looks at."""
        index = self.index[some]
        options = {"second": True} if self.second else {}
        for name, every in self.keep.items():
            keep, diagnostic = every[some], self.diagnostics[name]
            if not isinstance(view, diagnostic.sees):
                continue
            if bool(keep.all()):
                diagnostic.update(view, index, **options)
            else:
                diagnostic.update(_take(view, keep), index[keep], **options)


def _take(view: Any, keep: Tensor) -> Any:
    """A view of some of its images."""
    if isinstance(view, AttentionMaps):
        return AttentionMaps(view.view.take(keep), view.num_prefix_tokens)
    if isinstance(view, AttentionView):
        return view.take(keep)
    if isinstance(view, Images):
        return Images(view.image[keep], view.label[keep])
    return TokensView(view.layer, view.stage, view.tokens[keep], None if view.before is None else view.before[keep])
