"""What attention depends on and how sharp it is: normalised mutual information (Figure 4), entropy, prefix tokens."""

from __future__ import annotations

import math

from torch import Tensor

from harmonize.diagnostics.base import AttentionMaps, Diagnostic, curve
from harmonize.functional.attention import normalized_mutual_information
from harmonize.types import EncoderSpec, Findings, Quantity

NMI = Quantity(
    "Normalised mutual information of attention",
    "",
    "Mutual information between the positions of query and key, normalised by their entropies: 0 if all queries attend "
    "alike (attention collapse, or uniform attention), 1 if each attends to a patch of its own.",
    "arXiv:2305.00729, Figure 4; cl-vs-mim attention_analysis.ipynb",
    "Figure 4",
)
ENTROPY = Quantity(
    "Attention entropy, relative to uniform attention",
    "",
    "Entropy of a query's attention over patches divided by log N: 1 is uniform, 0 a single patch. Tells the two cases "
    "apart in which the mutual information is 0.",
    "arXiv:2205.13543 (entropy); normalisation ours",
)
PREFIX = Quantity(
    "Attention to prefix tokens",
    "",
    "Share of the patches' attention that goes to the class token and registers, which the curves over patches leave "
    "out.",
    "our definition",
)


class MutualInformation(Diagnostic):
    """Normalised mutual information of every block and head."""

    sees = (AttentionMaps,)

    def prepare(self, spec: EncoderSpec) -> None:
        """Declare the rows."""
        self.declare("nmi", spec.depth)

    def update(self, view: AttentionMaps, index: Tensor) -> None:
        """Add a block's attention for some images."""
        self.add("nmi", view.layer - 1, normalized_mutual_information(view.patches, view.entropy), index)

    def describe(self, rows: dict[str, Tensor]) -> Findings:
        """Curve ``nmi``."""
        return Findings(curves={"nmi": curve(NMI, self.blocks, rows["nmi"], uniform=0.0)})


class AttentionEntropy(Diagnostic):
    """Entropy of attention, and the share of it that goes to prefix tokens, of every block and head."""

    sees = (AttentionMaps,)

    def prepare(self, spec: EncoderSpec) -> None:
        """Declare the rows."""
        self.declare("entropy", spec.depth)
        self.declare("prefix", spec.depth)

    def update(self, view: AttentionMaps, index: Tensor) -> None:
        """Add a block's attention for some images."""
        self.add("entropy", view.layer - 1, view.entropy, index)
        self.add("prefix", view.layer - 1, view.prefix_mass, index)

    def describe(self, rows: dict[str, Tensor]) -> Findings:
        """Curve ``attention_entropy``; with prefix tokens also ``prefix_attention``."""
        spec = self.spec
        scale = 1 / math.log(spec.num_patches)
        found = Findings(curves={"attention_entropy": curve(ENTROPY, self.blocks, rows["entropy"], 1 / scale, scale)})
        if spec.num_prefix_tokens:
            share = spec.num_prefix_tokens / (spec.num_prefix_tokens + spec.num_patches)
            found.curves["prefix_attention"] = curve(PREFIX, self.blocks, rows["prefix"], share)
        return found
