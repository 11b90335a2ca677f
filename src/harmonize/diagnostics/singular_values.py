"""How many directions representations use, within an image and across images: Figure 7 of arXiv:2305.00729."""

from __future__ import annotations

import torch
from torch import Tensor

from harmonize.diagnostics.base import Diagnostic, curve
from harmonize.functional.spectrum import alpha_req, effective_rank, singular_values
from harmonize.functional.statistics import jackknife, mean_and_error
from harmonize.types import Curve, EncoderSpec, Findings, Quantity, Surface, TokensView

UNVERIFIED = "arXiv:2305.00729, Figure 7; there is no official code, the definition is ours (unverified)"
TOKEN_SPECTRUM = Quantity(
    "Singular values of the tokens of an image, relative to block 1",
    "",
    "Log singular values of an image's patch tokens around their mean, mean over images, minus the same after block 1.",
    UNVERIFIED,
    "Figure 7",
)
TOKEN_RANK = Quantity(
    "Effective rank of the tokens of an image",
    "",
    "RankMe's formula (exponential of the entropy of the singular values) on an image's patch tokens around their "
    "mean; mean over images.",
    "RankMe, arXiv:2210.02885; centring ours",
    "Figure 7",
)
IMAGE_SPECTRUM = Quantity(
    "Singular values across images, relative to block 1",
    "",
    "Log singular values of the images' mean patch tokens around their mean, minus the same after block 1.",
    UNVERIFIED,
    "Figure 7",
)
IMAGE_RANK = Quantity(
    "Effective rank across images",
    "",
    "RankMe's formula on the images' mean patch tokens around their mean; at most one less than the number of "
    "images, so compare it at equal numbers only.",
    "RankMe, arXiv:2210.02885; centring ours",
    "Figure 7",
)
ALPHA = Quantity(
    "Decay of the spectrum across images (alpha-ReQ)",
    "",
    "Exponent alpha of the eigenvalues of the covariance of mean patch tokens, i ** -alpha, fitted over ranks 11 to "
    "100 or as many as there are. Large: few directions.",
    "alpha-ReQ (NeurIPS 2022), range and weights as in reptrix",
    "Figure 7",
)
FLOOR = 1e-8  # of the largest singular value: below is rounding


def log_relative(values: Tensor) -> Tensor:
    """Log of singular values (..., K), those of rounding error raised to the floor."""
    largest = values[..., :1].clamp_min(torch.finfo(values.dtype).tiny)
    return torch.maximum(values, FLOOR * largest).log()


def _rank_and_alpha(values: Tensor) -> Tensor:
    """Effective rank and alpha, stacked, of singular values (..., K)."""
    return torch.stack([effective_rank(values), alpha_req(values)])


class TokenSpectrum(Diagnostic):
    """Singular values of the patch tokens of an image, at the input and after every block."""

    sees = (TokensView,)

    def prepare(self, spec: EncoderSpec) -> None:
        """Declare the rows."""
        self.num_values = min(spec.num_patches - 1, spec.width)
        self.declare("rank", spec.depth + 1)
        self.declare("log", spec.depth + 1)

    def update(self, view: TokensView, index: Tensor) -> None:
        """Add a layer's tokens for some images."""
        if view.stage == "attention":
            return
        values = singular_values(view.tokens[:, self.spec.num_prefix_tokens :])[:, : self.num_values]
        self.add("rank", view.layer, effective_rank(values), index)
        self.add("log", view.layer, log_relative(values).float(), index)

    def describe(self, rows: dict[str, Tensor]) -> Findings:
        """Curve ``token_effective_rank`` and surface ``token_spectrum``."""
        layers = [0, *self.blocks]
        logs = rows["log"].double()
        value, error = mean_and_error(logs - logs[:, 1:2])
        ranks = [float(rank) for rank in range(1, self.num_values + 1)]
        return Findings(
            curves={"token_effective_rank": curve(TOKEN_RANK, layers, rows["rank"])},
            surfaces={
                "token_spectrum": Surface(
                    TOKEN_SPECTRUM, [float(i) for i in layers], "rank", ranks, value.tolist(), error.tolist()
                )
            },
        )


class ImageSpectrum(Diagnostic):
    """Singular values of mean patch tokens over images, at the input and after every block."""

    sees = (TokensView,)

    def prepare(self, spec: EncoderSpec) -> None:
        """Declare the rows."""
        self.declare("mean", spec.depth + 1)

    def update(self, view: TokensView, index: Tensor) -> None:
        """Add a layer's tokens for some images."""
        if view.stage != "attention":
            self.add("mean", view.layer, view.tokens[:, self.spec.num_prefix_tokens :].mean(dim=1).float(), index)

    def describe(self, rows: dict[str, Tensor]) -> Findings:
        """Curves ``image_effective_rank`` and ``image_alpha``, and surface ``image_spectrum``."""
        features = rows["mean"].transpose(0, 1)  # (places, images, D)
        num_images = features.shape[1]
        layers = [0, *self.blocks]
        curves = {}
        value, error = jackknife(lambda i: _rank_and_alpha(singular_values(features[:, i])), num_images)
        for k, (name, quantity) in enumerate((("image_effective_rank", IMAGE_RANK), ("image_alpha", ALPHA))):
            if name != "image_alpha" or not value[k].isnan().any() or not features.isfinite().all():  # else: no fit
                curves[name] = Curve(quantity, layers, value[k].tolist(), error[k].tolist())
        num_values = max(1, min(num_images - 1, self.spec.width))
        logs = log_relative(singular_values(features)[:, :num_values])
        relative = (logs - logs[1]).tolist()
        ranks = [float(rank) for rank in range(1, num_values + 1)]
        surface = Surface(IMAGE_SPECTRUM, [float(i) for i in layers], "rank", ranks, relative)
        return Findings(curves=curves, surfaces={"image_spectrum": surface})
