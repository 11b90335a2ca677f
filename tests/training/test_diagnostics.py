"""Diagnostics during training: no trace in it, the same after a kill; rows, files, pictures, W&B, alarms."""

import io
import json
import re
import warnings
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import wandb
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from harmonize.analysis import choose_diagnostics
from harmonize.config import compose
from harmonize.diagnostics.attention_information import AttentionEntropy, MutualInformation
from harmonize.diagnostics.cka import CKA
from harmonize.diagnostics.health import Alarm, Health
from harmonize.diagnostics.measure import measure
from harmonize.diagnostics.token_similarity import TokenSimilarity
from harmonize.evaluation.layer_probe import LayerProbe
from harmonize.files import read_rows
from harmonize.reports.files import read_history
from harmonize.training.callbacks import diagnostics as diagnostics_module
from harmonize.training.callbacks.checkpoint import Checkpoints
from harmonize.training.callbacks.diagnostics import Diagnostics
from harmonize.training.callbacks.gradient_norms import GradientNorms
from harmonize.training.callbacks.probe import OnlineProbe
from harmonize.training.loggers import JsonLogger, Wandb
from harmonize.training.module import PretrainModule
from harmonize.types import ConfigError, FeatureSpec, NonFiniteLossError
from tests.helpers import random_batch, tiny_encoder
from tests.training.conftest import make_batches, make_module
from tests.training.test_module import assert_bit_equal, weights
from tests.training.test_run import TINY, differences, load, rows, run
from tests.training.test_run import diagnostics as files

IMAGES = random_batch(6, seed=50)
KINDS = {"nmi": MutualInformation, "entropy": AttentionEntropy, "tokens": TokenSimilarity, "cka": CKA}


def watch(module, folder, *names, **options):
    """The callback with some cheap diagnostics, which looks at ``IMAGES``; what it prints is in ``said``."""
    chosen = {name: KINDS[name](module.encoder.spec) for name in names or ("nmi", "tokens")}
    console = Console(file=io.StringIO(), width=200)
    watcher = Diagnostics(chosen, [IMAGES], range(6), folder, **{"figures": False, "console": console} | options)
    watcher.said = lambda: console.file.getvalue().splitlines()
    return watcher


def measured(row_list, step):
    """The latest values of all ``diagnostics/*`` rows of a step, without what depends on the clock."""
    merged = {}
    for row in row_list:
        if row["step"] == step:
            merged |= {k: v for k, v in row.items() if k.startswith("diagnostics/")}
    return {k: v for k, v in merged.items() if k not in ("diagnostics/seconds", "diagnostics/share_of_epoch")}


def values(plain):
    """What a file of the diagnostics says, as metrics."""
    return {
        f"diagnostics/{name}/layer_{layer:02d}": value
        for name, curve in plain["curves"].items()
        for layer, value in zip(curve["layer"], curve["value"], strict=True)
    }


# ---- the callback ----------------------------------------------------------------------------------------------------


def test_measuring_changes_no_bit_of_the_training(fit, tmp_path):
    section = compose([]).diagnostics
    results = []
    for on in (False, True):
        module = make_module("hybrid", total_steps=6, steps_per_epoch=2, encoder=tiny_encoder(drop_path=0.5))
        callbacks, val = [], None
        if on:
            spec = module.encoder.spec
            chosen = choose_diagnostics(section, spec)
            assert len(chosen.metrics) == 16
            gradients = GradientNorms(1)
            probe = OnlineProbe(make_batches(1), 2, FeatureSpec(), k=3, more=chosen.layer_probe.specs(spec))
            watcher = watch(module, tmp_path, layer_probe=chosen.layer_probe, probe=probe, gradients=gradients)
            watcher.num_classes, watcher.health, watcher.diagnostics = 2, chosen.health, chosen.metrics
            callbacks, val = [gradients, probe, watcher], [IMAGES]
        fit(module, make_batches(2), callbacks, val=val)
        moments = module.optimization.optimizer.state_dict()["state"]
        assert len(moments) > 10
        flat = {f"{number} {key}": value for number, state in moments.items() for key, value in state.items()}
        results.append(weights(module) | flat)
    assert_bit_equal(*results)
    assert sorted(watcher.history) == [0, 1, 2, 3]
    assert {"nmi", "cka", "fourier", "layer_probe_knn", "gradient_cosine"} <= {*watcher.history[3].curves}


