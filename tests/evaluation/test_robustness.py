"""Accuracy under other conditions, on folders made from the validation images themselves."""

import math

import numpy as np
import pytest
from PIL import Image

from harmonize.data.views import Evaluation
from harmonize.evaluation.classifier import classifier
from harmonize.evaluation.linear_probe import ConvergedProbe
from harmonize.evaluation.robustness import Robustness
from harmonize.types import ConfigError, FeatureSpec
from tests.evaluation.benches import make_bench, on_ranks, patterns

FEATURE = FeatureSpec(2, "cls_patch_mean")


def write(folder, dataset, rows=None, change=lambda image: image):
    """Validation images as FOLDER/CLASS/00007.png."""
    split = dataset.split("val")
    for i in range(len(split)) if rows is None else rows:
        image, label = split.load(i)
        place = folder / dataset.classes[label]
        place.mkdir(parents=True, exist_ok=True)
        change(image).save(place / f"{i:05}.png")


def dark(image):
    return image.point(lambda value: value // 4)


def top1(bench, rows, classes=None, change=lambda image: image, crop=1.0):
    """Accuracy on some validation images, one by one, among some of the classes."""
    head = classifier(bench, "probe", [FEATURE])
    classes = range(len(bench.classes)) if classes is None else classes
    right = []
    for i in rows:
        image, label = bench.dataset.split("val").load(i)
        view = Evaluation(16, crop)(change(image))
        scores = head.logits(bench.encoder, view[None])[0]
        right.append(max(classes, key=lambda c: scores[c].item()) == label)
    return float(np.mean(right))


def test_uncorrupted_images_have_the_clean_accuracy(tmp_path):
    """In the layout of ImageNet-C, and seen whole, whatever the data's own crop is."""
    bench = make_bench(tmp_path)
    for corruption in ("fog", "frost"):
        for severity in ("1", "3"):
            write(tmp_path / "set" / corruption / severity, bench.dataset)
    results = Robustness(str(tmp_path / "set")).run(bench)
    (plain,) = ConvergedProbe().run(bench)
    places = [(row.series, row.axis, row.at) for row in results]
    assert places == [
        ("clean", "", None),
        ("fog", "severity", 1.0),
        ("fog", "severity", 3.0),
        ("frost", "severity", 1.0),
        ("frost", "severity", 3.0),
        ("all conditions", "", None),
    ]
    assert {row.value for row in results} == {plain.value}
    assert [row.num_images for row in results] == [30] * 5 + [120]
    error = math.sqrt(plain.value * (1 - plain.value) / 29)
    assert [row.error for row in results] == pytest.approx([error] * 6)  # the same images
    assert {row.feature for row in results} == {str(FEATURE)}
    assert {row.note for row in results} == {"linear probe on 40 training images"}


def test_each_condition_is_scored_on_its_own_images(tmp_path):
    bench = make_bench(tmp_path, patterns(60, 30, visible=0.5))
    some = [i for i in range(30) if i % 4]
    write(tmp_path / "set" / "contrast" / "1", bench.dataset)
    write(tmp_path / "set" / "contrast" / "2", bench.dataset, some, dark)
    clean, first, second, everything = Robustness(str(tmp_path / "set")).run(bench)
    assert first.value == clean.value == top1(bench, range(30))
    assert second.value == top1(bench, some, change=dark)
    assert second.value != first.value
    assert (second.num_images, everything.num_images) == (len(some), 30 + len(some))
    assert everything.value == pytest.approx((first.value + second.value) / 2)
    assert everything.error is None  # other images


def test_corrupted_images_are_seen_whole(tmp_path):
    bench = make_bench(tmp_path, data_options={"eval_crop": 0.5})
    write(tmp_path / "set" / "fog" / "1", bench.dataset)
    write(tmp_path / "plain", bench.dataset)
    clean, fog = Robustness(str(tmp_path / "set")).run(bench)
    _, plain = Robustness(str(tmp_path / "plain")).run(bench)
    assert plain.value == clean.value == top1(bench, range(30), crop=0.5)
    assert fog.value == top1(bench, range(30)) != clean.value


@pytest.mark.parametrize("inner", ["", "val"])
def test_some_of_the_classes_restrict_the_decision(tmp_path, inner):
    bench = make_bench(tmp_path, patterns(60, 60, 5))
    labels = bench.dataset.parts["val"][1]
    rows = [i for i in range(60) if labels[i] in (1, 4)]
    write(tmp_path / "set" / inner, bench.dataset, rows, dark)
    clean, other = Robustness(str(tmp_path / "set")).run(bench)
    assert clean.value == top1(bench, rows, (1, 4)) > top1(bench, rows)
    assert other.value == top1(bench, rows, (1, 4), dark)
    assert clean.num_images == other.num_images == len(rows)
    assert (other.series, other.axis, other.at) == ("set", "", None)
    assert clean.note == other.note == "linear probe on 60 training images; among the 2 classes that occur"


def test_two_ranks_give_what_one_gives(tmp_path):
    dataset = patterns(20, 13)
    write(tmp_path / "set" / "fog" / "1", dataset)
    write(tmp_path / "set" / "fog" / "2", dataset, [3])  # one rank has nothing to do

    def run(name):
        return Robustness(str(tmp_path / "set")).run(make_bench(tmp_path / name, dataset))

    ranks = on_ranks(tmp_path / "ranks", lambda: [row.value for row in run("two")])
    assert ranks == [[row.value for row in run("one")]] * 2


@pytest.mark.parametrize(("num_val", "num"), [(10, 10), (29, 29), (100, 30)])
def test_as_many_images_as_asked_for(tmp_path, num_val, num):
    bench = make_bench(tmp_path, num_val=num_val)
    write(tmp_path / "set", bench.dataset)
    clean, other = Robustness(str(tmp_path / "set")).run(bench)
    assert (clean.num_images, other.num_images) == (min(num_val, 30), num)


def test_unreadable_images_are_left_out(tmp_path):
    bench = make_bench(tmp_path)
    write(tmp_path / "set", bench.dataset)
    broken = sorted((tmp_path / "set").rglob("*.png"))[:3]
    for path in broken:
        path.write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="skipped"):
        _, other = Robustness(str(tmp_path / "set")).run(bench)
    rows = sorted({*range(30)} - {int(path.stem) for path in broken})
    assert other.num_images == 27
    assert other.value == top1(bench, rows)


def test_mistakes_are_sentences(tmp_path):
    bench = make_bench(tmp_path)
    with pytest.raises(ConfigError, match=r"eval\.root"):
        Robustness().run(bench)
    with pytest.raises(ConfigError, match=r"eval\.root=.*nowhere"):
        Robustness(str(tmp_path / "nowhere")).run(bench)
    (tmp_path / "other" / "cat").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "other" / "cat" / "a.png")
    with pytest.raises(ConfigError, match="not among the 3 classes of the head, such as cat"):
        Robustness(str(tmp_path / "other")).run(bench)
