"""Exports give the encoder's features wherever they are loaded, or are refused in one sentence."""

import copy
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import timm
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from harmonize import __version__
from harmonize.backbones.timm_vit import ViTEncoder
from harmonize.checkpoints import export as exporting
from harmonize.checkpoints.export import export
from harmonize.checkpoints.fingerprint import MAX_DEVIATION, fingerprint, matches
from harmonize.checkpoints.model_card import CardFacts, front_matter, model_card
from harmonize.checkpoints.onnx_file import PACKAGES
from harmonize.checkpoints.single_file import architecture_of, load_exported, read_exported
from harmonize.evaluation.classifier import Head
from harmonize.types import ConfigError, FeatureSpec, Result
from tests.helpers import tiny_encoder

needs_onnx = pytest.mark.skipif(
    not all(map(find_spec, PACKAGES)), reason="needs onnx, onnxruntime and onnxscript (pip install 'harmonize[export]')"
)
ENCODERS = {
    "plain": {},
    "columns first": {"positions": "sincos_mae"},
    "no class token": {"class_token": False},
    "registers": {"num_registers": 3},
    "registers only": {"class_token": False, "num_registers": 2},
    "LayerScale": {"layer_scale": 0.1},
    "learned": {"positions": "learned"},
    "no positions": {"positions": "none"},
    "not square": {"image_size": (16, 32)},
    "simmim": {"relative_position": "shared", "positions": "none", "layer_scale": 0.1},
    "shared": {"relative_position": "shared"},
    "per block": {"relative_position": "per_block", "positions": "learned", "layer_scale": 0.1},
    "relative alone": {"relative_position": "per_block", "positions": "none", "class_token": False},
    "shared alone": {"relative_position": "shared", "positions": "none", "class_token": False, "layer_scale": 0.1},
    "shared, not square": {"relative_position": "shared", "image_size": (8, 24)},
    # (2 r - 1) (2 c - 1) is a square: timm's loader takes the grid for a square one
    "per block, 5 x 13": {"relative_position": "per_block", "image_size": (20, 52), "positions": "none"},
}


def trained(**options):
    """An encoder with every weight away from its initial value: no bias is zero, no norm is one."""
    encoder = tiny_encoder(**options)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder.eval()


def images_for(encoder, num=3):
    return torch.randn(num, 3, *encoder.spec.image_size, generator=torch.Generator().manual_seed(5))


def pool(encoder, tokens):
    return tokens[:, 0] if encoder.spec.has_class_token else tokens[:, encoder.spec.num_prefix_tokens :].mean(1)


def sentence(function, *arguments, **options):
    with pytest.raises(ConfigError) as error:
        function(*arguments, **options)
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def by_path(folder):
    config = json.loads((folder / "config.json").read_text())
    weights = str(folder / "model.safetensors")
    arguments = {"pretrained_cfg": config["pretrained_cfg"], "num_classes": 0} | config["model_args"]
    return timm.create_model(config["architecture"], checkpoint_path=weights, **arguments)


@pytest.mark.parametrize("options", ENCODERS.values(), ids=ENCODERS)
@torch.no_grad()
def test_timm_gives_the_same_features(tmp_path, options):
    encoder = trained(**options)
    exported = export(encoder, tmp_path / "out", "timm")
    assert sorted(path.name for path in exported.files) == ["README.md", "config.json", "model.safetensors"]
    assert all(path.parent == tmp_path / "out" and path.is_file() for path in exported.files)
    images = images_for(encoder)
    tokens = encoder(images)
    ways = [by_path(tmp_path / "out")]
    if "local-dir" in exported.snippet:
        ways.append(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0))
    else:
        assert encoder.relative_position != "none"
        assert options["image_size"]
    for model in ways:
        model.eval()
        tolerance = {"rtol": 0, "atol": 1e-5 if "relative_position" in options else 0}
        torch.testing.assert_close(model.forward_features(images), tokens, **tolerance)
        torch.testing.assert_close(model(images), pool(encoder, tokens), **tolerance)
        assert list(model.pretrained_cfg["mean"]) == [0.485, 0.456, 0.406]
        assert model.num_classes == 0