def test_rows_and_files_say_what_is_measured(fit, tmp_path):
    module = make_module("mim", total_steps=4, steps_per_epoch=2)
    untrained = measure(module.encoder.eval(), [IMAGES], {"nmi": MutualInformation(module.encoder.spec)}, range(6))
    module.train()
    watcher = watch(module, tmp_path)
    fit(module, make_batches(2), [watcher], val=[IMAGES])
    found = files(tmp_path)
    assert list(found) == ["epoch_0000.json", "epoch_0001.json", "epoch_0002.json"]
    row_list = read_rows(tmp_path / "metrics.jsonl")
    for epoch, plain in enumerate(found.values()):
        assert (plain["epoch"], plain["step"], plain["num_images"]) == (epoch, 2 * epoch, 6)
        assert not differences(values(plain), measured(row_list, 2 * epoch))
        assert {"diagnostics/nmi/layer_01", "diagnostics/token_similarity/layer_00"} <= {*values(plain)}
    assert found["epoch_0000.json"]["curves"]["nmi"]["value"] == untrained.curves["nmi"].value
    trained = measure(module.encoder.eval(), [IMAGES], {"nmi": MutualInformation(module.encoder.spec)}, range(6))
    assert found["epoch_0002.json"]["curves"]["nmi"]["value"] == trained.curves["nmi"].value
    assert found["epoch_0002.json"]["curves"]["nmi"]["standard_error"] == trained.curves["nmi"].error
    assert trained.curves["nmi"].value != untrained.curves["nmi"].value
    again = read_history(tmp_path / "diagnostics")
    assert {epoch: f.curves["nmi"].value for epoch, f in again.items()} == {
        epoch: f.curves["nmi"].value for epoch, f in watcher.history.items()
    }


def test_what_it_costs_is_printed_and_logged(fit, tmp_path):
    module = make_module("mim", total_steps=2, steps_per_epoch=1)
    watcher = watch(module, tmp_path)
    fit(module, make_batches(1), [watcher], val=[IMAGES])
    lines = [line for line in watcher.said() if line.startswith("diagnostics")]
    assert re.fullmatch(r"diagnostics  6 images  \d+\.\d s", lines[0])
    shown = [re.fullmatch(r"diagnostics  6 images  \d+\.\d s  (\d+\.\d) % of the epoch", line) for line in lines[1:]]
    assert len(shown) == 2
    costs = {r["step"]: r for r in read_rows(tmp_path / "metrics.jsonl") if "diagnostics/seconds" in r}
    assert list(costs) == [0, 1, 2]
    assert "diagnostics/share_of_epoch" not in costs[0]
    for step, match in enumerate(shown, start=1):
        assert costs[step]["diagnostics/seconds"] > 0
        share = costs[step]["diagnostics/share_of_epoch"]
        assert 0 < share < 1
        assert float(match[1]) == pytest.approx(100 * share, abs=0.051)


def test_thinned_ones_are_measured_before_training_every_nth_epoch_and_at_the_end(fit, tmp_path):
    module = make_module("mim", total_steps=5, steps_per_epoch=1)
    watcher = watch(module, tmp_path, "nmi", "cka")
    watcher.diagnostics["cka"].every_n_epochs = 2
    fit(module, make_batches(1), [watcher], val=[IMAGES])
    names = {name: set(plain["curves"]) for name, plain in files(tmp_path).items()}
    assert names == {
        f"epoch_{epoch:04d}.json": {"nmi", "cka"} if epoch in (0, 2, 4, 5) else {"nmi"} for epoch in range(6)
    }


