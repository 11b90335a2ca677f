"""Published curves: the numbers of arXiv:2305.00729's public sources, and only where they mean something."""

import pytest

from harmonize.reports.references import REFERENCES, references_for
from tests.reports.synthetic import CURVES, spec

MOCO_FOURIER = "-2.905 -3.180 -3.140 -3.075 -2.952 -2.810 -2.665 -2.554 -2.463 -2.404 -2.389 -2.401 -2.508"
SIMMIM_FOURIER = "-1.999 -2.049 -2.245 -2.184 -2.133 -2.122 -2.091 -2.064 -2.038 -2.057 -2.128 -2.116 -2.308"
# curve -> network, source, first block, values, and by what they are divided
PUBLISHED = [
    ("attention_distance", "MoCo", "[NB]", 1, "110.4 89.2 73.1 69.5 72.9 81.4 88.1 79.7 95.7 101.2 109.7 113.6", 1),
    ("nmi", "MoCo", "[NB]", 1, ".062 .121 .321 .295 .238 .180 .145 .171 .093 .077 .029 .009", 1),
    ("fourier", "MoCo", "[POSTER-V]", 0, MOCO_FOURIER, 1),
    ("fourier", "SimMIM", "[POSTER-V]", 0, SIMMIM_FOURIER, 1),
    ("fourier", "MAE", "[POSTER-R]", 0, "-3.06 -2.10 -2.27 -2.38 -2.33 -2.35 -2.31 -2.31 -2.27 -2.24 -2.17 -2.15", 1),
    ("layer_probe_linear", "MoCo", "[POSTER-V]", 1, "5.1 10.2 17.4 28.4 40 47.7 54.6 58.6 62.2 66.2 69.4 71.7", 100),
    ("layer_probe_linear", "SimMIM", "[POSTER-V]", 1, "14.9 25.9 35.5 43.2 48.6 53.6 56.7 56.8 56 52.9 48.3 45.3", 100),
    ("layer_probe_linear", "MAE", "[POSTER-V]", 1, "13.6 21.5 27.2 32.3 37.6 43.6 51.6 58.4 62.8 64.6 64.9 64.1", 100),
]


@pytest.mark.parametrize(("curve", "network", "source", "first", "values", "divisor"), PUBLISHED)
def test_the_numbers_are_the_published_ones(curve, network, source, first, values, divisor):
    (reference,) = [r for r in references_for(curve, spec()) if r.label.startswith(network)]
    assert source in str(reference)
    assert reference.value == pytest.approx([float(value) / divisor for value in values.split()])
    assert reference.layer == tuple(range(first, first + len(reference.value)))


def test_there_are_no_others():
    assert len(REFERENCES) == len(PUBLISHED)
    assert all(reference.curve in CURVES for reference in REFERENCES)
    assert not any(word in str(reference) for reference in REFERENCES for word in ("UNVERIFIED", "KAMIM"))


@pytest.mark.parametrize(
    "other", [{"image_size": 192}, {"patch_size": 14}, {"depth": 24}, {"image_size": 448, "patch_size": 32}]
)
def test_another_geometry_has_none(other):
    assert not any(references_for(curve, spec(**other)) for curve in CURVES)


def test_another_curve_has_none():
    assert references_for("attention_distance_normalized", spec()) == []