@pytest.mark.parametrize(
    ("options", "format", "what"),
    [
        ({"relative_position": "shared", "num_registers": 1}, "timm", "both registers and relative positions"),
        ({"relative_position": "shared", "class_token": False}, "timm", "but no class token"),
        ({"relative_position": "shared", "image_size": (8, 24)}, "hf", "a grid that is not square"),
    ],
)
def test_what_timm_cannot_express(tmp_path, options, format, what):
    encoder = trained(**options)
    assert what in sentence(export, encoder, tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []
    assert export(encoder, tmp_path / "out", "safetensors").difference == 0


@torch.no_grad()
def test_a_new_classifier_and_another_size(tmp_path):
    """What users do next with such a folder."""
    encoder = trained(num_registers=1)
    export(encoder, tmp_path / "out", "hf")
    images = images_for(encoder)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7).eval()
    torch.testing.assert_close(model.forward_features(images), encoder(images), rtol=0, atol=0)
    assert model(images).shape == (3, 7)
    larger = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, img_size=32).eval()
    assert larger(torch.randn(1, 3, 32, 32)).shape == (1, 24)


@pytest.mark.parametrize("options", ENCODERS.values(), ids=ENCODERS)
@torch.no_grad()
def test_safetensors_gives_the_same_encoder(tmp_path, options):
    encoder = trained(**options)
    exported = export(encoder, tmp_path / "out", "safetensors", name="vit")
    assert [path.name for path in exported.files] == ["README.md", "vit.safetensors"]
    loaded = load_exported(tmp_path / "out" / "vit.safetensors")
    images = images_for(encoder)
    assert loaded(images).equal(encoder(images))
    assert loaded.spec == encoder.spec
    assert not loaded.training
    architecture, weights, metadata = read_exported(str(tmp_path / "out" / "vit.safetensors"))
    assert architecture == architecture_of(encoder) == architecture_of(loaded)
    again = ViTEncoder(**architecture)
    again.load_state_dict(weights)
    trainable = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == trainable
    assert matches(again, metadata["fingerprint"]) == 0


def test_what_safetensors_says(tmp_path):
    facts = CardFacts(
        objective="hybrid", weight=0.2, license="MIT", config="a: 1", results=[Result("top1", float("nan"), 5)]
    )
    export(tiny_encoder(), tmp_path, "safetensors", card=facts)
    metadata = read_exported(tmp_path / "encoder.safetensors").metadata
    assert metadata["harmonize_version"] == __version__
    assert metadata["license"] == "MIT"
    assert (metadata["facts"]["objective"], metadata["facts"]["weight"]) == ("hybrid", 0.2)
    assert metadata["facts"]["results"][0]["value"] is None


@pytest.fixture
def stored(tmp_path):
    export(trained(), tmp_path / "out", "safetensors")
    return tmp_path / "out" / "encoder.safetensors"


