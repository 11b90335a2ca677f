"""Where metrics go: JSON lines in the run folder always, Weights & Biases as a mirror that may fail."""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from harmonize.files import finite, read_rows, write_json


def record(trainer: pl.Trainer, metrics: Mapping[str, float], step: int | None = None) -> None:
    """Hand metrics to every logger; ``step`` counts finished optimiser steps (default: now)."""
    step = trainer.global_step if step is None else step
    for logger in trainer.loggers if metrics else ():
        logger.log_metrics(dict(metrics), step)


class JsonLogger(Logger):
    """The run folder's own record.

    ``metrics.jsonl`` holds one object per row. A resumed run drops the rows beyond its checkpoint, so that the file
    reads as if it had never been interrupted. ``metrics.json`` holds the final values and is there only when the run is
    complete. A row that cannot be written (a full disk) costs a warning, not the run.

    Args:
        folder: The run folder.
        resume_step: Optimiser step of the checkpoint that the run resumes from; 0: all rows are dropped.
        resume_rows: Rows that had been written when it was saved; None: not known, all up to its step are kept.

    Attributes:
        num_rows: Rows in the file.
        latest: The latest value of every metric, and ``step``.
        now: What has been logged at the latest step.
    """

    def __init__(self, folder: Path, resume_step: int = 0, resume_rows: int | None = None) -> None:
        super().__init__()
        self.folder = folder
        self.num_rows = 0
        self.latest: dict[str, Any] = {}
        self.now: dict[str, Any] = {}
        self.rows = folder / "metrics.jsonl"
        self._failed = self._torn = False
        self._rewind(resume_step, resume_rows)

    @rank_zero_only
    def _rewind(self, step: int, num_rows: int | None) -> None:
        (self.folder / "metrics.json").unlink(missing_ok=True)
        kept = [row for row in read_rows(self.rows)[:num_rows] if 0 < step >= row["step"]]
        self.num_rows = len(kept)
        temporary = self.rows.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, self.rows)
        for row in kept:
            self.latest.update(row)

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "json"

    @property
    def version(self) -> str:
        """The run folder's name."""
        return self.folder.name

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row."""
        row = {"step": step, **{name: finite(float(value)) for name, value in metrics.items()}}
        if step != self.latest.get("step"):
            self.now = {}
        self.now.update(row)
        self.latest.update(row)
        try:
            with self.rows.open("a") as file:
                file.write("\n" * self._torn + json.dumps(row) + "\n")
            self._torn = False
            self.num_rows += 1
        except OSError as error:
            self._torn = True  # part of the row may be there
            self._warn_once(error)

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: ``config.yaml`` is written before training."""

    @rank_zero_only
    def complete(self, metrics: Mapping[str, Any]) -> None:
        """Write ``metrics.json``: the run has reached its end."""
        try:
            write_json(self.folder / "metrics.json", dict(metrics))
        except OSError as error:
            self._warn_once(error)

    def _warn_once(self, error: OSError) -> None:
        if not self._failed:
            # stacklevel 1: as a warning of lightning's, which calls this, it would be silenced.
            message = f"Metrics cannot be written to {self.folder} ({error.strerror}); training goes on."
            warnings.warn(message, stacklevel=1)
        self._failed = True


def json_logger(trainer: pl.Trainer) -> JsonLogger | None:
    """The run folder's own logger, if the trainer has one."""
    return next((logger for logger in trainer.loggers if isinstance(logger, JsonLogger)), None)


