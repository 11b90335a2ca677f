"""The head that class predictions come from: which one it is, and that a probe folded into it is still the probe."""

import pytest
import torch

from harmonize.evaluation.classifier import Head, classifier, fit_head, linear_head
from harmonize.evaluation.features import extract
from harmonize.functional.linear_probe import fit_linear_probe
from harmonize.types import ConfigError, FeatureSpec
from tests.evaluation.benches import make_bench, patterns
from tests.helpers import random_batch, tiny_encoder

SPECS = [FeatureSpec(2, "cls"), FeatureSpec(1, "patch_mean", False)]


def given_head(num_classes, encoder):
    torch.manual_seed(1)
    width = encoder.spec.width
    return linear_head(
        encoder.spec, SPECS[:1], torch.randn(num_classes, width), torch.randn(num_classes), "from elsewhere"
    )


def test_the_folded_probe_is_the_probe(tmp_path):
    bench = make_bench(tmp_path)
    head = fit_head(bench, SPECS, l2=1e-2)
    sides = extract(bench.encoder, bench.make_data().feature_loader("train", None, 8), SPECS, "cpu")
    x = torch.cat([side.x for side in sides], dim=1)
    probe = fit_linear_probe(x, sides[0].label, 3, l2=1e-2)
    assert probe.std.min() < 0.5  # standardisation matters
    images = random_batch(9).image
    pooled = torch.cat([one.x for one in extract(bench.encoder, [random_batch(9)], SPECS, "cpu")], dim=1)
    torch.testing.assert_close(head.logits(bench.encoder, images).double(), probe.logits(pooled), rtol=1e-5, atol=1e-5)
    assert head.origin == "linear probe on 40 training images"
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_images_without_a_label_take_no_part(tmp_path):
    few = patterns(num_train=60)
    unlabelled = few.relabelled("train", lambda labels: labels * (torch.arange(60).numpy() < 40) - (
        torch.arange(60).numpy() >= 40
    ))  # fmt: skip
    head = fit_head(make_bench(tmp_path / "a", unlabelled), SPECS)
    expected = fit_head(make_bench(tmp_path / "b", few.only("train", slice(40))), SPECS)
    assert head.origin == "linear probe on 40 training images"
    torch.testing.assert_close(head.linear.weight, expected.linear.weight, rtol=1e-3, atol=1e-4)
    none = few.relabelled("train", lambda labels: labels * 0 - 1)
    with pytest.raises(ConfigError, match="no readable training image with a label"):
        fit_head(make_bench(tmp_path / "c", none), SPECS)


def test_labels_of_ones_own(tmp_path):
    """By position in the training split, also where only some of the images are fitted on."""
    bench = make_bench(tmp_path, num_train=20)
    own = (torch.arange(40) // 2) % 2  # of the images taken, 0, 2, 4, ...: alternating
    head = fit_head(bench, SPECS, labels=own, num_classes=2)
    (x,) = extract(bench.encoder, bench.data.feature_loader("train", list(range(0, 40, 2)), 8), SPECS[:1], "cpu")
    assert head.num_classes == 2
    alone = fit_head(bench, SPECS[:1], labels=own, num_classes=2)
    expected = fit_linear_probe(x.x, torch.arange(20) % 2, 2)
    torch.testing.assert_close(alone(x.x).double(), expected.logits(x.x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "expected"), [("auto", "given"), ("checkpoint", "given"), ("probe", "fitted")])
def test_the_head_that_is_asked_for(tmp_path, kind, expected):
    encoder = tiny_encoder().eval()
    given = given_head(3, encoder)
    head = classifier(make_bench(tmp_path, encoder=encoder, head=given), kind, SPECS, 1e-2)
    assert (head is given) == (expected == "given")
    if expected == "fitted":
        assert head.features == SPECS
        again = fit_head(make_bench(tmp_path, encoder=encoder), SPECS, 1e-2)
        assert torch.equal(head.linear.weight, again.linear.weight)


@pytest.mark.parametrize("num", [None, 4])
def test_without_a_fitting_head_it_is_a_probe_or_a_sentence(tmp_path, num):
    encoder = tiny_encoder().eval()
    bench = make_bench(tmp_path, encoder=encoder, head=None if num is None else given_head(num, encoder))
    assert classifier(bench, "auto", SPECS).origin == "linear probe on 40 training images"
    has = "none" if num is None else "one for 4 classes"
    with pytest.raises(ConfigError, match=rf"eval\.head=checkpoint .* 3 classes of the data; this one has {has}"):
        classifier(bench, "checkpoint", SPECS)


def test_what_a_head_computes(tmp_path):
    encoder, images = tiny_encoder().eval(), random_batch(5).image
    for norm in (False, True):
        torch.manual_seed(0)
        head = Head(encoder.spec, SPECS, 7, norm).eval()
        pooled = torch.cat([one.x for one in extract(encoder, [random_batch(5)], SPECS, "cpu")], dim=1)
        x = torch.nn.functional.layer_norm(pooled, [48], eps=1e-6) if norm else pooled
        torch.testing.assert_close(head.logits(encoder, images), x @ head.linear.weight.T + head.linear.bias)
    assert not head.logits(encoder, images).requires_grad


def test_data_without_labels_are_a_sentence_before_anything_is_computed(tmp_path):
    dataset = patterns()
    dataset.classes = None
    with pytest.raises(ConfigError, match="no labels"):
        fit_head(make_bench(tmp_path, dataset), SPECS)
    assert list(tmp_path.iterdir()) == []
