"""How alike the layers of a network are: centred kernel alignment."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harmonize.diagnostics.singular_values import ImageSpectrum
from harmonize.functional.cka import linear_cka
from harmonize.functional.statistics import jackknife
from harmonize.types import Curve, Findings, Quantity, Surface

BETWEEN = Quantity(
    "Similarity of layers (CKA)",
    "",
    "Linear centred kernel alignment, unbiased, between the images' mean patch tokens at two depths.",
    "arXiv:1905.00414; unbiased as in arXiv:2010.15327; as used on these networks in arXiv:2304.13089",
)
PREVIOUS = Quantity(
    "Similarity to the previous layer (CKA)",
    "",
    "Linear centred kernel alignment, unbiased, between the images' mean patch tokens before and after the block.",
    BETWEEN.source,
)


class CKA(ImageSpectrum):
    """CKA between all layers, on mean patch tokens."""

    min_images = 4

    def describe(self, rows: dict[str, Tensor]) -> Findings:
        """Surface ``cka`` and curve ``cka``: each layer with the previous one."""
        features = rows["mean"].transpose(0, 1)
        num_images = features.shape[1]
        if num_images > self.min_images:
            value, error = jackknife(lambda i: linear_cka(features[:, i]), num_images)
        else:  # none can be left out
            value = linear_cka(features)
            error = torch.full_like(value, math.nan)
        layers = [float(i) for i in (0, *self.blocks)]
        previous = [x.diagonal(offset=1).tolist() for x in (value, error)]
        return Findings(
            curves={"cka": Curve(PREVIOUS, self.blocks, *previous)},
            surfaces={"cka": Surface(BETWEEN, layers, "layer", layers, value.tolist(), error.tolist())},
        )
