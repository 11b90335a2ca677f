"""Runs into Weights & Biases afterwards, from their own record: offline runs, and what a lost network cost."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from harmonize.arguments import Parser
from harmonize.config import load_config, to_plain
from harmonize.files import find_runs, read_json, read_rows, write_json
from harmonize.training.loggers import quiet_settings, run_id
from harmonize.types import ConfigError, FaultError

MARK = "synced.json"
"""How many rows of ``metrics.jsonl`` have been uploaded."""


def main(arguments: list[str]) -> int:
    """``harmonize sync FOLDER ... [--project P] [--entity E]``."""
    parser = Parser(prog="harmonize sync", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders of run folders")
    parser.add_argument("--project", help="instead of the run's own")
    parser.add_argument("--entity", help="instead of the run's own")
    parser.add_argument("--again", action="store_true", help="also what was uploaded before")
    options = parser.parse_args(arguments)
    folders = [run for folder in options.folders for run in find_runs(folder)]
    if not folders:
        raise ConfigError(f"{', '.join(map(str, options.folders))}: no run folder with metrics.jsonl.")
    console = Console(highlight=False, soft_wrap=True)
    for folder in folders:
        console.print(f"{folder}: {sync(folder, options.project, options.entity, options.again)} rows uploaded")
    return 0


def sync(folder: Path, project: str | None = None, entity: str | None = None, again: bool = False) -> int:
    """Upload what a run has recorded since the last time; the number of rows.

    The run keeps its id, so that what has been mirrored while it trained is gone on with, not doubled.

    Raises:
        FaultError: W&B cannot be reached.
    """
    import wandb

    config = to_plain(load_config(folder / "config.yaml"))
    logger = config.get("logger") or {}
    rows = read_rows(folder / "metrics.jsonl")
    done = 0 if again else int(read_json(folder / MARK).get("rows", 0))
    try:
        run = wandb.init(
            project=project or logger.get("project") or "harmonize",
            entity=entity or logger.get("entity"),
            name=folder.name,
            id=run_id(folder),
            dir=str(folder),
            config=config,
            resume="allow",
            # W&B itself reads the variable once in the life of a process.
            mode=os.environ.get("WANDB_MODE") or "online",  # type: ignore[arg-type]
            settings=quiet_settings(),
        )
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        mirrored = 0 if again else run.summary.get("trainer/global_step") or 0
        new = [row for row in rows[done:] if row["step"] > mirrored]
        for row in new:
            values = {key: value for key, value in row.items() if key != "step" and value is not None}
            run.log({**values, "trainer/global_step": row["step"]})
        for path in sorted((folder / "diagnostics").glob("epoch_*.png")) if new else ():
            run.log({f"pictures/{path.stem[11:] or 'curves'}": wandb.Image(str(path))})
        run.finish()
    except Exception as error:  # W&B raises many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FaultError(f"{folder}: W&B does not take it ({reason}); nothing is lost, try again later.") from error
    write_json(folder / MARK, {"rows": len(rows)})
    return len(new)
