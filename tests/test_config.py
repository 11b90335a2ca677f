"""Checking, building and naming: what ``config.py`` and ``rules.py`` promise (overrides in words: test_cli.py)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from harmonize import config, rules
from harmonize.functional.schedules import weight_schedule
from harmonize.types import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def conf():
    with config.composer() as composer:
        yield composer


@pytest.fixture(scope="module")
def analysis(conf):
    with config.composer("analyze") as composer:
        yield composer


def composed(conf, *overrides: str):
    return config.finish(conf.load(list(overrides)))


def mistakes(cfg, machine: bool = False, command: str = "train") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.check_config(cfg, machine=machine, command=command)
    return str(caught.value).splitlines()


# ---- check_config ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["loss.lambda=2"], "loss.lambda", "2"),
        (["loss.lambda=-0.1"], "loss.lambda", "-0.1"),
        (["loss.lambda=nan"], "loss.lambda", "nan"),
        (["loss.lambda=true"], "loss.lambda", "true"),
        (["loss.lambda='0.2'"], "loss.lambda", "'0.2'"),
        (["loss.lambda=null"], "loss.lambda", "null"),
        (["loss.lambda={schedule: line, start: 0, end: 1}"], "loss.lambda", "line"),
        (["loss.lambda={schedule: linear, start: 0, end: 2}"], "loss.lambda", "2"),
        (["loss.lambda={schedule: linear, start: 0}"], "loss.lambda", "start"),
        (["loss.lambda={schedule: linear, start: 0, end: 1, stop: 1}"], "loss.lambda", "stop"),
        (["backbone.patch_size=7"], "backbone.patch_size", "7"),
        (["data.image_size=[64,64]"], "data.image_size", "[64, 64]"),
        (["data.image_size=abc"], "data.image_size", "abc"),
        (["data.image_size=4"], "data.image_size", "4"),
        (["data.image_size=0"], "data.image_size", "0"),
        (["backbone.image_size=32"], "backbone.image_size", "32"),
        (["loss.mim.mask_unit=12"], "loss.mim.mask_unit", "12"),
        (["loss.mim.mask_unit=24"], "loss.mim.mask_unit", "24"),
        (["loss=mim", "loss.mask_unit=4"], "loss.mask_unit", "4"),
        (["loss=mim", "data.image_size=24"], "loss.mask_unit", "null"),
        (["loss.mim.mask_ratio=0"], "loss.mim.mask_ratio", "0"),
        (["loss=mim", "loss.mask_ratio=1"], "loss.mask_ratio", "1"),
        (["loss=mae", "loss.mask_ratio=1.2"], "loss.mask_ratio", "1.2"),
        (["loss=mae", "loss.mask_ratio=0.999"], "loss.mask_ratio", "0.999"),
        (["loss=mae", "loss.mask_ratio=half"], "loss.mask_ratio", "half"),
        (["loss=contrastive", "data.batch_size=1"], "data.batch_size", "1"),
        (["data.batch_size=1"], "data.batch_size", "1"),
        (["data.batch_size=4", "trainer.accumulate=4"], "data.batch_size", "4"),
        (["data.batch_size=9", "trainer.accumulate=2"], "data.batch_size", "9"),
        (["data.batch_size=0"], "data.batch_size", "0"),
        (["data.batch_size=32.5"], "data.batch_size", "32.5"),
        (["data.num_train=10"], "data.num_train", "10"),
        (["loss=contrastive", "loss.temperature=0"], "loss.temperature", "0"),
        (["loss.contrastive.temperature=-1"], "loss.contrastive.temperature", "-1"),
        (["trainer.max_epochs=-3"], "trainer.max_epochs", "-3"),
        (["trainer.max_epochs=0"], "trainer.max_epochs", "0"),
        (["trainer.max_epochs=2.5"], "trainer.max_epochs", "2.5"),
        (["trainer.max_epochs=null"], "trainer.max_epochs", "null"),
        (["trainer.max_steps=0"], "trainer.max_steps", "0"),
        (["trainer.devices=0"], "trainer.devices", "0"),
        (["trainer.precision=16"], "trainer.precision", "16"),
        (["trainer.accelerator=tpu"], "trainer.accelerator", "tpu"),
        (["trainer.sanity=2"], "trainer.sanity", "2"),
        (["diagnostics.num_images=2"], "diagnostics.num_images", "2"),
        (["diagnostics.every_n_epochs=0"], "diagnostics.every_n_epochs", "0"),
        (["diagnostics.batch_size=0.5"], "diagnostics.batch_size", "0.5"),
        (["seed=-1"], "seed", "-1"),
        (["seed=abc"], "seed", "abc"),
        (["optimizer.lr=0"], "optimizer.lr", "0"),
        (["optimizer.lr=inf"], "optimizer.lr", "inf"),
        (["optimizer.weight_decay=-0.1"], "optimizer.weight_decay", "-0.1"),
        (["optimizer.betas=[0.9]"], "optimizer.betas", "[0.9]"),
        (["optimizer.clip=0"], "optimizer.clip", "0"),
        (["schedule.warmup=1"], "schedule.warmup", "1"),
        (["schedule.decay=exp"], "schedule.decay", "exp"),
        (["backbone.num_heads=5"], "backbone.num_heads", "5"),
        (["backbone.width=190", "backbone.num_heads=2"], "backbone.width", "190"),
        (["callbacks.probe.feature.layer=13"], "callbacks.probe.feature.layer", "13"),
        (["run.dir=[a]"], "run.dir", "[a]"),
        (["loss@loss.mim=contrastive"], "loss@loss.mim", "mim or mae"),
        (["loss@loss.contrastive=mae"], "loss@loss.contrastive", "contrastive"),
        (["loss.contrastive=null"], "loss.contrastive", "null"),
        (["data.dataset=null"], "data.dataset", "null"),
        (["run=null"], "run", "null"),
        (["data.patch_size=-8"], "data.patch_size", "-8"),
        (["data.batch_size=9", "trainer.accumulate=16"], "data.batch_size", "9"),
        (["data=folder", "data.val_fraction=abc"], "data.val_fraction", "abc"),
        (["data=folder", "data.max_pixels=abc"], "data.max_pixels", "abc"),
        (["data=folder", "data.cache=2"], "data.cache", "2"),
        (["data=folder", "data.cache_size=0"], "data.cache_size", "0"),
        (["data=imagenet100", "data.class_list=[a]"], "data.class_list", "[a]"),
        (["data=cifar10", "data.download=maybe"], "data.download", "maybe"),
        (["data=stl10", "data.split=all"], "data.split", "all"),
        (["data.label=colour"], "data.label", "colour"),
        (["backbone.positions=rotary"], "backbone.positions", "rotary"),
        (["backbone.relative_position=true"], "backbone.relative_position", "true"),
        (["backbone.initialization=beit"], "backbone.initialization", "beit"),
        (["backbone.class_token=abc"], "backbone.class_token", "abc"),
        (["backbone.class_token=false"], "loss.contrastive.pool", "cls"),
        (["backbone.freeze_patch_embed=1"], "backbone.freeze_patch_embed", "1"),
        (["loss.mim_view=both"], "loss.mim_view", "both"),
        (["loss.contrastive_input=null"], "loss.contrastive_input", "null"),
        (["loss.contrastive.pool=max"], "loss.contrastive.pool", "max"),
        (["loss=contrastive", "loss.momentum_schedule=linear"], "loss.momentum_schedule", "linear"),
        (["loss.mim.decoder=conv"], "loss.mim.decoder", "conv"),
        (["loss=mae", "loss.norm_pix_loss=abc"], "loss.norm_pix_loss", "abc"),
        (["loss.mim.recipe=dino"], "loss.mim.recipe", "moco_v3, simmim, mae"),
        (["views.moco_v3.blur_prob=0.5"], "views.moco_v3.blur_prob", "0.5"),
        (["views.moco_v3.blur_sigma=[2,1]"], "views.moco_v3.blur_sigma", "[2, 1]"),
        (["views.moco_v3.jitter=[1,1,1,1]"], "views.moco_v3.jitter", "[1, 1, 1, 1]"),
        (["views.mae.crop_scale=abc"], "views.mae.crop_scale", "abc"),
        (["views.simmim.interpolation=nearest"], "views.simmim.interpolation", "nearest"),
        (["views.simmim.image_size=32"], "views.simmim.image_size", "32"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else v,
)
def test_a_wrong_value_is_one_sentence_with_its_key_and_the_value(conf, overrides, key, value):
    (sentence,) = mistakes(composed(conf, *overrides))
    assert key in sentence
    assert value in sentence
    assert sentence.endswith(".")


def test_all_mistakes_at_once(conf):
    cfg = composed(conf, "loss.lambda=2", "seed=-1", "backbone.patch_size=7", "optimizer.lr=0")
    keys = ["seed", "loss.lambda", "optimizer.lr", "backbone.patch_size"]
    assert [sentence.split()[0] for sentence in mistakes(cfg)] == keys


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["checkpoint=null"], "checkpoint", "null"),
        (["checkpoint=''"], "checkpoint", "''"),
        (["num_images=3"], "num_images", "3"),  # also where the diagnostics take it from
        (["batch_size=abc"], "batch_size", "abc"),
        (["image_size=0"], "image_size", "0"),
        (["names=[]"], "names", "[]"),
        (["names=[0.2]"], "names", "[0.2]"),
        (["seed=-1"], "seed", "-1"),
        (["run.root=null"], "run.root", "null"),
        (["data=shapes", "data.label=colour"], "data.label", "colour"),
        (["diagnostics=null", "diagnostics.num_images=2"], "diagnostics.num_images", "2"),
        (["diagnostics.figures=2"], "diagnostics.figures", "2"),
        (["diagnostics.cka.every_n_epochs=0"], "diagnostics.cka.every_n_epochs", "0"),
        ([f"+diagnostics.mine={{_target_: {__name__}.Part, num_images: 0}}"], "diagnostics.mine.num_images", "0"),
        ([f"+diagnostics.mine={{_target_: {__name__}.Part, inside: 1}}"], "diagnostics.mine.inside", "mine.inner?"),
        ([f"+diagnostics.mine={{_target_: {__name__}.Pert}}"], "diagnostics.mine._target_", "did you mean Part?"),
        (["diagnostics.layer_probe.pool=max"], "diagnostics.layer_probe.pool", "max"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else v,
)
def test_a_wrong_value_of_analyze(analysis, overrides, key, value):
    (sentence,) = mistakes(composed(analysis, "checkpoint=A", *overrides), command="analyze")
    assert re.search(rf"(^|key ){re.escape(key)}\W", sentence)
    assert value in sentence


def test_a_mistake_in_what_all_diagnostics_share_is_named_once():
    part = {"_target_": "fractions.Fraction", "num_images": 2, "every_n_epochs": 0}
    plain = {"run": {}, "num_images": 2, "diagnostics": {"num_images": 2, "every_n_epochs": 0, "a": part, "b": None}}

    def found() -> list[str]:
        return [sentence.split()[0] for sentence in rules.violations(plain, command="analyze")]

    assert found() == ["num_images", "diagnostics.every_n_epochs"]
    plain["num_images"] = plain["diagnostics"]["every_n_epochs"] = 4
    assert found() == ["diagnostics.num_images", "diagnostics.a.every_n_epochs"]
    plain["diagnostics"]["num_images"] = 4
    part |= {"num_images": None, "every_n_epochs": 2}  # null: all of them
    assert found() == []


def test_sections_that_may_be_null(conf, analysis):
    config.check_config(composed(conf, "diagnostics=null"), machine=False)
    config.check_config(composed(analysis, "checkpoint=A", "data=null"), machine=False, command="analyze")
    found = list(rules.violations({"run": {}, "data": 1, "diagnostics": []}, command="analyze"))
    assert found == [
        f"{key} must be a section with keys or null, not {v}." for key, v in (("data", 1), ("diagnostics", "[]"))
    ]


def test_every_rule_is_about_a_key_that_exists(conf, analysis):
    """A rule for a misspelt key would never fire."""
    spelt = set(config._keys(composed(analysis)))
    for data in ("folder", "imagenet100", "shards", "stl10"):
        spelt |= set(config._keys(composed(conf, f"data={data}")))
    for loss in ("contrastive", "mim", "mae", "hybrid", "supervised"):
        for logger in ("wandb", "csv"):
            spelt |= set(config._keys(composed(conf, f"loss={loss}", f"logger={logger}")))
    spelt |= set(config._keys(composed(conf, "loss@loss.mim=mae")))
    for command in ("evaluate", "inspect", "export"):
        with config.composer(command) as other:
            for name in other.groups().get("eval", [None]):
                spelt |= set(config._keys(composed(other, *([f"eval={name}"] if name else []))))
    named = {key for keys, _ in rules.RELATIONS for key in keys if "._" not in key} | {
        key for key in rules.VALUES if not re.match(r"(loss|views)\.", key)
    }
    assert named <= spelt, named - spelt
    names = {key.rpartition(".")[2] for key in rules.VALUES}  # losses share a table, and so do views
    assert names <= {key.rpartition(".")[2] for key in spelt}


@pytest.mark.parametrize("kind", ["linear", "cosine", "step", "line"])
@pytest.mark.parametrize("end", [1, 1.5, True, "1", None])
@pytest.mark.parametrize("rest", [{}, {"at": 0.5}, {"at": 2}, {"stop": 1}])
def test_a_weight_that_passes_can_be_built(kind, end, rest):
    """The rule that answers without torch is no laxer than the function that uses the value."""
    value = {"schedule": kind, "start": 0, "end": end, **rest}
    if rules.is_weight(value):
        assert weight_schedule(value)(0.0) == 0
    else:
        assert kind == "line" or end != 1 or end is True or rest


def test_a_reference_to_nothing_is_named(conf):
    (sentence,) = mistakes(composed(conf, "backbone.patch_size=${data.pach_size}"))
    assert sentence.startswith("backbone.patch_size")
    assert "data.pach_size" in sentence


def test_a_key_that_no_component_takes_is_named(conf):
    (sentence,) = mistakes(composed(conf, "+backbone.num_head=3"))
    assert "backbone.num_head:" in sentence
    assert "did you mean backbone.num_heads?" in sentence
    (sentence,) = mistakes(composed(conf, "+loss.contrastive.temprature=0.1"))
    assert "did you mean loss.contrastive.temperature?" in sentence
    config.check_config(composed(conf, "loss.lambda=0.3"), machine=False)  # `lambda` goes to the argument lambda_


def test_a_component_that_does_not_exist_is_named(conf):
    (sentence,) = mistakes(composed(conf, "loss._target_=harmonize.objectives.hybrid.Hybird"))
    assert "loss._target_=harmonize.objectives.hybrid.Hybird" in sentence
    assert "did you mean Hybrid?" in sentence
    (sentence,) = mistakes(composed(conf, "loss._target_=harmonize.objective.Hybrid"))
    assert "loss._target_=harmonize.objective.Hybrid" in sentence


def test_devices_that_are_not_there(conf, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    (sentence,) = mistakes(composed(conf, "trainer.accelerator=cpu", "trainer.devices=100"), machine=True)
    assert sentence == "trainer.devices must be at most 2, the number of CPU cores here, not 100."
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    (sentence,) = mistakes(composed(conf, "trainer.devices=2"), machine=True)
    assert sentence == "trainer.devices must be at most 1, the number of GPUs here, not 2."
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    (sentence,) = mistakes(composed(conf, "trainer.accelerator=gpu"), machine=True)
    assert sentence.startswith("trainer.accelerator must be cpu or auto")
    config.check_config(composed(conf, "trainer.accelerator=gpu", "trainer.devices=8"), machine=False)


@pytest.mark.parametrize("root", ["nowhere", "empty"])
def test_data_that_are_not_there(conf, tmp_path, root):
    (tmp_path / "empty").mkdir()
    (sentence,) = mistakes(composed(conf, "data=folder", f"data.root={tmp_path / root}"), machine=True)
    assert "data.root" in sentence
    assert str(tmp_path / root) in sentence


def test_values_are_checked_without_torch():
    code = """
