"""Linear probes: the papers' training written out again, grids, the choice among heads, interruptions and ranks."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch

from harmonize.config import compose, instantiate
from harmonize.data.supervised import CropFlip
from harmonize.evaluation.base import frozen
from harmonize.evaluation.features import extract, pooled_features
from harmonize.evaluation.linear_probe import ConvergedProbe, LinearProbe, linear_probe_accuracy
from harmonize.functional.probe_heads import HeadStack
from harmonize.functional.seeding import mix_int
from harmonize.types import ConfigError, FeatureSpec
from tests.evaluation.benches import make_bench, on_ranks, patterns

LAST = [{"layer": -1, "pool": "cls"}]
SPEC = FeatureSpec(2, "cls")
AUGMENT = {"crop_scale": [0.4, 1.0], "interpolation": "bilinear"}


def probe(**settings):
    return LinearProbe(**{"features": [LAST], "lrs": [30.0], "epochs": 4, "batch_size": 16} | settings)


def stored(bench, grid=0):
    """Weights of the heads on one feature, as they are when training has ended."""
    return bench.load_state("heads")[str(grid)]


def sides(bench, spec=SPEC, **options):
    """Features of all training and validation images, without the cache."""
    data = bench.make_data(**options)
    return [extract(bench.encoder, data.feature_loader(s, None, 8), [spec], "cpu")[0] for s in ("train", "val")]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- the converged probe -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [3, 11])
def test_the_converged_probe_is_the_probe_of_training(tmp_path, num_classes):
    bench = make_bench(tmp_path, patterns(66, 44, num_classes))
    results = ConvergedProbe({"layer": 1, "pool": "patch_mean", "norm": False}, l2=1e-2).run(bench)
    spec = FeatureSpec(1, "patch_mean", False)
    train, val = sides(bench, spec)
    assert [row.metric for row in results] == (["top1", "top5"] if num_classes > 10 else ["top1"])
    top1 = results[0]
    assert top1.value == linear_probe_accuracy(train, val, num_classes, 1e-2)
    assert 1 / num_classes < top1.value < 1
    assert top1.error == pytest.approx(math.sqrt(top1.value * (1 - top1.value) / 44))
    assert (top1.num_images, top1.feature) == (44, str(spec))


# ---- one head, written out -----------------------------------------------------------------------------------------


def lars(parameters, buffers, lr, decay):
    """MAE's, one tensor after the other."""
    for parameter, buffer in zip(parameters, buffers, strict=True):
        gradient = parameter.grad
        if parameter.ndim > 1:
            gradient = gradient + decay * parameter.data
            norms = parameter.data.norm(), gradient.norm()
            gradient = gradient * (0.001 * norms[0] / norms[1] if min(norms) > 0 else 1.0)
        buffer.mul_(0.9).add_(gradient)
        parameter.data.add_(buffer, alpha=-lr)


def written_out(x, label, num_classes, lr, epochs, batch, rate, decay=0.0, use_lars=False, batch_norm=False, seed=0):
    """The training of a head on features, with torch's own parts; ``rate(epoch, step, per_epoch)`` is the schedule."""
    head = torch.nn.Linear(x.shape[1], num_classes)
    generator = torch.Generator().manual_seed(mix_int(seed))
    head.weight.data = 0.01 * torch.randn(num_classes, x.shape[1], generator=generator)
    head.bias.data.zero_()
    norm = torch.nn.BatchNorm1d(x.shape[1], eps=1e-6, affine=False) if batch_norm else torch.nn.Identity()
    optimizer = torch.optim.SGD(head.parameters(), 1.0, momentum=0.9, weight_decay=decay)
    buffers = [torch.zeros_like(parameter) for parameter in head.parameters()]
    per_epoch = len(x) // batch
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(mix_int(seed, epoch)))
        for step in range(per_epoch):
            rows = order[step * batch : (step + 1) * batch]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(norm(x[rows])), label[rows]).backward()
            now = lr * batch / 256 * rate(epoch, step, per_epoch)
            if use_lars:
                lars([head.weight, head.bias], buffers, now, decay)
            else:
                optimizer.param_groups[0]["lr"] = now
                optimizer.step()
    return torch.nn.Sequential(norm, head).eval()