def test_epochs_without_anything_to_measure_leave_nothing(fit, tmp_path):
    module = make_module("mim", total_steps=3, steps_per_epoch=1)
    watcher = watch(module, tmp_path, "nmi")
    watcher.diagnostics["nmi"].every_n_epochs = 2
    fit(module, make_batches(1), [watcher], val=[IMAGES])
    assert list(files(tmp_path)) == ["epoch_0000.json", "epoch_0002.json", "epoch_0003.json"]
    assert len([line for line in watcher.said() if "% of the epoch" in line]) == 2


def test_without_a_sanity_check_nothing_is_measured_before_training(fit, tmp_path):
    module = make_module("mim", total_steps=1, steps_per_epoch=1)
    fit(module, make_batches(1), [watch(module, tmp_path)], val=[IMAGES], num_sanity_val_steps=0)
    assert list(files(tmp_path)) == ["epoch_0001.json"]


def test_the_layer_probe_scores_what_the_probe_has_collected(fit, tmp_path):
    module = make_module("mim", total_steps=1, steps_per_epoch=1)
    layer_probe = LayerProbe(k=3, num_images=5)
    more = layer_probe.specs(module.encoder.spec)
    probe = OnlineProbe([random_batch(6, seed=51)], 2, FeatureSpec(), k=3, more=more)
    watcher = watch(module, tmp_path, num_classes=2, layer_probe=layer_probe, probe=probe)
    fit(module, make_batches(1), [probe, watcher], val=[IMAGES])
    from harmonize.evaluation.features import extract

    module.encoder.eval()
    sides = [extract(module.encoder, [batch], more, "cpu") for batch in (random_batch(6, seed=51), IMAGES)]
    expected = layer_probe.score(*sides, 2)
    for name in ("layer_probe_linear", "layer_probe_knn"):
        curve = files(tmp_path)["epoch_0001.json"]["curves"][name]
        assert (curve["layer"], curve["value"]) == ([1, 2], expected.curves[name].value)
    assert probe.more_features == ([], [])  # not kept until the next epoch


@pytest.mark.parametrize("figures", [False, True])
def test_a_full_disk_is_one_warning_and_training_goes_on(fit, tmp_path, monkeypatch, figures):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if figures:
        monkeypatch.setattr(diagnostics_module, "epoch_sheet", lambda *_: Figure())
        monkeypatch.setattr(Figure, "savefig", full)
    else:
        monkeypatch.setattr(diagnostics_module, "write_json", full)
    module = make_module("mim", total_steps=2, steps_per_epoch=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, make_batches(1), [watch(module, tmp_path, figures=figures)], val=[IMAGES])
    sentences = [str(w.message) for w in caught if "iagnostics" in str(w.message)]
    folder = tmp_path / "diagnostics"
    assert sentences == [f"Diagnostics cannot be written to {folder} (No space left on device); training goes on."]
    assert len(list(folder.glob("*.json"))) == (3 if figures else 0)
    for step in (0, 1, 2):
        assert "diagnostics/nmi/layer_02" in measured(read_rows(tmp_path / "metrics.jsonl"), step)


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"epoch": 1',
        "[]",
        "null",
        '{"epoch": 1}',
        '{"epoch": 1, "num_images": 2, "curves": [], "surfaces": {}}',
        '{"epoch": 1, "num_images": 2, "curves": {"nmi": {"value": [1]}}, "surfaces": {}}',
        "\x00\xff",
    ],
)
def test_a_damaged_file_is_left_out_of_the_history(fit, tmp_path, text):
    module = make_module("mim", total_steps=1, steps_per_epoch=1)
    fit(module, make_batches(1), [watch(module, tmp_path)], val=[IMAGES])
    (tmp_path / "diagnostics" / "epoch_0001.json").write_bytes(text.encode("latin-1"))
    (tmp_path / "diagnostics" / "epoch_0002.json").mkdir()
    history = read_history(tmp_path / "diagnostics")
    assert list(history) == [0]
    assert len(history[0].curves["nmi"].value) == 2


