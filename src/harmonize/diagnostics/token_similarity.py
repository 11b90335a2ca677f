"""How alike tokens are, across space and across depth: Figure 5 of arXiv:2305.00729."""

from __future__ import annotations

from torch import Tensor

from harmonize.diagnostics.base import Diagnostic, curve
from harmonize.functional.similarity import depth_similarity, token_similarity
from harmonize.types import EncoderSpec, Findings, Quantity, TokensView

TOKENS = Quantity(
    "Similarity across tokens",
    "",
    "Cosine between two patch tokens of the same image after the block; mean over pairs. High: tokens are uniform in "
    "space.",
    "arXiv:2305.00729, Figure 5; there is no official code, the definition is ours",
    "Figure 5",
)
BLOCK = Quantity(
    "Similarity across depth: before and after the block",
    "",
    "Cosine between a patch token before and after the block; mean over tokens. 1: the block turns no token.",
    "arXiv:2305.00729, Figure 5; there is no official code, the definition is ours",
    "Figure 5",
)
ATTENTION = Quantity(
    "Similarity across depth: before and after the self-attention",
    "",
    "Cosine between a patch token before and after the block's self-attention (with its residual); mean over tokens.",
    "arXiv:2305.00729, Figure 5; there is no official code, the definition is ours",
    "Figure 5",
)


class TokenSimilarity(Diagnostic):
    """Cosine between the patch tokens of an image, after every block."""

    sees = (TokensView,)

    def prepare(self, spec: EncoderSpec) -> None:
        """Declare the rows."""
        self.declare("tokens", spec.depth + 1)

    def update(self, view: TokensView, index: Tensor) -> None:
        """Add a layer's tokens for some images."""
        if view.stage != "attention":
            tokens = view.tokens[:, self.spec.num_prefix_tokens :]
            self.add("tokens", view.layer, token_similarity(tokens), index)

    def describe(self, rows: dict[str, Tensor]) -> Findings:
        """Curve ``token_similarity``."""
        return Findings(curves={"token_similarity": curve(TOKENS, [0, *self.blocks], rows["tokens"])})


class DepthSimilarity(Diagnostic):
    """Cosine between tokens before and after every block, and every self-attention."""

    sees = (TokensView,)

    def prepare(self, spec: EncoderSpec) -> None:
        """Declare the rows."""
        self.declare("attention", spec.depth)
        self.declare("mlp", spec.depth)

    def update(self, view: TokensView, index: Tensor) -> None:
        """Add a layer's tokens for some images."""
        if view.before is not None:
            before, after = (x[:, self.spec.num_prefix_tokens :] for x in (view.before, view.tokens))
            self.add(view.stage, view.layer - 1, depth_similarity(before, after), index)

    def describe(self, rows: dict[str, Tensor]) -> Findings:
        """Curves ``depth_similarity_block`` and ``depth_similarity_attention``."""
        return Findings(
            curves={
                "depth_similarity_block": curve(BLOCK, self.blocks, rows["mlp"]),
                "depth_similarity_attention": curve(ATTENTION, self.blocks, rows["attention"]),
            }
        )