def edit(path, weights=None, **changes):
    """Rewrite a file with other weights, and metadata with some entries changed."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    save_file(weights or load_file(path), path, metadata=metadata | {k: json.dumps(v) for k, v in changes.items()})


def architecture(path, **changes):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["architecture"]) | changes


def test_an_edit_that_changes_nothing(stored):
    edit(stored, license="none")
    assert read_exported(stored).metadata["license"] == "none"


def test_another_head_count_is_refused(stored):
    edit(stored, architecture=architecture(stored, num_heads=6))
    text = sentence(read_exported, stored)
    assert "the file's weights do not give the features they were saved with" in text
    assert sentence(load_exported, stored) == text


def test_swapped_positions_are_refused(stored):
    weights = load_file(stored)
    weights["pos_embed"][0, [3, 4]] = weights["pos_embed"][0, [4, 3]]
    edit(stored, weights)
    assert "do not give the features" in sentence(load_exported, stored)


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 32},
        {"depth": 10**9},
        {"depth": 1},
        {"depth": None},
        {"num_heads": 5},
        {"num_heads": 0},
        {"patch_size": 0},
        {"patch_size": "4"},
        {"image_size": 7},
        {"image_size": [16]},
        {"image_size": [16, 32]},
        {"positions": "random"},
        {"num_registers": -1},
        {"_target_": "os.system"},
        {"class_token": False},
    ],
    ids=str,
)
def test_an_architecture_that_does_not_fit_is_refused(stored, changes):
    edit(stored, architecture=architecture(stored, **changes))
    assert "weights and architecture do not fit (" in sentence(load_exported, stored)


@pytest.mark.parametrize(
    "changes", [{"architecture": None}, {"architecture": [1]}, {"fingerprint": None}, {"fingerprint": ["x"]}], ids=str
)
def test_metadata_of_another_kind_are_refused(stored, changes):
    edit(stored, **changes)
    assert "holds no encoder that harmonize has exported" in sentence(load_exported, stored)


@pytest.mark.parametrize("numbers", [[], [0.0] * 16, [float("nan")] * 16])
def test_a_fingerprint_of_another_kind_is_refused(stored, numbers):
    edit(stored, fingerprint=numbers)
    assert "do not give the features" in sentence(load_exported, stored)


def test_other_files_are_refused(tmp_path, stored):
    save_file({"a": torch.ones(1)}, tmp_path / "foreign.safetensors")
    assert "holds no encoder" in sentence(load_exported, tmp_path / "foreign.safetensors")
    stored.write_bytes(stored.read_bytes()[:-9])
    assert "cannot be read as a safetensors file (" in sentence(load_exported, stored)
    stored.write_bytes(b"")
    assert "cannot be read as a safetensors file (" in sentence(load_exported, stored)
    assert "no such file" in sentence(load_exported, tmp_path / "none.safetensors")


@pytest.fixture(scope="module")
def onnx_export(tmp_path_factory):
    """Made once: the exporter takes seconds."""
    encoder = trained(relative_position="shared", num_registers=2, image_size=(8, 16), class_token=False)
    folder = tmp_path_factory.mktemp("onnx") / "out"
    return encoder, export(encoder, folder, "onnx", name="my.net-1", card=CardFacts(license="MIT"))


@needs_onnx
@torch.no_grad()
def test_onnx_gives_the_same_features(onnx_export):
    import onnxruntime

    encoder, exported = onnx_export
    assert [path.name for path in exported.files] == ["README.md", "my.net-1.onnx"]
    session = onnxruntime.InferenceSession(str(exported.files[1]), providers=["CPUExecutionProvider"])
    for num_images in (1, 2, 5):
        images = images_for(encoder, num_images)
        tokens, pooled = session.run(["tokens", "pooled"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(tokens), encoder(images), rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(pooled), pool(encoder, encoder(images)), rtol=0, atol=1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    assert matches(encoder, json.loads(metadata["fingerprint"])) == 0
    assert metadata["license"] == "MIT"
    assert exported.difference < 1e-5


def test_onnx_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("harmonize.checkpoints.onnx_file.find_spec", lambda name: None if name == "onnxscript" else 1)
    text = sentence(export, tiny_encoder(), tmp_path / "out", "onnx")
    assert text == "format=onnx needs onnxscript: pip install 'harmonize[export]'."
    assert list(tmp_path.iterdir()) == []


def head_on(encoder, feature, norm=False):
    torch.manual_seed(1)
    head = Head(encoder.spec, [feature], 5, norm=norm).eval()
    head.classes = ["a", "b", "c", "d", "e"]
    if norm:
        torch.nn.init.normal_(head.norm.weight)
    return head


@pytest.mark.parametrize(
    ("options", "feature", "norm"),
    [
        ({}, FeatureSpec(pool="cls"), False),
        ({}, FeatureSpec(pool="patch_mean", layer=2), False),
        ({"num_registers": 2}, FeatureSpec(pool="patch_mean", norm=False), True),
        ({}, FeatureSpec(pool="cls", norm=False), True),
        ({"relative_position": "shared"}, FeatureSpec(pool="cls"), False),
        ({"relative_position": "per_block"}, FeatureSpec(pool="patch_mean", norm=False), True),
        ({"relative_position": "shared", "positions": "none", "class_token": False},
         FeatureSpec(pool="patch_mean", norm=False), True),
    ],
)  # fmt: skip
def test_a_classifier_goes_with_the_encoder(tmp_path, options, feature, norm):
    encoder = trained(**options)
    head = head_on(encoder, feature, norm)
    exported = export(encoder.double(), tmp_path / "out", "hf", head=head.double())
    encoder, head = encoder.float(), head.float()
    assert "class scores" in exported.snippet
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = images_for(encoder)
    with torch.no_grad():
        torch.testing.assert_close(model(images), head.logits(encoder, images), rtol=0, atol=1e-5)
    assert model.pretrained_cfg["label_names"] == head.classes
    assert "pipeline_tag: image-classification" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("feature", "norm"),
    [
        (FeatureSpec(), False),
        (FeatureSpec(pool="cls", layer=1), False),
        (FeatureSpec(pool="cls"), True),
        (FeatureSpec(pool="cls", norm=False), False),
    ],
)
def test_a_classifier_that_timm_does_not_have(tmp_path, feature, norm):
    encoder = trained()
    assert "this one reads layer=" in sentence(
        export, encoder, tmp_path / "out", "timm", head=head_on(encoder, feature, norm)
    )
    relative = trained(relative_position="shared")
    head = head_on(relative, FeatureSpec(pool="patch_mean"))
    assert "reads patch_mean after the final norm" in sentence(export, relative, tmp_path / "out", "timm", head=head)
    assert "exports no classifier" in sentence(export, encoder, tmp_path / "out", "safetensors", head=head)
    assert list(tmp_path.iterdir()) == []


def snapshot(folder, cache):
    """A folder as the hub's client has it after a download of USER/NAME."""
    repository = cache / "models--user--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(folder)