def per_epoch_cosine(epoch, step, per_epoch, epochs):
    """MoCo v3's ``adjust_learning_rate``."""
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def warm_cosine(epoch, step, per_epoch, epochs, warmup):
    """MAE's ``lr_sched.py``, whose epochs are fractions."""
    epoch = epoch + step / per_epoch
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


MOCO = {"schedule": "epoch", "lrs": [30.0]}
MAE = {"optimizer": "lars", "batch_norm": True, "warmup_epochs": 2, "lrs": [1600.0], "weight_decay": 1e-3}
PAPER = {"lrs": [10.0], "weight_decay": 0.05}


@pytest.mark.parametrize(
    ("settings", "rate", "options"),
    [
        (MOCO, partial(per_epoch_cosine, epochs=6), {}),
        (MAE, partial(warm_cosine, epochs=6, warmup=2), {"use_lars": True, "batch_norm": True, "decay": 1e-3}),
        (PAPER, partial(warm_cosine, epochs=6, warmup=0), {"decay": 0.05}),
    ],
    ids=["moco_v3", "mae", "paper"],
)
def test_one_head_is_what_a_plain_training_loop_gives(tmp_path, settings, rate, options):
    dataset = patterns(58, 60, 11, visible=0.6)
    bench = make_bench(tmp_path, dataset, seed=3)
    results = probe(epochs=6, **settings).run(bench)
    x, val = sides(bench)
    expected = written_out(x.x, x.label, 11, settings["lrs"][0], 6, 16, rate, seed=3, **options)
    state = stored(bench)
    torch.testing.assert_close(state["weight"][0], expected[1].weight.data, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["bias"][0], expected[1].bias.data, rtol=1e-4, atol=1e-5)
    if "batch_norm" in settings:
        torch.testing.assert_close(state["running_var"], expected[0].running_var, rtol=1e-5, atol=1e-7)
    scores = expected(val.x).detach()
    top = scores.argsort(dim=1, descending=True)
    right = [(top[:, :k] == val.label[:, None]).any(1).double().mean().item() for k in (1, 5)]
    assert [row.value for row in results] == pytest.approx(right, abs=1e-12)
    assert [row.metric for row in results] == ["top1", "top5"]
    assert (state["weight"][0] - written_out(x.x, x.label, 11, 0.0, 1, 16, rate, seed=3)[1].weight).norm() > 0.05


@pytest.mark.parametrize("schedule", ["iteration", "epoch"])
@pytest.mark.parametrize("warmup", [0, 2, 2.5])
def test_the_schedule_in_closed_form(schedule, warmup):
    found = LinearProbe([LAST], [1.0], epochs=10, warmup_epochs=warmup, schedule=schedule)
    for step in (0, 1, 4, 5, 9, 10, 12, 13, 25, 37, 49):
        epoch = step / 5 if schedule == "iteration" else step // 5
        cosine = math.cos(math.pi / 2 * (epoch - warmup) / (10 - warmup)) ** 2
        assert found.factor(step, 5) == pytest.approx(epoch / warmup if epoch < warmup else cosine, abs=1e-12)
    assert found.factor(50, 5) == pytest.approx(0, abs=1e-12)


