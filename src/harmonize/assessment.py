"""``harmonize evaluate``: one protocol on one checkpoint or several, and a row for every number."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import nn

from harmonize import __version__
from harmonize.backbones.fine_tuning import trainable_copy
from harmonize.config import evaluations, instantiate, to_plain
from harmonize.evaluation.base import Bench, T, frozen
from harmonize.evaluation.classifier import Head
from harmonize.files import digest
from harmonize.functional.distributed import rank, world_size
from harmonize.networks import (
    Loaded,
    choose_device,
    data_module,
    data_section,
    default_folder,
    load_network,
    save_fine_tuned,
    short_names,
    slug,
)
from harmonize.reports.evaluation import result_key, write_results
from harmonize.reports.published import published
from harmonize.types import ConfigError, NonFiniteLossError, Result


def evaluate_run(cfg: DictConfig, folder: Path) -> dict[str, float]:
    """Do with a trained run what ``evaluate`` of its configuration lists; what has been done already stays.

    Every rank takes part.

    Args:
        cfg: Of the run.
        folder: Its run folder, with the last checkpoint in it.

    Returns:
        The single numbers, as in ``evaluate/linear_probe/top1``.

    Raises:
        ConfigError: Network, data and a protocol do not suit each other.
    """
    own = evaluations(cfg, folder).values()
    missing = [one for one in own if not _results(one).exists()]  # before any rank writes one
    for one in missing:
        evaluate(one)
    if missing and rank() == 0:
        shutil.rmtree(folder / "evaluations" / "features", ignore_errors=True)  # of use to nobody else
    rows = [row for one in own for row in json.loads(_results(one).read_text())] if rank() == 0 else []
    return {result_key(row): row["value"] for row in rows if not row["axis"]}


def is_evaluated(cfg: DictConfig, folder: Path) -> bool:
    """Whether everything that ``evaluate`` lists has been done."""
    return all(_results(one).exists() for one in evaluations(cfg, folder).values())


def _results(cfg: DictConfig) -> Path:
    return Path(cfg.run.dir) / "results.json"


def evaluate(cfg: DictConfig) -> None:
    """Evaluate what a configuration names, and write the results.

    Args:
        cfg: A configuration that ``check_config`` has passed.

    Raises:
        ConfigError: A checkpoint cannot be read, or network, data and protocol do not suit each other.
    """
    if cfg.devices > 1 and "RANK" not in os.environ:
        _start_ranks(cfg)
        return
    with _process_group(cfg):
        try:
            _evaluate(cfg)
        except PermissionError as error:
            raise ConfigError(f"run.dir or run.root: {error.filename} cannot be written ({error.strerror}).") from error
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise ConfigError(f"run.dir or run.root: {error.strerror}; what is complete stays.") from error


def _evaluate(cfg: DictConfig) -> None:
    protocol = instantiate(cfg.eval)  # first, as it refuses impossible hyper-parameters at once
    console = Console(soft_wrap=True, highlight=False, quiet=rank() != 0)
    device = choose_device(str(cfg.accelerator))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    checkpoints = [cfg.checkpoint] if isinstance(cfg.checkpoint, str) else list(cfg.checkpoint)
    names = list(cfg.names) if cfg.names else short_names(checkpoints)
    networks = [load_network(c, n, cfg) for c, n in zip(checkpoints, names, strict=True)]
    folder = Path(cfg.run.dir).expanduser() if cfg.run.dir else default_folder(cfg, [str(cfg.run.name), *names])
    for loaded in networks:
        for warning in loaded.warnings:
            console.print(f"Warning: {warning}")
    rows: list[dict[str, Any]] = []
    for loaded in networks:
        section = data_section(cfg, networks, loaded)
        bench = _bench(cfg, section, loaded, folder, device, console)
        console.print(f"{loaded.name}: {cfg.run.name} on {loaded.details['data']} ...")
        with frozen(bench.encoder):
            results = protocol.run(bench)
        settings = _settings(cfg, section)
        rows += [_row(result, cfg, settings, loaded) for result in results]
    if rank() == 0:
        paths = write_results(folder, rows, str(cfg.run.name))
        (folder / "command.txt").write_text(shlex.join(sys.argv) + "\n")
        _print_table(rows, console)
        console.print(f"Results: {', '.join(path.name for path in paths)} in {folder}")


def _bench(
    cfg: DictConfig, section: DictConfig, loaded: Loaded, folder: Path, device: torch.device, console: Console
) -> Bench:
    dataset = instantiate(section.dataset)
    encoder = loaded.encoder.to(device)
    # Networks may differ in the number of heads alone, which no weight tells.
    network = [loaded.fingerprint, str(loaded.spec)]

    def make_data(**options: Any) -> Any:
        options = {"world_size": world_size(), "rank": rank()} | options
        return data_module(section, dataset, loaded.spec.image_size, cfg.seed, **options)

    def progress(items: Iterable[T], what: str) -> Iterable[T]:
        return track(items, f"  {what}", console=console, transient=True, disable=not console.is_terminal)

    def keep(trained: nn.Module, head: nn.Module) -> None:
        assert isinstance(head, Head)
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            save_fine_tuned(folder / f"{slug(loaded.name)}-fine_tuned.ckpt", trained, head, loaded, section)

    return Bench(
        encoder=encoder,
        make_data=make_data,
        dataset=dataset,
        device=device,
        seed=cfg.seed,
        folder=folder / "state" / digest([loaded.name, network, _settings(cfg, section), cfg.seed], 12),
        cache=Path(cfg.run.root).expanduser() / "features" / digest([network, _images(section)], 12),
        batch_size=cfg.batch_size,
        num_train=cfg.num_train,
        num_val=cfg.num_val,
        head=None if loaded.head is None else loaded.head.to(device),
        trainable=partial(trainable_copy, encoder),
        keep=keep,
        track=progress,
        say=console.print,
    )


def _images(section: DictConfig) -> dict[str, Any]:
    """What clean images depend on."""
    plain = to_plain(section)
    return {key: plain[key] for key in ("dataset", "image_size", "eval_crop")}


def _settings(cfg: DictConfig, section: DictConfig) -> str:
    """Digest of the protocol's settings and of the images."""
    return digest([to_plain(cfg.eval), _images(section), cfg.num_train, cfg.num_val], 12)


