"""``harmonize analyze`` on a run of our own and on models of timm: the report, its numbers, and what is refused."""

import csv
import json

import pytest
import timm
import torch
from omegaconf import OmegaConf

from harmonize.analysis import choose_diagnostics
from harmonize.backbones.timm_models import TimmEncoder
from harmonize.checkpoints.own import read_checkpoint
from harmonize.cli import main
from harmonize.config import compose, instantiate
from harmonize.data.module import DataModule
from harmonize.diagnostics.measure import measure
from harmonize.evaluation.features import extract
from harmonize.functional.seeding import mix_int
from harmonize.reports.files import to_plain
from harmonize.types import ConfigError
from tests.training.test_run import TINY, differences, run

CREATE = timm.create_model
ALL = [name for name, node in compose([]).diagnostics.items() if OmegaConf.is_config(node)]
DATA = ["data=shapes", "data.num_train=24", "data.num_val=12", "data.num_workers=0"]
# Drawing takes longest, so that most tests leave most of it out.
FEW = [f"diagnostics.{name}=null" for name in ALL if name not in ("mutual_information", "layer_probe", "health")]
CHEAP = ["num_images=8", "batch_size=4", "accelerator=cpu", "tsne=false"]
VIT = "timm:vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No weights can be had, and Vision Transformers have two narrow blocks."""

    def create(name, **options):
        if options.pop("pretrained", False):
            raise OSError("there is no network")
        small = {"depth": 2, "embed_dim": 48, "num_heads": 3} if name.startswith(("vit", "cait", "naflex")) else {}
        return CREATE(name, **small | options)

    monkeypatch.setattr(timm, "create_model", create)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of our own, of two steps."""
    root = tmp_path_factory.mktemp("trained") / "run"
    run(*TINY, *DATA, "trainer.max_steps=2", "trainer.sanity=false", "callbacks.probe=null", f"run.dir={root}")
    return root


def analyze(checkpoint, *overrides, out="out", code=0):
    assert main(["analyze", f"checkpoint={checkpoint}", *CHEAP, f"run.dir={out}", *overrides]) == code


def read(folder, name="out"):
    return json.loads((folder / name / "diagnostics.json").read_text())


def encoder_of(root):
    found = read_checkpoint(str(root))
    encoder = instantiate(OmegaConf.create(found.config["backbone"])).eval()
    encoder.load_state_dict(found.weights)
    return encoder


def shapes(image_size):
    node = compose([*DATA, f"data.image_size={image_size}", "data.patch_size=4"]).data.dataset
    return DataModule(instantiate(node), {}, {}, image_size=image_size, batch_size=1, eval_crop=1.0)


def directly(encoder, image_size):
    """What a library user gets, without the report."""
    data, chosen = shapes(image_size), choose_diagnostics(compose(FEW).diagnostics, encoder.spec)
    indices = data.spread("val", 8)
    found = measure(encoder, data.feature_loader("val", indices, 4), chosen.metrics, indices)
    specs = chosen.layer_probe.specs(encoder.spec)
    sides = [extract(encoder, data.feature_loader(split, None, 4), specs, "cpu") for split in ("train", "val")]
    found.merge(chosen.layer_probe.score(*sides, len(data.classes)))
    return json.loads(json.dumps(to_plain(found)))


def test_a_run_of_our_own(trained, folder, capsys):
    analyze(trained, *FEW)
    assert {path.name for path in (folder / "out").iterdir()} == {
        "report.html",
        "diagnostics.json",
        "diagnostics.csv",
        "figures",
    }
    assert {p.name for p in (folder / "out" / "figures").iterdir()} == {
        f"{name}.{kind}" for name in ("nmi", "layer_probe_linear", "layer_probe_knn") for kind in ("png", "svg")
    }
    (network,) = read(folder)["networks"]
    assert network["name"] == "run"
    assert network["encoder"]["width"] == 16
    assert f"{trained} (step 2)" in network["details"]["checkpoint"]
    # On the data that it was trained on, at its image size; the untrained network is the one that training began with.
    assert network["details"]["data"] == "the data that it was trained on: Shapes"
    expected = directly(encoder_of(trained), 16)
    assert not differences({key: network[key] for key in expected}, expected)
    torch.manual_seed(mix_int(0))
    untrained = instantiate(OmegaConf.create(read_checkpoint(str(trained)).config["backbone"])).eval()
    assert not differences({key: network["untrained"][key] for key in expected}, directly(untrained, 16))
    assert network["untrained"]["curves"]["nmi"]["value"] != network["curves"]["nmi"]["value"]
    with (folder / "out" / "diagnostics.csv").open() as file:
        lines = [row for row in csv.DictReader(file) if row["diagnostic"] == "nmi" and not row["head"]]
    assert [float(row["value"]) for row in lines if row["network"] == "run"] == expected["curves"]["nmi"]["value"]
    assert {row["network"] for row in lines} == {"run", "run (untrained)"}
    page = (folder / "out" / "report.html").read_text()
    assert "RANDOM" not in page
    for words in ("mutual information", "Figure 10", "untrained"):
        assert words in page
    shown = capsys.readouterr().out
    assert "Report: out/report.html" in shown
    assert "mutual information" in shown


def test_the_same_command_gives_the_same_numbers(trained, folder):
    for name in ("one", "two"):
        analyze(f"[{trained},{VIT}]", *FEW, "diagnostics.layer_probe=null", out=name)
    first, second = ({k: v for k, v in read(folder, name).items() if k != "command"} for name in ("one", "two"))
    assert not differences(first, second)
    assert len(first["networks"]) == 2
    assert all(network["curves"]["nmi"]["value"] for network in first["networks"])


def test_random_weights_are_announced(folder, capsys):
    analyze(VIT, "image_size=32", *DATA, *FEW)
    warning = f"{VIT}: no pre-trained weights could be loaded (there is no network); the weights are RANDOM."
    assert f"Warning: {warning}" in capsys.readouterr().out
    assert warning in (folder / "out" / "report.html").read_text()
    (network,) = read(folder)["networks"]
    assert network["warnings"][0] == warning
    assert network["details"]["data"] == "the chosen data: Shapes"
    torch.manual_seed(mix_int(0))
    expected = directly(TimmEncoder("vit_tiny_patch16_224", image_size=32).eval(), 32)
    assert not differences({key: network[key] for key in expected}, expected)
    # The line to compare with is another random network, not the same one.
    assert network["untrained"]["curves"]["nmi"]["value"] != network["curves"]["nmi"]["value"]


def test_several_networks_in_one_report(trained, folder, capsys):
    """Each at its own image size, all on the data of the first run; what is wrong with one stands in the report."""
    analyze(f"[{trained},{VIT}]", "names=[A,B]", "untrained=false", *FEW, "diagnostics.layer_probe=null")
    a, b = read(folder)["networks"]
    assert (a["name"], b["name"]) == ("A", "B")
    assert (a["untrained"], b["untrained"]) == (None, None)
    assert (a["encoder"]["image_size"], b["encoder"]["image_size"]) == ([16, 16], [224, 224])
    assert a["details"]["data"] == b["details"]["data"] == "the data that it was trained on: Shapes"
    assert b["curves"]["nmi"]["value"] != a["curves"]["nmi"]["value"]
    shown = capsys.readouterr().out
    (alarm,) = [line for line in shown.splitlines() if line.startswith("Health: B: attention collapse: nmi")]
    sentence = alarm.removeprefix("Health: B: ")
    assert sentence in b["warnings"]  # which stand under the network's name
    assert sentence in (folder / "out" / "report.html").read_text()
    assert "untrained" not in shown


def test_t_sne(trained, folder, capsys):
    few = [*FEW, "diagnostics.layer_probe=null", "untrained=false", "tsne=true", "data=shapes", "data.num_train=8"]
    analyze(trained, *few, "data.num_val=12", "data.num_workers=0")  # one image of each class
    assert "t-SNE is left out: it takes 6 images of each of 3 classes." in capsys.readouterr().out
    assert {p.stem for p in (folder / "out" / "figures").iterdir()} == {"nmi"}
    analyze(trained, *few, "data.num_val=150", "data.num_workers=0", out="drawn")
    assert "left out" not in capsys.readouterr().out
    (network,) = read(folder, "drawn")["networks"]
    assert network["num_images"] == 8  # of the diagnostics, whose images are others
    assert [p.stem for p in (folder / "drawn" / "figures").glob("*tsne*.png")]


def test_the_folder_is_a_function_of_the_command(trained, folder):
    few = [*FEW, "diagnostics.layer_probe=null", "untrained=false", "run.dir=null"]
    for names in ("[mine]", "[mine]", "[other]"):
        analyze(trained, *few, f"names={names}")
    made = sorted(path.name for path in (folder / "outputs" / "analysis").iterdir())
    assert [name.rpartition("-")[0] for name in made] == ["mine", "other"]


TRAINED = "a run"


@pytest.mark.parametrize(
    ("checkpoint", "overrides", "words"),
    [
        ("timm:vit_tny_patch16", DATA, "checkpoint=timm:vit_tny_patch16: timm has no such model"),
        ("timm:resnet18", DATA, "checkpoint=timm:resnet18 is no Vision Transformer"),
        ("timm:resnet18", [*DATA, "image_size=32"], "checkpoint=timm:resnet18 cannot be built: "),
        ("timm:naflexvit_base_patch16_gap", DATA, "takes images of any size"),
        ("timm:cait_xxs24_224", [*DATA, "image_size=32"], "Diagnostics cannot read this network: block 1"),
        (VIT, [*DATA, "image_size=40"], "image_size must be a multiple of the patch size"),
        (VIT, [*DATA, "image_size=8"], "image_size"),
        ("nowhere.ckpt", DATA, "checkpoint=nowhere.ckpt: there is no such file or run folder"),
        ("text.ckpt", DATA, "checkpoint=text.ckpt is damaged or no file"),
        ("other.ckpt", DATA, "checkpoint=other.ckpt"),
        (f"[{VIT},nowhere.ckpt]", DATA, "checkpoint=nowhere.ckpt"),
        (TRAINED, ["num_images=13"], "num_images must be at most 12, which is how many validation images"),
        (TRAINED, ["num_images=2"], "num_images must be a whole number of at least 4, not 2."),
        (TRAINED, ["image_size=18"], "image_size must be a multiple of the patch size of "),
        (TRAINED, ["names=[A,B]"], "names"),
        (f"[{TRAINED},{TRAINED}]", ["names=[A,A]"], "names"),
        (TRAINED, ["data=folder", "data.root=nowhere"], "data.root=nowhere"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(trained, folder, capfd, checkpoint, overrides, words):
    (folder / "text.ckpt").write_text("hello")
    torch.save({"model": {"cls_token": torch.ones(3)}}, folder / "other.ckpt")
    before = sorted(path.name for path in folder.iterdir())
    analyze(checkpoint.replace(TRAINED, str(trained)), *FEW, *overrides, code=2)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("harmonize: error: ")
    assert words in lines[0]
    assert sorted(path.name for path in folder.iterdir()) == before


def touch(path):
    """What a harmful checkpoint would have called."""
    open(path, "w").close()


@pytest.mark.parametrize(
    ("place", "node"),
    [
        ("backbone", {"_target_": "tests.test_analysis.touch"}),
        ("backbone", {"_target_": "harmonize.training.run.os.mkdir"}),
        ("backbone", {"_target_": "harmonize.backbones.timm_models.socket.gethostbyname"}),
        ("backbone", {"_target_": "harmonize.backbones.timm_vit.math.sqrt"}),
        ("backbone", {"_target_": "harmonize.backbones.nothing.There"}),
        ("backbone", {}),
        ("backbone", "vit_tiny"),
        ("backbone", "nested"),
        ("data", {"dataset": {"_target_": "tests.test_analysis.touch"}}),
    ],
)
def test_a_checkpoint_cannot_name_foreign_code(trained, folder, capsys, monkeypatch, place, node):
    """Its configuration says what to build; a file from elsewhere could name any function."""
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    if node == "nested":
        node = content["config"]["backbone"] | {"positions": {"_target_": "tests.test_analysis.touch"}}
    for part in (node, *(node.values() if isinstance(node, dict) else ())):
        if isinstance(part, dict) and part.get("_target_") == "tests.test_analysis.touch":
            part["path"] = str(folder / "harm")
    content["config"][place] = node
    torch.save(content, "a.ckpt")
    analyze("a.ckpt", *FEW, code=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"harmonize: error: checkpoint=a.ckpt: its {place}")
    assert sorted(path.name for path in folder.iterdir()) == ["a.ckpt"]


def test_weights_that_do_not_fit_the_configuration(trained, folder, capsys):
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    content["config"]["backbone"]["depth"] = 3
    torch.save(content, "a.ckpt")
    analyze("a.ckpt", *FEW, code=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("harmonize: error: checkpoint=a.ckpt does not fit its own configuration: ")


def test_what_is_no_diagnostic_is_refused():
    section = OmegaConf.create({"mine": {"_target_": "fractions.Fraction", "numerator": 1}})
    with pytest.raises((ConfigError, TypeError)):
        choose_diagnostics(section, encoder_spec())


def encoder_spec():
    return TimmEncoder("vit_tiny_patch16_224", pretrained=False, image_size=32).spec


def test_choosing_nothing_is_none():
    assert choose_diagnostics(None, encoder_spec()) is None
    assert choose_diagnostics(compose(["diagnostics=none"]).diagnostics, encoder_spec()) is None
    only_alarms = OmegaConf.create({"health": {"_target_": "harmonize.diagnostics.health.Health"}, "cka": None})
    assert choose_diagnostics(only_alarms, encoder_spec()) is None
