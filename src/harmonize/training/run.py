"""``train(cfg)``: from a checked configuration to a trained encoder in its run folder."""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn

from harmonize.analysis import choose_diagnostics
from harmonize.config import changed_keys, instantiate, load_config, run_dir, save_config, to_plain
from harmonize.data.module import DataModule
from harmonize.files import write_json
from harmonize.functional.seeding import mix_int
from harmonize.functional.weight_decay import is_excluded
from harmonize.memory import keep_freed_memory
from harmonize.training.callbacks.checkpoint import AtomicCheckpointIO, Checkpoints
from harmonize.training.callbacks.diagnostics import Diagnostics
from harmonize.training.callbacks.gradient_norms import GradientNorms
from harmonize.training.callbacks.metrics import StepMetrics
from harmonize.training.callbacks.probe import OnlineProbe
from harmonize.training.callbacks.progress import ProgressDisplay
from harmonize.training.callbacks.speed import Speed
from harmonize.training.compilation import Compilation, should_compile
from harmonize.training.loggers import JsonLogger, Wandb, has_api_key, read_rows
from harmonize.training.module import PretrainModule
from harmonize.training.optim import trained_parameters
from harmonize.types import ConfigError, EncoderSpec

PRECISION: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
PACKAGES = ("harmonize", "torch", "torchvision", "timm", "lightning", "hydra-core", "torchmetrics", "wandb", "numpy")


@dataclass(frozen=True)
class Resume:
    """A readable checkpoint of the run folder.

    Attributes:
        path: The file.
        step: Its optimiser step.
        shapes: Name -> shape of every tensor of its ``state_dict``.
        groups: Number of parameters in each group of its optimiser.
        no_decay: The patterns that made these groups.
    """

    path: Path
    step: int
    shapes: dict[str, tuple[int, ...]]
    groups: list[int]
    no_decay: list[str]


def train(cfg: DictConfig) -> dict[str, Any]:
    """Train, or go on training, the run that a configuration describes.

    Args:
        cfg: A configuration that ``check_config`` has passed.

    Returns:
        The latest value of every metric (``metrics.json``).

    Raises:
        ConfigError: The configuration contradicts the data or what the run folder holds; nothing has been written.
    """
    console = Console(quiet=_rank() != 0, soft_wrap=True, highlight=False)
    folder = run_dir(cfg).absolute()
    with _plain_output(), warnings.catch_warnings():
        _quiet_lightning()
        if not cfg.run.fresh and (done := _finished(folder, cfg)):
            console.print(f"This run is finished (run.fresh=true starts it anew): {folder}")
            _print_table(console, done, folder)
            return done
        return _train(cfg, folder, console)


