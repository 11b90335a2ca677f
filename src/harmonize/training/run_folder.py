"""What a run folder holds: the checkpoint to go on from, the configuration, the command, the versions.

Every reason for which a run cannot go on in a folder is found before anything in it is written.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import nn

from harmonize.config import changed_keys, load_config, save_config
from harmonize.files import read_json, write_json
from harmonize.functional.weight_decay import is_excluded
from harmonize.training.module import PretrainModule
from harmonize.training.optim import trained_parameters
from harmonize.training.setup import batch_in_words
from harmonize.types import ConfigError

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
        num_rows: Rows of ``metrics.jsonl`` when it was saved; None: it does not say.
        validation_due: Whether the validation of its epoch is still to come.
    """

    path: Path
    step: int
    shapes: dict[str, tuple[int, ...]]
    groups: list[int]
    no_decay: list[str]
    num_rows: int | None = None
    validation_due: bool = False


def find_checkpoint(folder: Path) -> Resume | None:
    """The checkpoint that a run goes on from: ``last.ckpt``, or with a warning an earlier one if that cannot be read.

    Raises:
        ConfigError: There are checkpoints, and none can be read.
    """
    unreadable = []
    for name in ("last.ckpt", "previous.ckpt", "best.ckpt"):
        path = folder / "checkpoints" / name
        if not path.exists():
            continue
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            shapes = {key: tuple(value.shape) for key, value in checkpoint["state_dict"].items()}
            groups = [len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"]]
            no_decay = checkpoint["config"]["optimizer"].get("no_decay", [])
            more = {key: checkpoint[key] for key in ("num_rows", "validation_due") if key in checkpoint}
            resume = Resume(path, checkpoint["global_step"], shapes, groups, no_decay, **more)
        except Exception:  # a damaged file raises one of many errors, depending on where it is damaged
            unreadable.append(name)
            continue
        if unreadable:
            names = f"{' and '.join(unreadable)} {'is' if len(unreadable) == 1 else 'are'}"
            warnings.warn(f"{names} damaged; going on from {name}, of step {resume.step}.", stacklevel=1)
        return resume
    if unreadable:
        raise ConfigError(
            f"run.dir={folder} holds no readable checkpoint ({' and '.join(unreadable)} damaged); "
            "run.fresh=true starts anew."
        )
    return None


def same_architecture(resume: Resume, module: nn.Module, folder: Path) -> None:
    """Refuse a checkpoint whose tensors are not the module's.

    Raises:
        ConfigError: Names the first tensor that differs.
    """
    own = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    for key in [*own, *(key for key in resume.shapes if key not in own)]:
        if own.get(key) != resume.shapes.get(key):
            there, here = (shapes.get(key, "absent") for shapes in (resume.shapes, own))
            raise _another_architecture(folder, key, there, here)


def same_groups(resume: Resume, module: PretrainModule, folder: Path) -> None:
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


def note_changes(folder: Path, cfg: DictConfig, console: Console) -> None:
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
    try:
        before, now = batch_in_words(load_config(folder / "config.yaml")), batch_in_words(cfg)
    except Exception:  # see _changes
        return
    if before != now:
        console.print(f"Batch: {now}; before: {before}.")


def _changes(folder: Path, cfg: DictConfig) -> dict[str, tuple[Any, Any]] | None:
    """What differs from the configuration in the run folder; None where there is none that can be read."""
    try:
        stored = load_config(folder / "config.yaml")
        return changed_keys(stored, cfg) if "backbone" in stored else None
    except Exception:  # a damaged file raises one of many errors, depending on where it is damaged
        return None


def move_aside(folder: Path, console: Console) -> None:
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


def write_run_folder(folder: Path, cfg: DictConfig) -> None:
    """config.yaml, command.txt and versions.json."""
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


def finished(folder: Path, cfg: DictConfig) -> dict[str, Any] | None:
    """The metrics of a run that has reached its end with this very configuration."""
    metrics = read_json(folder / "metrics.json")
    done = {"step", "total_steps"} <= metrics.keys() and metrics["step"] >= metrics["total_steps"]
    return metrics if done and _changes(folder, cfg) == {} and (folder / "checkpoints" / "last.ckpt").exists() else None
