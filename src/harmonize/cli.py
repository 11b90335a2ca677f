"""The command line: ``harmonize train | evaluate | analyze | inspect | export | plan | sweep | doctor | ...``.

Hydra runs the jobs (it brings sweeps and launchers), but only after they have been composed and checked here (of a
large sweep: jobs in which every value occurs), so that a mistake costs seconds, gets one sentence, and leaves nothing
behind.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from harmonize import __version__
from harmonize.types import ConfigError, FaultError

if TYPE_CHECKING:
    from argparse import Namespace

    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

HELP = f"""\
harmonize {__version__}: contrastive learning, masked image modelling and their hybrid on one Vision Transformer.

usage: harmonize <command> [key=value ...]

commands
  train      pre-train a Vision Transformer
  evaluate   k-NN, linear probes, fine-tuning, segmentation, shape bias, robustness of a checkpoint
  analyze    look inside one checkpoint, or compare several
  inspect    say what a checkpoint file holds, key by key
  export     write a checkpoint for timm, Hugging Face, ONNX or as safetensors

  plan       what a run would do: steps, batch, learning rate, memory, time, batch script; runs nothing
  sweep      how the jobs of a sweep stand; starts those again that failed
  compare    runs or a sweep: settings that differ, results over seeds, every diagnostic; as a page, tables and figures
  report     one interactive page of runs, a sweep or a set of studies, with verdicts on claims
  doctor     what is wrong with this machine, cluster or data set, and what to do
  sync       upload finished or offline runs to Weights & Biases
  dashboard  make a workspace and a report of all runs in Weights & Biases
  shards     write a folder of images as WebDataset shards
  replay     show where a loss stopped being finite

examples
  harmonize train loss=hybrid loss.lambda=0.2       the hybrid on drawn shapes, which need no download
  harmonize train loss=mim data=folder data.root=my_images
  harmonize train -m loss.lambda=0,0.2,0.4          one run after the other
  harmonize train --help                            groups, keys and more examples
  harmonize train loss=mim --cfg job                print the configuration, run nothing
  harmonize analyze checkpoint=timm:vit_small_patch16_224
  harmonize evaluate checkpoint=outputs/hybrid-shapes-vit_tiny-1a2b3c4d eval=knn
  harmonize inspect vit-b-300ep.pth.tar
"""

TRAIN_HELP = """\
Pre-train a Vision Transformer with a contrastive loss (CL), masked image modelling (MIM) or both:
L = (1 - lambda) * L_MIM + lambda * L_CL on one shared backbone.

usage: harmonize train [key=value ...] [-m] [--cfg job]        (or: python train.py ...)

groups: choose a file with group=name (* is chosen)
{groups}

keys: set any value with key=value
  seed                   everything random is a function of it
  run.dir, run.root      the run folder, or where run folders lie; the same command resumes its own run
  run.fresh              true: start anew instead
  loss.lambda            weight of the contrastive loss in the hybrid, 0 to 1, or a schedule:
                         "loss.lambda={{schedule: linear, start: 0, end: 1}}"
  loss.temperature       of the contrastive loss (loss.contrastive.temperature in the hybrid)
  loss.mask_ratio        share of the image that is masked (loss.mim.mask_ratio in the hybrid)
  loss.mask_unit         side of a masked block in px, null: two patches (loss.mim.mask_unit in the hybrid)
  backbone.patch_size    side of a patch in px
  data.root              where the images are; also data.image_size (px), data.num_train, data.num_val
  data.batch_size        over all devices and micro-batches
  optimizer.lr           per optimizer.lr_batch images; also optimizer.weight_decay, schedule.warmup
  trainer.max_epochs     or trainer.max_steps; also trainer.devices, trainer.precision, trainer.accumulate
  diagnostics.NAME       one diagnostic; null leaves it out, and diagnostics=none all

examples
  harmonize train loss=hybrid loss.lambda=0.2
  harmonize train loss=mim data=folder data.root=my_images data.image_size=96 backbone=vit_small
  harmonize train loss=hybrid loss@loss.mim=mae trainer.max_epochs=50 logger=csv
  harmonize train -m loss.lambda=0,0.2,0.4,0.6,0.8,1
  harmonize train experiment=demo
"""

ANALYZE_HELP = """\
Look inside a network, layer by layer, or compare several; the untrained network is shown beside them.

usage: harmonize analyze checkpoint=... [key=value ...] [-m] [--cfg job]        (or: python analyze.py ...)