def _train(cfg: DictConfig, folder: Path, console: Console) -> dict[str, Any]:
    precision = _precision(cfg)  # refused before anything is built
    compiled = should_compile(cfg.trainer.compile, _on_gpu(cfg))
    config = to_plain(cfg)
    trainer_config = config["trainer"]
    world_size = trainer_config["devices"] * trainer_config["num_nodes"]
    resume = None if cfg.run.fresh else find_checkpoint(folder)

    if not _on_gpu(cfg):
        keep_freed_memory()
    torch.manual_seed(mix_int(cfg.seed))
    encoder = instantiate(cfg.backbone)
    if cfg.trainer.activation_checkpointing:
        encoder.set_grad_checkpointing()
    objective = instantiate(cfg.loss, encoder=encoder)
    data = DataModule(
        instantiate(cfg.data.dataset),
        {name: instantiate(recipe) for name, recipe in cfg.views.items()},
        objective.required_views,
        image_size=cfg.data.image_size,
        batch_size=cfg.data.batch_size,
        num_workers=cfg.data.num_workers,
        seed=cfg.seed,
        eval_crop=cfg.data.eval_crop,
        accumulate=cfg.trainer.accumulate,
        world_size=world_size,
        rank=_rank(),
        augment=cfg.data.augment,
        on_gpu=_on_gpu(cfg),
    )
    steps_per_epoch, total_steps = _length(data.steps_per_epoch, trainer_config)
    module = PretrainModule(
        encoder,
        objective,
        optimizer=config["optimizer"],
        schedule=config["schedule"],
        global_batch=cfg.data.batch_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        seed=cfg.seed,
        fused=precision != "fp16",
        log_every_n_steps=cfg.trainer.log_every_n_steps,
        config=config,
    )
    if resume is not None:
        _same_architecture(resume, module, folder)
        _same_groups(resume, module, folder)
        _note_changes(folder, cfg, console)
    step = resume.step if resume is not None else 0
    if step < total_steps:
        data.check_readable(_has_probe(cfg, data))

    try:
        if _rank() == 0:
            _write_run_folder(folder, cfg, console)
        record = JsonLogger(folder, resume_step=step)
    except OSError as error:
        raise ConfigError(f"run.dir={folder} cannot be written: {error.strerror}.") from error
    wandb = Wandb(folder, **_without(config["logger"], "name"), config=config) if cfg.logger.name == "wandb" else None
    if wandb is not None:
        wandb.start()
        if wandb.mode == "offline" and cfg.logger.mode == "auto" and not has_api_key():
            console.print("W&B: no API key found, logging offline (wandb sync uploads it; logger=csv turns it off).")
    failed = True
    try:
        if step < total_steps:
            if resume is not None:
                console.print(f"Resuming at step {step} of {total_steps} from {resume.path.name}.")
            console.print(_how(cfg, precision, compiled, data))
            _fit(cfg, folder, module, data, resume, record, wandb, console, precision, compiled)
        metrics = {**record.latest, "total_steps": total_steps}
        record.complete(metrics)
        failed = False
    finally:
        if wandb is not None:
            wandb.finish(exit_code=int(failed))
    _print_table(console, metrics, folder)
    return metrics