def test_features_are_joined_in_their_order(tmp_path):
    bench = make_bench(tmp_path)
    parts = [{"layer": 1, "pool": "patch_mean", "norm": False}, {"layer": -1, "pool": "cls"}]
    (row,) = probe(features=[parts]).run(bench)
    specs = [FeatureSpec(1, "patch_mean", False), SPEC]
    columns = extract(bench.encoder, bench.make_data().feature_loader("train", None, 8), specs, "cpu")
    x = torch.cat([column.x for column in columns], dim=1)
    rate = partial(warm_cosine, epochs=4, warmup=0)
    expected = written_out(x, columns[0].label, 3, 30.0, 4, 16, rate)[1].weight
    torch.testing.assert_close(stored(bench)["weight"][0], expected.data, rtol=1e-4, atol=1e-5)
    assert row.feature == " + ".join(map(str, specs))


def test_a_batch_is_at_most_all_images_and_the_rate_goes_with_it(tmp_path):
    bench = make_bench(tmp_path)
    probe(batch_size=1024).run(bench)
    expected = make_bench(tmp_path / "other")
    probe(batch_size=40).run(expected)
    assert_equal(stored(bench), stored(expected))
    fixed = make_bench(tmp_path / "fixed")
    probe(batch_size=40, lr_batch=None, lrs=[30.0 * 40 / 256]).run(fixed)
    torch.testing.assert_close(stored(fixed)["weight"], stored(expected)["weight"])


# ---- several heads -------------------------------------------------------------------------------------------------

GRID = {
    "features": [LAST, [{"layer": 1, "pool": "patch_mean", "norm": False}]],
    "lrs": [0.001, 30.0, 3.0],
    "holdout": 0.25,
}


def test_a_head_of_a_grid_is_that_head_alone(tmp_path):
    dataset = patterns()
    bench = make_bench(tmp_path / "grid", dataset)
    results = probe(**GRID).run(bench)
    fitted = dataset.only("train", np.flatnonzero(np.arange(40) % 4 != 3))
    found = {(row.series, row.at): row for row in results if row.metric == "grid_top1"}
    assert len(found) == 6
    for g, (series, feature) in enumerate(zip(("cls@2", "patch_mean@1 without norm"), GRID["features"], strict=True)):
        for h, lr in enumerate(GRID["lrs"]):
            alone = make_bench(tmp_path / f"{g}{h}", fitted)
            (row,) = probe(features=[feature], lrs=[lr]).run(alone)
            for name in ("weight", "bias"):
                torch.testing.assert_close(stored(bench, g)[name][h], stored(alone)[name][0], rtol=1e-4, atol=1e-6)
            grid_row = found[series, lr]
            assert (grid_row.value, grid_row.error) == (row.value, row.error)
            assert (grid_row.axis, grid_row.num_images, grid_row.feature) == ("learning_rate", 30, row.feature)


def test_the_head_is_chosen_on_held_out_training_images_alone(tmp_path):
    """Where the validation labels are wrong, the head that has learnt nothing is the best there."""
    whole = patterns(80, 60, 2, visible=1.0)
    for name, dataset in (("right", whole), ("wrong", whole.relabelled("val", lambda labels: 1 - labels))):
        results = probe(lrs=[1e-6, 30.0], holdout=0.25, epochs=10).run(make_bench(tmp_path / name, dataset))
        reported, *grid = results
        by_rate = {row.at: row.value for row in grid}
        assert reported.note.startswith("cls@2, lr=30: chosen among 2 heads on 20 held-out training images (")
        assert reported.value == by_rate[30.0]
        assert (by_rate[30.0] > by_rate[1e-6]) == (name == "right")


@pytest.mark.parametrize("augment", [None, AUGMENT])
def test_held_out_images_take_no_part_in_training(tmp_path, augment):
    whole, held = patterns(), np.arange(40) % 4 == 3
    spoilt = {
        "clean": whole,
        "held": whole.relabelled("train", lambda labels: np.where(held, (labels + 1) % 3, labels)),
        "fitted": whole.relabelled("train", lambda labels: np.where(np.arange(40) == 4, (labels + 1) % 3, labels)),
    }
    states = {}
    for name, dataset in spoilt.items():
        bench = make_bench(tmp_path / name, dataset)
        reported = probe(**GRID, augment=augment, epochs=2, batch_size=15).run(bench)[0]
        states[name] = stored(bench)
        if name == "held" and augment is None:  # wrong labels are all that the choice goes by
            assert "chosen among 6 heads on 10 held-out training images" in reported.note
    assert_equal(states["clean"], states["held"])
    assert not torch.equal(states["clean"]["weight"], states["fitted"]["weight"])


