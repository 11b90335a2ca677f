"""How a self-attention moves the tokens of an image: Figure 6 of arXiv:2305.00729."""

from __future__ import annotations

import torch
from torch import Tensor

from harmonize.diagnostics.base import Diagnostic, curve
from harmonize.functional.similarity import common_projection, translation_share
from harmonize.types import EncoderSpec, Findings, Picture, Quantity, TokensView

SHARE = Quantity(
    "Common translation by the self-attention",
    "",
    "Share of the squared displacement of an image's patch tokens by the block's self-attention that is one and the "
    "same vector for all of them: 1 if all move in unison, about 1 / N if each moves on its own.",
    "a number for arXiv:2305.00729, Figure 6; the definition is ours",
    "Figure 6",
)
MOVES = Quantity(
    "Tokens before and after a self-attention",
    "",
    "Patch tokens before (hollow) and after (filled) the block's self-attention, projected onto the two leading "
    "directions of both together; one colour per image.",
    "arXiv:2305.00729, Figure 6; there is no official code, the projection is ours (unverified)",
    "Figure 6",
)


class TokenTranslation(Diagnostic):
    """Share of common translation in the displacement of tokens by every self-attention."""

    sees = (TokensView,)

    def prepare(self, spec: EncoderSpec) -> None:
        """Declare the rows."""
        self.declare("share", spec.depth)

    def update(self, view: TokensView, index: Tensor) -> None:
        """Add a block's tokens before and after self-attention for some images."""
        if view.stage != "attention":
            return
        assert view.before is not None
        before, after = (x[:, self.spec.num_prefix_tokens :].float() for x in (view.before, view.tokens))
        self.add("share", view.layer - 1, translation_share(before, after), index)

    def describe(self, rows: dict[str, Tensor]) -> Findings:
        """Curve ``translation_share``."""
        return Findings(curves={"translation_share": curve(SHARE, self.blocks, rows["share"])})


class TokenMoves(Diagnostic):
    """The picture of Figure 6 for a few images and blocks."""

    sees = (TokensView,)

    def prepare(self, spec: EncoderSpec) -> None:
        """Declare the rows."""
        self.shown = shown_layers(spec.depth)
        self.declare("before", len(self.shown))
        self.declare("after", len(self.shown))

    def update(self, view: TokensView, index: Tensor) -> None:
        """Keep the tokens of the shown blocks."""
        if view.stage != "attention" or view.layer not in self.shown:
            return
        assert view.before is not None
        for name, tokens in (("before", view.before), ("after", view.tokens)):
            self.add(name, self.shown.index(view.layer), tokens[:, self.spec.num_prefix_tokens :].float(), index)

    def describe(self, rows: dict[str, Tensor]) -> Findings:
        """Picture ``token_moves``."""
        num, num_layers, num_tokens, _ = rows["before"].shape
        projected = [
            common_projection(rows["before"][:, k].flatten(0, 1), rows["after"][:, k].flatten(0, 1))
            for k in range(num_layers)
        ]
        arrays = {
            "before": torch.stack([before for before, _ in projected]).cpu(),
            "after": torch.stack([after for _, after in projected]).cpu(),
            "image": torch.arange(num).repeat_interleave(num_tokens),
            "layers": torch.tensor(self.shown),
        }
        return Findings(pictures={"token_moves": Picture(MOVES, "token_moves", arrays)})


def shown_layers(depth: int, num: int = 4) -> list[int]:
    """Blocks that pictures show: evenly spaced, the last one included.

    >>> shown_layers(12), shown_layers(2)
    ([3, 6, 9, 12], [1, 2])
    """
    num = min(num, depth)
    return [depth * (i + 1) // num for i in range(num)]