groups: choose a file with group=name (* is chosen)
{groups}

keys: set any value with key=value
  checkpoint             a run folder or checkpoint file, ours or another project's, timm:NAME, or a list [A,B]
  names                  what to call them, as in names=[CL,MIM]
  num_images             how many images are looked at; also batch_size, and image_size in px (null: the network's own)
  data.root              where the images are; like every key of data after data=NAME. Without a choice of data:
                         those that the (first) checkpoint was trained on, else shapes
  diagnostics.NAME       one diagnostic; null leaves it out, and diagnostics=none all
  branch                 of files with two networks: base, momentum, student or teacher
  num_heads              attention heads, for files that do not say how many
  resize                 how positions are resampled for another image size: mae, timm or dino
  untrained              false: without the untrained network
  tsne                   false: without the t-SNE maps
  accelerator            auto, cpu or gpu
  run.dir, run.root      the folder for the results, or where such folders lie
  seed                   everything random is a function of it

examples
  harmonize analyze checkpoint=outputs/hybrid-shapes-vit_tiny-1a2b3c4d
  harmonize analyze checkpoint=timm:vit_small_patch16_224 data=openclipart
  harmonize analyze checkpoint=[A,B] names=[CL,MIM] num_images=256
  harmonize analyze checkpoint=A diagnostics.cka=null
  harmonize analyze -m checkpoint=A,B
"""

EVALUATE_HELP = """\
Evaluate a checkpoint, ours or another project's, or several side by side: one protocol, a row for every number.

usage: harmonize evaluate checkpoint=... [eval=NAME] [key=value ...] [-m] [--cfg job]   (or: python evaluate.py ...)

groups: choose a file with group=name (* is chosen)
{groups}

keys: set any value with key=value
  checkpoint             a run folder or checkpoint file, timm:NAME, or a list [A,B]
  names                  what to call them, as in names=[CL,MIM]
  eval.KEY               a hyper-parameter of the protocol: harmonize evaluate eval=NAME --cfg job lists them
  data.root              where the images are; like every key of data after data=NAME. Without a choice of data:
                         those that the (first) checkpoint was trained on, else shapes
  num_train, num_val     at most so many labelled images to fit on, to score on
  branch, num_heads      for files with two networks, and for files that do not say how many attention heads
  image_size, resize     another image size in px, and how positions are resampled for it
  batch_size             images at a time through the frozen encoder
  devices, accelerator   how many processes share the work; auto, cpu or gpu
  run.dir, run.root      the folder for the results, or where such folders and the cache of features lie
  seed                   everything random is a function of it

examples
  harmonize evaluate checkpoint=outputs/hybrid-shapes-vit_tiny-1a2b3c4d eval=linear_probe
  harmonize evaluate checkpoint=vit-b-300ep.pth.tar eval=linear_probe_moco_v3 data=imagenet data.root=/data/imagenet
  harmonize evaluate checkpoint=[A,B] names=[CL,MIM] eval=layer_probe
  harmonize evaluate -m checkpoint=A eval=knn,linear_probe_grid,frequency_noise
"""

INSPECT_HELP = """\
Say what a checkpoint file holds: whose it is, the architecture, and what becomes of every key. Runs no code in it.

usage: harmonize inspect PATH [key=value ...]

keys
  branch                 of files with two networks: auto, base, momentum, student or teacher
  num_heads              attention heads, where the file does not say

examples
  harmonize inspect vit-b-300ep.pth.tar
  harmonize inspect vit-b-300ep.pth.tar branch=momentum
"""

EXPORT_HELP = """\
Write the encoder of a checkpoint for other software; its features are compared before anything is kept.

usage: harmonize export checkpoint=... format=timm|hf|safetensors|onnx [key=value ...]

keys
  checkpoint             a run folder or checkpoint file, ours or another project's
  format                 timm or hf (a folder that timm and its hub read), safetensors (one file), onnx
  name                   of the model; null: that of the run folder or file
  licence                of the weights, for the model card
  branch, num_heads, image_size, resize   as for harmonize evaluate
  run.dir, run.root      the folder to write, or where such folders lie

examples
  harmonize export checkpoint=outputs/hybrid-shapes-vit_tiny-1a2b3c4d format=timm
  harmonize export checkpoint=vit-b-300ep.pth.tar format=onnx
"""

OPTIONS_HELP = """
options
  --cfg job              print the whole configuration and run nothing (--resolve: with derived values)
  -m, --multirun         run every combination of comma-separated values
  --config-dir DIR       also look for YAML files in DIR, which has the folders of conf/
  -sc install=bash       tab completion (also fish, zsh)
  --hydra-help           what else Hydra can do
"""


@dataclass(frozen=True)
class Command:
    """A command of the command line, whose configuration is ``conf/<name>.yaml``.

    Attributes:
        name: As it is typed; also its key in the tables of ``rules.py``.
        help: The text of ``--help``, with ``{groups}`` where the groups are listed.
        work: What it does with a checked configuration; imports what it needs.
        interrupted: What the user can count on after Ctrl-C.
        argument: The key that an argument without a key is the value of; None: there is none.
        sweeps: Whether ``-m`` makes sense.
    """

    name: str
    help: str
    work: Callable[[DictConfig], None]
    interrupted: str
    argument: str | None = None
    sweeps: bool = True


def _train(cfg: DictConfig) -> None:
    from harmonize.training.run import train

    train(cfg)


def _analyze(cfg: DictConfig) -> None:
    from harmonize.analysis import analyze

    analyze(cfg)


def _evaluate(cfg: DictConfig) -> None:
    from harmonize.assessment import evaluate

    evaluate(cfg)


def _inspect(cfg: DictConfig) -> None:
    from harmonize.inspection import inspect

    inspect(cfg)


def _export(cfg: DictConfig) -> None:
    from harmonize.exporting import export

    export(cfg)


COMMANDS = {
    command.name: command
    for command in (
        Command("train", TRAIN_HELP, _train, "the same command resumes from the last checkpoint"),
        Command("analyze", ANALYZE_HELP, _analyze, "the same command starts again"),
        Command("evaluate", EVALUATE_HELP, _evaluate, "the same command goes on where it stopped"),
        Command("inspect", INSPECT_HELP, _inspect, "nothing is written", argument="checkpoint", sweeps=False),
        Command("export", EXPORT_HELP, _export, "nothing is kept", sweeps=False),
    )
}

# Commands with options of their own, whose module's ``main`` takes what follows and returns the exit code.
TOOLS = {
    "plan": "harmonize.plan",
    "sweep": "harmonize.sweeps",
    "compare": "harmonize.comparison",
    "report": "harmonize.reporting",
    "doctor": "harmonize.doctor",
    "sync": "harmonize.syncing",
    "dashboard": "harmonize.dashboard",
    "shards": "harmonize.sharding",
    "replay": "harmonize.replay",
}

# Above this number not every job of a sweep is composed beforehand, but jobs in which every value occurs.
MAX_CHECKED = 24
LOCAL_LAUNCHERS = ("BasicLauncher", "JoblibLauncher", "LocalLauncher")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        The exit code: 0, 1 after a loss that is not finite and 2 after a mistake of the user (one sentence on stderr
        each), 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return run(arguments)
    except (ConfigError, FaultError) as error:  # of a sweep; a single run has reported its own
        report(error)
        return 2 if isinstance(error, ConfigError) else 1
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        command = COMMANDS.get(arguments[0] if arguments else "")
        print(f"harmonize: interrupted{f'; {command.interrupted}' if command else ''}.", file=sys.stderr)
        return 130


def report(error: Exception) -> None:
    """Print a mistake, one line per sentence."""
    for line in str(error).splitlines():
        print(f"harmonize: error: {line}", file=sys.stderr)


def run(arguments: list[str]) -> int:
    """Hand over to the command that the first argument names."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    name, *rest = arguments
    if name in ("-V", "--version"):
        print(f"harmonize {__version__}")
        return 0
    if name in ("-sc", "--shell-completion"):  # what a shell types behind the user's back, whatever the command is
        typed = os.environ.get("COMP_LINE", "").split()[1:2]
        return start(COMMANDS[typed[0] if typed and typed[0] in COMMANDS else "train"], arguments)
    if name in TOOLS:
        return int(importlib.import_module(TOOLS[name]).main(rest))
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, [*COMMANDS, *TOOLS], 1)
        hint = f"harmonize {near[0]}" if near else f"harmonize train {name}" if "=" in name else "harmonize --help"
        raise ConfigError(f"Unknown command {name}; did you mean: {hint}")
    command = COMMANDS[name]
    return start(command, [_with_key(argument, command) for argument in rest])