def _fit(
    cfg: DictConfig,
    folder: Path,
    module: PretrainModule,
    data: DataModule,
    resume: Resume | None,
    record: JsonLogger,
    wandb: Wandb | None,
    console: Console,
    precision: str,
    compiled: bool,
) -> None:
    """Run lightning's loop over what is left of the run."""
    has_probe = _has_probe(cfg, data)
    callbacks: list[pl.Callback] = [Speed()]
    if compiled:
        callbacks.append(Compilation())
    gradients = GradientNorms(**cfg.callbacks.gradient_norms) if cfg.callbacks.get("gradient_norms") else None
    if gradients is not None:
        callbacks.append(gradients)
    callbacks.append(StepMetrics())
    spec: EncoderSpec = module.encoder.spec  # type: ignore[assignment]
    looks_inside = choose_diagnostics(cfg.diagnostics, spec)
    layer_probe = looks_inside.layer_probe if looks_inside is not None and has_probe else None
    val_loader = probe = None
    if has_probe:
        probe_config = to_plain(cfg.callbacks.probe)
        numbers = {split: probe_config.pop(f"num_{split}") for split in ("train", "val")}
        if cfg.trainer.limit_val_batches is not None:
            # Not lightning's limit: these lists are sorted by class, and the first batches would miss most classes.
            limit = cfg.trainer.limit_val_batches * cfg.data.batch_size
            numbers = {split: min(number, limit) for split, number in numbers.items()}
        val_loader = data.feature_loader("val", numbers["val"])
        train_loader = data.feature_loader("train", numbers["train"])
        more = layer_probe.specs(spec) if layer_probe is not None else ()
        probe = OnlineProbe(train_loader, len(data.classes or ()), **probe_config, more=more)
        callbacks.append(probe)
    elif cfg.callbacks.get("probe"):
        console.print("The data have no labels, or one class: k-NN and linear probes are off.")
    if looks_inside is not None:
        indices = data.spread("val", cfg.diagnostics.num_images)
        callbacks.append(
            Diagnostics(
                looks_inside.metrics,
                data.feature_loader("val", indices, cfg.diagnostics.batch_size),
                indices,
                folder,
                num_classes=len(data.classes or ()),
                layer_probe=layer_probe,
                probe=probe,
                gradients=gradients,
                health=looks_inside.health,
                figures=cfg.diagnostics.figures,
                console=console,
            )
        )
        if val_loader is None:  # a validation epoch has to begin and to end; the diagnostics bring their own images
            val_loader = torch.utils.data.DataLoader([torch.zeros(1)])  # type: ignore[arg-type]
    callbacks.append(ProgressDisplay(None if cfg.trainer.progress == "auto" else cfg.trainer.progress, console))
    callbacks.append(
        Checkpoints(folder / "checkpoints")
        if has_probe
        else Checkpoints(folder / "checkpoints", monitor="epoch/loss", mode="min")
    )
    trainer = pl.Trainer(
        accelerator=cfg.trainer.accelerator,
        devices=cfg.trainer.devices,
        num_nodes=cfg.trainer.num_nodes,
        strategy=_strategy(cfg, module.objective),
        precision=PRECISION[precision],
        accumulate_grad_batches=cfg.trainer.accumulate,
        max_epochs=-1,  # the module stops at total_steps, in mid-epoch as well
        check_val_every_n_epoch=cfg.trainer.val_every_n_epochs,
        limit_train_batches=cfg.trainer.limit_train_batches,
        # The sanity check before the first step takes all of it: that is the measurement of the untrained network.
        num_sanity_val_steps=-1 if resume is None and cfg.trainer.sanity else 0,
        logger=[record, *([wandb] if wandb is not None else [])],
        log_every_n_steps=cfg.trainer.log_every_n_steps,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=folder,
        # Operations that have no deterministic kernel warn instead of ending the run.
        deterministic="warn" if cfg.trainer.deterministic else False,
        use_distributed_sampler=False,  # the data module shares out the images
        enable_checkpointing=True,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    step = resume.step if resume is not None else 0
    epoch, offset = divmod(step, module.steps_per_epoch)
    try:
        trainer.fit(
            module,
            train_dataloaders=data.train_loader(epoch=epoch, start=offset * cfg.trainer.accumulate),
            val_dataloaders=val_loader,
            ckpt_path=resume.path if resume is not None else None,
            weights_only=True,
        )
    except SystemExit:  # lightning's answer to Ctrl-C
        raise KeyboardInterrupt from None


def _length(data_steps: int, trainer: Mapping[str, Any]) -> tuple[int, int]:
    """Optimiser steps of an epoch and of the whole run.

    >>> _length(100, {"limit_train_batches": None, "accumulate": 1, "max_epochs": 3, "max_steps": None})
    (100, 300)
    """
    limit = trainer["limit_train_batches"]
    steps = data_steps if limit is None else min(data_steps, -(-limit // trainer["accumulate"]))
    return steps, trainer["max_steps"] or trainer["max_epochs"] * steps


def _has_probe(cfg: DictConfig, data: DataModule) -> bool:
    """Whether frozen features are probed; that takes labels."""
    return bool(cfg.callbacks.get("probe")) and data.classes is not None


def _on_gpu(cfg: DictConfig) -> bool:
    return cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()


def _precision(cfg: DictConfig) -> str:
    """``32``, ``bf16`` or ``fp16``; ``auto`` is the fastest safe one: bf16 where the hardware computes in it, else 32.

    Raises:
        ConfigError: fp16 on a CPU, where lightning would compute in bf16.
    """
    name, on_gpu = str(cfg.trainer.precision), _on_gpu(cfg)
    if name == "fp16" and not on_gpu:
        raise ConfigError("trainer.precision=fp16 needs a GPU; use bf16, 32 or auto.")
    if name == "auto":
        bf16 = torch.cuda.is_bf16_supported() if on_gpu else torch.cpu._is_avx512_bf16_supported()
        name = "bf16" if bf16 else "32"
    return name


def _how(cfg: DictConfig, precision: str, compiled: bool, data: DataModule) -> str:
    """One line: on what the run computes, and what ``auto`` has chosen."""
    if _on_gpu(cfg):
        hardware = torch.cuda.get_device_name()
    else:
        num = torch.get_num_threads()
        hardware = f"the CPU with {num} thread{'s' if num > 1 else ''}"
    chosen = " (the fastest safe one here)" if str(cfg.trainer.precision) == "auto" else ""
    code = ", compiled blocks" if compiled else ""
    where = (
        "whole batches there"
        if data.augments_on_device
        else f"images in {cfg.data.num_workers or 'no'} worker processes"
    )
    return f"Computing on {hardware} in {precision}{' bit' * precision.isdigit()}{chosen}{code}; augmenting {where}."


def _strategy(cfg: DictConfig, objective: nn.Module) -> Strategy | str:
    """DDP where there are several processes; a scheduled term that is skipped leaves parameters without a gradient."""
    if cfg.trainer.devices * cfg.trainer.num_nodes == 1:
        return "auto"
    return DDPStrategy(find_unused_parameters=bool(getattr(objective, "scheduled", False)))


# ---- the run folder --------------------------------------------------------------------------------------------------


def find_checkpoint(folder: Path) -> Resume | None:
    """The checkpoint that a run goes on from: ``last.ckpt``, or with a warning ``best.ckpt`` if that cannot be read.

    Raises:
        ConfigError: There are checkpoints, and none can be read.
    """
    unreadable = []
    for name in ("last.ckpt", "best.ckpt"):
        path = folder / "checkpoints" / name
        if not path.exists():
            continue
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            shapes = {key: tuple(value.shape) for key, value in checkpoint["state_dict"].items()}
            groups = [len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"]]
            no_decay = checkpoint["config"]["optimizer"].get("no_decay", [])
            resume = Resume(path, checkpoint["global_step"], shapes, groups, no_decay)
        except Exception:  # a damaged file raises one of many errors, depending on where it is damaged
            unreadable.append(name)
            continue
        if unreadable:
            warnings.warn(f"{unreadable[0]} is damaged; going on from {name}.", stacklevel=1)
        return resume
    if unreadable:
        raise ConfigError(
            f"run.dir={folder} holds no readable checkpoint ({' and '.join(unreadable)} damaged); "
            "run.fresh=true starts anew."
        )
    return None


def _same_architecture(resume: Resume, module: nn.Module, folder: Path) -> None:
    """Refuse a checkpoint whose tensors are not the module's.

    Raises:
        ConfigError: Names the first tensor that differs.
    """
    own = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    for key in [*own, *(key for key in resume.shapes if key not in own)]:
        if own.get(key) != resume.shapes.get(key):
            there, here = (shapes.get(key, "absent") for shapes in (resume.shapes, own))
            raise _another_architecture(folder, key, there, here)


def _same_groups(resume: Resume, module: PretrainModule, folder: Path) -> None:
    """Refuse a checkpoint whose optimiser groups its parameters otherwise.

    Raises:
        ConfigError: Its moments would go to other parameters.
    """
    trained = trained_parameters(module.encoder, module.objective).items()
    no_decay = module.config["optimizer"].get("no_decay", [])
    then, now = ([is_excluded(*item, patterns) for item in trained] for patterns in (resume.no_decay, no_decay))
    groups = [len(group["params"]) for group in module.optimization.optimizer.param_groups]
    if then != now or resume.groups != groups:
        raise ConfigError(
            f"run.dir={folder} holds a checkpoint that trains or decays other parameters (optimizer.no_decay is "
            f"{resume.no_decay} there and {no_decay} here); choose another run.dir, or run.fresh=true to start anew."
        )


def _another_architecture(folder: Path, key: str, there: Any, here: Any) -> ConfigError:
    return ConfigError(
        f"run.dir={folder} holds a checkpoint of another architecture ({key} is {there} there and {here} here); choose "
        "another run.dir, or run.fresh=true to start anew."
    )


def _note_changes(folder: Path, cfg: DictConfig, console: Console) -> None:
    """Say what differs from the configuration that the run folder was made with.

    Raises:
        ConfigError: The backbone differs, even if its tensors have the same shapes (number of heads, positions).
    """
    changes = _changes(folder, cfg) or {}
    for key, (before, now) in changes.items():
        if key.startswith("backbone."):
            raise _another_architecture(folder, key, before, now)
    if changes:
        listed = ", ".join(f"{key}: {before} -> {now}" for key, (before, now) in changes.items())
        console.print(f"Note: the configuration has changed since this run began ({listed}).")


def _changes(folder: Path, cfg: DictConfig) -> dict[str, tuple[Any, Any]] | None:
    """What differs from the configuration in the run folder; None where there is none that can be read."""
    try:
        stored = load_config(folder / "config.yaml")
        return changed_keys(stored, cfg) if "backbone" in stored else None
    except Exception:  # a damaged file raises one of many errors, depending on where it is damaged
        return None


def _move_aside(folder: Path, console: Console) -> None:
    """Give an old run folder another name; an empty folder may stay.

    Raises:
        ConfigError: What is there is no run folder.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not ((folder / "config.yaml").exists() or (folder / "checkpoints").is_dir()):
        raise ConfigError(f"run.dir={folder} is no run folder, and run.fresh=true moves nothing else aside.")
    old = next(p for n in range(1, 10**6) if not (p := folder.with_name(f"{folder.name}.old-{n}")).exists())
    folder.rename(old)
    console.print(f"The old run folder is now {old}")


def _write_run_folder(folder: Path, cfg: DictConfig, console: Console) -> None:
    """config.yaml, command.txt and versions.json; ``run.fresh`` moves an old run folder aside first."""
    if cfg.run.fresh:
        _move_aside(folder, console)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    save_config(cfg, folder / "config.yaml")
    with (folder / "command.txt").open("a") as file:
        file.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} in {Path.cwd()}\n{shlex.join(sys.argv)}\n")
    write_json(folder / "versions.json", versions())


def versions() -> dict[str, Any]:
    """What a run depended on: Python, packages, the commit of the source, the hardware."""
    installed: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = None
    return {
        "python": platform.python_version(),
        "packages": installed,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def _git(*arguments: str) -> str | None:
    """What git says about the folder of this source; None outside of a repository of harmonize's own."""
    source = Path(__file__).resolve()
    root = source.parents[3]
    if not (root / ".git").exists():
        return None
    command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _finished(folder: Path, cfg: DictConfig) -> dict[str, Any] | None:
    """The metrics of a run that has reached its end with this very configuration."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        done = metrics["step"] >= metrics["total_steps"]
    except (OSError, ValueError, KeyError):
        return None
    return metrics if done and _changes(folder, cfg) == {} and (folder / "checkpoints" / "last.ckpt").exists() else None


# ---- what the user sees ----------------------------------------------------------------------------------------------


def _print_table(console: Console, metrics: Mapping[str, Any], folder: Path) -> None:
    """The run in a few lines: losses, probes against the untrained network's, and where everything is."""
    table = Table(title=folder.name, title_justify="left")
    for column in ("", "trained", "untrained", "chance"):
        table.add_column(column, justify="left" if not column else "right")
    first = next((row for row in read_rows(folder / "metrics.jsonl") if "train/loss" in row), {})
    for name in ("mim", "contrastive"):
        losses = metrics.get(f"epoch/loss_{name}"), first.get(f"train/loss_{name}"), metrics.get(f"train/chance_{name}")
        if losses[0] is not None:
            table.add_row(f"{name} loss", *("" if x is None else f"{x:.4f}" for x in losses))
    for key, label in (("knn_top1", "k-NN top-1"), ("linear_top1", "linear probe top-1")):
        accuracies = metrics.get(f"val/{key}"), metrics.get(f"untrained/{key}"), metrics.get("val/chance_top1")
        if accuracies[0] is not None:
            table.add_row(label, *("" if x is None else f"{100 * x:.1f} %" for x in accuracies))
    console.print(table)
    console.print(f"Run folder: {folder}")


@contextmanager
def _plain_output() -> Iterator[None]:
    """Warnings as sentences, without the line of code that raised them."""
    formatter = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"Warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = formatter


def _quiet_lightning() -> None:
    """Silence what lightning says about itself; its warnings about our deliberate choices as well."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.")


def _rank() -> int:
    """This process's rank before there is a process group, from the launcher's environment."""
    return getattr(rank_zero_only, "rank", 0)


def _without(mapping: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}