def _row(result: Result, cfg: DictConfig, settings: str, loaded: Loaded) -> dict[str, Any]:
    beside = published(str(cfg.run.name), loaded.objective, loaded.spec, result.at, result.series)
    beside = beside if result.metric == "top1" else None
    low, high = result.interval or (None, None)
    return {
        "protocol": str(cfg.run.name),
        "network": loaded.name,
        "metric": result.metric,
        "series": result.series,
        "axis": result.axis,
        "at": result.at,
        "value": result.value,
        "standard_error": result.error,
        "low": low,
        "high": high,
        "num_images": result.num_images,
        "feature": result.feature,
        "data": loaded.details["data"],
        "seed": cfg.seed,
        "checkpoint": loaded.checkpoint,
        "fingerprint": loaded.fingerprint,
        "settings": settings,
        "note": result.note,
        "published": beside.value if beside else None,
        "published_source": beside.source if beside else "",
        "harmonize": __version__,
    }


def _print_table(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """A line for each number, and for each curve one with its two ends."""
    title = "percent ± one standard error, or (95 % interval)"
    if any(row["published"] is not None for row in rows):
        title += "; [published, of another network]"
    console.print(title, markup=False)
    table = Table()
    networks = list(dict.fromkeys(row["network"] for row in rows))
    table.add_column("")
    for network in networks:
        table.add_column(network, justify="right")
    for metric, series in dict.fromkeys((row["metric"], row["series"]) for row in rows):
        of_line = [row for row in rows if (row["metric"], row["series"]) == (metric, series)]
        ends = [[row for row in of_line if row["network"] == network] for network in networks]
        first = of_line[0]
        axis = f"{first['axis']} {first['at']:.4g} ... {of_line[-1]['at']:.4g}" if first["axis"] else ""
        cells = ["" if not own else _percent(own[0]) for own in ends]
        if axis:
            cells = [
                "" if not own else " ... ".join(f"{100 * r['value']:.1f}" for r in (own[0], own[-1])) for own in ends
            ]
        table.add_row(", ".join(filter(None, [metric, series, axis])), *map(escape, cells))
    console.print(table)
    for note in dict.fromkeys(f"{row['network']}: {row['note']}" for row in rows if row["note"]):
        console.print(note)


def _percent(row: dict[str, Any]) -> str:
    if row["low"] is not None:
        return f"{100 * row['value']:.1f} ({100 * row['low']:.1f} ... {100 * row['high']:.1f})"
    error = row["standard_error"]
    beside = "" if row["published"] is None else f" [{100 * row['published']:.1f}]"
    return f"{100 * row['value']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + beside


# ---- several processes -----------------------------------------------------------------------------------------------


def _start_ranks(cfg: DictConfig) -> None:
    """One process per device on this machine; a launcher such as torchrun may start them instead."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    mistakes = context.SimpleQueue()
    arguments = (OmegaConf.to_yaml(cfg), port, sys.argv, mistakes)
    try:
        mp.spawn(_rank_main, arguments, nprocs=cfg.devices)
    except (mp.ProcessExitedException, mp.ProcessRaisedException):
        if mistakes.empty():
            raise
        kind, text = mistakes.get()
        raise (NonFiniteLossError if kind == "loss" else ConfigError)(text) from None


def _rank_main(number: int, config: str, port: int, argv: list[str], mistakes: Any) -> None:
    cfg = OmegaConf.create(config)
    assert isinstance(cfg, DictConfig)
    sys.argv = argv
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(cfg.devices)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        evaluate(cfg)
    except (ConfigError, NonFiniteLossError) as error:
        mistakes.put(("loss" if isinstance(error, NonFiniteLossError) else "config", str(error)))
        sys.exit(2)


@contextmanager
def _process_group(cfg: DictConfig) -> Iterator[None]:
    """The group of the processes that a launcher has started, where there are several."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    on_gpu = choose_device(str(cfg.accelerator)).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