def _with_key(argument: str, command: Command) -> str:
    """An argument as ``key=value``, where the command has a key for arguments without one.

    >>> _with_key("a b.pth", COMMANDS["inspect"]), _with_key("seed=1", COMMANDS["inspect"])
    ("checkpoint='a b.pth'", 'seed=1')
    """
    is_setting = argument.startswith("-") or re.match(r"[+~]*[\w.@/]+=", argument)
    if command.argument is None or (is_setting and not os.path.exists(argument)):
        return argument
    quoted = argument.replace("\\", "\\\\").replace("'", "\\'")
    return f"{command.argument}='{quoted}'"


def start(command: Command, arguments: list[str]) -> int:
    """Check every job, then let Hydra run them."""
    from hydra._internal.utils import _run_hydra, get_args_parser

    from harmonize import config

    parser = get_args_parser()
    parser.error = partial(_refuse, command.name)  # type: ignore[method-assign]
    options = parser.parse_intermixed_args(arguments)
    _check_options(options, command.name)
    if options.shell_completion:  # Hydra expects settings right after the program's name
        line = os.environ.get("COMP_LINE", "")
        os.environ["COMP_LINE"] = re.sub(rf"^(\S+)\s+{command.name}\b", r"\1", line)
    else:
        jobs, hydra, multirun = _jobs(options, command.name)
        if multirun and not command.sweeps:
            raise ConfigError(f"harmonize {command.name} takes one checkpoint at a time; -m is not possible.")
        if options.help:
            print(command.help.format(groups=_groups(hydra.runtime.choices, command.name)) + OPTIONS_HELP, end="")
            return 0
        if not (options.hydra_help or options.cfg or options.info):
            launcher = str(hydra.launcher.get("_target_", ""))
            _check(jobs, launcher, multirun, command.name)
            if multirun and _is_ours(launcher) and not _sets(options.overrides, "hydra.sweep.dir"):
                options.overrides.append(f"hydra.sweep.dir='{_sweep_folder(jobs)}'")
    # Hydra prints errors in its own, shortened way and exits with 1; with this it raises them.
    with _environment(HYDRA_FULL_ERROR="1"):
        _run_hydra(
            args=options, args_parser=parser, task_function=job, config_path=str(config.CONF), config_name=command.name
        )
    return 0


