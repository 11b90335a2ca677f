"""``train(cfg)``: from a checked configuration to a trained encoder in its run folder."""

from __future__ import annotations

import logging
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn

from harmonize.analysis import choose_diagnostics
from harmonize.assessment import evaluate_run, is_evaluated
from harmonize.config import run_dir, to_plain
from harmonize.files import read_rows
from harmonize.memory import keep_freed_memory
from harmonize.training.callbacks.checkpoint import AtomicCheckpointIO, Checkpoints
from harmonize.training.callbacks.diagnostics import Diagnostics
from harmonize.training.callbacks.gradient_norms import GradientNorms
from harmonize.training.callbacks.metrics import StepMetrics
from harmonize.training.callbacks.probe import OnlineProbe
from harmonize.training.callbacks.progress import ProgressDisplay
from harmonize.training.callbacks.speed import Speed
from harmonize.training.compilation import Compilation
from harmonize.training.loggers import JsonLogger, Wandb, has_api_key
from harmonize.training.run_folder import (
    Resume,
    find_checkpoint,
    finished,
    move_aside,
    note_changes,
    same_architecture,
    same_groups,
    write_run_folder,
)
from harmonize.training.setup import (
    Setup,
    batch_in_words,
    build,
    computes_on_gpu,
    num_ranks,
    rank,
    rate_in_words,
    shares_weights,
)
from harmonize.training.signals import Interrupted, exit_code
from harmonize.training.status import RunStatus
from harmonize.types import ConfigError, EncoderSpec, FaultError, WorkerError

PRECISION: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def train(cfg: DictConfig) -> dict[str, Any]:
    """Train, or go on training, the run that a configuration describes.

    Args:
        cfg: A configuration that ``check_config`` has passed.

    Returns:
        The latest value of every metric (``metrics.json``).

    Raises:
        ConfigError: The configuration contradicts the data or what the run folder holds, or another process has the
            folder; nothing has been written.
        SystemExit: A signal stopped the run; what was done is saved.
    """
    console = Console(quiet=rank() != 0, soft_wrap=True, highlight=False)
    folder = run_dir(cfg).absolute()
    with _plain_output(), warnings.catch_warnings():
        _quiet_lightning()
        if not cfg.run.fresh and (done := finished(folder, cfg)) and is_evaluated(cfg, folder):
            console.print(f"This run is finished (run.fresh=true starts it anew): {folder}")
            _print_table(console, done, folder)
            return done
        try:
            with RunStatus(folder) if rank() == 0 else nullcontext() as status:
                return _train(cfg, folder, console, status)
        except Interrupted as stop:
            console.print(f"Stopped by {stop}; the same command goes on from the last checkpoint in {folder}")
            _pass_on(stop.signum, console)
            raise SystemExit(exit_code(stop.signum)) from None


def _pass_on(signum: int, console: Console) -> None:
    """Let whoever listened to a signal before the run do its part: submitit hands a job in again on rank 0."""
    before = signal.getsignal(signum)
    if not callable(before) or signum == signal.SIGINT:
        return
    try:
        before(signum, None)
    except Exception as error:  # such as: no scontrol on this node, handed in too often
        console.print(f"The run is saved, but the job was not handed in again: {error}")
        return
    if rank() != 0 and signum != signal.SIGTERM:
        time.sleep(60)  # leaving would end the job before rank 0 has handed it in


