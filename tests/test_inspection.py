"""``harmonize inspect``, and official files through every command: what is printed, and what is refused."""

import csv
import json
import pickle

import pytest
import torch
from omegaconf import OmegaConf

from harmonize.cli import main
from harmonize.config import compose
from harmonize.networks import load_network
from tests.golden.conftest import GOLDEN, assert_equal, expected, names
from tests.helpers import tiny_encoder

FIXTURES = [name for kind in ("moco_v3", "simmim", "mae", "dino") for name in names(kind)]
FAMILY = {"moco_v3": "MoCo v3", "simmim": "SimMIM", "mae": "MAE", "dino": "DINO"}
DATA = ["data=shapes", "data.num_train=24", "data.num_val=12", "data.num_workers=0"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def path_and_heads(name):
    return str(GOLDEN / f"{name}.pth"), f"num_heads={expected(name)['config']['num_heads']}"


@pytest.mark.parametrize("name", FIXTURES)
def test_family_architecture_and_every_key(name, capsys):
    path, heads = path_and_heads(name)
    assert main(["inspect", path]) == 0
    text = capsys.readouterr().out
    lines = dict(line.split(None, 1) for line in text.splitlines() if line)
    config = expected(name)["config"]
    assert lines["family"].startswith(next(words for kind, words in FAMILY.items() if name.startswith(kind)))
    assert f"width {config['embed_dim']}, depth {config['depth']}" in lines["architecture"]
    content = torch.load(path, weights_only=False)
    tensors = [
        f"{entry}/{key}" if isinstance(value, dict) else entry
        for entry, value in content.items()
        for key in (value if isinstance(value, dict) and value else [""])
    ]
    shown = [line.split()[0] for line in text.splitlines()]
    assert {key.rstrip("/") for key in tensors} <= set(shown)
    outcomes = text.splitlines()[-1]
    assert "mapped" in outcomes
    assert "missing" not in outcomes
    assert "unexplained" not in outcomes

    assert main(["inspect", path, heads]) == 0
    assert f"{config['num_heads']} (from: " in capsys.readouterr().out


@pytest.mark.parametrize("name", names("dino") + names("moco_v3"))
def test_features_through_the_loader_of_the_commands(name):
    """What analyze and evaluate see is what the official code computed."""
    path, heads = path_and_heads(name)
    loaded = load_network(path, name, compose([f"checkpoint={path}", heads], "evaluate"))
    want = expected(name)
    images, features = ("image", "features_eval") if "features_eval" in want else ("view1", "features_eval_view1")
    assert_equal(loaded.encoder(want[images])[:, 0], want[features])


@pytest.mark.parametrize("name", FIXTURES)
def test_analyze_and_evaluate_take_official_files(name, folder):
    path, heads = path_and_heads(name)
    small = [*DATA, f"run.dir={folder / 'out'}"]
    assert main(["evaluate", f"checkpoint={path}", heads, "eval=knn", "eval.k=[3]", f"run.root={folder}", *small]) == 0
    rows = json.loads((folder / "out" / "results.json").read_text())
    assert rows[0]["metric"] == "top1"
    assert rows[0]["num_images"] == 12


def test_analyze_takes_an_official_file(folder):
    path, heads = path_and_heads(names("simmim")[0])
    every = [key for key, node in compose([]).diagnostics.items() if OmegaConf.is_config(node)]
    few = [f"diagnostics.{key}=null" for key in every if key != "mutual_information"]
    small = ["tsne=false", "num_images=8", "batch_size=4", f"run.dir={folder / 'out'}", *DATA]
    assert main(["analyze", f"checkpoint={path}", heads, *few, *small]) == 0
    with (folder / "out" / "diagnostics.csv").open() as file:
        assert {row["network"] for row in csv.DictReader(file)} == {"simmim", "simmim (untrained)"}


def test_without_a_head_count_only_inspect_goes_on(capsys):
    path, _ = path_and_heads(names("moco_v3")[0])
    assert main(["inspect", path]) == 0
    assert "give num_heads=" in capsys.readouterr().out
    assert main(["evaluate", f"checkpoint={path}", "eval=knn", *DATA]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "number of heads" in line
    assert "num_heads=" in line


def test_another_image_size(folder):
    """Positions of official and of own networks are resampled; at their own size nothing changes."""
    path, heads = path_and_heads(names("dino")[0])
    config = expected(names("dino")[0])["config"]
    size = config["img_size"] + config["patch_size"]
    for resize in ("mae", "timm", "dino"):
        cfg = compose([f"checkpoint={path}", heads, f"image_size={size}", f"resize={resize}"], "evaluate")
        encoder = load_network(path, "a", cfg).encoder
        assert encoder.spec.image_size == (size, size)
        assert encoder(torch.zeros(1, 3, size, size)).isfinite().all()


class Bomb:
    def __reduce__(self):
        return print, ("boom",)


def wrong_files(folder):
    resnet = {"conv1.weight": torch.ones(4, 3, 7, 7), "fc.weight": torch.ones(2, 4)}
    torch.save({"state_dict": resnet}, folder / "resnet.pth")
    (folder / "empty.pth").touch()
    (folder / "text.pth").write_text("hello")
    whole = (GOLDEN / "dino.pth").read_bytes()
    (folder / "torn.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "bomb.pth").write_bytes(pickle.dumps({"state_dict": Bomb()}))
    content = torch.load(GOLDEN / "mae.pth", weights_only=False)
    content["model"]["strange.weight"] = torch.ones(3)
    torch.save(content, folder / "strange.pth")
    del content["model"]["strange.weight"], content["model"]["blocks.1.attn.qkv.weight"]
    torch.save(content, folder / "lacking.pth")
    (folder / "folder").mkdir()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.pth", "there is no such file or run folder"),
        ("empty.pth", "is an empty file"),
        ("text.pth", "is damaged"),
        ("torn.pth", "is damaged"),
        ("bomb.pth", "checkpoint="),
        ("resnet.pth", "checkpoint="),
        ("strange.pth", "strange.weight"),
        ("lacking.pth", "blocks.1.attn.qkv.weight"),
        ("folder", "does not exist"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "evaluate"])
def test_a_wrong_file_is_one_sentence(folder, capfd, command, name, words):
    wrong_files(folder)
    before = sorted(path.name for path in folder.iterdir())
    arguments = [name] if command == "inspect" else [f"checkpoint={name}", "num_heads=3", *DATA]
    assert main([command, *arguments]) == 2
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("harmonize: error: checkpoint=")
    assert words in line
    assert "boom" not in out
    assert sorted(path.name for path in folder.iterdir()) == before


def test_our_own_files(folder, capsys):
    encoder = tiny_encoder()
    backbone = {"_target_": "harmonize.backbones.timm_vit.ViTEncoder"}
    backbone |= {"image_size": 16, "patch_size": 4, "width": 24, "depth": 2, "num_heads": 3}
    state = {f"encoder.{key}": value for key, value in encoder.state_dict().items()} | {"objective.head": torch.ones(2)}
    loss = {"_target_": "harmonize.objectives.hybrid.Hybrid", "lambda": 0.2}
    content = {"state_dict": state, "config": {"backbone": backbone, "loss": loss}, "global_step": 7, "optimizer": {}}
    torch.save(content, folder / "a.ckpt")
    assert main(["inspect", "a.ckpt"]) == 0
    text = capsys.readouterr().out
    assert "after step 7" in text
    assert "hybrid 0.2" in text
    assert "of the pre-training objective" in text


@pytest.mark.parametrize("root", ["${evil}", "${oc.create:{_target_:os.getcwd}}"])
def test_the_data_of_a_checkpoint_can_name_no_foreign_code(folder, capsys, monkeypatch, root):
    """References are followed when a configuration is resolved, and what they lead to would be built."""
    backbone = {"_target_": "harmonize.backbones.timm_vit.ViTEncoder"}
    backbone |= {"image_size": 16, "patch_size": 4, "width": 24, "depth": 2, "num_heads": 3}
    state = {f"encoder.{key}": value for key, value in tiny_encoder().state_dict().items()}
    dataset = {"_target_": "harmonize.data.datasets.Folder", "root": root, "image_size": 16}
    data = {"dataset": dataset, "evil": {"_target_": "os.getcwd"}, "image_size": 16, "num_workers": 0, "eval_crop": 1.0}
    torch.save({"state_dict": state, "config": {"backbone": backbone, "data": data}}, folder / "a.ckpt")
    for command in ("evaluate", "analyze"):
        assert main([command, "checkpoint=a.ckpt"]) == 2
        assert "its data section refers to other keys" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["branch=momentum", "num_heads=2"])
def test_keys_for_other_projects_files_are_not_ignored(folder, capsys, key):
    backbone = {"_target_": "harmonize.backbones.timm_vit.ViTEncoder"}
    backbone |= {"image_size": 16, "patch_size": 4, "width": 24, "depth": 2, "num_heads": 3}
    state = {f"encoder.{name}": value for name, value in tiny_encoder().state_dict().items()}
    torch.save({"state_dict": state, "config": {"backbone": backbone}}, folder / "a.ckpt")
    assert main(["evaluate", "checkpoint=a.ckpt", key, *DATA]) == 2
    assert f"{key} is for other projects' files" in capsys.readouterr().err


def test_inspect_takes_one_file(capsys):
    assert main(["inspect", "-m", "checkpoint=a,b"]) == 2
    assert main(["inspect", "checkpoint=[a,b]"]) == 2
    assert main(["inspect", "timm:vit_tiny_patch16_224"]) == 2
    assert main(["inspect"]) == 2
    assert all("checkpoint" in line for line in capsys.readouterr().err.splitlines())