def job(cfg: DictConfig) -> None:
    """One run, as Hydra or a launcher calls it, on the machine that does the work."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from harmonize import config

    hydra = HydraConfig.get()
    command = COMMANDS[str(hydra.job.config_name)]
    cfg = config.finish(cfg, hydra)
    is_sweep = hydra.mode == RunMode.MULTIRUN
    try:
        if is_sweep:
            print(f"harmonize: job {hydra.job.num}: {' '.join(hydra.overrides.task)}", flush=True)
            config.check_config(cfg, command=command.name)  # a launcher may have brought it to another machine
        command.work(cfg)
    except (ConfigError, FaultError) as error:
        if is_sweep:
            raise  # Hydra says which job, and lets the others run
        report(error)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from error


def _refuse(command: str, message: str) -> NoReturn:
    sentence = f"{message[0].upper()}{message[1:]}"
    raise ConfigError(f"{sentence}; settings are written key=value, see harmonize {command} --help.")


def _check_options(options: Namespace, command: str) -> None:
    """Refuse what does not go together, and turn ``--config-dir`` into Hydra's search path."""
    if options.config_path or options.config_name or options.experimental_rerun:
        raise ConfigError(
            f"harmonize {command} has one primary configuration; add files of your own with --config-dir DIR."
        )
    modes = options.run + options.multirun + options.shell_completion + bool(options.cfg) + bool(options.info)
    if modes > 1:
        raise ConfigError("Only one of --run, --multirun, --cfg, --info and --shell-completion can be given.")
    if options.resolve and not options.cfg:
        raise ConfigError("--resolve goes with --cfg job.")
    if options.config_dir:
        folder = os.path.abspath(options.config_dir)
        if not os.path.isdir(folder):
            raise ConfigError(f"--config-dir {options.config_dir}: there is no such folder.")
        quoted = f"file://{folder}".replace("\\", "\\\\").replace("'", "\\'")
        options.overrides.append(f"hydra.searchpath=['{quoted}']")
        options.config_dir = None


def _groups(choices: Mapping[str, str], command: str) -> str:
    from harmonize import config

    with config.composer(command) as conf:
        return "\n".join(
            f"  {group:<11} {', '.join(f'{n}*' if n == choices.get(group) else n for n in names)}"
            for group, names in conf.groups().items()
        )


