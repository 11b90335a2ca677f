"""How long a user waits: for help, for the answer to a mistake, for the first training step, for a checkpoint.

    python -m benchmarks.startup --json startup.json      # some minutes
    python -m benchmarks.startup --quick

Commands are fresh processes. Their ``peer`` is ``python -c "import torch"``, their ``limit`` a Python that does
nothing; for the first step they are importing the libraries that training needs, and importing torch. Each command runs
once before the rounds, so that files are in the system's memory and compiled, and images rendered. Checkpoints are
those of a hybrid run with the state of its optimiser: saved against ``torch.save`` (which does not wait for the disk;
ours does) and writing as many bytes and waiting for the disk; loaded, the encoder built and checked, against
``torch.load`` and reading as many bytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.common import ROOT, Report, Row, interleave, own_cache, parser, quietly, row
from harmonize.config import compose
from harmonize.files import read_rows
from harmonize.networks import load_network
from harmonize.training.callbacks.checkpoint import AtomicCheckpointIO
from harmonize.training.run import train

GOAL = 1.0  # answers come no later than torch could have been imported
LIBRARIES = "import torch, torchvision, timm, lightning.pytorch, torchmetrics, hydra"
TINY = [
    *("loss=hybrid", "data=shapes", "data.image_size=32", "data.batch_size=16", "data.num_train=64", "data.num_val=16"),
    *("data.num_workers=0", "logger=csv", "diagnostics=none", "callbacks.probe=null", "trainer.accelerator=cpu"),
    *("trainer.max_steps=1", "trainer.sanity=false"),
]


def python(*words: str, fails: bool = False) -> Callable[[], None]:
    """A command that runs to its end; a mistake must be answered, so ``fails`` says how it ends."""

    def run() -> None:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        if (done.returncode != 0) != fails:
            raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-500:]}")

    return run


def until_first_step(folder: Path, settings: Sequence[str]) -> Callable[[], None]:
    """Training until its first step is on record; what follows (a checkpoint, tables) is not waited for in the time."""

    def run() -> None:
        place = folder / str(len(os.listdir(folder)))
        command = [sys.executable, "train.py", *settings, f"run.dir={place}"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while not any("train/loss" in found for found in read_rows(place / "metrics.jsonl")):
                if process.poll() not in (None, 0):
                    raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
                time.sleep(0.005)
            process.kill()

    return run


def commands(folder: Path, settings: Sequence[str], rounds: int, warm: bool) -> list[Row]:
    """Rows of what a user types."""
    (folder / "runs").mkdir()
    answers = {
        "train.py --help": python("train.py", "--help"),
        "a typo: loss.lamda=0.2": python("train.py", "loss.lamda=0.2", fails=True),
        "a value: loss.lambda=2": python("train.py", "loss.lambda=2", fails=True),
    }
    missing = "a folder that is not there"
    others = {
        missing: python("train.py", "data=folder", f"data.root={folder / 'no'}", fails=True),
        "first training step": until_first_step(folder / "runs", settings),
        "libraries": python("-c", LIBRARIES),
        "torch": python("-c", "import torch"),
        "nothing": python("-c", "pass"),
    }
    times = interleave(answers | others, rounds, warm=warm)
    rows = [row(name, times[name], times["torch"], times["nothing"], GOAL) for name in answers]
    rows.append(row(missing, times[missing], times["torch"], times["nothing"]))
    return [*rows, row("first training step", times["first training step"], times["libraries"], times["torch"])]


def checkpoints(folder: Path, settings: Sequence[str], rounds: int) -> list[Row]:
    """Rows of saving and loading."""
    cfg = compose([*settings, f"run.dir={folder / 'run'}"])
    with quietly():
        train(cfg)
    source, ours, theirs, raw = (folder / name for name in ("run/checkpoints/last.ckpt", "ours", "theirs", "raw"))
    checkpoint = torch.load(source, weights_only=True)
    content = source.read_bytes()
    reading = compose([f"checkpoint={source}"], "analyze")

    def write() -> None:
        with raw.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    times = interleave(
        {
            "save": lambda: AtomicCheckpointIO().save_checkpoint(checkpoint, ours),
            "torch.save": lambda: torch.save(checkpoint, theirs),
            "write": write,
            "load": lambda: load_network(str(source), "x", reading),
            "torch.load": lambda: torch.load(theirs, weights_only=True),
            "read": raw.read_bytes,
        },
        rounds,
    )
    size = {"MiB": len(content) / 2**20}
    return [
        row("checkpoint save", times["save"], times["torch.save"], times["write"], **size),
        row("checkpoint load", times["load"], times["torch.load"], times["read"], **size),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    options = parser(__doc__, rounds=7).parse_args(arguments)
    if options.quick:
        options.rounds = 1
    backbone = "vit_tiny" if options.quick else "vit_small"
    settings = [*TINY, "scale.hidden_dim=64"] if options.quick else TINY
    report = Report(options)
    with TemporaryDirectory() as folder, own_cache():
        report.add("Waiting for an answer", commands(Path(folder), settings, options.rounds, not options.quick))
        found = checkpoints(Path(folder), [*settings, f"backbone={backbone}"], options.rounds)
        report.add(f"Checkpoints, {backbone}", found)


if __name__ == "__main__":
    main()