# ---- alarms ----------------------------------------------------------------------------------------------------------


class FakeRun:
    """What W&B's run is asked to do."""

    def __init__(self):
        self.logged, self.alerts = [], []

    def log(self, row):
        self.logged.append(row)

    def alert(self, title, text):
        self.alerts.append((title, text))

    def finish(self, exit_code=0):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A W&B logger without W&B, and its run."""
    fake = FakeRun()
    monkeypatch.setattr(wandb, "init", lambda **_: fake)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return Wandb(tmp_path / "mirror"), fake


class Script(Health):
    """Health with given blocks that collapse, one entry per check."""

    def check(self, found, spec):
        global CHECKS
        CHECKS += 1
        return [
            Alarm("attention collapse", "nmi", dict.fromkeys(blocks, 0.01), "is below 0.02", "it is bad")
            for blocks in [SCRIPT[CHECKS - 1]]
            if blocks
        ]


SCRIPT, CHECKS = ([1], [1], [1], [1, 2], [], [1, 2]), 0


def test_an_alarm_is_given_once_for_a_set_of_blocks(fit, tmp_path, mirror):
    """And not for the untrained network, nor again before the blocks change or have recovered."""
    global CHECKS
    CHECKS = 0
    logger, fake = mirror
    module = make_module("mim", total_steps=5, steps_per_epoch=1)
    watcher = watch(module, tmp_path, "nmi", health=Script())
    fit(module, make_batches(1), [watcher], val=[IMAGES], logger=[JsonLogger(tmp_path), logger])
    assert CHECKS == 6
    alarms = [line for line in watcher.said() if line.startswith("Health")]
    one, both = "block 1: 0.01", "block 1: 0.01, block 2: 0.01"
    sentences = [f"attention collapse: nmi is below 0.02 ({b}): it is bad." for b in (one, both, both)]
    assert alarms == [f"Health: {sentence}" for sentence in sentences]
    titles = [f"{step}: attention collapse" for step in (1, 3, 5)]
    assert fake.alerts == list(zip(titles, sentences, strict=True))
    assert not logger.failed


def test_uniform_attention_is_no_alarm_before_training_but_after_it(fit, tmp_path):
    module = make_module("mim", total_steps=1, steps_per_epoch=1)
    watcher = watch(module, tmp_path, "entropy", health=Health(entropy=0.0))  # every map is "uniform" then
    fit(module, make_batches(1), [watcher], val=[IMAGES])
    said = watcher.said()
    first = next(i for i, line in enumerate(said) if line.startswith("diagnostics"))
    alarms = [i for i, line in enumerate(said) if line.startswith("Health: uniform attention: attention_entropy")]
    assert len(alarms) == 1
    assert alarms[0] > first


def test_what_is_not_a_number_is_named_even_before_training(fit, tmp_path, mirror):
    logger, fake = mirror
    module = make_module("mim", total_steps=1, steps_per_epoch=1)
    with torch.no_grad():
        module.encoder.blocks[1].mlp.fc1.weight.fill_(float("nan"))
    chosen = choose_diagnostics(compose([]).diagnostics, module.encoder.spec)  # none may break on such a network
    watcher = watch(module, tmp_path, health=Health())
    watcher.diagnostics = chosen.metrics
    with pytest.raises(NonFiniteLossError):
        fit(module, make_batches(1), [watcher], val=[IMAGES], logger=[JsonLogger(tmp_path), logger])
    (line,) = [line for line in watcher.said() if "not a number: token_similarity " in line]
    meaning = "the weights or the activations are broken"
    assert line == f"Health: not a number: token_similarity is not finite (block 2: nan): {meaning}."
    assert ("0: not a number", line.removeprefix("Health: ")) in fake.alerts
    assert files(tmp_path)["epoch_0000.json"]["curves"]["token_similarity"]["value"][2] is None


# ---- W&B -------------------------------------------------------------------------------------------------------------


def table(chart):
    """Line name -> its points, of a W&B line plot."""
    lines = {}
    for row in chart.table.data:
        point = dict(zip(chart.table.columns, row, strict=True))
        lines.setdefault(point["lineKey"], []).append((point["step"], point["lineVal"]))
    return lines


def test_one_line_plot_for_each_curve_with_a_line_for_each_epoch(fit, tmp_path, mirror):
    logger, fake = mirror
    module = make_module("mim", total_steps=2, steps_per_epoch=1)
    watcher = watch(module, tmp_path, "nmi", "cka")
    watcher.diagnostics["cka"].every_n_epochs = 5
    fit(module, make_batches(1), [watcher], val=[IMAGES], logger=[JsonLogger(tmp_path), logger])
    plots = [(row["trainer/global_step"], key, row[key]) for row in fake.logged for key in row if "depth/" in key]
    assert [(step, key) for step, key, _ in plots] == [
        (0, "depth/nmi"),
        (0, "depth/cka"),
        (1, "depth/nmi"),
        (2, "depth/nmi"),
        (2, "depth/cka"),
    ]
    assert [list(table(chart)) for _, _, chart in plots[:4]] == [
        ["untrained"],
        ["untrained"],
        ["untrained", "epoch 1"],
        ["untrained", "epoch 1", "epoch 2"],
    ]
    assert list(table(plots[4][2])) == ["untrained", "epoch 2"]  # CKA was not measured after epoch 1
    curves = [plain["curves"]["nmi"] for plain in files(tmp_path).values()]
    assert list(table(plots[3][2]).values()) == [list(zip(c["layer"], c["value"], strict=True)) for c in curves]
    assert {row["trainer/global_step"] for row in fake.logged if "diagnostics/nmi/layer_01" in row} == {0, 1, 2}


def test_a_line_plot_stays_legible_after_many_epochs(fit, tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(diagnostics_module, "MAX_LINES", 3)
    logger, fake = mirror
    module = make_module("mim", total_steps=6, steps_per_epoch=1)
    fit(module, make_batches(1), [watch(module, tmp_path, "nmi")], val=[IMAGES], logger=[JsonLogger(tmp_path), logger])
    drawn = [list(table(row["depth/nmi"])) for row in fake.logged if "depth/nmi" in row]
    assert max(map(len, drawn)) == 3
    assert [names[0] for names in drawn] == ["untrained"] * 7
    assert [names[-1] for names in drawn[1:]] == [f"epoch {epoch}" for epoch in range(1, 7)]
    assert drawn[-1] == ["untrained", "epoch 3", "epoch 6"]


def test_a_resumed_run_draws_the_lines_from_before_and_none_that_are_void(fit, tmp_path, mirror):
    """Resumed at epoch 1 of files up to epoch 2: the latter's line is not drawn as if it belonged to this run."""
    module = make_module("mim", total_steps=2, steps_per_epoch=1)
    trainer = fit(module, make_batches(1), [watch(module, tmp_path, "nmi")], val=[IMAGES])
    assert trainer.global_step == 2
    logger, fake = mirror
    module = make_module("mim", total_steps=1, steps_per_epoch=1)
    fit(module, make_batches(1), [watch(module, tmp_path, "nmi")], val=[IMAGES], logger=[JsonLogger(tmp_path), logger])
    drawn = [list(table(row["depth/nmi"])) for row in fake.logged if "depth/nmi" in row]
    assert drawn == [["untrained"], ["untrained", "epoch 1"]]


