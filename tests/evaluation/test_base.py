"""The bench: features are computed once, by all ranks together, and nothing changes the encoder."""

import time
from dataclasses import astuple

import pytest
import torch

from harmonize.data.module import DataModule
from harmonize.evaluation import base
from harmonize.evaluation.base import frozen
from harmonize.evaluation.features import extract
from harmonize.functional.distributed import rank
from harmonize.functional.hashing import weights_hash
from harmonize.types import ConfigError, FeatureSpec
from tests.evaluation.benches import count_images, killed_after, make_bench, on_ranks, patterns
from tests.helpers import tiny_encoder

SPECS = [FeatureSpec(-1, "cls"), FeatureSpec(1, "patch_mean", False)]


def directly(bench, split, specs, indices=None, **options):
    data = bench.make_data(**options)
    return extract(bench.encoder, data.feature_loader(split, indices, 5), specs, "cpu")


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.spec == other.spec
        assert one.index.tolist() == other.index.tolist()
        assert one.label.tolist() == other.label.tolist()
        torch.testing.assert_close(one.x, other.x, rtol=1e-5, atol=1e-6)


def test_features_are_those_of_the_images_in_their_order(tmp_path):
    bench = make_bench(tmp_path)
    for split, num in (("train", 40), ("val", 30)):
        found = bench.features(split, SPECS)
        assert_same(found, directly(bench, split, SPECS))
        assert found[0].index.tolist() == list(range(num))
        assert found[0].label.tolist() == bench.dataset.parts[split][1].tolist()


@pytest.mark.parametrize("part", [7, 40, 8192])
def test_features_are_computed_once(tmp_path, monkeypatch, part):
    monkeypatch.setattr(base, "PART", part)
    bench = make_bench(tmp_path)
    seen = count_images(monkeypatch, bench.encoder)
    first = bench.features("train", SPECS)
    assert sum(seen) == 40
    for again in (bench, make_bench(tmp_path, encoder=bench.encoder)):
        second = again.features("train", SPECS)
        assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(
            astuple(x)[:3], astuple(y)[:3], strict=True
        ))  # fmt: skip
    assert sum(seen) == 40
    assert_same(first, directly(bench, "train", SPECS))


def test_only_what_is_missing_is_computed_and_in_one_pass(tmp_path, monkeypatch):
    bench = make_bench(tmp_path)
    seen = count_images(monkeypatch, bench.encoder)
    bench.features("val", SPECS[:1])
    assert sum(seen) == 30
    both = bench.features("val", [SPECS[1], SPECS[0], SPECS[1]])
    assert sum(seen) == 60
    assert_same(both, directly(bench, "val", [SPECS[1], SPECS[0], SPECS[1]]))
    bench.features("val", [FeatureSpec(2, "cls")])  # the last block by its number
    assert sum(seen) == 90 - 30 + 30  # of the direct pass alone


def test_everything_that_makes_another_feature_is_computed_anew(tmp_path, monkeypatch):
    bench = make_bench(tmp_path, patterns(30, 30))
    seen = count_images(monkeypatch, bench.encoder)
    bilinear = {"eval_crop": 0.5, "eval_interpolation": "bilinear"}
    variants = {
        "first": lambda: bench.features("val", SPECS[:1]),
        "pool": lambda: bench.features("val", [FeatureSpec(-1, "patch_mean")]),
        "norm": lambda: bench.features("val", [FeatureSpec(-1, "cls", False)]),
        "layer": lambda: bench.features("val", [FeatureSpec(1, "cls")]),
        "split": lambda: bench.features("train", SPECS[:1]),
        "view": lambda: bench.features("val", SPECS[:1], bench.make_data(**bilinear), "bilinear"),
        "images": lambda: make_bench(tmp_path, bench.dataset, bench.encoder, num_val=10).features("val", SPECS[:1]),
    }
    found = {}
    for name, make in variants.items():
        before = len(seen)
        (found[name],) = make()
        assert len(seen) > before, name
    assert found["images"].index.tolist() == list(range(0, 30, 3))
    assert_same([found["images"]], directly(bench, "val", SPECS[:1], list(range(0, 30, 3))))
    assert_same([found["view"]], directly(bench, "val", SPECS[:1], **bilinear))
    for name in ("pool", "norm", "layer", "split"):
        assert_same([found[name]], directly(bench, "train" if name == "split" else "val", [found[name].spec]))
    before = len(seen)
    for make in variants.values():
        make()
    assert len(seen) == before


def test_a_kill_loses_the_part_that_is_being_made(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "PART", 10)
    encoder = tiny_encoder().eval()
    seen = count_images(monkeypatch, encoder)
    whole = make_bench(tmp_path / "whole", encoder=encoder).features("train", SPECS)
    seen.clear()

    with pytest.raises(KeyboardInterrupt):
        make_bench(tmp_path / "part", encoder=encoder, track=killed_after(2)).features("train", SPECS)
    assert sum(seen) == 20
    forward = encoder.iter_blocks

    def killed_within(images):
        if sum(seen) >= 30:
            raise KeyboardInterrupt
        return forward(images)

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "iter_blocks", killed_within)
        with pytest.raises(KeyboardInterrupt):
            make_bench(tmp_path / "part", encoder=encoder, batch_size=5).features("train", SPECS)
    assert sum(seen) == 30
    resumed = make_bench(tmp_path / "part", encoder=encoder).features("train", SPECS)
    assert sum(seen) == 40
    assert_same(resumed, whole)
    assert not list(tmp_path.rglob("*.tmp"))