import sys
from harmonize.cli import main
assert main(["train", "loss.lambda=2"]) == 2
assert main(["train", "los.lambda=0.2"]) == 2
assert main(["analyze", "num_images=2"]) == 2
assert main(["analyze", "checkpoint=A", "data.root=x"]) == 2
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False", done.stderr


# ---- instantiate -----------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """Something with an argument that no YAML key can be called otherwise."""

    lambda_: object = None
    inner: object = None
    numbers: object = ()


@dataclass
class Picky:
    """Something that refuses its value, or falls over it."""

    value: int

    def __post_init__(self) -> None:
        if self.value < -1:
            raise ValueError(f"value={self.value} must be at least -1")
        if self.value < 0:
            raise ValueError("value must not be negative")
        1 / self.value


PART = {"_target_": f"{__name__}.Part"}
PICKY = {"_target_": f"{__name__}.Picky"}


def test_a_python_keyword_goes_to_the_argument_with_an_underscore():
    assert config.instantiate({**PART, "lambda": 0.2}).lambda_ == 0.2
    assert config.instantiate(OmegaConf.create({**PART, "lambda": {"schedule": "step"}})).lambda_ == {
        "schedule": "step"
    }


def test_nested_components_and_plain_containers():
    cfg = OmegaConf.create({"n": 3, "part": {**PART, "inner": {**PART, "lambda": "${n}"}, "numbers": [1, "${n}"]}})
    part = config.instantiate(cfg.part)
    assert part == Part(inner=Part(lambda_=3), numbers=[1, 3])
    assert type(part.numbers) is list