def test_the_printed_code_runs_as_it_is(tmp_path, request):
    """All of it in one fresh interpreter, in another folder; one of the paths has quotes and spaces in it."""
    relative = {"relative_position": "shared", "image_size": (8, 16)}
    cases = {
        "timm": (trained(num_registers=2), "timm", 'it\'s "here" {0} \\n'),
        "by path": (trained(**relative), "timm", "path"),
        "hf": (trained(class_token=False), "hf", "hf"),
        "safetensors": (trained(**relative, num_registers=1), "safetensors", "own"),
    }
    runs = {
        name: (encoder, export(encoder, tmp_path / folder, format, name="my.net-1").snippet)
        for name, (encoder, format, folder) in cases.items()
    }
    if all(map(find_spec, PACKAGES)):
        encoder, exported = request.getfixturevalue("onnx_export")
        runs["onnx"] = encoder, exported.snippet
    encoder, code = runs["hf"]
    assert '# timm.create_model("hf-hub:USER/NAME", pretrained=True)' in code
    snapshot(tmp_path / "hf", tmp_path / "hub")
    runs["from the hub"] = encoder, code.replace('f"local-dir:{folder}"', '"hf-hub:user/name"')
    assert runs["from the hub"][1] != code
    (tmp_path / "code").mkdir()
    for name, (_, code) in runs.items():
        (tmp_path / "code" / f"{name} snippet.py").write_text(code)
    runner = (
        "import runpy, torch\n"
        f"for name in {list(runs)}:\n"
        "    found = runpy.run_path(f'{name} snippet.py')\n"
        "    found = [torch.as_tensor(found[key]) for key in ('images', 'tokens', 'features')]\n"
        "    torch.save(found, f'{name}.pt')\n"
    )
    offline = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", runner]
    subprocess.run(command, cwd=tmp_path / "code", check=True, timeout=300, env=os.environ | offline)
    for name, (encoder, _) in runs.items():
        images, tokens, features = torch.load(tmp_path / "code" / f"{name}.pt")
        with torch.no_grad():
            expected = encoder(images)
        torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(features, pool(encoder, expected), rtol=0, atol=1e-5)


def test_a_wrong_export_is_not_written(tmp_path, monkeypatch):
    right = exporting.to_timm

    def wrong(encoder, head=None):
        model = right(encoder, head)
        model.model_args["num_heads"] = 6
        return model

    monkeypatch.setattr(exporting, "to_timm", wrong)
    text = sentence(export, trained(), tmp_path / "a" / "out", "timm")
    assert text.startswith("format=timm: the outputs of the exported network differ by ")
    assert list((tmp_path / "a").iterdir()) == []


def test_no_features_no_export(tmp_path):
    encoder = tiny_encoder()
    with torch.no_grad():
        encoder.norm.weight[3] = float("nan")
    assert "not finite" in sentence(export, encoder, tmp_path / "out", "timm")


def test_wrong_names(tmp_path):
    allowed = "timm, safetensors, onnx, hf"
    assert sentence(export, tiny_encoder(), tmp_path, "jax") == f"format=jax must be one of {allowed}."
    for name in ("", "../evil", "a/b", ".hidden", "a b", "-x", "a\nb"):
        assert "name=" in sentence(export, tiny_encoder(), tmp_path / "out", "safetensors", name=name)
    assert list(tmp_path.iterdir()) == []


def test_the_encoder_is_left_as_it_is(tmp_path):
    encoder = tiny_encoder(drop_path=0.3).bfloat16().train()
    before = copy.deepcopy(encoder.state_dict())
    export(encoder, tmp_path, "timm")
    assert encoder.training
    assert all(before[name].equal(value) for name, value in encoder.state_dict().items())
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}