def test_progress_is_shown_of_parts_or_of_batches(tmp_path, monkeypatch):
    tracked = []

    def track(items, what):
        tracked.append((what, len(items)))
        return items

    make_bench(tmp_path, track=track).features("train", SPECS)
    monkeypatch.setattr(base, "PART", 16)
    make_bench(tmp_path, track=track).features("train", SPECS)
    assert tracked == [("features, train", 3), ("features, train", 3)]  # 3 batches of 16, then 3 parts


def change_parameter(encoder):
    encoder.blocks[0].mlp.fc1.bias.data[0] += 1e-6


def change_buffer(encoder):
    encoder.counter += 1


def train_mode(encoder):
    encoder.blocks[1].train()


@pytest.mark.parametrize(
    ("harm", "words"), [(change_parameter, "changed"), (change_buffer, "changed"), (train_mode, "train mode")]
)
def test_what_changes_a_frozen_encoder_is_noticed(harm, words):
    encoder = tiny_encoder().eval()
    encoder.register_buffer("counter", torch.zeros(1))
    with frozen(encoder):
        pass
    with pytest.raises(RuntimeError, match=words), frozen(encoder):
        harm(encoder)


def test_an_encoder_in_train_mode_is_no_frozen_one():
    with pytest.raises(RuntimeError, match="eval mode"), frozen(tiny_encoder().train()):
        pass


def test_features_are_frozen(tmp_path, monkeypatch):
    bench = make_bench(tmp_path)
    monkeypatch.setattr(base, "extract", lambda encoder, *_: change_parameter(encoder) or [])
    with pytest.raises((RuntimeError, FileNotFoundError)):
        bench.features("val", SPECS)


def test_the_hash_of_a_state_sees_names_types_shapes_and_values():
    state = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    others = [
        {"c": state["a"], "b": state["b"]},
        state | {"a": torch.zeros(3, 2)},
        state | {"a": torch.zeros(2, 3, dtype=torch.int32)},
        state | {"a": torch.zeros(2, 3).index_put_((torch.tensor(1), torch.tensor(2)), torch.tensor(1e-30))},
        {"b": state["b"]},
    ]
    assert len({weights_hash(one) for one in (state, *others)}) == 6
    assert weights_hash(dict(reversed(state.items()))) == weights_hash(state)
    assert weights_hash({"a": torch.zeros(3, 2).T, "b": state["b"]}) == weights_hash(state)


def measure(batch):
    """Two numbers that depend on the image, and one on its position."""
    return torch.stack([batch.image.mean((1, 2, 3)), batch.image.std((1, 2, 3)), batch.index.float()], dim=1).double()


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_row_for_each_image(tmp_path, batch_size):
    bench = make_bench(tmp_path, patterns(num_val=11))
    data = bench.make_data()
    rows, label, index = bench.per_image(data.feature_loader("val", None, batch_size), measure, "x")
    expected = []
    for i in range(11):
        (batch,) = data.feature_loader("val", [i], 1)
        expected.append(measure(batch)[0])
    torch.testing.assert_close(rows, torch.stack(expected))
    assert index.tolist() == list(range(11))
    assert label.tolist() == bench.dataset.parts["val"][1].tolist()


def both(folder, num_val):
    bench = make_bench(folder, patterns(num_train=9, num_val=num_val))
    rows = bench.per_image(bench.data.feature_loader("val", None, 2), measure, "x")
    features = [bench.features(split, SPECS) for split in ("train", "val", "train")]
    return rows, features


@pytest.mark.parametrize("num_val", [7, 1])
def test_two_ranks_give_what_one_gives(tmp_path, num_val):
    """Numbers of images that two do not divide; one rank has none at all."""
    ranks = on_ranks(tmp_path / "ranks", lambda: both(tmp_path / "two", num_val))
    alone_rows, alone_features = both(tmp_path / "one", num_val)
    assert alone_rows[2].tolist() == list(range(num_val))
    for rows, features in ranks:
        for found, expected in zip(rows, alone_rows, strict=True):
            torch.testing.assert_close(found, expected)
        for found, expected in zip(features, alone_features, strict=True):
            assert_same(found, expected)


def test_one_rank_reads_what_two_have_stored(tmp_path, monkeypatch):
    on_ranks(tmp_path / "ranks", lambda: both(tmp_path / "store", 7))
    bench = make_bench(tmp_path / "store", patterns(num_train=9, num_val=7))
    seen = count_images(monkeypatch, bench.encoder)
    bench.features("train", SPECS)
    assert seen == []


def test_states_are_kept(tmp_path):
    bench = make_bench(tmp_path)
    assert bench.load_state("a") is None
    state = {"epoch": 3, "weights": {"x": torch.arange(3.0)}, "losses": [0.5, None], "name": "y"}
    bench.save_state("a", state)
    found = make_bench(tmp_path).load_state("a")
    assert found["weights"]["x"].tolist() == [0, 1, 2]
    assert {k: v for k, v in found.items() if k != "weights"} == {k: v for k, v in state.items() if k != "weights"}
    assert bench.load_state("b") is None


def late_loading(folder):
    """One rank comes late to what the other is about to overwrite."""
    bench = make_bench(folder)
    time.sleep(0.5 * rank())
    found = bench.load_state("a")
    bench.save_state("a", {"epoch": 3})
    return found


def test_all_ranks_load_what_was_there_before_any_went_on(tmp_path):
    assert on_ranks(tmp_path / "ranks", lambda: late_loading(tmp_path / "store")) == [None, None]


def test_data_without_labels_are_a_sentence(tmp_path):
    dataset = patterns()
    dataset.classes = None
    with pytest.raises(ConfigError, match="two classes or more"):
        _ = make_bench(tmp_path, dataset).classes
    assert make_bench(tmp_path).classes == ["class0", "class1", "class2"]
    assert isinstance(make_bench(tmp_path).data, DataModule)
