"""What is in a checkpoint file, read without running any code that the file brings along."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from harmonize.types import ConfigError


class _PlainMapping:
    """Stands in for subclasses of dict (yacs' CfgNode, defaultdict): unpickled, they are plain ordered dicts.

    torch fills nothing but plain dicts when it loads weights only, whatever else is allowed.
    """

    def __new__(cls, *args: object) -> Any:
        """Leave out what a defaultdict is made with."""
        return OrderedDict()


class _Unread:
    """Stands in for values beside the weights that nobody needs, such as paths and numpy's numbers."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# Every class or function that a file may name beyond tensors and plain containers -> what is made of it.
_NUMPY = ("core.multiarray.scalar", "core.multiarray._reconstruct", "ndarray", "dtype")
ALLOWED: Mapping[str, Any] = {
    "argparse.Namespace": Namespace,
    "yacs.config.CfgNode": _PlainMapping,
    "collections.defaultdict": _PlainMapping,
    **{f"builtins.{kind.__name__}": kind for kind in (dict, list, int, float)},  # what a defaultdict is made with
    **{
        f"{module}.{name}": _Unread
        for module in ("pathlib", "pathlib._local")  # since Python 3.13
        for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    },
    **{f"numpy.{name}": _Unread for name in (*_NUMPY, *(n.replace("core", "_core") for n in _NUMPY))},  # numpy 1 and 2
}


@dataclass(frozen=True)
class CheckpointFile:
    """What a file holds.

    Attributes:
        name: As the user wrote it.
        path: The file.
        content: By top-level name: weights of a bare state dict, or entries such as ``state_dict`` and ``args``.
        metadata: Of a safetensors file.
        beside: What timm and Hugging Face write into JSON files beside theirs, by the name of the JSON file.
    """

    name: str
    path: Path
    content: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)

    def stated(self, *places: tuple[str, ...]) -> tuple[Any, str]:
        """The first value that is found at one of some places in the file or beside it, and that place.

        Returns:
            The value, None if there is none, and the names on the way to it, joined by dots.
        """
        for place in places:
            value: Any = {**self.content, **self.beside}
            for key in place:
                value = value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)
            if value is not None:
                return value, ".".join(place)
        return None, ""


# Only files of these names are described by the JSON files that lie beside them.
_DESCRIBED = ("model.safetensors", "pytorch_model.bin")
_DESCRIPTIONS = ("config.json", "preprocessor_config.json")


def read_file(name: str) -> CheckpointFile:
    """Read a file of ``torch.save`` (of any age) or safetensors; its tensors may still lie on the disk.

    Raises:
        ConfigError: It does not exist, is damaged, is something else, or would run code.
    """
    path = Path(name).expanduser()
    if not path.exists():
        raise ConfigError(f"checkpoint={name}: there is no such file; models of timm are written timm:NAME.")
    if path.is_dir():
        raise ConfigError(f"checkpoint={name} is a folder, not a file.")
    try:
        with path.open("rb") as opened:
            start = opened.read(4)
    except OSError as error:
        raise ConfigError(f"checkpoint={name} cannot be read ({error.strerror or error}).") from error
    if not start:
        raise ConfigError(f"checkpoint={name} is an empty file.")
    if path.suffix == ".safetensors":
        return _read_safetensors(name, path)
    content = _load(name, path, zipped=start == b"PK\x03\x04")
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"checkpoint={name} holds no weights by name, but a {type(content).__name__}.")
    return CheckpointFile(name, path, content, {}, _descriptions(name, path))


def _descriptions(name: str, path: Path) -> dict[str, Any]:
    found = {}
    for file in _DESCRIPTIONS if path.name in _DESCRIBED else ():
        if (path.parent / file).is_file():
            try:
                found[file] = json.loads((path.parent / file).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"checkpoint={name}: {file} beside it is no JSON file ({error}).") from error
    return found


def _read_safetensors(name: str, path: Path) -> CheckpointFile:
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
        content = load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"checkpoint={name} is damaged or no safetensors file ({_first_line(error)}).") from error
    return CheckpointFile(name, path, content, metadata, _descriptions(name, path))


def _load(name: str, path: Path, zipped: bool) -> Any:
    try:
        with torch.serialization.safe_globals([(value, known) for known, value in ALLOWED.items()]):
            # mapped, the optimiser's state of a large file is never read
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged or foreign file raises one of many errors
        if named := re.search(r"\bGLOBAL ([\w.]+)", str(error)):
            raise ConfigError(
                f"checkpoint={name} would run code when it is opened (it names {named.group(1)}); it is refused."
            ) from error
        raise ConfigError(
            f"checkpoint={name} is damaged or no file of torch.save or safetensors ({_first_line(error)})."
        ) from error


def _first_line(error: Exception) -> str:
    """What is wrong, short: torch's advice to load without ``weights_only`` is no help here."""
    text = str(error).partition("WeightsUnpickler error: ")[2] or str(error) or type(error).__name__
    return text.strip().splitlines()[0].rstrip(".")
