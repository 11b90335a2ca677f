"""k-NN as a protocol: every setting as if it were alone, which are left out, and what is refused."""

import math

import numpy as np
import pytest
import torch

from harmonize.evaluation.features import extract
from harmonize.evaluation.knn import KNN, knn_accuracy
from harmonize.types import ConfigError, FeatureSpec
from tests.evaluation.benches import make_bench, patterns

K, TEMPERATURES = (5, 1, 17), (0.07, 0.5)


def sides(bench, spec):
    data = bench.make_data()
    return [extract(bench.encoder, data.feature_loader(s, None, 8), [spec], "cpu")[0] for s in ("train", "val")]


@pytest.mark.parametrize("feature", [{"layer": -1, "pool": "cls"}, {"layer": 1, "pool": "patch_mean", "norm": False}])
def test_each_setting_is_scored_as_it_is_alone(tmp_path, feature):
    bench = make_bench(tmp_path, patterns(60, 30, 5))
    results = KNN(feature, K, TEMPERATURES).run(bench)
    spec = FeatureSpec(**feature | {"layer": feature["layer"] % 3})
    expected = {
        f"k={k}, temperature={t:g}": knn_accuracy(*sides(bench, spec), 5, k, t) for k in K for t in TEMPERATURES
    }
    assert {row.series: row.value for row in results} == expected
    assert next(iter(expected)) == results[0].series  # the first of each is the headline
    assert len({*expected.values()}) > 2
    for row in results:
        assert (row.metric, row.num_images, row.feature) == ("top1", 30, str(spec))
        assert row.error == pytest.approx(math.sqrt(row.value * (1 - row.value) / 30))


def test_memory_changes_nothing(tmp_path):
    bench = make_bench(tmp_path)
    assert KNN(k=(3,), memory=1).run(bench) == KNN(k=(3,)).run(bench)


def test_more_neighbours_than_images_are_left_out(tmp_path):
    said = []
    results = KNN(k=(200, 10, 41, 40)).run(make_bench(tmp_path, say=said.append))
    assert [row.series for row in results] == ["k=10, temperature=0.07", "k=40, temperature=0.07"]
    assert said == ["k = 41, 200 is left out: there are 40 images."]
    with pytest.raises(ConfigError, match=r"eval\.k=\[41, 200\] must be at most 40, the number of training images"):
        KNN(k=(41, 200)).run(make_bench(tmp_path))


def test_one_number_is_a_list_of_one(tmp_path):
    bench = make_bench(tmp_path)
    assert KNN(k=5, temperature=0.1).run(bench) == KNN(k=[5], temperature=[0.1]).run(bench)


@pytest.mark.parametrize(("num_classes", "metrics"), [(10, ["top1"]), (11, ["top1", "top5"])])
def test_the_best_five_of_more_than_ten_classes(tmp_path, num_classes, metrics):
    bench = make_bench(tmp_path, patterns(60, 44, num_classes))
    results = KNN(k=[8]).run(bench)
    assert [row.metric for row in results] == metrics
    if len(metrics) > 1:
        assert results[0].value < results[1].value < 1
        train, val = sides(bench, FeatureSpec(2, "cls"))
        similarity = torch.nn.functional.normalize(val.x) @ torch.nn.functional.normalize(train.x).T
        right = 0
        for row, label in zip(similarity, val.label.tolist(), strict=True):
            votes = [0.0] * num_classes
            for i in row.argsort(descending=True)[:8].tolist():
                votes[train.label[i]] += math.exp(row[i].item() / 0.07)
            right += label in sorted(range(num_classes), key=lambda c: (-votes[c], c))[:5]
        assert results[1].value == pytest.approx(right / 44)


def hide(labels):
    return np.where(np.arange(len(labels)) % 3 == 0, -1, labels)


def test_images_without_a_label_take_no_part(tmp_path):
    whole = patterns()
    bench = make_bench(tmp_path / "a", whole.relabelled("train", hide).relabelled("val", hide))
    seen = {name: np.flatnonzero(np.arange(num) % 3) for name, num in (("train", 40), ("val", 30))}
    alone = make_bench(tmp_path / "b", whole.only("train", seen["train"]).only("val", seen["val"]))
    results = KNN(k=(5, 26, 27)).run(bench)
    assert results == KNN(k=(5, 26)).run(alone)
    assert {row.num_images for row in results} == {20}


def test_as_many_images_as_asked_for(tmp_path):
    whole = patterns()
    few = whole.only("train", slice(None, None, 4)).only("val", slice(None, None, 2))
    results = KNN(k=[5]).run(make_bench(tmp_path / "a", whole, num_train=10, num_val=15))
    assert results == KNN(k=[5]).run(make_bench(tmp_path / "b", few))
    assert results[0].num_images == 15
