"""Learning-rate schedules against the official recipes (arithmetic by hand)."""

import math

import pytest

from harmonize.functional.schedules import learning_rate


def test_moco_v3_schedule():
    """main_moco.py: lr * epoch / 40 in the warm-up, then lr / 2 * (1 + cos(pi (epoch - 40) / (300 - 40)))."""
    steps = 7
    for step in range(300 * steps):
        epoch = step / steps
        official = 2.4e-3 * epoch / 40 if epoch < 40 else 1.2e-3 * (1 + math.cos(math.pi * (epoch - 40) / 260))
        ours = learning_rate(step / (300 * steps), 2.4e-3, warmup=40 / 300)
        assert ours == pytest.approx(official, rel=1e-9, abs=1e-15), step


def test_simmim_schedule():
    """SimMIM's ViT-B: linear from 5e-7 to 1e-4 over 10 of 800 epochs, one tenth from epoch 700 on."""
    steps = 5
    rule = {"warmup": 10 / 800, "warmup_lr": 5e-7 / 1e-4, "decay": "multistep", "milestones": [700 / 800]}
    for step in range(800 * steps):
        warmup = 5e-7 + step * (1e-4 - 5e-7) / (10 * steps)
        official = warmup if step < 10 * steps else 1e-4 if step < 700 * steps else 1e-5
        assert learning_rate(step / (800 * steps), 1e-4, **rule) == pytest.approx(official, rel=1e-9), step


def test_mae_schedule_with_a_minimum():
    """util/lr_sched.py: min + (lr - min) / 2 * (1 + cos(pi (epoch - warm-up) / (epochs - warm-up)))."""
    for step in range(100):
        epoch = step / 10
        official = 3 * epoch / 2 if epoch < 2 else 0.6 + 2.4 * 0.5 * (1 + math.cos(math.pi * (epoch - 2) / 8))
        ours = learning_rate(step / 100, 3.0, warmup=0.2, min_lr=0.2)
        assert ours == pytest.approx(official, rel=1e-9), step


def test_constant_after_warmup():
    assert [learning_rate(s / 4, 2.0, warmup=0.5, decay="constant") for s in range(5)] == [0, 1, 2, 2, 2]
    assert learning_rate(1.0, 2.0) == 0.0


@pytest.mark.parametrize("power", [1.0, 0.9, 2.0])
def test_polynomial(power):
    for step in range(101):
        done = max(0, step - 10) / 90
        expected = 3 * (0.1 + 0.9 * step / 10) if step < 10 else 0.3 + 2.7 * (1 - done) ** power
        ours = learning_rate(step / 100, 3.0, warmup=0.1, warmup_lr=0.1, decay="polynomial", min_lr=0.1, power=power)
        assert ours == pytest.approx(expected, rel=1e-9), step


def test_an_unknown_decay_is_a_sentence():
    with pytest.raises(ValueError, match="decay=poly must be cosine, polynomial"):
        learning_rate(0.5, 1.0, decay="poly")
