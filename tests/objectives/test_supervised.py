"""Supervised learning: against the formula, image by image; images without a label; what it refuses."""

import math

import pytest
import torch

from harmonize.cli import main
from harmonize.objectives.supervised import Supervised
from harmonize.types import Progress
from tests.helpers import random_batch, tiny_encoder
from tests.training.test_run import images, overrides, run  # noqa: F401


def batch():
    found = random_batch()
    found.views = {"supervised": found.views["mim"]}
    found.label = torch.tensor([0, 2, 1, -1, 2, -1])
    return found


@pytest.mark.parametrize("pool", ["cls", "patch_mean"])
def test_it_is_the_smoothed_cross_entropy_of_the_labelled_images(pool):
    encoder, smoothing = tiny_encoder(), 0.1
    objective = Supervised(encoder, num_classes=3, smoothing=smoothing, pool=pool)
    output = objective(encoder, batch(), Progress(0, 1))
    losses, right = [], 0
    for image, label in zip(batch().views["supervised"][0], batch().label.tolist(), strict=True):
        tokens = encoder(image[None])[0].double().detach()
        feature = tokens[0] if pool == "cls" else tokens[1:].mean(0)
        weight, bias = (p.detach().double() for p in objective.classifier.parameters())
        scores = [float(w @ feature + b) for w, b in zip(weight, bias, strict=True)]
        logs = [s - math.log(sum(map(math.exp, scores))) for s in scores]
        if label >= 0:
            losses.append(-(1 - smoothing) * logs[label] - smoothing * sum(logs) / 3)
            right += max(range(3), key=scores.__getitem__) == label
    assert output.loss.item() == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert output.stats["supervised_accuracy"].item() == pytest.approx(right / 4)
    assert set(output.terms) == {"supervised"}
    output.loss.backward()
    unused = [n for m in (encoder, objective) for n, p in m.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused


def test_no_label_is_no_loss():
    encoder = tiny_encoder()
    none = batch()
    none.label = torch.full_like(none.label, -1)
    assert Supervised(encoder, 3)(encoder, none, Progress(0, 1)).loss.item() == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"num_classes": 1}, "num_classes=1"), ({"smoothing": 1}, "smoothing=1"), ({"pool": "max"}, "pool=max")],
)
def test_values_that_mean_nothing(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Supervised(tiny_encoder(), **options)


def without_parts(overrides):  # noqa: F811
    return [o for o in overrides if not o.startswith("loss.")]


def test_a_run_learns_the_two_colours(overrides):  # noqa: F811
    more = ["loss=supervised", "loss.num_classes=2", "trainer.max_epochs=12", "optimizer.lr=3e-2"]
    metrics = run(*without_parts(overrides), *more)
    assert metrics["val/linear_top1"] == 1
    certain = -0.95 * math.log(0.95) - 0.05 * math.log(0.05)  # the least that smoothed labels allow
    assert certain < metrics["epoch/loss"] < 0.6 < math.log(2)


def test_data_without_labels_and_too_few_outputs(overrides, images, capsys):  # noqa: F811
    plain = without_parts(overrides)
    assert main(["train", *plain, "loss=supervised", f"data.root={images / 'red'}"]) == 2
    assert "data has no labels" in capsys.readouterr().err
    assert main(["train", *plain, "loss=supervised", "loss.num_classes=1"]) == 2
    assert "loss.num_classes must be a whole number of at least 2" in capsys.readouterr().err