def test_arguments_are_handed_on_as_they_are():
    """Hydra's own instantiate turns a dataclass into a configuration node."""
    given = Part(lambda_=1)
    assert config.instantiate(OmegaConf.create({**PART, "inner": None}), inner=given).inner is given


def test_partial_makes_a_function():
    make = config.instantiate({**PART, "_partial_": True, "lambda": 0.1})
    assert isinstance(make, partial)
    assert make(inner=2) == Part(lambda_=0.1, inner=2)


def test_what_a_constructor_refuses_carries_its_place():
    cfg = OmegaConf.create({"a": {"b": {**PICKY, "value": -1}}})
    with pytest.raises(ConfigError, match=r"^a\.b: value must not be negative"):
        config.instantiate(cfg.a.b)
    with pytest.raises(ConfigError, match=r"^inner: value must not be negative"):
        config.instantiate({**PART, "inner": {**PICKY, "value": -1}})
    with pytest.raises(ConfigError, match=r"^a\.b\.value=-2 must be at least -1$"):
        config.instantiate(OmegaConf.create({"a": {"b": {**PICKY, "value": -2}}}).a.b)
    with pytest.raises(ConfigError, match=r"^inner: '<' not supported") as caught:
        config.instantiate({**PART, "inner": {**PICKY, "value": "abc"}})
    assert isinstance(caught.value.__cause__, TypeError)
    with pytest.raises(ConfigError, match=r"^a\.b: missing a required argument: 'value'"):
        config.instantiate(OmegaConf.create({"a": {"b": PICKY}}).a.b)


