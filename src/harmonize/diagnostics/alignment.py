"""Alignment and uniformity of every layer's features (Wang and Isola, arXiv:2005.10242)."""

from __future__ import annotations

from torch import Tensor

from harmonize.diagnostics.base import Diagnostic, curve
from harmonize.functional.sphere import alignment, uniformity
from harmonize.functional.statistics import jackknife
from harmonize.types import Curve, EncoderSpec, Findings, Quantity, TokensView

UNIFORMITY = Quantity(
    "Uniformity",
    "",
    "Log of the mean Gaussian potential (t = 2) between the normalised mean patch tokens of different images: 0 if "
    "all are equal, near -4 if they spread over the sphere.",
    "arXiv:2005.10242",
)
ALIGNMENT = Quantity(
    "Alignment",
    "",
    "Squared distance between the normalised mean patch tokens of an image and of its mirror image enlarged by a "
    "quarter; mean over images. 0: invariant.",
    "arXiv:2005.10242; the fixed second view is ours",
)


class AlignmentUniformity(Diagnostic):
    """Alignment between two views of an image and uniformity over images, at the input and after every block."""

    sees = (TokensView,)
    sees_second_view = True

    def prepare(self, spec: EncoderSpec) -> None:
        """Declare the rows."""
        self.declare("first", spec.depth + 1)
        self.declare("second", spec.depth + 1)

    def update(self, view: TokensView, index: Tensor, second: bool = False) -> None:
        """Add a layer's tokens for some images, of the clean or of the second view."""
        if view.stage != "attention":
            mean = view.tokens[:, self.spec.num_prefix_tokens :].mean(dim=1).float()
            self.add("second" if second else "first", view.layer, mean, index)

    def describe(self, rows: dict[str, Tensor]) -> Findings:
        """Curves ``uniformity`` and ``alignment``."""
        layers = [0, *self.blocks]
        features = rows["first"].transpose(0, 1)
        value, error = jackknife(lambda i: uniformity(features[:, i]), features.shape[1])
        return Findings(
            curves={
                "uniformity": Curve(UNIFORMITY, layers, value.tolist(), error.tolist()),
                "alignment": curve(ALIGNMENT, layers, alignment(rows["first"], rows["second"])),
            }
        )