def test_the_choice_goes_by_the_held_out_labels(tmp_path):
    """The head that is best on them, though every other image speaks for the other one."""
    whole, held = patterns(80, 60, 2, visible=1.0), np.arange(80) % 4 == 3
    dataset = whole.relabelled("train", lambda labels: np.where(held, 1 - labels, labels))
    reported = probe(lrs=[1e-6, 30.0], holdout=0.25, epochs=10).run(make_bench(tmp_path, dataset))[0]
    assert reported.note.startswith("cls@2, lr=1e-06:")


def test_too_few_images_to_hold_any_out_are_a_sentence(tmp_path):
    bench = make_bench(tmp_path, patterns(9, 9))
    with pytest.raises(ConfigError, match=r"eval\.holdout=0\.1 holds out none of 9 .* 10 labelled images or more"):
        probe(lrs=[1.0, 2.0]).run(bench)
    assert len(probe().run(bench)) == 1


# ---- interruptions -------------------------------------------------------------------------------------------------


def stop_after(num, within):
    """Progress that is killed at the num-th item of what is called ``within``; tells what it is asked to show."""
    asked = []

    def track(items, what):
        asked.append((what, list(items) if isinstance(items, range) else len(items)))
        for i, item in enumerate(items):
            if what.startswith(within) and i == num:
                raise KeyboardInterrupt
            yield item

    track.asked = asked
    return track


@pytest.mark.parametrize(
    ("settings", "num", "within", "left"),
    [
        (GRID | {"epochs": 25}, 15, "linear heads", range(10, 25)),
        (GRID | {"epochs": 3, "augment": AUGMENT, "batch_size": 10, "batch_norm": True}, 2, "epoch 2", range(1, 3)),
    ],
    ids=["cached", "augmented"],
)
def test_interrupted_it_goes_on_to_the_same_result(tmp_path, settings, num, within, left):
    bench = make_bench(tmp_path / "whole")
    whole = probe(**settings).run(bench)
    with pytest.raises(KeyboardInterrupt):
        probe(**settings).run(make_bench(tmp_path / "part", track=stop_after(num, within)))
    watch = stop_after(-1, "nothing")
    resumed = make_bench(tmp_path / "part", track=watch)
    assert probe(**settings).run(resumed) == whole
    assert ("linear heads", list(left)) in watch.asked
    for grid in range(2):
        assert_equal(stored(resumed, grid), stored(bench, grid))


@pytest.mark.parametrize(
    ("changed", "options"),
    [({"lrs": [3.0]}, {}), ({"epochs": 5}, {}), ({}, {"seed": 1}), ({}, {"num_train": 20})],
)
def test_what_other_settings_have_stored_is_not_gone_on_with(tmp_path, changed, options):
    said = []
    probe().run(make_bench(tmp_path / "a"))
    again = make_bench(tmp_path / "a", say=said.append, **options)
    found = probe(**changed).run(again)
    expected = make_bench(tmp_path / "b", **options)
    assert found == probe(**changed).run(expected)
    assert_equal(stored(again), stored(expected))
    assert said == ["heads: what is stored here was trained with other settings; starting anew."]


# ---- augmentation --------------------------------------------------------------------------------------------------


