"""Curves of arXiv:2305.00729 that can be read off its public sources, to draw beside one's own.

All of them are ViT-B/16 at 224 px. [NB] are plots kept in the official notebooks, digitised; [POSTER-V] are marker
coordinates of the poster's vector graphics; [POSTER-R] are read off its raster panels.
"""

from __future__ import annotations

from dataclasses import dataclass

from harmonize.types import EncoderSpec


@dataclass(frozen=True)
class Reference:
    """A published curve and the networks beside which it may be drawn.

    Attributes:
        curve: Name of the curve that it belongs to.
        label: The network and what it was measured on.
        source: Where the numbers come from and how far they can be trusted.
        layer: Block numbers, 0 for the input of the first block.
        value: One per layer, in the unit of the curve.
        image_size: Side of the images, in px.
        patch_size: Side of a patch, in px.
        depth: Number of blocks.
    """

    curve: str
    label: str
    source: str
    layer: tuple[int, ...]
    value: tuple[float, ...]
    image_size: int = 224
    patch_size: int = 16
    depth: int = 12

    def __str__(self) -> str:
        """Text for a legend."""
        return f"{self.label}: {self.source}"


def references_for(name: str, spec: EncoderSpec) -> list[Reference]:
    """The published curves of a diagnostic that hold for such images, patches and depth, or none.

    Distances in px, grids and block numbers of another geometry mean something else, so nothing is rescaled.
    """
    return [
        reference
        for reference in REFERENCES
        if reference.curve == name
        and spec.image_size == (reference.image_size, reference.image_size)
        and spec.patch_size == reference.patch_size
        and spec.depth == reference.depth
    ]


_BLOCKS = tuple(range(1, 13))
_WITH_INPUT = tuple(range(13))


def _probe(label: str, *percent: float) -> Reference:
    """A linear probe of every block; the poster gives percent, our files hold fractions."""
    fractions = tuple(round(number / 100, 4) for number in percent)
    return Reference("layer_probe_linear", f"{label} on ImageNet-1K", "poster [POSTER-V]", _BLOCKS, fractions)


# fmt: off
REFERENCES = (
    Reference(
        "attention_distance", "MoCo v3 ViT-B/16", "notebook [NB], ±0.3 px", _BLOCKS,
        (110.4, 89.2, 73.1, 69.5, 72.9, 81.4, 88.1, 79.7, 95.7, 101.2, 109.7, 113.6),
    ),
    Reference(
        "nmi", "MoCo v3 ViT-B/16", "notebook [NB], ±0.003", _BLOCKS,
        (0.062, 0.121, 0.321, 0.295, 0.238, 0.180, 0.145, 0.171, 0.093, 0.077, 0.029, 0.009),
    ),
    Reference(
        "fourier", "MoCo v3 ViT-B/16", "poster [POSTER-V]", _WITH_INPUT,
        (-2.905, -3.180, -3.140, -3.075, -2.952, -2.810, -2.665, -2.554, -2.463, -2.404, -2.389, -2.401, -2.508),
    ),
    Reference(
        "fourier", "SimMIM ViT-B/16", "poster [POSTER-V]", _WITH_INPUT,
        (-1.999, -2.049, -2.245, -2.184, -2.133, -2.122, -2.091, -2.064, -2.038, -2.057, -2.128, -2.116, -2.308),
    ),
    # The encoder of Figure 11; its last point can only be guessed in the raster panel, so it is left out.
    Reference(
        "fourier", "MAE ViT-B/16 encoder", "poster [POSTER-R], ±0.02", _WITH_INPUT[:-1],
        (-3.06, -2.10, -2.27, -2.38, -2.33, -2.35, -2.31, -2.31, -2.27, -2.24, -2.17, -2.15),
    ),
    _probe("MoCo v3 ViT-B/16", 5.1, 10.2, 17.4, 28.4, 40.0, 47.7, 54.6, 58.6, 62.2, 66.2, 69.4, 71.7),
    _probe("SimMIM ViT-B/16", 14.9, 25.9, 35.5, 43.2, 48.6, 53.6, 56.7, 56.8, 56.0, 52.9, 48.3, 45.3),
    _probe("MAE ViT-B/16", 13.6, 21.5, 27.2, 32.3, 37.6, 43.6, 51.6, 58.4, 62.8, 64.6, 64.9, 64.1),
)
# fmt: on