def _jobs(options: Namespace, command: str) -> tuple[list[DictConfig], DictConfig, bool]:
    """The configurations that Hydra is going to run (of a large sweep: a part with every value in it)."""
    from hydra.types import RunMode

    from harmonize import config

    with config.composer(command) as conf:
        options.overrides = conf.without_null(options.overrides)
        parsed = conf.parse(options.overrides)
        swept = {o.key_or_group for o in parsed if o.is_sweep_override()}
        waiting = [o for o in parsed if o.is_sweep_override() or _depends(o, swept)]
        first = conf.load([o.input_line or "" for o in parsed if o not in waiting])
        hydra = first.hydra
        if not (options.multirun or hydra.mode == RunMode.MULTIRUN):
            return [config.finish(conf.load(options.overrides) if waiting else first)], hydra, False
        # Hydra composes the fixed values once before the sweep, without what they depend on: hand them over as values
        # of a sweep of length one.
        options.overrides = [_as_sweep(o) if _depends(o, swept) else o.input_line or "" for o in parsed]
        try:
            jobs = [config.finish(conf.load(overrides)) for overrides in _combinations(conf.axes(parsed, first))]
        except NotImplementedError:  # a sweeper other than Hydra's own decides later what it runs
            jobs = [config.finish(first)]
        return jobs, hydra, True


def _is_ours(launcher: str) -> bool:
    """Whether a launcher gives every job a process of its own."""
    return launcher.startswith("hydra_plugins.harmonize_launchers.")


def _sets(overrides: Sequence[str], key: str) -> bool:
    return any(o.lstrip("+").startswith(f"{key}=") for o in overrides)


def _sweep_folder(jobs: Sequence[DictConfig]) -> str:
    """Where the sweep's own files go, a function of its run folders: the same command finds its sweep again."""
    from harmonize import config
    from harmonize.files import digest

    folders = sorted(str(config.run_dir(cfg)) for cfg in jobs)
    folder = os.path.join(os.path.expanduser(jobs[0].run.root), "sweeps", digest(folders, 8))
    return folder.replace("\\", "\\\\").replace("'", "\\'")


def _depends(override: Override, swept: set[str]) -> bool:
    """Whether a fixed value can only be set once a swept file is chosen: ``loss.mask_ratio=0.5 loss=mim,mae``."""
    section = override.key_or_group.partition(".")[0]
    if override.is_sweep_override() or override.is_delete() or section in ("run", "hydra"):
        return False
    return "experiment" in swept or (section in swept and section != override.key_or_group)


def _as_sweep(override: Override) -> str:
    key, _, value = (override.input_line or "").partition("=")
    return f"{key}=choice({value})"


def _combinations(axes: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """The overrides of each job of a sweep, or, of a large one, of jobs in which every value occurs."""
    count = 1
    for axis in axes:
        count *= len(axis)
    if count <= MAX_CHECKED:
        yield from map(list, itertools.product(*axes))
    else:
        longest = min(MAX_CHECKED, max(map(len, axes)))
        yield from ([axis[i % len(axis)] for axis in axes] for i in range(longest))


def _check(jobs: Sequence[DictConfig], launcher: str, multirun: bool, command: str) -> None:
    """Everything that can be known before the first job starts."""
    from harmonize import config

    local = not multirun or launcher.rpartition(".")[2] in LOCAL_LAUNCHERS
    problems: dict[str, None] = {}
    for cfg in jobs:
        try:
            config.check_config(cfg, machine=local, command=command)
        except ConfigError as error:
            problems.update(dict.fromkeys(str(error).splitlines()))
    if problems:
        raise ConfigError("\n".join(problems))
    if not multirun:
        return
    if local and not _is_ours(launcher) and any("trainer" in cfg and cfg.trainer.devices > 1 for cfg in jobs):
        raise ConfigError(
            "trainer.devices above 1 cannot be combined with -m and this launcher, because jobs would restart the "
            "sweep: use hydra/launcher=local or hydra/launcher=slurm, which start a process for every job."
        )
    folders = [config.run_dir(cfg) for cfg in jobs]
    if len(set(folders)) < len(folders):
        shared = next(f for f in folders if folders.count(f) > 1)
        raise ConfigError(
            f"Several jobs of the sweep would share the run folder {shared}: set run.root instead of run.dir, and "
            "sweep over keys that change the result."
        )


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before: Mapping[str, str | None] = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


if __name__ == "__main__":
    sys.exit(main())
