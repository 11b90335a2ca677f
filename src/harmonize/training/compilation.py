"""torch.compile, where it pays: one Transformer block at a time, for training steps only."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from harmonize.types import ConfigError


def transformer_blocks(*modules: nn.Module) -> list[nn.Module]:
    """The Transformer blocks of modules, those of momentum copies and decoders included."""
    return [
        block
        for module in modules
        for name, part in module.named_modules()
        if name.rpartition(".")[2] == "blocks"
        for block in part.children()
    ]


def compile_blocks(*modules: nn.Module, **options: Any) -> int:
    """Compile the Transformer blocks of modules in place, momentum copies and decoders included.

    Blocks of one kind share their compiled code, so that this takes seconds, not minutes. Parameters and their names
    stay as they are. Shapes are taken as constant: every kind of pass of a training step (queries, keys, masked
    images) is compiled in the first step, and nothing after it.

    Args:
        *modules: Where to look for blocks.
        **options: Of ``torch.compile``.

    Returns:
        How many blocks there are.
    """
    blocks = transformer_blocks(*modules)
    import torch._dynamo  # takes a second: only where it is used

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in blocks:
        block.compile(dynamic=False, **options)
    return len(blocks)


def should_compile(choice: str | bool, on_gpu: bool) -> bool:
    """Whether ``trainer.compile`` asks for compilation here; ``auto``: on a GPU, where a compiler is at hand.

    On a CPU the matrix products take most of a step, and compiling takes longer than it saves in a short run.

    Raises:
        ConfigError: It is asked for, and no compiler is at hand.
    """
    if choice is False or (choice == "auto" and not on_gpu):
        return False
    missing = _missing_tool(on_gpu)
    if missing and choice is True:
        raise ConfigError(f"trainer.compile=true needs {missing}; install it, or set trainer.compile=false.")
    return not missing


def _missing_tool(on_gpu: bool) -> str:
    if not any(map(shutil.which, ("cc", "gcc", "g++", "clang"))):
        return "a C compiler (gcc or clang)"
    if on_gpu and importlib.util.find_spec("triton") is None:
        return "the package triton"
    return ""


class Compilation(pl.Callback):
    """Compiles the blocks before the first training step and lets validation run them as they are written.

    Diagnostics look into the blocks while they run, which compiled code does not allow.
    """

    def __init__(self) -> None:
        self._compiled = False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Compile."""
        compile_blocks(module)
        self._compiled = True

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Suspend compiled code."""
        if self._compiled:
            torch.compiler.set_stance("force_eager")

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Go back to it."""
        if self._compiled:
            torch.compiler.set_stance("default")