class Wandb(WandbLogger):
    """Weights & Biases that never stops a run: the first failure ends the mirroring with a warning.

    Args:
        folder: The run folder; the run's id is a function of it, so that a resumed run continues its own W&B run.
        project: W&B project.
        entity: W&B entity, or None for the default one.
        mode: ``auto`` (online with an API key, else offline), ``online`` or ``offline``.
        config: The resolved configuration, logged.
    """

    def __init__(
        self,
        folder: Path,
        project: str = "harmonize",
        entity: str | None = None,
        mode: str = "auto",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.failed = False
        self.mode = os.environ.get("WANDB_MODE") or (
            ("online" if has_api_key() else "offline") if mode == "auto" else mode
        )
        super().__init__(
            name=folder.name,
            save_dir=folder,
            project=project,
            entity=entity,
            id=run_id(folder),
            config=dict(config or {}),
            mode=self.mode,
            settings=quiet_settings(),
        )
        self._wandb_init.pop("anonymous", None)  # lightning passes it on; newer W&B warns of it

    @property
    def experiment(self) -> Any:
        """The W&B run; None once W&B has failed: lightning asks for it as well, and must not try again."""
        return None if self.failed else super().experiment

    @rank_zero_only
    def start(self) -> None:
        """Open the W&B run now, so that a failure shows at the start; without a server go on offline.

        The runs of one process share W&B's service: where it has died, a new one is started.
        """
        self._open()

    def _open(self, again: bool = False) -> None:
        import wandb

        try:
            _ = self.experiment
        except Exception as error:  # whatever W&B may raise, training goes on
            if self.mode == "online" and (again or isinstance(error, wandb.errors.Error)):
                warnings.warn(f"W&B cannot be reached ({_short(error)}); logging offline instead.", stacklevel=1)
                self.mode = self._wandb_init["mode"] = "offline"
            elif again:
                self._give_up(error)
                return
            with contextlib.suppress(Exception, SystemExit):  # a service that has died gives no answer
                wandb.teardown()  # one that has not holds on to the run's id
            self._open(again=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Mirror one row, unless W&B has failed before."""
        self._try(lambda: super(Wandb, self).log_metrics(metrics, step))

    @rank_zero_only
    def log_lines(
        self,
        key: str,
        xs: Sequence[Sequence[float]],
        ys: Sequence[Sequence[float]],
        names: Sequence[str],
        title: str,
        step: int,
    ) -> None:
        """Mirror a line plot over depth with several named lines."""

        def log() -> None:
            import wandb

            plot = wandb.plot.line_series([list(x) for x in xs], [list(y) for y in ys], list(names), title, "layer")
            self.experiment.log({key: plot, "trainer/global_step": step})

        self._try(log)

    @rank_zero_only
    def log_images(self, paths: Mapping[str, Path], step: int) -> None:
        """Mirror pictures, from files."""

        def log() -> None:
            import wandb

            images = {key: wandb.Image(str(path)) for key, path in paths.items()}
            self.experiment.log({**images, "trainer/global_step": step})

        self._try(log)

    @rank_zero_only
    def alert(self, title: str, text: str) -> None:
        """Send an alert, by mail or chat as the user has set up."""
        self._try(lambda: self.experiment.alert(title=title, text=text))

    def _try(self, action: Callable[[], Any]) -> None:
        """Do something with W&B, unless it has failed before."""
        if self.failed:
            return
        try:
            action()
        except Exception as error:  # whatever W&B may raise, training goes on
            self._give_up(error)

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: the configuration is given to ``wandb.init``."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Nothing: see :meth:`finish`; no checkpoint is uploaded."""

    @rank_zero_only
    def finish(self, exit_code: int = 0) -> None:
        """Close the W&B run, so that the next one of this process does not continue it."""
        try:
            if self._experiment is not None:
                self._experiment.finish(exit_code=exit_code)
        except Exception as error:  # whatever W&B may raise, the run's result stands
            self._give_up(error)
        self._experiment = None

    def _give_up(self, error: Exception) -> None:
        self.failed = True
        warnings.warn(
            f"W&B failed ({_short(error)}); training goes on, metrics.jsonl has every value.",
            stacklevel=1,
        )


def run_id(folder: Path) -> str:
    """W&B run id of a run folder: a function of its path, in the letters that W&B allows.

    >>> run_id(Path("/runs/hybrid-shapes-1a2b"))
    'hybrid-shapes-1a2b-af93fd79'
    """
    from zlib import crc32

    path = str(folder.absolute())
    return f"{re.sub(r'[^A-Za-z0-9_-]', '-', folder.name)[-100:]}-{crc32(path.encode()):08x}"


def has_api_key() -> bool:
    """Whether W&B finds credentials in the environment or in a netrc file; asks nobody and contacts no server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import netrc
    from urllib.parse import urlparse

    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for candidate in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if candidate and netrc.netrc(os.path.expanduser(candidate)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def quiet_settings() -> Any:
    """W&B without words: our own lines say what happens, and console and code are in the run folder already.

    It waits for its server for a minute at the start and five at the end, unless W&B's own variables say otherwise.
    """
    import wandb

    options: dict[str, Any] = {"silent": True, "console": "off", "disable_git": True, "disable_code": True}
    for name, seconds in (("init_timeout", 60), ("finish_timeout", 300), ("finish_timeout_raises", True)):
        if name in wandb.Settings.model_fields:  # older ones wait for ever at the end
            options[name] = os.environ.get(f"WANDB_{name.upper()}", seconds)
    return wandb.Settings(**options)


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
