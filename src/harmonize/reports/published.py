"""Published results, to stand beside one's own: always of other networks and, nearly always, of other data.

Every number is for ImageNet-1k at 224 px; the source says whose it is. [POSTER-V] are marker coordinates of the vector
graphics of the poster of arXiv:2305.00729, [POSTER-R] are read off its raster panels.
"""

from __future__ import annotations

from dataclasses import dataclass

from harmonize.reports.references import REFERENCES
from harmonize.types import EncoderSpec


@dataclass(frozen=True)
class Published:
    """A published number.

    Attributes:
        protocol: Name of the protocol (``conf/eval``).
        objective: What the network was trained with, see :attr:`harmonize.networks.Loaded.objective`.
        value: As a share.
        source: The network and where the number comes from.
        width: Token dimension of the network.
        depth: Its blocks.
        at: Where on the protocol's axis; None for a single number.
        series: Of the row that it stands beside; empty for any.
    """

    protocol: str
    objective: str
    value: float
    source: str
    width: int = 768
    depth: int = 12
    at: float | None = None
    series: str = ""


def published(
    protocol: str, objective: str, spec: EncoderSpec, at: float | None = None, series: str = ""
) -> Published | None:
    """The published number to put beside a result, of a network of the same width if there is one, else ViT-B's.

    Values by block hold for networks of as many blocks as the published one.

    >>> spec = EncoderSpec(384, 12, 6, (224, 224), 16, (14, 14), num_prefix_tokens=1, has_class_token=True)
    >>> published("linear_probe_moco_v3", "contrastive", spec).value
    0.732
    """
    found = [
        entry
        for entry in PUBLISHED
        if (entry.protocol, entry.objective, entry.at) == (protocol, objective, at)
        and entry.series in ("", series)
        and (at is None or spec.depth == entry.depth)
    ]
    return min(found, key=lambda entry: (entry.width != spec.width, abs(entry.width - 768)), default=None)


_NAMES = {"MoCo v3 ViT-B/16": "contrastive", "SimMIM ViT-B/16": "mim", "MAE ViT-B/16": "mae"}
_HYBRID = "arXiv:2305.00729, Figure 12 [POSTER-R], ViT-B/16, 100 epochs"

PUBLISHED = (
    Published("knn", "dino", 0.745, "DINO ViT-S/16", 384, series="k=20, temperature=0.07"),
    Published("knn", "dino", 0.761, "DINO ViT-B/16", series="k=20, temperature=0.07"),
    Published("linear_probe_moco_v3", "contrastive", 0.732, "MoCo v3 ViT-S/16, 300 epochs", 384),
    Published("linear_probe_moco_v3", "contrastive", 0.767, "MoCo v3 ViT-B/16, 300 epochs"),
    Published("linear_probe_mae", "mae", 0.680, "MAE ViT-B/16, 1600 epochs"),
    Published("linear_probe_mae", "mae", 0.758, "MAE ViT-L/16, 1600 epochs", 1024),
    Published("linear_probe_mae", "mae", 0.766, "MAE ViT-H/14, 1600 epochs", 1280),
    Published("linear_probe_simmim", "mim", 0.567, "SimMIM ViT-B/16, 800 epochs (SimMIM, Table 6)"),
    Published("linear_probe_dino", "dino", 0.782, "DINO ViT-B/16 (arXiv:2305.00729, Figure 1 [POSTER-V])"),
    Published("linear_probe_paper", "mim", 0.182, _HYBRID),
    Published("linear_probe_paper", "hybrid 0.2", 0.616, _HYBRID),
    Published("linear_probe_paper", "hybrid 0.4", 0.622, _HYBRID),
    Published("linear_probe_paper", "hybrid 0.6", 0.619, _HYBRID),
    Published("linear_probe_paper", "contrastive", 0.580, _HYBRID),
    Published("fine_tune_mae", "mae", 0.836, "MAE ViT-B/16, 1600 epochs"),
    Published("fine_tune_mae", "mae", 0.859, "MAE ViT-L/16, 1600 epochs", 1024),
    Published("fine_tune_mae", "mae", 0.869, "MAE ViT-H/14, 1600 epochs", 1280),
    Published("fine_tune_simmim", "mim", 0.838, "SimMIM ViT-B/16, 800 epochs"),
    Published("fine_tune_simmim", "hybrid 0.2", 0.8229, _HYBRID),
    Published("fine_tune_simmim", "hybrid 0.4", 0.8195, _HYBRID),
    Published("fine_tune_simmim", "hybrid 0.6", 0.8162, _HYBRID),
    Published("fine_tune_simmim", "contrastive", 0.8133, _HYBRID),
    Published("fine_tune_beit", "beit", 0.832, "BEiT ViT-B/16"),
    Published("fine_tune_beit", "beit", 0.852, "BEiT ViT-L/16", 1024),
    Published("fine_tune_deit", "contrastive", 0.814, "MoCo v3 ViT-S/16, 300 epochs", 384),
    Published("fine_tune_deit", "contrastive", 0.832, "MoCo v3 ViT-B/16, 300 epochs"),
    *(
        Published(
            "layer_probe",
            _NAMES[reference.label.removesuffix(" on ImageNet-1K")],
            value,
            f"{reference.label} (arXiv:2305.00729, Figure 10, {reference.source})",
            at=layer,
            series="linear",
        )
        for reference in REFERENCES
        if reference.curve == "layer_probe_linear"
        for layer, value in zip(reference.layer, reference.value, strict=True)
    ),
)