def test_augmented_images_go_through_the_encoder_in_every_epoch(tmp_path, monkeypatch):
    bench = make_bench(tmp_path, patterns(45))
    steps, step = [], HeadStack.step

    def counted(self, features, labels, scale, reduce=None):
        steps.append((features.clone(), labels, scale))
        step(self, features, labels, scale, reduce)

    monkeypatch.setattr(HeadStack, "step", counted)
    with frozen(bench.encoder):
        probe(augment=AUGMENT, epochs=3).run(bench)
    assert len(steps) == 3 * (45 // 16)
    data = bench.make_data(
        recipes={"x": CropFlip(16, (0.4, 1.0), "bilinear")}, required_views={"probe": "x"}, batch_size=16
    )
    head = written_out(torch.zeros(1, 24), torch.zeros(1).long(), 3, 0.0, 1, 1, lambda *_: 0.0)[1]
    optimizer, i = torch.optim.SGD(head.parameters(), 1.0, momentum=0.9), 0
    for epoch in range(3):
        for batch in data.train_loader(epoch):
            (x,) = pooled_features(bench.encoder, batch.views["probe"][0], [SPEC])
            assert torch.equal(steps[i][1], batch.label)
            torch.testing.assert_close(steps[i][0], x)
            optimizer.param_groups[0]["lr"] = 30.0 * 16 / 256 * warm_cosine(epoch, i % 2, 2, 3, 0)
            assert steps[i][2] == pytest.approx(warm_cosine(epoch, i % 2, 2, 3, 0))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(x), batch.label).backward()
            optimizer.step()
            i += 1
    torch.testing.assert_close(stored(bench)["weight"][0], head.weight.data, rtol=1e-4, atol=1e-5)
    assert not torch.equal(steps[0][0], steps[2][0])


def test_the_clean_view_is_the_one_that_is_asked_for(tmp_path):
    """MoCo v3 resizes bilinearly; both views share a cache."""
    dataset, options, weights = patterns(40, 200, visible=0.6), {"eval_crop": 0.3}, {}
    for kind in ("bicubic", "bilinear"):
        bench = make_bench(tmp_path / kind, dataset, None, options, cache=tmp_path / "shared")
        (row,) = probe(eval_interpolation=kind).run(bench)
        data = bench.make_data(eval_interpolation=kind)
        (x,), (val,) = (
            extract(bench.encoder, data.feature_loader(s, None, 8), [SPEC], "cpu") for s in ("train", "val")
        )
        expected = written_out(x.x, x.label, 3, 30.0, 4, 16, partial(warm_cosine, epochs=4, warmup=0))
        weights[kind] = stored(bench)["weight"][0]
        torch.testing.assert_close(weights[kind], expected[1].weight.data, rtol=1e-4, atol=1e-5)
        assert row.value == (expected(val.x).argmax(1) == val.label).double().mean().item()
    assert (weights["bicubic"] - weights["bilinear"]).abs().max() > 1e-3


# ---- ranks ---------------------------------------------------------------------------------------------------------


def on_bench(folder, **settings):
    bench = make_bench(folder, patterns(41, 31))
    return probe(**settings).run(bench), stored(bench)


def test_two_ranks_fit_the_same_heads_on_cached_features(tmp_path):
    settings = GRID | {"epochs": 3}
    ranks = on_ranks(tmp_path / "ranks", lambda: on_bench(tmp_path / "two", **settings))
    rows, state = on_bench(tmp_path / "one", **settings)
    for found, theirs in ranks:
        assert found == rows
        torch.testing.assert_close(theirs["weight"], state["weight"], rtol=1e-5, atol=1e-6)
    assert_equal(ranks[0][1], ranks[1][1])


def test_two_ranks_share_the_augmented_batch(tmp_path):
    settings = {"augment": AUGMENT, "epochs": 3}
    ranks = on_ranks(tmp_path / "ranks", lambda: on_bench(tmp_path / "two", **settings))
    rows, state = on_bench(tmp_path / "one", **settings)
    for found, theirs in ranks:
        assert found == rows
        torch.testing.assert_close(theirs["weight"], state["weight"], rtol=1e-5, atol=1e-5)


# ---- what is refused, and the recipes ------------------------------------------------------------------------------


