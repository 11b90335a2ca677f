"""Published numbers: which stands beside which result."""

from dataclasses import replace

import pytest

from harmonize.config import CONF
from harmonize.reports.published import PUBLISHED, published
from harmonize.types import EncoderSpec

BASE = EncoderSpec(768, 12, 12, (224, 224), 16, (14, 14), 1, True)
SMALL = replace(BASE, width=384, num_heads=6)
LARGE = replace(BASE, width=1024, depth=24, num_heads=16)
HUGE = replace(BASE, width=1280, depth=32, num_heads=16)
TINY = replace(BASE, width=192, depth=6, num_heads=3)
K20 = "k=20, temperature=0.07"


@pytest.mark.parametrize(
    ("protocol", "objective", "spec", "series", "value"),
    [
        ("knn", "dino", SMALL, K20, 0.745),
        ("knn", "dino", BASE, K20, 0.761),
        ("knn", "dino", BASE, "k=10, temperature=0.07", None),
        ("knn", "contrastive", BASE, K20, None),
        ("linear_probe_moco_v3", "contrastive", SMALL, "", 0.732),
        ("linear_probe_moco_v3", "contrastive", BASE, "", 0.767),
        ("linear_probe_moco_v3", "contrastive", TINY, "", 0.767),
        ("linear_probe_moco_v3", "mae", BASE, "", None),
        ("linear_probe_mae", "mae", BASE, "", 0.680),
        ("linear_probe_mae", "mae", LARGE, "", 0.758),
        ("linear_probe_mae", "mae", HUGE, "", 0.766),
        ("linear_probe_simmim", "mim", BASE, "", 0.567),
        ("linear_probe_dino", "dino", BASE, "", 0.782),
        ("linear_probe_paper", "mim", BASE, "", 0.182),
        ("linear_probe_paper", "hybrid 0.2", BASE, "", 0.616),
        ("linear_probe_paper", "hybrid 0.4", BASE, "", 0.622),
        ("linear_probe_paper", "hybrid 0.6", BASE, "", 0.619),
        ("linear_probe_paper", "hybrid 0.3", BASE, "", None),
        ("linear_probe_paper", "contrastive", BASE, "", 0.580),
        ("fine_tune_mae", "mae", BASE, "", 0.836),
        ("fine_tune_mae", "mae", LARGE, "", 0.859),
        ("fine_tune_mae", "mae", HUGE, "", 0.869),
        ("fine_tune_simmim", "mim", BASE, "", 0.838),
        ("fine_tune_beit", "beit", BASE, "", 0.832),
        ("fine_tune_deit", "contrastive", SMALL, "", 0.814),
        ("fine_tune_deit", "contrastive", BASE, "", 0.832),
        ("linear_probe", "contrastive", BASE, "", None),
        ("knn", "", BASE, K20, None),
    ],
)
def test_a_single_number(protocol, objective, spec, series, value):
    found = published(protocol, objective, spec, series=series)
    assert (found and found.value) == value
    if found is not None and found.width == 768:
        assert "ViT-B/16" in found.source


@pytest.mark.parametrize(
    ("objective", "values"),
    [
        ("contrastive", {1: 0.051, 8: 0.586, 12: 0.717}),
        ("mim", {1: 0.149, 8: 0.568, 12: 0.453}),
        ("mae", {1: 0.136, 11: 0.649, 12: 0.641}),
        ("hybrid 0.2", {1: None}),
    ],
)
def test_by_block(objective, values):
    for layer, value in values.items():
        found = published("layer_probe", objective, BASE, at=layer, series="linear")
        assert (found and found.value) == value
        assert published("layer_probe", objective, BASE, at=layer, series="knn") is None
        assert published("layer_probe", objective, TINY, at=layer, series="linear") is None
    assert published("layer_probe", objective, BASE, series="linear") is None
    assert published("layer_probe", objective, BASE, at=13, series="linear") is None


def test_every_entry_belongs_to_a_protocol_and_says_whose_it_is():
    protocols = {path.stem for path in (CONF / "eval").glob("*.yaml")}
    for entry in PUBLISHED:
        assert entry.protocol in protocols
        assert 0 < entry.value < 1
        assert "ViT-" in entry.source
    places = [(e.protocol, e.objective, e.width, e.at, e.series) for e in PUBLISHED]
    assert len(set(places)) == len(places)
