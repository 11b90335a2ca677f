"""Who may import whom (docs/README.md, "Layers"): read from the syntax trees, so that lazy imports count as well."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "harmonize"

ANYTHING = {"*"}
TENSORS = {"torch", "einops"}
# Part (a folder or a module of the package) -> the parts and the third-party packages that it may import.
MAY_IMPORT = {
    "__init__": set(),
    "__main__": {"cli"},
    "functional": TENSORS,
    "types": {"torch"},
    "files": set(),
    "clock": set(),
    "arguments": {"types"},
    "memory": set(),
    "rules": {"types"},
    "backbones": {"types", "functional", "timm", "huggingface_hub"} | TENSORS,
    "objectives": {"types", "functional"} | TENSORS,
    "diagnostics": {"types", "functional", "memory", "torchmetrics", "sklearn"} | TENSORS,
    "data": {"types", "functional", "torchvision", "numpy", "PIL", "rich", "timm"} | TENSORS,
    "evaluation": {"types", "files", "functional", "data", "safetensors"} | TENSORS,
    "checkpoints": {"types", "files", "functional", "backbones", "safetensors", "onnx", "onnxruntime"} | TENSORS,
    "reports": {"types", "files", "torch", "matplotlib", "plotly"},
    "sharding": {"arguments", "types", "files", "functional", "data", "torch", "numpy", "rich"},
    "checks": ANYTHING,
    "doctor": ANYTHING,
    "training": ANYTHING,
    "analysis": ANYTHING,
    "networks": ANYTHING,
    "assessment": ANYTHING,
    "inspection": ANYTHING,
    "exporting": ANYTHING,
    "plan": ANYTHING,
    "replay": ANYTHING,
    "sweeps": {"arguments", "clock", "config", "files", "slurm", "types", "omegaconf", "rich", "torch"},
    "slurm": {"config", "sweeps", "types", "omegaconf", "submitit"},
    "comparison": {"arguments", "config", "files", "reports", "rules", "sweeps", "types", "rich"},
    "claims": {"reports", "types", "scipy"},
    "reporting": {"arguments", "claims", "comparison", "config", "files", "reports", "types", "omegaconf", "rich"},
    "syncing": {"arguments", "config", "files", "training", "types", "rich", "wandb"},
    "dashboard": ANYTHING,
    "config": ANYTHING,
    "cli": ANYTHING,
}
# Name -> the only places that may import it: a folder, or one file.
ONLY_IN = {
    # The official fine-tuning recipes are defined by timm's RandAugment and RandomErasing; torchvision's differ.
    "timm": ["backbones/", "data/supervised.py"],
    "lightning": ["training/"],
    "hydra": ["config.py", "cli.py"],
    "omegaconf": [
        "config.py",
        "cli.py",
        "checks/",
        "training/run.py",
        "analysis.py",
        "networks.py",
        "assessment.py",
        "inspection.py",
        "exporting.py",
        "plan.py",
        "dashboard.py",
        "replay.py",
        "reporting.py",
        "sweeps.py",
        "slurm.py",
        "training/setup.py",
        "training/run_folder.py",
    ],
    "submitit": ["slurm.py"],
    "cli": ["__main__.py"],
}


def imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports; relative names are made absolute."""
    package = ["harmonize", *path.relative_to(root).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from harmonize import data` names a part; `from harmonize import __version__` the package itself.
            yield from ((node.lineno, f"{module}.{a.name}" if module == "harmonize" else module) for a in node.names)


def offences(root: Path) -> list[str]:
    """Every import below ``root`` that a rule forbids, as ``file:line: reason``."""
    found = []
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root).as_posix()
        part = file.split("/")[0].removesuffix(".py")
        allowed = MAY_IMPORT.get(part)
        if allowed is None:
            found.append(f"{file}:1: the part {part!r} has no rule; give it one in {Path(__file__).name}")
            continue
        for line, name in imports(path, root):
            top, *rest = name.split(".")
            if top in sys.stdlib_module_names or name in {"harmonize.__version__", "typing_extensions"}:
                continue
            target = rest[0] if top == "harmonize" and rest else top
            if target == part and top == "harmonize":
                continue
            places = ONLY_IN.get(target)
            if places is not None and not any(file == place or file.startswith(place) for place in places):
                found.append(f"{file}:{line}: imports {name}; only {', '.join(places)} may")
            elif "*" not in allowed and target not in allowed:
                may = ", ".join(sorted(allowed)) or "nothing"
                found.append(f"{file}:{line}: imports {name}; {part} may import {may}")
    return found


def test_every_import_is_allowed():
    found = offences(SOURCE)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("file", "line", "name"),
    [
        ("functional/loss.py", "from harmonize.types import Batch", "harmonize.types"),
        ("functional/loss.py", "import numpy as np", "numpy"),
        ("objectives/mim.py", "from ..training.optim import learning_rate", "harmonize.training.optim"),
        ("objectives/mim.py", "def f():\n    from harmonize import data", "harmonize.data"),
        ("objectives/other.py", "import timm.layers", "timm.layers"),
        ("evaluation/probe.py", "import lightning.pytorch as pl", "lightning.pytorch"),
        ("training/module.py", "import hydra", "hydra"),
        ("training/module.py", "from omegaconf import OmegaConf", "omegaconf"),
        ("training/run.py", "from harmonize.cli import main", "harmonize.cli"),
    ],
)
def test_a_forbidden_import_is_named(tmp_path, file, line, name):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    (found,) = offences(tmp_path)
    assert found.startswith(f"{file}:{line.count(chr(10)) + 1}: imports {name};")


def test_allowed_imports_pass(tmp_path):
    lines = ["import math", "import torch", "from . import masks", "from harmonize.types import Batch"]
    (tmp_path / "objectives").mkdir()
    (tmp_path / "objectives" / "mim.py").write_text("\n".join(lines))
    assert offences(tmp_path) == []


def test_a_typo_need_not_wait_for_the_heavy_packages():
    """``python train.py typo=1`` answers within seconds because these load only when a run starts."""
    heavy = ["torch", "lightning", "timm", "torchvision", "wandb", "matplotlib"]
    code = f"import sys, harmonize.cli, harmonize.config; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert loaded.strip() == "[]"
