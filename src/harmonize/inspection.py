"""``harmonize inspect``: what a checkpoint file holds, key by key."""

from __future__ import annotations

from collections import Counter

from omegaconf import DictConfig
from rich.console import Console

from harmonize.checkpoints.keys import KeyRow
from harmonize.checkpoints.official import UNKNOWN_HEADS, interpret, kind_of
from harmonize.checkpoints.own import find_file
from harmonize.checkpoints.reading import read_file
from harmonize.networks import TIMM, load_network
from harmonize.types import ConfigError


def inspect(cfg: DictConfig) -> None:
    """Print the family, the architecture and what becomes of every key.

    Args:
        cfg: A configuration that ``check_config`` has passed.

    Raises:
        ConfigError: The file cannot be read, is of no known family, or not every key of it is explained.
    """
    checkpoint = cfg.checkpoint
    if not isinstance(checkpoint, str) or checkpoint.startswith(TIMM):
        raise ConfigError(f"checkpoint={checkpoint} must be one file or run folder.")
    console = Console(soft_wrap=True, highlight=False)
    file = read_file(find_file(checkpoint))
    lines: dict[str, str] = {"file": str(file.path)}
    if kind_of(file) == "official":
        found = interpret(file, cfg.branch, cfg.image_size, cfg.resize, cfg.num_heads, heads_needed=False)
        arguments, keys = dict(found.architecture), found.keys
        heads = f"{arguments.pop('num_heads')} (from: {found.heads_from})"
        if found.heads_from == UNKNOWN_HEADS:
            heads = "not in the file, and not published for this width: to use the encoder, give num_heads=..."
        lines |= {"family": found.family, "what": found.note, "heads": heads}
        if found.mean:
            lines["normalised by"] = f"mean {_numbers(found.mean)}, standard deviation {_numbers(found.std)}"
    else:
        loaded = load_network(checkpoint, checkpoint, cfg)
        spec, keys = loaded.spec, loaded.keys
        arguments = {
            "image_size": f"{spec.image_size[0]} x {spec.image_size[1]}",
            "patch_size": spec.patch_size,
            "width": spec.width,
            "depth": spec.depth,
            "num_heads": spec.num_heads,
        }
        lines |= {"family": loaded.family, "what": loaded.note, "trained with": loaded.objective or "unknown"}
        lines["fingerprint"] = loaded.fingerprint
    lines["architecture"] = ", ".join(f"{key} {value}" for key, value in arguments.items() if value is not None)
    for name, text in lines.items():
        console.print(f"{name:<14} {text}", markup=False)
    print("\n".join(_table(keys)))
    count = Counter(row.outcome for row in keys)
    console.print(", ".join(f"{number} {outcome}" for outcome, number in sorted(count.items(), reverse=True)))


def _table(keys: list[KeyRow]) -> list[str]:
    """Lines of a table that is as wide as it has to be: names must not be cut."""
    cells = [("key", "shape", "", "as, or why")]
    for row in keys:
        key = "/".join(filter(None, [row.entry, row.key]))
        cells.append((key, " x ".join(map(str, row.shape)), row.outcome, row.detail))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
