"""Every file of conf/ composes, and every sensible combination passes the checks that need no data."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from harmonize import config

GROUPS = {
    folder.name: sorted(p.stem for p in folder.glob("*.yaml") if not p.name.startswith("_"))
    for folder in sorted(config.CONF.iterdir())
    if folder.is_dir() and folder.name != "hydra"
}
# Command -> its groups, as its primary configuration names them.
COMMANDS = {
    command: [
        group
        for line in yaml.safe_load((config.CONF / f"{command}.yaml").read_text())["defaults"]
        for group in (line if isinstance(line, dict) else ())
        if not group.startswith("override ")
    ]
    for command in ("train", "analyze", "evaluate")
}
CHOICES = [(c, f"{group}={name}") for c, groups in COMMANDS.items() for group in groups for name in GROUPS[group]]
LOSSES = GROUPS["loss"]
# What the user has to bring.
NEEDS = {
    "data=imagenet100": ["data.class_list=classes.txt"],
    "trainer=ddp": ["trainer.devices=2"],
    "trainer=fsdp": ["trainer.devices=2"],
}


@pytest.fixture(scope="module")
def composers():
    with ExitStack() as stack:
        yield {command: stack.enter_context(config.composer(command)) for command in COMMANDS}


@pytest.fixture
def conf(composers):
    return composers["train"]


def check(conf, overrides: list[str], command: str = "train") -> None:
    config.check_config(config.finish(conf.load(overrides)), machine=False, command=command)


def test_the_groups_that_other_work_relies_on():
    assert set(GROUPS) >= {"loss", "backbone", "data", "optimizer", "schedule", "trainer", "logger", "callbacks"}
    assert set(LOSSES) >= {"contrastive", "mim", "mae", "hybrid"}
    assert set(GROUPS["logger"]) == {"wandb", "csv"}
    assert set(GROUPS["trainer"]) >= {"default", "smoke"}


def test_every_group_belongs_to_a_command():
    assert set(GROUPS) == {group for groups in COMMANDS.values() for group in groups}


@pytest.mark.parametrize(("command", "choice"), CHOICES)
def test_every_file_composes_and_passes(composers, command, choice):
    given = ["checkpoint=any"] if command != "train" else []
    check(composers[command], [*given, choice, *NEEDS.get(choice, [])], command)


@pytest.mark.parametrize(
    "overrides",
    [
        ["checkpoint=outputs/hybrid-shapes-vit_tiny-1a2b3c4d"],
        ["checkpoint=timm:vit_small_patch16_224", "image_size=448", "untrained=false", "tsne=false"],
        ["checkpoint=[A,B]", "names=[CL,MIM]", "num_images=256", "batch_size=1", "accelerator=gpu"],
        ["checkpoint=[A]", "names=[CL]", "data=openclipart", "data.num_val=100", "run.dir=here", "seed=1"],
        ["checkpoint=A", "data=shapes", "data.num_train=1", "diagnostics=null"],
    ],
    ids=" ".join,
)
def test_analyze_takes(composers, overrides):
    check(composers["analyze"], overrides, "analyze")


def test_the_diagnostics_of_analyze_go_by_its_own_keys(composers):
    cfg = config.finish(composers["analyze"].load(["num_images=128", "batch_size=8"]))
    assert (cfg.diagnostics.num_images, cfg.diagnostics.batch_size) == (128, 8)
    assert cfg.data is None
    left_out = config.finish(composers["analyze"].load(["diagnostics=null"])).diagnostics
    assert set(left_out) == {"num_images", "batch_size", "every_n_epochs"}
    assert [name for name, part in cfg.diagnostics.items() if "_target_" in (part if OmegaConf.is_dict(part) else ())]


@pytest.mark.parametrize("data", GROUPS["data"])
def test_mae_fits_every_data_set(conf, data):
    """The default loss, whose parts are the other two, is tried above."""
    check(conf, ["loss=mae", f"data={data}", *NEEDS.get(f"data={data}", [])])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "overrides",
    [
        ["backbone=vit_base", "data.image_size=224", "backbone.patch_size=16", "trainer.precision=bf16"],
        ["data.image_size=96", "backbone.positions=none", "backbone.relative_position=shared", "trainer=smoke"],
        ["trainer.max_epochs=null", "trainer.max_steps=7", "trainer.accumulate=2", "trainer.devices=2"],
        ["callbacks.probe=null", "callbacks.gradient_norms=null", "logger=csv", "backbone.num_registers=4"],
    ],
    ids=" ".join,
)
def test_sensible_combinations(conf, loss, overrides):
    check(conf, [f"loss={loss}", *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss.lambda=0"],
        ["loss.lambda=1.0"],
        ["loss.lambda=0", "data.batch_size=1"],
        ["loss.lambda={schedule: linear, start: 0, end: 0.4}"],
        ["loss.lambda={schedule: cosine, start: 1, end: 0}"],
        ["loss.lambda={schedule: step, start: 0, end: 0.4, at: 0.5}"],
        ["loss@loss.mim=mae"],
        ["loss@loss.mim=mae", "loss.mim.mask_ratio=0.5"],
        ["loss.contrastive.temperature=0.1", "loss.mim.mask_unit=8"],
        ["optimizer=mim", "schedule=contrastive", "schedule.decay=multistep", "schedule.milestones=[0.5,0.9]"],
    ],
    ids=" ".join,
)
def test_the_hybrid_takes(conf, overrides):
    check(conf, overrides)


@pytest.mark.parametrize("loss", LOSSES)
def test_each_recipe_brings_its_own_optimiser_and_schedule(conf, loss):
    cfg = conf.load([f"loss={loss}"])
    assert (cfg.hydra.runtime.choices.optimizer, cfg.hydra.runtime.choices.schedule) == (loss, loss)
    cfg = conf.load([f"loss={loss}", "optimizer=mae"])
    assert (cfg.hydra.runtime.choices.optimizer, cfg.hydra.runtime.choices.schedule) == ("mae", loss)


@pytest.mark.parametrize(
    ("loss", "lr", "lr_batch", "weight_decay", "betas", "clip", "warmup", "decay"),
    [
        # MoCo v3: 2.4e-3 at 4096, 40 of 300 epochs. SimMIM: 4e-4 at 2048, 10 of 800. MAE: 2.4e-3 at 4096, 40 of 800.
        ("contrastive", 2.4e-3 / 4096, 256, 0.1, [0.9, 0.999], None, 40 / 300, "cosine"),
        ("mim", 4e-4 / 2048, 512, 0.05, [0.9, 0.999], 5.0, 10 / 800, "multistep"),
        ("mae", 2.4e-3 / 4096, 256, 0.05, [0.9, 0.95], None, 40 / 800, "cosine"),
    ],
)
def test_the_official_optimisation(conf, loss, lr, lr_batch, weight_decay, betas, clip, warmup, decay):
    cfg = conf.load([f"loss={loss}"])
    assert cfg.optimizer.lr / cfg.optimizer.lr_batch == pytest.approx(lr)
    assert (cfg.optimizer.lr_batch, cfg.optimizer.weight_decay, cfg.optimizer.clip) == (lr_batch, weight_decay, clip)
    assert list(cfg.optimizer.betas) == betas
    assert cfg.schedule.warmup == pytest.approx(warmup, abs=1e-4)
    assert cfg.schedule.decay == decay
    if loss == "mim":  # lr x 0.1 at epoch 700 of 800, warm-up from 5e-7 of 1e-4
        assert (list(cfg.schedule.milestones), cfg.schedule.gamma) == ([700 / 800], 0.1)
        assert cfg.schedule.warmup_lr == pytest.approx(5e-7 / 1e-4)


@pytest.mark.parametrize("group", ["optimizer", "schedule"])
def test_the_files_of_one_interface_have_the_same_keys(group):
    keys = {name: set(yaml.safe_load((config.CONF / group / f"{name}.yaml").read_text())) for name in GROUPS[group]}
    assert len(set(map(frozenset, keys.values()))) == 1, keys


@pytest.mark.parametrize("command", COMMANDS)
def test_hydra_writes_nothing_on_its_own(composers, command):
    hydra = composers[command].load([]).hydra
    assert (hydra.job.name, hydra.output_subdir, hydra.run.dir, hydra.job.chdir) == (command, None, ".", False)
    assert (hydra.job_logging.root, hydra.hydra_logging.root) == (None, None)
    assert Path(composers[command].load(["run.root=elsewhere"]).hydra.sweep.dir).parts[0] == "elsewhere"


STUDIES = ["self_attention", "representation", "components", "hybrid", "scaling", "lambda_schedule", "lambda_per_block"]
STUDIES += ["shared_views", "supervised", "drawings", "learning_rate"]


@pytest.mark.parametrize("scale", GROUPS["scale"])
@pytest.mark.parametrize("study", STUDIES)
def test_every_study_goes_at_every_scale(conf, study, scale):
    check(conf, [f"experiment={study}", f"scale={scale}"])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_scale_suits_every_loss(conf, loss):
    check(conf, [f"loss={loss}", "scale=laptop"])
    cfg = conf.load([f"loss={loss}", "scale=laptop"])
    assert (cfg.backbone.width, cfg.data.clutter, cfg.trainer.max_steps) == (64, 0.1, 800)
    sizes = [value for key, value in cfg.loss.items() if key in ("hidden_dim", "decoder_width")]
    assert set(sizes) <= {512, 64}
    assert OmegaConf.select(conf.load(["loss=contrastive"]), "loss.hidden_dim") == 4096


def test_studies_share_their_runs(conf):
    """What another study has trained is not trained again; counted for one seed."""
    folders = {study: set(conf.folders([f"experiment={study}", "seed=1"])) for study in STUDIES}
    num = {"self_attention": 3, "representation": 3, "components": 2, "hybrid": 6, "scaling": 6}
    num |= {"lambda_schedule": 3, "lambda_per_block": 4, "shared_views": 2, "supervised": 1, "drawings": 3}
    num |= {"learning_rate": 3}
    assert {study: len(runs) for study, runs in folders.items()} == num
    assert folders["self_attention"] == folders["representation"] < folders["hybrid"]
    shared = {study: len(folders[study] & folders["hybrid"]) for study in STUDIES}
    assert shared == num | {"components": 1, "scaling": 2, "lambda_schedule": 1, "lambda_per_block": 1} | {
        "shared_views": 1,
        "supervised": 0,
        "drawings": 0,
        "learning_rate": 0,
    }
    larger = set(conf.folders(["experiment=hybrid", "scale=gpu", "seed=1"]))
    assert len(larger) == 6
    assert not larger & folders["hybrid"]
    assert len(conf.folders(["loss=mim", "seed=3"])) == 1


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_has_three_seeds_or_more(conf, study):
    seeds = str(conf.load([f"experiment={study}"]).hydra.sweeper.params.seed).split(",")
    assert len(set(seeds)) == len(seeds) >= 3


def test_smoke_is_short(conf):
    trainer = conf.load(["trainer=smoke"]).trainer
    assert (trainer.max_steps, trainer.limit_val_batches) == (10, 2)
    assert set(trainer) == set(conf.load([]).trainer)
