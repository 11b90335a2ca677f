"""Every alarm sounds just beyond its threshold, names what it is about, and is silent otherwise."""

import math

import pytest

from harmonize.diagnostics.health import Health
from harmonize.types import Curve, Findings, Quantity
from tests.helpers import tiny_encoder

SPEC = tiny_encoder().spec  # width 24
BELOW, ABOVE = -math.inf, math.inf


def curve(values, first=1):
    layers = list(range(first, first + len(values)))
    return Curve(Quantity("", "", "", ""), layers, list(values), [0.0] * len(values))


def check(num_images=64, health=None, **curves):
    found = Findings(curves={name: x if isinstance(x, Curve) else curve(x) for name, x in curves.items()})
    found.num_images = num_images
    return (health or Health()).check(found, SPEC)


def just(threshold, direction):
    return math.nextafter(threshold, direction)


def test_a_sound_network_gives_no_alarm():
    assert check(nmi=[0.3, 0.02], attention_entropy=[0.5, 0.99], image_effective_rank=[9.0, 8.0]) == []
    assert check() == []
    assert check(translation_share=[1.0, 0.0], head_similarity=[1.0, -1.0]) == []  # there is no rule for these


def test_attention_collapse():
    assert check(nmi=[0.5, 0.02]) == []
    (alarm,) = check(nmi=[0.5, just(0.02, BELOW), 0.001])
    assert (alarm.rule, alarm.curve, list(alarm.values)) == ("attention collapse", "nmi", [2, 3])
    text = (
        "attention collapse: nmi is below 0.02 (block 2: 0.02, block 3: 0.001): all queries attend to the same places."
    )
    assert str(alarm) == text


def test_uniform_attention():
    assert check(attention_entropy=[0.99, 0.1]) == []
    (alarm,) = check(attention_entropy=[just(0.99, ABOVE), 0.1, 0.995])
    assert (alarm.rule, alarm.curve, list(alarm.values)) == ("uniform attention", "attention_entropy", [1, 3])
    assert str(alarm).startswith("uniform attention: attention_entropy is above 0.99 (block 1: 0.99, block 3: 0.995): ")


def test_uniform_attention_is_not_called_collapse():
    """Its mutual information is 0 as well."""
    (alarm,) = check(nmi=[0.0, 0.5], attention_entropy=[1.0, 0.5])
    assert alarm.rule == "uniform attention"
    both = check(nmi=[0.0, 0.001], attention_entropy=[1.0, 0.5])
    assert [(alarm.rule, list(alarm.values)) for alarm in both] == [
        ("uniform attention", [1]),
        ("attention collapse", [2]),
    ]


@pytest.mark.parametrize(("num_images", "possible"), [(64, 24), (25, 24), (24, 23), (11, 10)])
def test_dimensional_collapse(num_images, possible):
    """The rank is compared with what so many images and so much width allow."""
    least = 0.05 * possible
    assert check(num_images, image_effective_rank=[least, 20.0]) == []
    (alarm,) = check(num_images, image_effective_rank=curve([0.1, 20.0, just(least, BELOW)], first=0))
    assert (alarm.rule, alarm.curve, list(alarm.values)) == ("dimensional collapse", "image_effective_rank", [2])
    assert f"is below {least:.3g} (0.05 of the possible {possible}) (block 2: {least:.3g})" in str(alarm)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_a_number_names_the_layer(value):
    (alarm,) = check(fourier=[0.1, value, 0.2])
    assert (alarm.rule, alarm.curve, list(alarm.values)) == ("not a number", "fourier", [2])
    assert f"fourier is not finite (block 2: {value:.3g}): the weights or the activations are broken" in str(alarm)


def test_not_a_number_is_nothing_else():
    alarms = check(nmi=[math.nan, 0.5], attention_entropy=[math.inf, 0.5], image_effective_rank=[-math.inf, 9.0])
    assert [(alarm.rule, alarm.curve, list(alarm.values)) for alarm in alarms] == [
        ("not a number", "nmi", [1]),
        ("not a number", "attention_entropy", [1]),
        ("not a number", "image_effective_rank", [1]),
    ]


def test_a_curve_that_was_not_measured_gives_no_alarm():
    assert check(nmi=[0.5]) == check(attention_entropy=[0.5]) == check(image_effective_rank=[9.0]) == []
    (alarm,) = check(nmi=[0.0])  # without the entropy it may as well be uniform: better an alarm than none
    assert alarm.rule == "attention collapse"


def test_thresholds_are_settings():
    health = Health(nmi=0.3, entropy=0.4, rank=0.5)
    rules = [
        alarm.rule for alarm in check(health=health, nmi=[0.25], attention_entropy=[0.35], image_effective_rank=[11.9])
    ]
    assert rules == ["attention collapse", "dimensional collapse"]
    (alarm,) = check(health=health, nmi=[0.3], attention_entropy=[0.41], image_effective_rank=[12.0])
    assert str(alarm).startswith("uniform attention: attention_entropy is above 0.4 (block 1: 0.41)")