def test_pictures_are_mirrored(fit, tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(diagnostics_module, "epoch_sheet", lambda *_: Figure((1, 1)))
    logger, fake = mirror
    module = make_module("mim", total_steps=1, steps_per_epoch=1)
    watcher = watch(module, tmp_path, "nmi", figures=True)
    fit(module, make_batches(1), [watcher], val=[IMAGES], logger=[JsonLogger(tmp_path), logger])
    images = [(row["trainer/global_step"], row["pictures/curves"]) for row in fake.logged if "pictures/curves" in row]
    assert [step for step, _ in images] == [0, 1]
    assert all(isinstance(image, wandb.Image) for _, image in images)
    assert not logger.failed


# ---- whole runs ------------------------------------------------------------------------------------------------------

SHAPES = [
    *(o for o in TINY if o != "diagnostics=none"),
    "data=shapes",
    "data.num_train=16",
    "data.num_val=8",
    "callbacks.gradient_norms.every_n_steps=1",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of one epoch with everything on, and what it printed."""
    folder, out = tmp_path_factory.mktemp("whole"), io.StringIO()
    with redirect_stdout(out):
        run(*SHAPES, "trainer.max_epochs=1", f"run.dir={folder / 'run'}")
    return folder / "run", out.getvalue()


def test_by_default_everything_is_measured_and_drawn(whole):
    folder, shown = whole
    pictures = ["", "_attention_maps_1", "_attention_maps_2", "_token_colors", "_token_moves"]
    names = {f"epoch_000{epoch}{picture}.png" for epoch in (0, 1) for picture in pictures}
    assert {p.name for p in (folder / "diagnostics").iterdir()} == names | {"epoch_0000.json", "epoch_0001.json"}
    for name in names:
        low, high = Image.open(folder / "diagnostics" / name).convert("L").getextrema()
        assert high - low > 100, name
    costs = [line for line in shown.splitlines() if line.startswith("diagnostics  8 images")]
    assert ["% of the epoch" in line for line in costs] == [False, True]
    row_list = rows(folder)
    for epoch, step in enumerate((0, 2)):
        plain = json.loads((folder / "diagnostics" / f"epoch_000{epoch}.json").read_text())
        assert not differences(values(plain), measured(row_list, step))
        by_probe = {"layer_probe_linear", "layer_probe_knn"}
        assert by_probe <= {*plain["curves"]}
        assert ({"gradient_cosine", "gradient_ratio"} <= {*plain["curves"]}) is (epoch == 1)
        assert {"attention_distance", "nmi", "cka", "fourier", "uniformity", "alignment"} <= {*plain["curves"]}
        assert plain["surfaces"]


def test_a_run_without_diagnostics_is_the_same_run(whole, tmp_path):
    run(*SHAPES, "trainer.max_epochs=1", "diagnostics=none", f"run.dir={tmp_path / 'run'}")
    assert not (tmp_path / "run" / "diagnostics").exists()
    of_gradients = r"diagnostics/gradient_(cosine|ratio)/layer_0\d"  # which callbacks.gradient_norms measures
    names = {name for row in rows(tmp_path / "run") for name in row if name.startswith("diagnostics/")}
    assert all(re.fullmatch(of_gradients, name) for name in names)
    ours, theirs = (load(path / "checkpoints" / "last.ckpt") for path in (whole[0], tmp_path / "run"))
    assert_bit_equal(ours["state_dict"], theirs["state_dict"])
    moments = ours["optimizer_states"][0]["state"]
    assert moments
    for number, state in moments.items():
        assert_bit_equal(state, theirs["optimizer_states"][0]["state"][number])
    for row in (row for row in rows(whole[0]) if "train/loss" in row or "val/knn_top1" in row):
        assert any(row == other for other in rows(tmp_path / "run")), row


class KilledError(Exception):
    pass


# Only every second epoch is validated, so that a checkpoint comes between two validations.
EVERY_SECOND = [
    *SHAPES,
    "diagnostics.figures=false",
    "diagnostics.cka.every_n_epochs=4",
    "trainer.max_epochs=4",
    "trainer.val_every_n_epochs=2",
]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    run(*EVERY_SECOND, f"run.dir={folder}")
    return folder


@pytest.mark.parametrize("where", ["in an epoch", "before its checkpoint"])
def test_killed_and_resumed_it_leaves_the_same_files(straight, tmp_path, monkeypatch, where):
    options, killed = EVERY_SECOND, tmp_path / "killed"
    with monkeypatch.context() as patch:
        owner, name = {
            "in an epoch": (PretrainModule, "training_step"),
            "before its checkpoint": (Checkpoints, "on_train_epoch_end"),
        }[where]
        real = getattr(owner, name)

        def call(self, *arguments):
            trainer = self.trainer if isinstance(self, PretrainModule) else arguments[0]
            if trainer.global_step == {"in an epoch": 7, "before its checkpoint": 8}[where]:
                raise KilledError
            return real(self, *arguments)

        patch.setattr(owner, name, call)
        with pytest.raises(KilledError):
            run(*options, f"run.dir={killed}")
    run(*options, f"run.dir={killed}")
    assert load(killed / "checkpoints" / "last.ckpt")["global_step"] == 8
    assert list(files(straight)) == ["epoch_0000.json", "epoch_0002.json", "epoch_0004.json"]
    assert not differences(files(killed), files(straight))
    assert not differences(rows(killed), rows(straight))
    assert "gradient_cosine" in files(killed)["epoch_0004.json"]["curves"]


def test_images_without_labels_are_looked_at_all_the_same(tmp_path, capsys):
    for i in range(20):
        path = tmp_path / "flat" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.radial_gradient("L").rotate(18 * i).resize((20, 20)).convert("RGB").save(path)
    unlabelled = [o for o in SHAPES if o != "data=shapes" and not o.startswith(("data.num_train", "data.num_val"))]
    unlabelled += [
        "trainer.sanity=false",
        "data=folder",
        f"data.root={tmp_path / 'flat'}",
        "data.val_fraction=0.4",
        "trainer.max_epochs=1",
    ]
    # What can be told of one diagnostic: a number of images, and leaving it out.
    some = ["diagnostics.num_images=5", "diagnostics.cka=null", "diagnostics.figures=false"]
    run(*unlabelled, *some, f"run.dir={tmp_path / 'run'}")
    ((name, plain),) = files(tmp_path / "run").items()
    assert (name, plain["num_images"]) == ("epoch_0001.json", 5)
    assert {"nmi", "fourier", "gradient_cosine"} <= {*plain["curves"]}
    assert not [name for name in plain["curves"] if name.startswith(("layer_probe", "cka"))]
    assert not differences(values(plain), measured(rows(tmp_path / "run"), 1))
    shown = capsys.readouterr().out
    assert "The data have no labels, or one class: k-NN and linear probes are off." in shown
    assert "diagnostics  5 images" in shown
    run(*unlabelled, "diagnostics=none", f"run.dir={tmp_path / 'none'}")
    ours, theirs = (load(tmp_path / n / "checkpoints" / "last.ckpt")["state_dict"] for n in ("run", "none"))
    assert_bit_equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("diagnostics.num_images=3", r"^diagnostics\.num_images must be .* at least 4.*, not 3\.$"),
        (
            "data.num_val=3",
            r"^The list of images for the diagnostics holds 3, and \w+ needs at least 4: raise num_images",
        ),
    ],
)
def test_too_few_images_are_a_sentence(tmp_path, change, words):
    with pytest.raises(ConfigError, match=words):
        run(*SHAPES, change, f"run.dir={tmp_path / 'run'}")
    assert not Path(tmp_path / "run" / "diagnostics").exists()


def test_a_batch_of_the_probe_does_not_decide_what_the_diagnostics_see(fit, tmp_path):
    """Diagnostics bring their own images: another validation loader changes no value."""
    found = []
    for val in ([IMAGES], [replace(IMAGES, image=IMAGES.image + 1)]):
        module = make_module("mim", total_steps=1, steps_per_epoch=1)
        fit(module, make_batches(1), [watch(module, tmp_path)], val=val)
        found.append(files(tmp_path))
    assert not differences(*found)