def test_mistakes_are_sentences_before_anything_is_computed(tmp_path):
    unlabelled = copy.copy(patterns())
    unlabelled.classes = None
    for found in (ConvergedProbe(), probe(), probe(augment=AUGMENT), probe(**GRID)):
        with pytest.raises(ConfigError, match="no labels"):
            found.run(make_bench(tmp_path, unlabelled))
    with pytest.raises(ConfigError, match=r"feature\.layer=99 must be a block in 1 \.\.\. 2"):
        probe(features=[[{"layer": 99}]]).run(make_bench(tmp_path))
    with pytest.raises(ConfigError, match=r"eval\.features has the keys layer, pool and norm"):
        probe(features=[[{"layer": 1, "token": "cls"}]]).run(make_bench(tmp_path))
    assert list(tmp_path.iterdir()) == []
    none = patterns().relabelled("val", lambda labels: labels * 0 - 1)
    with pytest.raises(ConfigError, match="no readable image with a label among the val images"):
        probe(epochs=1).run(make_bench(tmp_path, none))


# optimizer, lrs, lr_batch, epochs, batch, decay, BatchNorm, warm-up, schedule, pools by layer, crop, clean view
OFFICIAL = {
    "moco_v3": ("sgd", [3.0], 256, 90, 1024, 0.0, False, 0, "epoch", {-1: "cls"}, "bilinear", "bilinear"),
    "mae": ("lars", [0.1], 256, 90, 16384, 0.0, True, 10, "iteration", {-1: "cls"}, "bicubic", "bicubic"),
    "simmim": ("lars", [0.1], 256, 90, 16384, 0.0, True, 10, "iteration", {8: "patch_mean"}, "bicubic", "bicubic"),
    "dino": (
        "sgd", [0.001], 256, 100, 1024, 0.0, False, 0, "epoch", dict.fromkeys((-4, -3, -2, -1), "cls"), "bilinear",
        "bicubic",
    ),
    "paper": ("sgd", [1.0], 1024, 50, 1024, 0.05, False, 0, "iteration", {-1: "cls"}, None, "bicubic"),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_recipes_are_the_official_ones(name):
    found = instantiate(compose([f"eval=linear_probe_{name}", "checkpoint=x"], "evaluate").eval)
    assert isinstance(found, LinearProbe)
    (parts,) = found.features
    augment = found.augment
    assert (
        found.optimizer, list(found.lrs), found.lr_batch, found.epochs, found.batch_size, found.weight_decay,
        found.batch_norm, found.warmup_epochs, found.schedule, {part["layer"]: part["pool"] for part in parts},
        augment and augment["interpolation"], found.eval_interpolation,
    ) == OFFICIAL[name]  # fmt: skip
    assert (found.momentum, found.init_std) == (0.9, 0.01)
    assert all(part.get("norm", True) == (name != "simmim") for part in parts)
    if augment:
        assert list(augment["crop_scale"]) == [0.08, 1.0]
        assert augment["crop"] == ("mae" if name in ("mae", "simmim") else "torchvision")
        assert CropFlip(16, **augment)


def test_the_grid_is_that_of_dinov2():
    found = instantiate(compose(["eval=linear_probe_grid", "checkpoint=x"], "evaluate").eval)
    rates = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]
    assert list(found.lrs) == pytest.approx(rates)
    last = {(n, mean): ["cls"] * (n - 1) + ["cls_patch_mean" if mean else "cls"] for n in (1, 4) for mean in (0, 1)}
    pools = [[part["pool"] for part in parts] for parts in found.features]
    assert pools == list(last.values())
    assert len(pools) * len(rates) == 52
    for parts in found.features:
        assert [part["layer"] for part in parts] == list(range(-len(parts), 0))
    assert (found.optimizer, found.momentum, found.weight_decay, found.lr_batch, found.batch_size, found.schedule) == (
        "sgd", 0.9, 0.0, 256, 1024, "iteration",
    )  # fmt: skip