def test_an_error_of_the_program_is_not_taken_for_the_users():
    with pytest.raises(RuntimeError, match="inner: building Picky failed") as caught:
        config.instantiate({**PART, "inner": {**PICKY, "value": 0}})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


# ---- run folders -----------------------------------------------------------------------------------------------------


def test_the_run_folder_is_named_after_what_runs(conf):
    folder = config.run_dir(composed(conf, "loss=mim"))
    assert re.fullmatch(r"outputs/mim-shapes-vit_tiny-[0-9a-f]{8}", folder.as_posix())
    assert config.run_dir(composed(conf, "loss=mim", "run.dir=here/it/is")) == Path("here/it/is")


def test_the_folder_of_an_analysis(analysis):
    first, second = (config.run_dir(composed(analysis, f"checkpoint={name}")) for name in "AB")
    assert first.parent == second.parent == Path("outputs/analysis")
    assert first != second
    assert config.run_dir(composed(analysis, "run.dir=x")) == Path("x")


def test_the_run_folder_is_a_function_of_what_changes_the_result(conf):
    first = config.run_dir(composed(conf, "loss.lambda=0.2", "seed=1"))
    assert config.run_dir(composed(conf, "seed=1", "loss.lambda=0.20")) == first
    for neutral in ("logger=csv", "data.num_workers=0", "run.fresh=true", "trainer.progress=false"):
        assert config.run_dir(composed(conf, "seed=1", neutral)) == first
    assert config.run_dir(composed(conf, "seed=1", "run.root=elsewhere")) == Path("elsewhere") / first.name
    for other in ("seed=2", "loss.lambda=0.3", "data.batch_size=64", "trainer.max_epochs=3", "loss@loss.mim=mae"):
        assert config.run_dir(composed(conf, "seed=1", other)).name != first.name
    assert config.run_dir(composed(conf, "loss.lambda=1")) == config.run_dir(composed(conf, "loss.lambda=1.0"))


