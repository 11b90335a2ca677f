"""How much the heads of a block differ: in their attention, and in what they read (Figure 5)."""

from __future__ import annotations

from torch import Tensor

from harmonize.diagnostics.base import AttentionMaps, Diagnostic, curve
from harmonize.functional.attention import head_divergence, head_map_similarity
from harmonize.functional.similarity import head_similarity
from harmonize.types import AttentionView, EncoderSpec, Findings, Quantity

DIVERGENCE = Quantity(
    "Divergence between heads",
    "nats",
    "Kullback-Leibler divergence from one head's attention to another's for the same query; mean over queries and "
    "pairs.",
    "arXiv:2205.13543 (KL between heads)",
)
MAPS = Quantity(
    "Similarity of the heads' attention",
    "",
    "Cosine between the attention of two heads for the same query; mean over queries and pairs. 1: all heads attend "
    "alike.",
    "our definition",
)
OUTPUTS = Quantity(
    "Similarity across heads",
    "",
    "Cosine between what two heads hand over for the same token (attention times values, before the output "
    "projection); mean over patch tokens and pairs. High: heads say the same.",
    "arXiv:2305.00729, Figure 5; there is no official code, the definition is ours",
    "Figure 5",
)


class HeadDiversity(Diagnostic):
    """Divergence and cosine between the attention of the heads of every block."""

    sees = (AttentionMaps,)

    def prepare(self, spec: EncoderSpec) -> None:
        """Declare the rows."""
        self.declare("divergence", spec.depth)
        self.declare("maps", spec.depth)

    def update(self, view: AttentionMaps, index: Tensor) -> None:
        """Add a block's attention for some images."""
        self.add("divergence", view.layer - 1, head_divergence(view.log_products), index)
        self.add("maps", view.layer - 1, head_map_similarity(view.patches), index)

    def describe(self, rows: dict[str, Tensor]) -> Findings:
        """Curves ``head_divergence`` and ``head_map_similarity``; none with a single head."""
        if self.spec.num_heads == 1:
            return Findings()
        return Findings(
            curves={
                "head_divergence": curve(DIVERGENCE, self.blocks, rows["divergence"], uniform=0.0),
                "head_map_similarity": curve(MAPS, self.blocks, rows["maps"], uniform=1.0),
            }
        )


class HeadSimilarity(Diagnostic):
    """Cosine between the outputs of the heads of every block."""

    sees = (AttentionView,)

    def prepare(self, spec: EncoderSpec) -> None:
        """Declare the rows."""
        self.declare("outputs", spec.depth)

    def update(self, view: AttentionView, index: Tensor) -> None:
        """Add a block's per-head outputs for some images."""
        patches = view.output[:, :, self.spec.num_prefix_tokens :].float()
        self.add("outputs", view.layer - 1, head_similarity(patches), index)

    def describe(self, rows: dict[str, Tensor]) -> Findings:
        """Curve ``head_similarity``; none with a single head."""
        if self.spec.num_heads == 1:
            return Findings()
        return Findings(curves={"head_similarity": curve(OUTPUTS, self.blocks, rows["outputs"])})
