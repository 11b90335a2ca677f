"""The command line: mistakes in words, nothing written, and what reaches ``train`` and ``analyze``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from harmonize import config
from harmonize.cli import COMMANDS, _with_key, main
from harmonize.types import ConfigError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def runs(monkeypatch) -> list:
    """The configurations that reach the work, which is not done here; put an exception in to have it raised."""
    reached: list = []

    def work(cfg) -> None:
        if reached and isinstance(reached[0], BaseException):
            raise reached[0]
        reached.append(cfg)

    for name, function in {"harmonize.training.run": "train", "harmonize.analysis": "analyze"}.items():
        module = types.ModuleType(name)
        setattr(module, function, work)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(name, module, raising=False)

    def start(sweep, jobs) -> None:
        """The jobs of a sweep in this process; tests/test_sweeps.py gives them their own."""
        for job in jobs:
            COMMANDS[sweep.command].work(config.compose(job.overrides, sweep.command))

    monkeypatch.setattr("harmonize.sweeps.start", start)
    return reached


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["typo=1"], ["typo", "the nearest is"]),
        (["los.lambda=0.2"], ["los.lambda", "did you mean loss.lambda?"]),
        (["lambda=0.2"], ["lambda", "did you mean loss.lambda?"]),
        (["loss.lamda=0.2"], ["loss.lamda", "did you mean loss.lambda?"]),
        (["trainer.epochs=3"], ["trainer.epochs", "trainer.max_epochs"]),
        (["optimiser=mim"], ["optimiser", "did you mean optimizer?"]),
        (["loss=hybird"], ["contrastive, hybrid, mae, mim", "did you mean hybrid?"]),
        (["data=null"], ["data", "shapes"]),
        (["trainer=smok"], ["ddp, default, fsdp, smoke", "did you mean smoke?"]),
        (["hydra/launcher=none_such"], ["hydra/launcher", "basic"]),
        (["loss=mim", "loss.lambda=0.2"], ["loss.lambda", "belongs to loss=hybrid, not to loss=mim"]),
        (["loss=mim", "loss.lamda=0.2"], ["loss.lamda", "did you mean loss.lambda (loss=hybrid)?"]),
        (
            ["loss.mask_ratio=0.5"],
            ["loss.mask_ratio", "loss=mae or loss=mim", "loss=hybrid, which has loss.mim.mask_ratio"],
        ),
        (["loss@loss.mim=mae", "loss.mim.mask_unit=8"], ["loss@loss.mim=mim, not to loss@loss.mim=mae"]),
        (["loss.mim=mae"], ["loss@loss.mim=mae"]),
        (["loss=mim", "loss@loss.mim=mae"], ["loss@loss.mim=mae", "loss=mim"]),
        (["loss@loss.mim=mea"], ["loss@loss.mim=mea: loss must be one of mae, mim; did you mean mae?"]),
        (["loss@loss.contrastive=nope"], ["loss must be one of contrastive."]),
        (["loss.contrastive.temprature=1"], ["did you mean loss.contrastive.temperature?"]),
        (["run=null"], ["run must be a section"]),
        (["data.dataset=shapes"], ["data.dataset", "section"]),
        (["loss.lambda.schedule=linear"], ["loss.lambda is a value", "loss.lambda={...}"]),
        (["data={num_train: 500, typo: 3}"], ["data.typo"]),
        (["hydra.ouput_subdir=x"], ["did you mean hydra.output_subdir?"]),
        (["hydra.job.chdir=banana"], ["hydra.job.chdir=banana", "bool"]),
        (["+trainer.max_epoch=3"], ["trainer.max_epoch", "did you mean trainer.max_epochs"]),
        (["+typo.deep=1"], ["typo.deep"]),
        (["+loss.typo=1"], ["loss.typo", "Hybrid"]),
        (["++backbone.image_sise=3"], ["did you mean backbone.image_size?"]),
        (["loss.lambda=0,0.2"], ["loss.lambda=0,0.2", "-m"]),
        (["loss=mim,mae"], ["loss=mim,mae", "-m"]),
        (["word"], ["'word'", "key=value"]),
        (["loss.lambda=[1"], ["'loss.lambda=[1'"]),
        (["a=b=c"], ["'a=b=c'"]),
        (["--epochs", "3"], ["--epochs"]),
        (["--config-name", "other"], ["--config-dir"]),
        (["--config-dir", "nowhere"], ["nowhere"]),
        (["--cfg", "job", "-m"], ["Only one"]),
        (["--cfg", "job", "typo=1"], ["typo"]),
        (["--help", "loss=hybird"], ["did you mean hybrid?"]),
        (["~data.root"], ["data.root"]),
        (["experiment=none_such"], ["experiment", "demo"]),
        (["loss.lambda=2"], ["loss.lambda", "2"]),
        (["trainer.max_epochs=-3"], ["trainer.max_epochs", "-3"]),
        (["data=folder"], ["data.root"]),
        (["data=folder", "data.root=nowhere"], ["data.root", "nowhere"]),
        (["-m", "loss.lambda=0,0.5,2"], ["loss.lambda", "2"]),
        (["-m", "loss.lambda=0,0.5", "typo=1,2"], ["typo"]),
        (["-m", "loss=mim,mea"], ["did you mean mae?"]),
        (["-m", "loss=mim,hybrid", "loss.lambda=0,0.2"], ["belongs to loss=hybrid, not to loss=mim"]),
        (["-m", "seed=range(0,100)", "loss.lambda=0,3"], ["loss.lambda", "3"]),
        (["-m", "run.dir=x", "seed=1,2"], ["run folder x", "run.root"]),
        (["-m", "data.num_workers=0,1"], ["share the run folder"]),
        (
            ["-m", "trainer.devices=2", "trainer.accelerator=cpu", "seed=1,2", "hydra/launcher=basic"],
            ["trainer.devices", "-m", "hydra/launcher=local"],
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else v,
)
def test_a_mistake_gets_its_sentence_and_leaves_nothing(arguments, words, runs, folder, capsys, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    refused("train", arguments, words, capsys)
    assert runs == []
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["checkpoint must be given: a run folder, a checkpoint file, timm:NAME, or a list [A,B]"]),
        (["checkpoint=[]"], ["checkpoint must be given", "[]"]),
        (["checkpoint=[A,3]"], ["checkpoint must be given", "[A, 3]"]),
        (["checkpoint={A: B}"], ["checkpoint must be given", "{A: B}"]),
        (["checkpoint=A,B"], ["checkpoint=A,B", "add -m", "checkpoint=[...]"]),
        (["checkpont=A"], ["checkpont", "did you mean checkpoint?"]),
        (["checkpoint=A", "num_image=8"], ["did you mean num_images?"]),
        (["checkpoint=A", "typo=1"], ["typo", "harmonize analyze --cfg job prints all"]),
        (["checkpoint=A", "loss.lambda=0.2"], ["Unknown key loss.lambda"]),
        (["checkpoint=A", "num_images=2"], ["num_images must be a whole number of at least 4, not 2."]),
        (["checkpoint=A", "batch_size=0"], ["batch_size must be a whole number of at least 1, not 0."]),
        (["checkpoint=A", "diagnostics.every_n_epochs=0"], ["diagnostics.every_n_epochs", "at least 1, not 0"]),
        (["checkpoint=A", "image_size=[8,8]"], ["image_size", "null, not [8, 8]"]),
        (["checkpoint=A", "untrained=1", "tsne=no"], ["untrained must be true or false", "tsne must be true or false"]),
        (["checkpoint=A", "accelerator=tpu"], ["accelerator must be auto, cpu or gpu, not tpu"]),
        (["checkpoint=A", "accelerator=gpu"], ["accelerator must be cpu or auto, not gpu: there is no GPU here."]),
        (["checkpoint=A", "names=CL"], ["names must be null or a list", "not CL"]),
        (["checkpoint=A", "names=[CL,MIM]"], ["names must be null or a list of 1", "[CL, MIM]"]),
        (["checkpoint=[A,B]", "names=[CL]"], ["names must be null or a list of 2", "[CL]"]),
        (["checkpoint=A", "run=null"], ["run must be a section"]),
        (["checkpoint=A", "data.root=x"], ["data.root", "add data=NAME", "folder"]),
        (["checkpoint=A", "+data.root=x"], ["data.root", "add data=NAME"]),
        (["checkpoint=A", "data={root: x}"], ["add data=NAME"]),
        (["checkpoint=A", "data=shaps"], ["data must be one of", "did you mean shapes?"]),
        (["checkpoint=A", "data=shapes", "data.rot=x"], ["did you mean data.root?"]),
        (["checkpoint=A", "data=folder"], ["data.root=null"]),
        (["checkpoint=A", "data=folder", "data.root=nowhere"], ["data.root=nowhere does not exist"]),
        (["checkpoint=A", "data@other=shapes"], ["data@other=shapes"]),
        (["checkpoint=A", "diagnostics=defalt"], ["diagnostics must be one of", "did you mean default?"]),
        (["checkpoint=A", "loss=mim"], ["harmonize analyze has no group loss; it has data, diagnostics."]),
        (["checkpoint=A", "+loss=mim"], ["harmonize analyze has no group loss"]),
        (["checkpoint=A", "loss@loss.mim=mae"], ["harmonize analyze has no group loss"]),
        (["checkpoint=A", "experiment=demo"], ["harmonize analyze has no group experiment"]),
        (["--epochs", "3"], ["--epochs", "harmonize analyze --help"]),
        (["--config-name", "train"], ["harmonize analyze has one primary configuration"]),
        (["-m", "checkpoint=A,B", "num_images=2"], ["num_images must be"]),
        (["-m", "checkpoint=A,B", "run.dir=x"], ["run folder x", "run.root"]),
        (["-m", "checkpoint=A", "data=shapes,null"], ["data=shapes,null", "data=null on its own"]),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else v,
)
def test_a_mistake_of_analyze_gets_its_sentence(arguments, words, runs, folder, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    refused("analyze", arguments, words, capsys)
    assert runs == []
    assert list(folder.iterdir()) == []


def refused(command, arguments, words, capsys) -> None:
    assert main([command, *arguments]) == 2
    captured = capsys.readouterr()
    assert all(line.startswith("harmonize: error: ") for line in captured.err.splitlines()), captured.err
    assert all(word in captured.err for word in words), captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("program", "wrong", "right"),
    [
        (["train.py"], "loss.lamda=0.2", "loss.lambda"),
        (["-m", "harmonize", "train"], "loss.lamda=0.2", "loss.lambda"),
        (["analyze.py"], "checkpont=A", "checkpoint"),
    ],
)
def test_a_typo_is_answered_at_once(program, wrong, right, folder):
    command = [str(ROOT / word) if word.endswith(".py") else word for word in program]
    started = time.monotonic()
    done = subprocess.run([sys.executable, *command, wrong], capture_output=True, text=True, timeout=120)
    assert time.monotonic() - started < 15
    assert done.returncode == 2
    assert done.stderr == f"harmonize: error: Unknown key {wrong.partition('=')[0]}; did you mean {right}?\n"
    assert done.stdout == ""
    assert list(folder.iterdir()) == []


def test_help_needs_nothing_heavy():
    code = "import sys; from harmonize.cli import main; main([]); print({'torch', 'hydra'} & set(sys.modules))"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[-1] == "set()"
    assert set(COMMANDS) <= {line.split()[0] for line in lines if line.strip()}
    assert any("harmonize train loss=hybrid loss.lambda=0.2" in line for line in lines)


def test_commands(capsys):
    assert main(["--version"]) == 0
    assert main(["trian"]) == 2
    assert "did you mean: harmonize train" in capsys.readouterr().err
    assert main(["loss=mim"]) == 2
    assert "did you mean: harmonize train loss=mim" in capsys.readouterr().err
    assert main(["analyse"]) == 2
    assert "did you mean: harmonize analyze" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("vit-b.pth.tar", "checkpoint='vit-b.pth.tar'"),
        ("a folder/it's.pth", "checkpoint='a folder/it\\'s.pth'"),
        ("branch=momentum", "branch=momentum"),
        ("--cfg", "--cfg"),
    ],
)
def test_a_path_needs_no_key_for_inspect(argument, expected):
    assert _with_key(argument, COMMANDS["inspect"]) == expected
    assert _with_key(argument, COMMANDS["train"]) == argument


def test_a_file_whose_name_has_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1.pth").touch()
    assert _with_key("lr=1.pth", COMMANDS["inspect"]) == "checkpoint='lr=1.pth'"


def test_help_of_train_lists_groups_keys_and_examples(capsys, runs):
    assert main(["train", "--help", "loss=mim"]) == 0
    text = capsys.readouterr().out
    assert "contrastive, hybrid, mae, mim*" in text
    for key in ("loss.lambda", "data.root", "trainer.max_epochs", "run.dir"):
        assert f"  {key}" in text
    assert "harmonize train experiment=demo" in text
    assert " _vit" not in text
    assert "-m, --multirun" in text
    assert runs == []


def test_help_of_analyze_lists_its_own_groups_keys_and_examples(capsys, runs):
    assert main(["analyze", "--help"]) == 0
    text = capsys.readouterr().out
    groups = text.partition("\ngroups")[2].partition("\nkeys")[0]
    assert [line.split()[0] for line in groups.splitlines()[1:] if line] == ["data", "diagnostics"]
    assert "shapes," in groups
    assert "default*" in groups
    shown = re.findall(r"(?:^  |also |, and )([a-z_]+(?:\.[a-z_]+)?)", text.partition("\nkeys")[2], re.M)
    assert {*OmegaConf.load(config.CONF / "analyze.yaml")} - {"defaults", "diagnostics", "run", "hydra"} <= {*shown}
    for example in (
        "checkpoint=outputs/hybrid-shapes-vit_tiny-1a2b3c4d",
        "checkpoint=timm:vit_small_patch16_224",
        "checkpoint=[A,B] names=[CL,MIM]",
    ):
        assert f"harmonize analyze {example}" in text
    assert "-m, --multirun" in text
    assert runs == []


def test_cfg_prints_the_configuration_and_runs_nothing(capsys, runs, folder):
    assert main(["train", "loss=mim", "loss.mask_ratio=0.5", "--cfg", "job"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert printed.loss.mask_ratio == 0.5
    assert "hydra" not in printed
    assert runs == []
    assert list(folder.iterdir()) == []


def test_cfg_of_analyze_needs_no_checkpoint(capsys, runs, folder):
    assert main(["analyze", "num_images=8", "--cfg", "job", "--resolve"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert (printed.checkpoint, printed.num_images, printed.diagnostics.num_images) == (None, 8, 8)
    assert "hydra" not in printed
    assert "loss" not in printed
    assert runs == []
    assert list(folder.iterdir()) == []


def test_train_gets_what_compose_gives(runs, folder):
    arguments = ["loss=hybrid", "loss.lambda=0.4", "seed=3"]
    assert main(["train", *arguments]) == 0
    (cfg,) = runs
    assert config.to_plain(cfg) == config.to_plain(config.compose(arguments))
    assert config.run_dir(cfg) == config.run_dir(config.compose(arguments))
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "checkpoint", ["outputs/hybrid-shapes-vit_tiny-1a2b3c4d", "timm:vit_small_patch16_224", "[A,B]"]
)
def test_analyze_gets_what_compose_gives(checkpoint, runs, folder):
    arguments = [f"checkpoint={checkpoint}", "num_images=256", "data=shapes", "data.num_train=10", "data.num_val=300"]
    assert main(["analyze", *arguments]) == 0
    (cfg,) = runs
    assert config.to_plain(cfg) == config.to_plain(config.compose(arguments, "analyze"))
    assert cfg.checkpoint == (["A", "B"] if checkpoint == "[A,B]" else checkpoint)
    assert (cfg.num_images, cfg.diagnostics.num_images, cfg.data.num_val) == (256, 256, 300)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("choice", [[], ["data=null"], ["~data"]])
def test_analyze_without_a_choice_of_data(choice, runs):
    assert main(["analyze", "checkpoint=A", "names=[CL]", *choice]) == 0
    (cfg,) = runs
    assert cfg.data is None
    assert list(cfg.names) == ["CL"]
    assert "name" not in cfg.run


def test_a_group_that_is_left_out(runs):
    assert main(["analyze", "checkpoint=A", "diagnostics=null"]) == 0
    assert main(["train", "diagnostics=null", "loss=mim"]) == 0
    assert main(["train", "-m", "diagnostics=null", "seed=1,2"]) == 0
    analysis, *trained = runs
    assert not any(OmegaConf.is_config(entry) for entry in analysis.diagnostics.values())
    assert [cfg.diagnostics for cfg in trained] == [None, None, None]


def test_a_job_can_compose(runs, monkeypatch):
    """As analyze does for the data of a checkpoint that names none."""
    monkeypatch.setattr(
        "harmonize.analysis.analyze", lambda cfg: runs.append(config.compose(["data=shapes"], "analyze"))
    )
    assert main(["analyze", "checkpoint=A"]) == 0
    (composed,) = runs
    assert composed.data.label == "shape"


def test_a_sweep_of_analyze(runs, folder, capsys):
    assert main(["analyze", "-m", "checkpoint=[A,B],C", "data=null", "run.root=sweep"]) == 0
    assert [cfg.checkpoint for cfg in runs] == [["A", "B"], "C"]
    assert "harmonize: job 1: " in capsys.readouterr().out
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()] == [
        "sweep/multirun/multirun.yaml"
    ]


def test_options_may_stand_anywhere(runs):
    assert main(["train", "loss=mim", "-m", "seed=1,2"]) == 0
    assert [cfg.seed for cfg in runs] == [1, 2]


def test_a_sweep_runs_every_combination_in_its_own_folder(runs, folder, capsys):
    assert main(["train", "-m", "loss.lambda=0,1", "seed=1,2", "run.root=sweep"]) == 0
    assert [(cfg.loss["lambda"], cfg.seed) for cfg in runs] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert len({config.run_dir(cfg) for cfg in runs}) == 4
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    (name,) = os.listdir("sweep/sweeps")
    assert files == [f"sweep/sweeps/{name}/multirun.yaml", f"sweep/sweeps/{name}/sweep.yaml"]
    assert main(["train", "-m", "seed=1,2", "loss.lambda=0,1", "run.root=sweep"]) == 0
    assert os.listdir("sweep/sweeps") == [name]  # the same jobs are the same sweep


def test_a_sweep_over_losses_takes_a_key_that_only_they_have(runs):
    assert main(["train", "-m", "loss=mim,mae", "loss.mask_ratio=0.5"]) == 0
    assert [(cfg.loss._target_.split(".")[-1], cfg.loss.mask_ratio) for cfg in runs] == [
        ("MaskedImageModeling", 0.5),
        ("MaskedAutoencoder", 0.5),
    ]


def test_files_of_ones_own(runs, folder, capsys):
    (folder / "mine" / "experiment").mkdir(parents=True)
    file = folder / "mine" / "experiment" / "short.yaml"
    file.write_text("# @package _global_\ndefaults: [{override /loss: mae}]\nseed: 7\ntrainer: {max_epochs: 2}\n")
    assert main(["train", "--config-dir", "mine", "experiment=short"]) == 0
    (cfg,) = runs
    assert (cfg.seed, cfg.trainer.max_epochs, cfg.loss.mask_ratio) == (7, 2, 0.75)

    file.write_text("# @package _global_\ntrainer: {max_epoch: 2}\n")
    assert main(["train", "--config-dir", "mine", "experiment=short"]) == 2
    assert "experiment=short: Unknown key trainer.max_epoch; did you mean trainer.max_epochs" in capsys.readouterr().err


def test_a_mistake_found_later_is_a_sentence_too(runs, capsys):
    runs.append(ConfigError("run.dir=x holds a checkpoint of another architecture."))
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "harmonize: error: run.dir=x holds a checkpoint of another architecture.\n"


def test_a_mistake_that_analysis_finds_is_a_sentence_too(runs, capsys):
    runs.append(ConfigError("checkpoint=A does not exist."))
    assert main(["analyze", "checkpoint=A"]) == 2
    assert capsys.readouterr().err == "harmonize: error: checkpoint=A does not exist.\n"


def test_an_error_of_the_program_keeps_its_traceback(runs):
    runs.append(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["train"])


def test_ctrl_c_is_one_line(runs, capsys):
    runs.append(KeyboardInterrupt())
    assert main(["train"]) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("harmonize: interrupted; the same command resumes")
    assert main(["analyze", "checkpoint=A"]) == 130
    assert capsys.readouterr().err == "harmonize: interrupted; the same command starts again.\n"


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("harmonize train loss=", ["loss=contrastive", "loss=hybrid", "loss=mae", "loss=mim", "loss=supervised"]),
        ("harmonize analyze data=c", ["data=cifar10", "data=cifar100"]),
        ("harmonize analyze checkp", ["checkpoint="]),
    ],
)
def test_completion_knows_the_command(line, answer, monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    assert main(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out.split() == answer
