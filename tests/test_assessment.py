"""``harmonize evaluate`` on runs of our own: rows, files, several networks and processes, and what is refused."""

import csv
import json
import os

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from harmonize import assessment
from harmonize.checkpoints.own import read_checkpoint
from harmonize.cli import main
from harmonize.config import CONF, check_config, compose, instantiate
from harmonize.data.module import DataModule
from harmonize.evaluation import base
from harmonize.evaluation.features import extract
from harmonize.evaluation.knn import knn_accuracy
from harmonize.evaluation.linear_probe import linear_probe_accuracy
from harmonize.functional.hashing import weights_hash
from harmonize.reports import evaluation as reports
from harmonize.reports.evaluation import COLUMNS
from harmonize.reports.style import to_png, to_svg
from harmonize.types import FeatureSpec
from tests.training.test_run import TINY, run

DATA = ["data=shapes", "data.num_train=24", "data.num_val=12", "data.num_workers=0"]
PRESETS = sorted(path.stem for path in (CONF / "eval").glob("*.yaml") if not path.stem.startswith("_"))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of our own, of two steps, on drawn shapes; and another of one step."""
    root = tmp_path_factory.mktemp("trained")
    for name, steps in (("run", 2), ("other", 1)):
        short = [f"trainer.max_steps={steps}", "trainer.sanity=false", "callbacks.probe=null", f"run.dir={root / name}"]
        run(*TINY, *DATA, *short)
    return root / "run"


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Drawing takes long, so that most tests leave it out."""
    monkeypatch.setattr(reports, "to_png", lambda figure: b"")
    monkeypatch.setattr(reports, "to_svg", lambda figure: "")


def given(checkpoint, overrides, out):
    place = [f"run.dir={out}"] if out else []
    return [f"checkpoint={checkpoint}", "accelerator=cpu", "run.root=root", *place, *overrides]


def evaluate(checkpoint, *overrides, out="out"):
    """The command, but for the command line."""
    cfg = compose(given(checkpoint, overrides, out), "evaluate")
    check_config(cfg, command="evaluate")
    assessment.evaluate(cfg)


def command(checkpoint, *overrides, out="out", code=0):
    assert main(["evaluate", *given(checkpoint, overrides, out)]) == code


def read(folder, name="out"):
    return json.loads((folder / name / "results.json").read_text())


def encoder_of(root):
    found = read_checkpoint(str(root))
    encoder = instantiate(OmegaConf.create(found.config["backbone"])).eval()
    encoder.load_state_dict(found.weights)
    return encoder


def directly(root, spec):
    """What a library user gets from features of all images of the data that the run was trained on."""
    encoder, node = encoder_of(root), compose([*DATA, "data.image_size=16", "data.patch_size=4"]).data
    data = DataModule(instantiate(node.dataset), {}, {}, 16, 1, eval_crop=node.eval_crop)
    return [extract(encoder, data.feature_loader(s, None, 8), [spec], "cpu")[0] for s in ("train", "val")]


def test_knn(trained, folder, capsys):
    command(trained, "eval=knn", "eval.k=[3,5,100]")
    rows = read(folder)
    sides = directly(trained, FeatureSpec(2, "cls"))
    found = {row["series"]: row["value"] for row in rows if row["metric"] == "top1"}
    assert found == {f"k={k}, temperature=0.07": knn_accuracy(*sides, 12, k) for k in (3, 5)}
    assert [row["metric"] for row in rows] == ["top1", "top5"] * 2  # 12 shapes
    weights = weights_hash(encoder_of(trained).state_dict())
    for row in rows:
        assert set(row) == set(COLUMNS)
        same = {
            "protocol": "knn",
            "network": "run",
            "num_images": 12,
            "feature": str(FeatureSpec(2, "cls")),
            "data": "the data that it was trained on: Shapes",
            "seed": 0,
            "checkpoint": str(trained),
            "fingerprint": weights[:16],
            "published": None,
            "low": None,
            "axis": "",
        }
        assert {key: row[key] for key in same} == same
        assert row["standard_error"] == pytest.approx((row["value"] * (1 - row["value"]) / 12) ** 0.5)
    shown = capsys.readouterr().out
    assert "k = 100 is left out: there are 24 images." in shown
    (line,) = [line for line in shown.splitlines() if "top1, k=3, temperature=0.07" in line]
    assert f"{100 * rows[0]['value']:.1f} ± {100 * rows[0]['standard_error']:.1f}" in line
    assert "Results: results.json, results.csv, results.png, results.svg in out" in shown