def test_an_earlier_export_is_replaced(tmp_path):
    folder = tmp_path / "new" / "out"
    export(tiny_encoder(), folder, "timm")
    export(tiny_encoder(seed=1), folder, "safetensors", name="b")
    export(tiny_encoder(seed=2), folder, "safetensors", name="b")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "b.safetensors"]
    stored = read_exported(folder / "b.safetensors")
    assert matches(tiny_encoder(seed=2), stored.metadata["fingerprint"]) < MAX_DEVIATION
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("extra", ["notes.txt", "sub/a", "pytorch_model.bin"])
def test_anything_else_is_left_alone(tmp_path, extra):
    folder = tmp_path / "out"
    export(tiny_encoder(), folder, "timm")
    (folder / extra).parent.mkdir(exist_ok=True)
    (folder / extra).write_text("mine")
    before = sorted(folder.rglob("*"))
    assert f"holds {extra.split('/')[0]}, which no export" in sentence(export, tiny_encoder(seed=1), folder, "timm")
    assert sorted(folder.rglob("*")) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_with_a_readme_of_someone_else(tmp_path):
    (tmp_path / "README.md").write_text("# my project\n")
    assert "holds README.md" in sentence(export, tiny_encoder(), tmp_path, "timm")
    assert "is a file" in sentence(export, tiny_encoder(), tmp_path / "README.md", "timm")


FACTS = CardFacts(
    objective="hybrid",
    weight=0.2,
    data="imagenet",
    epochs=300,
    steps=93750,
    results=[
        Result("top1", 0.71234, 50000, error=0.00203, feature="layer=last pool=cls"),
        Result("top1", 0.5, 100, interval=(0.4, 0.6), series="a|b\nc", axis="block", at=3.0),
    ],
    config="loss:\n  lambda: 0.2\n  note: '```'\n",
)


def test_the_model_card(tmp_path):
    encoder = tiny_encoder(num_registers=2)
    exported = export(encoder, tmp_path / "out", "timm", card=FACTS, name="vit-hybrid")
    text = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "# vit-hybrid",
        "| objective | hybrid |",
        "| lambda (weight of contrastive learning) | 0.2 |",
        "| data | imagenet |",
        "| epochs | 300 |",
        "| optimiser steps | 93750 |",
        "| top1 | 0.7123 ± 0.002 | 50000 | layer=last pool=cls |",
        r"| top1 | 0.5 (0.4 to 0.6) | 100 | a\|b c, block 3 |",
        "Not stated.",
    ):
        assert line in text.splitlines()
    assert f"````yaml\n{FACTS.config}````" in text
    assert f"exported by harmonize {__version__}: 2 blocks of width 24 with 3 heads" in text
    assert "a class token, 2 registers" in text
    assert "2305.00729" in text
    assert exported.snippet.replace(str(tmp_path / "out"), "out") in text
    assert str(tmp_path) not in text  # it may be published
    assert "Warning" not in text
    assert text.startswith("# ")
    numbers = json.loads(text.split("```json\n")[1].split("\n")[0])
    assert numbers == pytest.approx(fingerprint(encoder), abs=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["harmonize"] == {"version": __version__, "fingerprint": fingerprint(encoder)}
    assert "license" not in config["pretrained_cfg"]


@pytest.mark.parametrize("recipe", ["moco_v3", "mae"])
def test_non_commercial_weights_stay_so(tmp_path, recipe):
    facts = CardFacts(license="MIT", derived_from=recipe)
    text = model_card("a", tiny_encoder().spec, facts, "pass", [0.0])
    assert "\nCC-BY-NC-4.0.\n" in text
    assert "**Warning:** these weights derive from the official weights of M" in text
    assert "MIT" not in text
    assert "license: cc-by-nc-4.0\n" in front_matter("a", facts, False)
    export(tiny_encoder(), tmp_path, "timm", card=facts)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pretrained_cfg"]["license"] == "cc-by-nc-4.0"


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        ("not stated", {"license": "unknown"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("ask: me", {"license": "other", "license_name": "ask: me"}),
    ],
)
def test_what_the_hub_reads(tmp_path, license, expected):
    export(tiny_encoder(), tmp_path, "hf", card=CardFacts(license=license), name="my-net")
    _, matter, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    found = yaml.safe_load(matter)
    assert expected.items() <= found.items()
    assert found["library_name"] == "timm"
    assert found["pipeline_tag"] == "image-feature-extraction"
    assert found["model_name"] == "my-net"
    assert "arxiv:2305.00729" in found["tags"]
    assert text.startswith("\n# my-net\n")
