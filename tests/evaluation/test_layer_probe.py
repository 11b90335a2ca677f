"""Probes of every block: what they score, on which images, with which error."""

import math
from dataclasses import replace

import pytest
import torch

from harmonize.evaluation.features import Features, extract
from harmonize.evaluation.knn import knn_accuracy
from harmonize.evaluation.layer_probe import LayerProbe
from harmonize.evaluation.linear_probe import linear_probe_accuracy
from harmonize.types import ConfigError, FeatureSpec
from tests.evaluation.benches import make_bench
from tests.helpers import random_batch, tiny_encoder


def sides(encoder, specs, num_train=40, num_val=30):
    """Features of all blocks, of labelled noise whose brightness gives a label away half of the time."""
    batches = []
    for seed, num in ((1, num_train), (2, num_val)):
        batch = random_batch(num, seed=seed)
        shift = batch.label * (torch.arange(num) % 4 < 2)
        batches.append(replace(batch, image=batch.image + 2.0 * shift.view(-1, 1, 1, 1)))
    return [extract(encoder, [batch], specs, "cpu") for batch in batches]


@pytest.mark.parametrize(
    ("pool", "norm"), [("cls", True), ("patch_mean", True), ("patch_mean", False), ("cls_patch_mean", True)]
)
def test_each_block_is_scored_by_the_protocols_on_features_of_its_own(pool, norm):
    encoder = tiny_encoder(depth=3).eval()
    probe = LayerProbe(pool=pool, norm=norm, k=5, temperature=0.1, l2=1e-2)
    specs = probe.specs(encoder.spec)
    assert specs == [FeatureSpec(layer, pool, norm) for layer in (1, 2, 3)]
    found = probe.score(*sides(encoder, specs), 2)
    assert {*found.curves} == {"layer_probe_linear", "layer_probe_knn"}
    linear, knn = found.curves["layer_probe_linear"], found.curves["layer_probe_knn"]
    assert linear.layer == knn.layer == [1, 2, 3]
    for i, spec in enumerate(specs):
        (train,), (val,) = sides(encoder, [spec])
        assert linear.value[i] == linear_probe_accuracy(train, val, 2, 1e-2)
        assert knn.value[i] == knn_accuracy(train, val, 2, 5, 0.1)
    assert len({*linear.value, *knn.value}) > 1
    for curve in (linear, knn):
        assert curve.error == pytest.approx([math.sqrt(p * (1 - p) / 30) for p in curve.value], abs=1e-15)
        assert f"{pool}, {'final norm' if norm else 'no norm'}, clean view" in curve.quantity.definition


def planted(num, seed, layer, separable):
    """Two classes: twenty standard deviations apart, or none."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(num) % 2
    x = torch.randn(num, 6, generator=generator)
    x[:, 0] += (20.0 * label - 10.0) * separable
    return Features(x, label, torch.arange(num), FeatureSpec(layer, "patch_mean"))


def test_the_block_that_knows_the_classes_is_found():
    train, val = ([planted(400, seed + i, i, i == 2) for i in (1, 2, 3)] for seed in (10, 20))
    for curve in LayerProbe().score(train, val, 2).curves.values():
        assert curve.value[1] == 1.0
        assert curve.error[1] == 0.0
        for i in (0, 2):
            assert abs(curve.value[i] - 0.5) < 4 * 0.025  # four standard errors of 400 coin tosses
            assert curve.error[i] == pytest.approx(0.025, rel=0.03)


def test_labels_that_change_places_are_noticed():
    """A probe that is fitted and scored on the same images would not."""
    train, val = [planted(60, 1, 1, True)], [planted(60, 2, 1, True)]
    swapped = [replace(val[0], label=1 - val[0].label)]
    for curve in LayerProbe().score(train, swapped, 2).curves.values():
        assert curve.value == [0.0]


@pytest.mark.parametrize("num_images", [7, 20, 500])
def test_no_more_than_so_many_images_evenly_spaced(num_images):
    train, val = [planted(40, 1, 1, False)], [planted(50, 2, 1, False)]
    found = LayerProbe(num_images=num_images, k=3).score(train, val, 2)
    few = []
    for (features,) in (train, val):
        num = min(num_images, len(features.x))
        rows = torch.tensor([len(features.x) * i // num for i in range(num)])
        few.append(Features(features.x[rows], features.label[rows], features.index[rows], features.spec))
    linear, knn = found.curves["layer_probe_linear"], found.curves["layer_probe_knn"]
    assert linear.value == [linear_probe_accuracy(*few, 2)]
    assert knn.value == [knn_accuracy(*few, 2, 3)]
    for curve in (linear, knn):
        (p,), (error,) = curve.value, curve.error
        assert error == pytest.approx(math.sqrt(p * (1 - p) / len(few[1].x)))


def test_images_without_a_label_count_neither_as_right_nor_for_the_error():
    train, val = [planted(40, 1, 1, False)], [planted(50, 2, 1, False)]
    label = val[0].label.clone()
    label[:10] = -1
    found = LayerProbe(k=3).score(train, [replace(val[0], label=label)], 2).curves["layer_probe_knn"]
    kept = Features(val[0].x[10:], val[0].label[10:], val[0].index[10:], val[0].spec)
    expected = knn_accuracy(train[0], kept, 2, 3)
    assert found.value == [expected]
    assert found.error == pytest.approx([math.sqrt(expected * (1 - expected) / 40)])


def test_the_same_feature_for_fitting_and_for_scoring():
    with pytest.raises(ValueError, match=r"layer=1 .*layer=2 "):
        LayerProbe().score([planted(20, 1, 1, True)], [planted(20, 2, 2, True)], 2)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        LayerProbe().score([planted(20, 1, 1, True)], [planted(20, 2, 1, True), planted(20, 2, 2, True)], 2)


def test_no_label_at_all_is_a_sentence():
    none = replace(planted(20, 2, 1, True), label=torch.full((20,), -1))
    with pytest.raises(ConfigError, match=r"data\.root .* val images"):
        LayerProbe().score([planted(20, 1, 1, True)], [none], 2)


@pytest.mark.parametrize(("pool", "norm"), [("patch_mean", True), ("cls", False)])
def test_as_an_evaluation_it_gives_the_curves_as_rows(tmp_path, pool, norm):
    bench = make_bench(tmp_path)
    protocol = LayerProbe(pool=pool, norm=norm, num_images=None, k=3, l2=0.1)
    data, specs = bench.make_data(), protocol.specs(bench.spec)
    sides = [extract(bench.encoder, data.feature_loader(s, None, 8), specs, "cpu") for s in ("train", "val")]
    curves = protocol.score(*sides, 3).curves
    rows = protocol.run(bench)
    assert [(row.series, row.axis, row.at) for row in rows] == [
        (series, "block", layer) for series in ("linear", "knn") for layer in (1, 2)
    ]
    for series in ("linear", "knn"):
        curve = curves[f"layer_probe_{series}"]
        found = [(row.value, row.error) for row in rows if row.series == series]
        assert found == list(zip(curve.value, curve.error, strict=True))
    assert {(row.metric, row.num_images) for row in rows} == {("top1", 30)}
    assert f"pool={pool} norm={'final' if norm else 'none'}" in rows[0].feature