def _train(cfg: DictConfig, folder: Path, console: Console, status: RunStatus | None) -> dict[str, Any]:
    resume = None if cfg.run.fresh else find_checkpoint(folder)
    if not computes_on_gpu(cfg) and not shares_weights(cfg):  # whose gathered blocks would be kept as well
        keep_freed_memory()
    setup = build(cfg)
    module = setup.module
    if resume is not None:
        same_architecture(resume, module, folder)
        same_groups(resume, module, folder)
        note_changes(folder, cfg, console)
    step = resume.step if resume is not None else 0
    is_done = step >= module.total_steps and not (resume is not None and resume.validation_due)
    if not is_done:
        setup.data.check_readable(setup.has_probe)

    try:
        if status is not None:
            if cfg.run.fresh:
                status.release()
                move_aside(folder, console)
            status.claim(module.total_steps, step)
            write_run_folder(folder, cfg)
        record = JsonLogger(folder, step, resume.num_rows if resume is not None else None)
    except OSError as error:
        raise ConfigError(f"run.dir={folder} cannot be written: {error.strerror}.") from error
    config = to_plain(cfg)
    wandb = Wandb(folder, **_without(config["logger"], "name"), config=config) if cfg.logger.name == "wandb" else None
    if wandb is not None:
        wandb.start()
        if wandb.mode == "offline" and cfg.logger.mode == "auto" and not has_api_key():
            console.print(
                "W&B: no API key found, logging offline (harmonize sync uploads it; logger=csv turns it off)."
            )
    failed = True
    try:
        if not is_done:
            if resume is not None:
                console.print(f"Resuming at step {step} of {module.total_steps} from {resume.path.name}.")
            console.print(_how(cfg, setup))
            _fit(cfg, folder, setup, resume, record, wandb, console, status)
        if found := evaluate_run(cfg, folder):
            for logger in (record, wandb) if wandb is not None else (record,):
                logger.log_metrics(found, module.total_steps)
        metrics = {**record.latest, "total_steps": module.total_steps}
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
    setup: Setup,
    resume: Resume | None,
    record: JsonLogger,
    wandb: Wandb | None,
    console: Console,
    status: RunStatus | None,
) -> None:
    """Run lightning's loop over what is left of the run."""
    module, data, has_probe = setup.module, setup.data, setup.has_probe
    callbacks: list[pl.Callback] = [Speed()]
    if setup.compiled:
        callbacks.append(Compilation())
    gradients = None
    if cfg.callbacks.get("gradient_norms"):
        if shares_weights(cfg):
            console.print("Gradients of single loss terms are not measured with trainer.strategy=fsdp.")
        else:
            gradients = GradientNorms(**cfg.callbacks.gradient_norms)
            callbacks.append(gradients)
    callbacks.append(StepMetrics(cfg.trainer.max_skipped_steps, folder))
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
    monitor = {"monitor": "val/knn_top1", "mode": "max"} if has_probe else {"monitor": "epoch/loss", "mode": "min"}
    callbacks.append(Checkpoints(folder / "checkpoints", **monitor, minutes=cfg.trainer.save_every_minutes))
    checkpoints = AtomicCheckpointIO()
    plugins: list[Any] = [checkpoints]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # the launcher hands jobs in again, and nobody else
    trainer = pl.Trainer(
        accelerator=cfg.trainer.accelerator,
        devices=cfg.trainer.devices,
        num_nodes=cfg.trainer.num_nodes,
        strategy=_strategy(cfg, module.objective),
        precision=PRECISION[setup.precision],
        accumulate_grad_batches=cfg.trainer.accumulate,
        max_epochs=-1,  # the module stops at total_steps, in mid-epoch as well
        check_val_every_n_epoch=cfg.trainer.val_every_n_epochs,
        limit_train_batches=cfg.trainer.limit_train_batches,
        # The sanity check before the first step takes all of it: that is the measurement of the untrained network.
        num_sanity_val_steps=-1 if resume is None and cfg.trainer.sanity else 0,
        logger=[record, *([wandb] if wandb is not None else [])],
        log_every_n_steps=cfg.trainer.log_every_n_steps,
        callbacks=callbacks,
        plugins=plugins,
        default_root_dir=folder,
        # Operations that have no deterministic kernel warn instead of ending the run.
        deterministic="warn" if cfg.trainer.deterministic else False,
        inference_mode=not shares_weights(cfg),  # gathered weights live on after a validation
        use_distributed_sampler=False,  # the data module shares out the images
        enable_checkpointing=True,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    step = resume.step if resume is not None else 0
    epoch, offset = divmod(step, module.steps_per_epoch)
    if status is not None:
        status.step_of = lambda: trainer.global_step
    try:
        trainer.fit(
            module,
            train_dataloaders=data.train_loader(epoch=epoch, start=offset * cfg.trainer.accumulate),
            val_dataloaders=val_loader,
            ckpt_path=resume.path if resume is not None else None,
            weights_only=True,
        )
    except SystemExit:  # lightning's answer to a second Ctrl-C
        raise KeyboardInterrupt from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise WorkerError(
            f"A data loader worker was killed ({str(error).splitlines()[0]}), usually because memory ran out: lower "
            "data.num_workers or data.batch_size, or give the job more memory. The same command resumes from the last "
            "checkpoint."
        ) from error
    if status is not None and not checkpoints.written:
        raise FaultError(
            f"The last checkpoint of {folder} could not be written, so that the run is not finished: make room, and "
            "the same command goes on from the checkpoint before it."
        )


def _how(cfg: DictConfig, setup: Setup) -> str:
    """On what the run computes, what ``auto`` has chosen, how large its steps are."""
    if setup.on_gpu:
        hardware = torch.cuda.get_device_name()
    else:
        num = torch.get_num_threads()
        hardware = f"the CPU with {num} thread{'s' if num > 1 else ''}"
    precision = setup.precision
    chosen = " (the fastest safe one here)" if str(cfg.trainer.precision) == "auto" else ""
    code = ", compiled blocks" if setup.compiled else ""
    where = (
        "whole batches there"
        if setup.data.augments_on_device
        else f"images in {cfg.data.num_workers or 'no'} worker processes"
    )
    rate = rate_in_words(cfg, setup.module.optimization.peak_lr)
    return (
        f"Computing on {hardware} in {precision}{' bit' * precision.isdigit()}{chosen}{code}; augmenting {where}.\n"
        f"Batch: {batch_in_words(cfg)}. Learning rate: {rate} at its peak."
    )


def _strategy(cfg: DictConfig, objective: nn.Module) -> Strategy | str:
    """DDP's ``find_unused_parameters``: a scheduled term that is skipped leaves parameters without a gradient."""
    if num_ranks(cfg) == 1:
        return "auto"
    if shares_weights(cfg):
        from harmonize.training.fsdp import FSDPStrategy  # half a second, and only here

        return FSDPStrategy()
    return DDPStrategy(find_unused_parameters=bool(getattr(objective, "scheduled", False)))


# ---- what the user sees ----------------------------------------------------------------------------------------------


def _print_table(console: Console, metrics: Mapping[str, Any], folder: Path) -> None:
    """The run in a few lines: losses, probes against the untrained network's, and where everything is."""
    table = Table(title=folder.name, title_justify="left")
    for column in ("", "trained", "untrained", "chance"):
        table.add_column(column, justify="left" if not column else "right")
    first = next((row for row in read_rows(folder / "metrics.jsonl") if "train/loss" in row), {})
    for name in ("mim", "contrastive", "supervised"):
        losses = metrics.get(f"epoch/loss_{name}"), first.get(f"train/loss_{name}"), metrics.get(f"train/chance_{name}")
        if losses[0] is not None:
            table.add_row(f"{name} loss", *("" if x is None else f"{x:.4f}" for x in losses))
    for key, label in (("knn_top1", "k-NN top-1"), ("linear_top1", "linear probe top-1")):
        accuracies = metrics.get(f"val/{key}"), metrics.get(f"untrained/{key}"), metrics.get("val/chance_top1")
        if accuracies[0] is not None:
            table.add_row(label, *("" if x is None else f"{100 * x:.1f} %" for x in accuracies))
    for key, value in metrics.items():
        if key.startswith("evaluate/") and value is not None:
            table.add_row(key.partition("/")[2].replace("/", ", "), f"{100 * value:.1f} %", "", "")
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


def _without(mapping: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}
