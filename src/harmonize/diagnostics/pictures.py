"""What people would rather look at: attention maps over the image (Figure 2), tokens as colours."""

from __future__ import annotations

import torch
from torch import Tensor

from harmonize.diagnostics.base import AttentionMaps, Diagnostic, Images
from harmonize.diagnostics.token_translation import shown_layers
from harmonize.functional.similarity import principal_colors
from harmonize.types import IMAGE_MEAN, IMAGE_STD, EncoderSpec, Findings, Picture, Quantity, TokensView

MAPS = Quantity(
    "Attention maps",
    "",
    "Where a patch (marked) attends to, mean over heads, prefix tokens left out and the rest renormalised. One row per "
    "query: the centre of the image and a corner of it.",
    "arXiv:2305.00729, Figure 2 (there one head)",
    "Figure 2",
)
COLORS = Quantity(
    "Tokens as colours",
    "",
    "The three leading principal components of the patch tokens of all shown images together, as red, green and blue: "
    "equal colours are equal tokens.",
    "as in DINOv2 (arXiv:2304.07193)",
)


def displayed(image: Tensor) -> Tensor:
    """Normalised images (B, 3, h, w) as (B, h, w, 3) in [0, 1]."""
    mean, std = (image.new_tensor(x).view(3, 1, 1) for x in (IMAGE_MEAN, IMAGE_STD))
    return (image * std + mean).clamp(0, 1).permute(0, 2, 3, 1)


class AttentionPictures(Diagnostic):
    """Attention maps of chosen queries for the first of the images."""

    sees = (Images, AttentionMaps)
    min_images = 1

    def prepare(self, spec: EncoderSpec) -> None:
        """Declare the rows."""
        rows, columns = spec.grid
        self.queries = [(rows // 2, columns // 2), (rows // 8, columns // 8)]
        self.shown = shown_layers(spec.depth)
        self.declare("image", 1)
        self.declare("maps", len(self.shown))

    def update(self, view: Images | AttentionMaps, index: Tensor) -> None:
        """Keep the image, and the shown blocks' attention of the queries."""
        if isinstance(view, Images):
            self.add("image", 0, displayed(view.image), index)
        elif view.layer in self.shown:
            positions = [row * self.spec.grid[1] + column for row, column in self.queries]
            maps = view.patches[:, :, positions].mean(dim=1).unflatten(-1, self.spec.grid)
            self.add("maps", self.shown.index(view.layer), maps, index)

    def describe(self, rows: dict[str, Tensor]) -> Findings:
        """Pictures ``attention_maps_<i>``, one per image."""
        pictures = {}
        for i in range(len(rows["image"])):
            arrays = {
                "image": rows["image"][i, 0].cpu(),
                "maps": rows["maps"][i].cpu(),
                "queries": torch.tensor(self.queries),
                "layers": torch.tensor(self.shown),
            }
            pictures[f"attention_maps_{i + 1}"] = Picture(MAPS, "attention_maps", arrays)
        return Findings(pictures=pictures)


class TokenColors(Diagnostic):
    """Principal components of patch tokens as colours."""

    sees = (Images, TokensView)
    min_images = 1

    def prepare(self, spec: EncoderSpec) -> None:
        """Declare the rows."""
        self.shown = shown_layers(spec.depth)
        self.declare("image", 1)
        self.declare("tokens", len(self.shown))

    def update(self, view: Images | TokensView, index: Tensor) -> None:
        """Keep the images, and their tokens after the shown blocks."""
        if isinstance(view, Images):
            self.add("image", 0, displayed(view.image), index)
        elif view.stage == "mlp" and view.layer in self.shown:
            tokens = view.tokens[:, self.spec.num_prefix_tokens :].float()
            self.add("tokens", self.shown.index(view.layer), tokens, index)

    def describe(self, rows: dict[str, Tensor]) -> Findings:
        """Picture ``token_colors``."""
        colors = [principal_colors(rows["tokens"][:, k]) for k in range(len(self.shown))]
        arrays = {
            "images": rows["image"][:, 0].cpu(),
            "colors": torch.stack(colors, dim=1).unflatten(2, self.spec.grid).cpu(),
            "layers": torch.tensor(self.shown),
        }
        return Findings(pictures={"token_colors": Picture(COLORS, "token_colors", arrays)})