def test_the_files(trained, folder, monkeypatch):
    monkeypatch.setattr(reports, "to_png", to_png)
    monkeypatch.setattr(reports, "to_svg", to_svg)
    command(trained, "eval=linear_probe", "eval.feature.pool=cls")
    made = {path.name for path in (folder / "out").iterdir()}
    assert made == {"results.json", "results.csv", "results.png", "results.svg", "command.txt"}
    rows = read(folder)
    assert rows[0]["value"] == linear_probe_accuracy(*directly(trained, FeatureSpec(2, "cls")), 12)
    with (folder / "out" / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [{k: str(v) if v is not None else "" for k, v in row.items()} for row in rows] == table
    assert (folder / "out" / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "out" / "results.svg").read_text()


AUGMENTED = ["eval=linear_probe_moco_v3", "eval.epochs=2", "eval.batch_size=8"]


@pytest.mark.parametrize("chosen", [["eval=knn", "eval.k=[3]"], AUGMENTED], ids=["knn", "augmented"])
def test_the_same_command_gives_the_same_rows(trained, folder, chosen):
    evaluate(trained, *chosen, out="one")
    evaluate(trained, *chosen, out="one")
    again = read(folder, "one")
    evaluate(trained, *chosen, "run.root=elsewhere", out="two")
    assert read(folder, "two") == again
    assert sorted(path.name for path in folder.iterdir()) == ["elsewhere", "one", "root", "two"]


def test_other_settings_in_the_same_folder_are_trained_anew(trained, folder):
    """As a run that stopped half-way through is gone on with only by the same command."""
    grid = ["eval=linear_probe_moco_v3", "eval.augment=null", "eval.epochs=3", "eval.holdout=0.25"]
    evaluate(trained, *grid, "eval.lrs=[0.1,100]")
    drawn = [*DATA, "data.num_val=60", "data.clutter=0.0"]
    for name, changed in (("data", ["eval.lrs=[0.1,100]", *drawn]), ("lrs", ["eval.lrs=[30,300]", *drawn])):
        evaluate(trained, *grid, *changed)
        evaluate(trained, *grid, *changed, out=name)
        assert read(folder) == read(folder, name)


def test_interrupted_it_says_so_and_goes_on(trained, folder, capsys, monkeypatch):
    chosen = [*AUGMENTED, "eval.epochs=3"]
    evaluate(trained, *chosen, out="whole")
    capsys.readouterr()
    save, saved = base.Bench.save_state, []

    def until_killed(self, name, state):
        save(self, name, state)
        saved.append(state["epoch"])
        if saved == [1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(base.Bench, "save_state", until_killed)
    command(trained, *chosen, code=130)
    assert capsys.readouterr().err == "harmonize: interrupted; the same command goes on where it stopped.\n"
    assert not (folder / "out" / "results.json").exists()
    command(trained, *chosen)
    assert saved == [1, 2, 3]
    assert read(folder) == read(folder, "whole")


def test_two_checkpoints_side_by_side(trained, folder, capsys):
    other = trained.parent / "other"
    evaluate(f"[{trained},{other}]", "eval=layer_probe", "eval.k=3", "eval.l2=1.0", "names=[A,B]")
    rows = read(folder)
    for name, root in (("A", trained), ("B", other)):
        own = [row for row in rows if row["network"] == name]
        places = [(series, "block", layer) for series in ("linear", "knn") for layer in (1, 2)]
        assert [(row["series"], row["axis"], row["at"]) for row in own] == places
        sides = directly(root, FeatureSpec(2, "patch_mean"))
        assert own[1]["value"] == linear_probe_accuracy(*sides, 12, l2=1.0)
        assert own[3]["value"] == knn_accuracy(*sides, 12, 3)
        assert {row["fingerprint"] for row in own} == {weights_hash(encoder_of(root).state_dict())[:16]}
    assert rows[0]["fingerprint"] != rows[4]["fingerprint"]
    shown = capsys.readouterr().out
    assert "A: layer_probe on the data that it was trained on: Shapes ..." in shown
    assert "top1, knn, block 1 ... 2" in shown


def test_the_folder_is_a_function_of_the_command(trained, folder):
    for k in (3, 3, 5):
        evaluate(trained, "eval=knn", f"eval.k={k}", out=None)
    made = sorted(path.name for path in (folder / "root").iterdir())
    assert [name.rpartition("-")[0] for name in made if name != "features"] == ["knn-run", "knn-run"]


def test_networks_that_differ_in_heads_alone_share_no_features(trained, folder):
    """Their weights are the same."""
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    content["config"]["backbone"]["num_heads"] = 1  # of two
    torch.save(content, "heads.ckpt")
    drawn = ["eval=knn", "eval.k=[1,2,3,5]", *DATA, "data.num_train=96", "data.num_val=48"]
    evaluate(trained, *drawn, out="two")
    evaluate("heads.ckpt", *drawn, out="one")
    evaluate("heads.ckpt", *drawn, "run.root=fresh", out="fresh")
    assert read(folder, "one") == read(folder, "fresh")
    assert [row["value"] for row in read(folder, "one")] != [row["value"] for row in read(folder, "two")]


def test_features_are_kept_for_other_evaluations(trained, folder, monkeypatch):
    seen = []
    forward = extract

    def counted(encoder, loader, *rest):
        seen.append(loader)
        return forward(encoder, loader, *rest)

    monkeypatch.setattr(base, "extract", counted)
    evaluate(trained, "eval=knn", "eval.k=3", "eval.feature.pool=cls_patch_mean")
    assert len(seen) == 2
    evaluate(trained, "eval=linear_probe", out="other")
    assert len(seen) == 2
    evaluate(trained, "eval=linear_probe", "num_train=12", out="few")
    assert len(seen) == 3
    assert read(folder, "few")[0]["settings"] != read(folder, "other")[0]["settings"]


@pytest.mark.parametrize("chosen", [["eval=knn", "eval.k=[3,5]"], AUGMENTED], ids=["knn", "augmented"])
def test_two_processes_give_what_one_gives(trained, folder, chosen, capfd, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    evaluate(trained, *chosen, "num_val=11", out="one")
    evaluate(trained, *chosen, "num_val=11", "devices=2", "run.root=root2", out="two")
    assert read(folder, "two") == read(folder, "one")
    assert capfd.readouterr().out.count("Results: ") == 2  # each once, not once for each process
    command(trained, "eval=knn", "eval.feature.layer=99", "devices=2", out="wrong", code=2)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("harmonize: ")]
    assert "feature.layer=99 must be a block in 1 ... 2" in line


def images(root, by_class):
    for i in range(16):
        place = root / (f"class{i % 2}" if by_class else "")
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
    return root


def test_data_of_other_classes(trained, folder):
    root = images(folder / "images", by_class=True)
    few = ["data=folder", f"data.root={root}", "data.num_workers=0", "data.val_fraction=0.4"]
    for name in ("knn", "frequency_noise"):
        evaluate(trained, f"eval={name}", *few, *(["eval.k=3"] if name == "knn" else []), out=name)
        rows = read(folder, name)
        assert {row["data"] for row in rows} == {"the chosen data: Folder"}
        assert {row["metric"] for row in rows} <= {"top1", "accuracy_drop"}


TRAINED = "a run"


@pytest.mark.parametrize(
    ("checkpoint", "overrides", "words"),
    [
        ("null", [], "checkpoint must be given"),
        ("nowhere.ckpt", [], "checkpoint=nowhere.ckpt"),
        (TRAINED, ["eval=linear_prob"], "did you mean linear_probe?"),
        (TRAINED, ["eval=knn", "eval.k=0"], "eval.k must be a whole number of at least 1"),
        (TRAINED, ["eval=knn", "eval.k=[]"], "eval.k"),
        (TRAINED, ["eval=knn", "eval.temperature=[]"], "eval.temperature"),
        (TRAINED, ["eval=linear_probe_moco_v3", "eval.lrs=[]"], "eval.lrs"),
        (TRAINED, ["eval=linear_probe_moco_v3", "eval.features=[]"], "eval.features"),
        (TRAINED, ["eval=layer_probe", "eval.k=[3]"], "eval.k"),
        (TRAINED, ["eval=knn", "eval.feature.layer=99"], "feature.layer=99 must be a block in 1 ... 2"),
        (TRAINED, ["eval=linear_probe_mae", "eval.augment.crop=none"], "eval.augment.crop=none is not known"),
        (TRAINED, ["eval=shape_bias", "data=folder", "data.root=labelled"], "data=shapes has, or eval.root"),
        (TRAINED, ["eval=robustness"], "eval.root"),
        (TRAINED, ["eval=frequency_noise", "eval.head=checkpoint"], "eval.head=checkpoint needs a checkpoint with"),
        (TRAINED, ["names=[A,B]"], "names"),
        *(
            (TRAINED, [f"eval={name}", "data=folder", "data.root=unlabelled"], "data has no labels")
            for name in ("knn", "linear_probe", "linear_probe_grid", "layer_probe", "frequency_noise")
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else v,
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_leaves_nothing(trained, folder, capfd, checkpoint, overrides, words):
    for name in ("labelled", "unlabelled"):
        if f"data.root={name}" in overrides:
            images(folder / name, by_class=name == "labelled")
            overrides = [*overrides, "data.num_workers=0"]
    before = sorted(path.name for path in folder.iterdir())
    command(checkpoint.replace(TRAINED, str(trained)), *overrides, code=2)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("harmonize: error: ")
    assert words in lines[0]
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_built(name):
    cfg = compose([f"eval={name}", "checkpoint=x"], "evaluate")
    check_config(cfg, command="evaluate")
    if not name.endswith("_ade20k"):  # which looks for its folder
        assert callable(instantiate(cfg.eval).run)


def test_the_published_number_stands_beside_the_headline(trained, folder, monkeypatch, capsys):
    seen = []

    def published(*arguments):
        seen.append(arguments)
        return assessment_published("linear_probe_moco_v3", "contrastive", arguments[2])

    assessment_published = assessment.published
    monkeypatch.setattr(assessment, "published", published)
    evaluate(trained, "eval=linear_probe")
    top1, top5 = read(folder)
    assert (top1["published"], top1["published_source"]) == (0.767, "MoCo v3 ViT-B/16, 300 epochs")
    assert (top5["published"], top5["published_source"]) == (None, "")
    protocol, objective, spec, at, series = seen[0]
    assert (protocol, objective, spec.width, at, series) == ("linear_probe", "hybrid 0.2", 16, None, "")
    assert "published, of another network" in capsys.readouterr().out
    assert os.path.isfile("out/command.txt")