def test_the_run_folder_survives_writing_and_reading(conf, tmp_path):
    cfg = composed(conf, "loss=mae")
    config.save_config(cfg, tmp_path / "config.yaml")
    read = config.load_config(tmp_path / "config.yaml")
    assert config.run_dir(read) == config.run_dir(cfg)
    assert config.changed_keys(read, cfg) == {}
    assert "${" not in (tmp_path / "config.yaml").read_text()


def test_changed_keys(conf):
    old = composed(conf, "loss=mae")
    new = composed(conf, "loss=mae", "seed=3", "logger=csv", "run.dir=x", "+loss.new=1", "optimizer.betas=[0.9,0.9]")
    assert config.changed_keys(old, new) == {
        "loss.new": (None, 1),
        "optimizer.betas": ([0.9, 0.95], [0.9, 0.9]),
        "seed": (0, 3),
    }


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_a_changed_file_of_conf_is_read_again(tmp_path, monkeypatch):
    """One process, as in a notebook: what has been read is kept, but not longer than the files stay as they are."""
    shutil.copytree(config.CONF, tmp_path / "conf")
    monkeypatch.setattr(config, "CONF", tmp_path / "conf")
    assert "mine" not in config.compose(["loss=mim"]).loss
    with pytest.raises(ConfigError, match=r"Unknown key loss\.mine"):
        config.compose(["loss=mim", "loss.mine=2"])
    with (tmp_path / "conf" / "loss" / "mim.yaml").open("a") as file:
        file.write("mine: 1\n")
    assert config.compose(["loss=mim"]).loss.mine == 1
    assert config.compose(["loss=mim", "loss.mine=2"]).loss.mine == 2
    shutil.copy(tmp_path / "conf" / "data" / "stl10.yaml", tmp_path / "conf" / "data" / "new.yaml")
    assert "STL" in config.compose(["data=new"]).data.dataset._target_


def test_what_is_given_may_be_changed():
    """And is not what the next one gets, with or without settings beside the choice of files."""
    for overrides in (["loss=mim"], ["loss=mim", "seed=3"]):
        first = config.compose(overrides)
        first.loss.mask_ratio = 0.123
        assert config.compose(overrides).loss.mask_ratio != 0.123


# ---- the wheel -------------------------------------------------------------------------------------------------------


def test_conf_is_found_and_part_of_the_wheel():
    assert all((config.CONF / f"{command}.yaml").is_file() for command in rules.SECTIONS)
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"conf": "harmonize/conf"}
