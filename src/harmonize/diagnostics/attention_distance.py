"""How far attention reaches: Figure 3 of arXiv:2305.00729."""

from __future__ import annotations

from torch import Tensor

from harmonize.diagnostics.base import AttentionMaps, Diagnostic, curve
from harmonize.functional.attention import attention_distance, patch_distances
from harmonize.types import EncoderSpec, Findings, Quantity

DISTANCE = Quantity(
    "Attention distance",
    "px",
    "Distance between a patch and the patches it attends to, weighted by attention; mean over queries, heads and "
    "images. Prefix tokens are left out and the rest is renormalised.",
    "arXiv:2305.00729, Figure 3; cl-vs-mim attention_analysis.ipynb",
    "Figure 3",
)
NORMALIZED = Quantity(
    "Attention distance, relative to uniform attention",
    "",
    "The same divided by the distance that uniform attention has on this grid: 1 is uniform, comparable across image "
    "and patch sizes.",
    "our definition",
    "Figure 3",
)


class AttentionDistance(Diagnostic):
    """Mean attention distance of every block and head."""

    sees = (AttentionMaps,)
    distances: Tensor

    def prepare(self, spec: EncoderSpec) -> None:
        """Declare the rows."""
        self.register_buffer("distances", patch_distances(spec.grid, spec.patch_size), persistent=False)
        self.declare("distance", spec.depth)

    def update(self, view: AttentionMaps, index: Tensor) -> None:
        """Add a block's attention for some images."""
        self.add("distance", view.layer - 1, attention_distance(view.patches, self.distances), index)

    def describe(self, rows: dict[str, Tensor]) -> Findings:
        """Curves ``attention_distance`` and ``attention_distance_normalized``."""
        uniform = self.distances.double().mean().item()
        return Findings(
            curves={
                "attention_distance": curve(DISTANCE, self.blocks, rows["distance"], uniform),
                "attention_distance_normalized": curve(NORMALIZED, self.blocks, rows["distance"], uniform, 1 / uniform),
            }
        )
