"""Claims: what a side of one means, and verdicts on planted numbers."""

import math

import pytest
import torch

from harmonize.claims import LAYERS, Side, difference_of_means, hedges_g, judge, read_claim, values
from harmonize.reports.comparison import Cell, Group
from harmonize.types import ConfigError, EncoderSpec, Findings

SPEC = EncoderSpec(16, 6, 2, (16, 16), 4, (4, 4), 1, True)


def make(name, accuracy, curve=()):
    """A group with an accuracy for each run, and a curve over blocks 0, 1, ... with the values of each run."""
    by_layer = {"nmi": {float(at): Cell(list(runs)) for at, runs in enumerate(zip(*curve, strict=True))}}
    folders = [f"{name}{i}" for i in range(len(accuracy))]
    return Group(name, folders, {"top1": Cell(list(accuracy))}, SPEC, [], Findings(), Findings(), by_layer)


CURVE = [[9.0, 1.0, 2.0, 6.0, 4.0, 5.0, 3.0], [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0]]
EXPECTED = {
    "first": [1, 2],
    "early": [1.5, 3],
    "middle": [5, 7],
    "late": [4, 11],
    "last": [3, 12],
    "all": [3.5, 7],
    "best": [6, 12],
    "fall": [3, 0],
}


def test_every_part_of_a_curve_is_covered():
    assert set(EXPECTED) == set(LAYERS)


@pytest.mark.parametrize(("layers", "expected"), EXPECTED.items())
def test_parts_of_a_curve_leave_out_the_input(layers, expected):
    groups = {"a": make("a", [0.1, 0.2], CURVE)}
    assert values(Side("a", "nmi", layers), groups) == expected


def test_differences_are_run_by_run():
    groups = {"wide": make("wide", [0.5, 0.9]), "narrow": make("narrow", [0.4, 0.5]), "one": make("one", [0.4])}
    assert values(Side("wide", "top1", minus=Side("narrow", "top1")), groups) == pytest.approx([0.1, 0.4])
    assert values(Side("wide", "top1", minus=Side("one", "top1")), groups) == []  # such as while runs are missing


@pytest.mark.parametrize(
    ("more", "less", "verdict"),
    [
        ([0.9, 0.91, 0.92], [0.5, 0.51, 0.52], "supported"),
        ([0.5, 0.51, 0.52], [0.9, 0.91, 0.92], "contradicted"),
        ([0.5, 0.7, 0.9], [0.5, 0.6, 0.8], "not supported"),
        ([0.5], [0.1], "not tested"),
        ([0.5, 0.6, 0.7], [], "not tested"),
        ([0.5, 0.5], [0.4, 0.4], "not supported"),  # without a spread there is no interval
    ],
)
def test_verdicts(more, less, verdict):
    groups = {"a": make("a", more)} | ({"b": make("b", less)} if less else {})
    found = judge(read_claim({"claim": "c", "quantity": "top1", "more": "a", "less": "b"}), groups)
    assert found.verdict == verdict
    assert found.more_values.values == more


def test_the_interval_is_welchs():
    """Against the textbook's formula in double precision, with the quantile of t found by bisection of its integral."""
    a, b = [3.1, 2.7, 3.9, 3.3], [1.0, 2.2, 1.9]
    n, m = len(a), len(b)
    mean_a, mean_b = sum(a) / n, sum(b) / m
    va = sum((x - mean_a) ** 2 for x in a) / (n - 1) / n
    vb = sum((x - mean_b) ** 2 for x in b) / (m - 1) / m
    freedom = (va + vb) ** 2 / (va**2 / (n - 1) + vb**2 / (m - 1))

    def beyond(t):
        scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        x = torch.linspace(0, t, 200_001, dtype=torch.float64)
        return 0.5 - scale * torch.trapezoid((1 + x * x / freedom) ** (-(freedom + 1) / 2), x).item()

    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if beyond(middle) > 0.025 else (low, middle)
    half = low * math.sqrt(va + vb)
    assert difference_of_means(a, b) == pytest.approx(
        (mean_a - mean_b, mean_a - mean_b - half, mean_a - mean_b + half), rel=1e-6
    )


def test_ninety_five_of_a_hundred_intervals_hold_the_truth():
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        a = (0.3 + 2.0 * torch.randn(4, generator=generator)).tolist()
        b = (0.5 * torch.randn(3, generator=generator)).tolist()
        _, low, high = difference_of_means(a, b)
        held += low < 0.3 < high
    assert 0.92 < held / 400 < 0.98


def test_the_effect_is_in_pooled_deviations():
    assert hedges_g([1.0, 1.0], [0.0, 0.0]) != hedges_g([1.0, 1.0], [0.0, 0.0])  # NaN: no spread
    assert hedges_g([2.0, 4.0], [1.0, 3.0]) == pytest.approx(1 / math.sqrt(2) * (1 - 3 / 7))


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        ({"claim": "c", "more": "a"}, "less is missing"),
        ({"claim": "c", "quantity": "q", "more": "a", "less": "b", "layer": "late"}, "layer is unknown"),
        ({"claim": "c", "more": "a", "less": "b"}, "a side has group, quantity"),
        ({"claim": "c", "quantity": "q", "layers": "lates", "more": "a", "less": "b"}, "layers must be one of first"),
    ],
)
def test_mistakes_get_a_sentence(node, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_claim(node)


def test_a_curve_needs_a_part():
    with pytest.raises(ConfigError, match="a claim about it needs layers"):
        values(Side("a", "nmi"), {"a": make("a", [0.1, 0.2], CURVE)})
