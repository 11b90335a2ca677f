"""``harmonize export``: from a checkpoint to files, with a model card that says where they come from."""

import json

import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors import safe_open

from harmonize.checkpoints.single_file import load_exported
from harmonize.cli import main
from harmonize.config import compose, instantiate, save_config
from tests.golden.conftest import GOLDEN, expected, names

TINY = ["backbone.width=24", "backbone.depth=2", "backbone.num_heads=3", "data.image_size=16", "data.patch_size=4"]


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A run folder as training leaves it, after two epochs of the hybrid."""
    monkeypatch.chdir(tmp_path)
    cfg = compose([*TINY, "loss=hybrid", "loss.lambda=0.3", "trainer.max_epochs=2", "run.root=/srv/somewhere/outputs"])
    torch.manual_seed(0)
    encoder = instantiate(cfg.backbone)
    folder = tmp_path / "my run"
    (folder / "checkpoints").mkdir(parents=True)
    save_config(cfg, folder / "config.yaml")
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    config = OmegaConf.to_container(cfg, resolve=True)
    torch.save({"state_dict": state, "config": config, "global_step": 12}, folder / "checkpoints" / "last.ckpt")
    rows = [{"step": 6, "val/knn_top1": 0.25, "val/knn_top1_se": 0.01}, {"step": 12, "val/knn_top1": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, encoder.eval()


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_to_timm(run_folder, tmp_path, capsys):
    folder, encoder = run_folder
    assert main(["export", f"checkpoint='{folder}'", "format=timm", "licence=cc-by-4.0", "run.dir=out"]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        assert model.forward_features(IMAGES).equal(encoder(IMAGES))
    printed = capsys.readouterr().out
    assert main(["inspect", "out"]) == 0  # MoCo v3's positions do not make it a file of MoCo v3
    assert "MoCo" not in capsys.readouterr().out
    assert "differ from the encoder's by at most 0." in printed
    assert "timm.create_model(" in printed


def test_the_model_card_says_where_it_comes_from_and_not_where_things_lie(run_folder, tmp_path):
    folder, _ = run_folder
    assert main(["export", f"checkpoint='{folder}'", "format=safetensors", "licence=cc-by-4.0"]) == 0
    (card,) = tmp_path.glob("outputs/exported/*/README.md")
    assert card.parent.name == "my-run-safetensors"
    text = card.read_text()
    for words in ("hybrid", "0.3", "Shapes", "cc-by-4.0", "knn_top1", "0.5 ± 0.01", "mask_ratio", "12"):
        assert words.lower() in text.lower(), words
    assert "/srv/somewhere" not in text
    assert str(tmp_path) not in text


def test_an_exported_file_is_a_checkpoint_again(run_folder, tmp_path):
    folder, encoder = run_folder
    assert main(["export", f"checkpoint='{folder}'", "format=safetensors", "run.dir=out", "name=mine"]) == 0
    with torch.no_grad():
        assert load_exported(tmp_path / "out" / "mine.safetensors")(IMAGES).equal(encoder(IMAGES))
    for checkpoint in ("out", "out/mine.safetensors"):
        assert main(["inspect", checkpoint]) == 0
    with safe_open(tmp_path / "out" / "mine.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["facts"])["weight"] == 0.3


def test_official_weights_keep_their_licence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = names("mae")[0]
    heads = expected(name)["config"]["num_heads"]
    arguments = [f"checkpoint={GOLDEN / name}.pth", f"num_heads={heads}", "format=hf", "licence=mit", "run.dir=out"]
    assert main(["export", *arguments]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "CC-BY-NC-4.0" in text
    assert "mit" not in text.lower().partition("## licence")[2][:100]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["format=onxx"], "format must be timm, hf, safetensors or onnx, not onxx"),
        (["checkpoint=timm:vit_tiny_patch16_224", "image_size=32"], "nothing to export"),
        (["checkpoint=[a,b]"], "must be one file"),
        (["name='a/b'"], "name="),
    ],
)
def test_mistakes(run_folder, capsys, arguments, words):
    folder, _ = run_folder
    before = sorted(folder.parent.iterdir())
    given = [] if any(a.startswith("checkpoint=") for a in arguments) else [f"checkpoint='{folder}'"]
    assert main(["export", *given, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert sorted(folder.parent.iterdir()) == before
