"""What the network has learnt, at every validation epoch: curves, pictures, alarms."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import lightning.pytorch as pl
from rich.console import Console

from harmonize.diagnostics.base import Diagnostic
from harmonize.diagnostics.health import Health
from harmonize.diagnostics.measure import measure
from harmonize.evaluation.layer_probe import LayerProbe
from harmonize.files import write_json, write_whole
from harmonize.reports.figures import epoch_sheet
from harmonize.reports.files import read_history, to_plain
from harmonize.reports.pictures import draw
from harmonize.reports.style import to_png
from harmonize.training.callbacks.gradient_norms import GradientNorms
from harmonize.training.callbacks.probe import OnlineProbe
from harmonize.training.loggers import Wandb, record
from harmonize.training.module import PretrainModule
from harmonize.types import Batch, EncoderSpec, Findings

MAX_LINES = 24
"""Epochs that a W&B line plot shows at most, the first and the last included."""


class Diagnostics(pl.Callback):
    """Measures at the end of a validation epoch; of the untrained network in the sanity check before training.

    Logs ``diagnostics/<name>/layer_<ii>``, writes ``diagnostics/epoch_<eeee>.json`` and PNG files into the run folder,
    draws one line plot per curve into W&B, and sounds an alarm when a curve says that something has gone wrong. Epochs
    are counted in finished ones: 0000 is the untrained network.

    Args:
        diagnostics: By name.
        batches: The fixed list of images, each rank its own share.
        indices: Its positions, over all ranks.
        folder: The run folder.
        num_classes: Classes of the data set, for the layer probe.
        layer_probe: Probes every block, on the features that ``probe`` collects; or None.
        probe: The callback that collects them, which must come before this one; or None.
        gradients: The callback that measures gradients per block; or None.
        health: The alarms; or None.
        figures: Whether to draw PNG files.
        console: Where lines go to.
    """

    def __init__(
        self,
        diagnostics: Mapping[str, Diagnostic],
        batches: Iterable[Batch],
        indices: Sequence[int],
        folder: Path,
        num_classes: int = 0,
        layer_probe: LayerProbe | None = None,
        probe: OnlineProbe | None = None,
        gradients: GradientNorms | None = None,
        health: Health | None = None,
        figures: bool = True,
        console: Console | None = None,
    ) -> None:
        self.diagnostics, self.batches, self.indices = dict(diagnostics), batches, list(indices)
        self.folder, self.num_classes = folder / "diagnostics", num_classes
        self.layer_probe, self.probe, self.gradients, self.health = layer_probe, probe, gradients, health
        self.figures, self.console = figures, console or Console()
        self.history: dict[int, Findings] = {}
        self._alarmed: set[tuple[str, frozenset[int]]] = set()
        self._failed = False
        self._mark = time.perf_counter()

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Read what earlier starts of this run have measured."""
        if trainer.is_global_zero:
            self.history = read_history(self.folder)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock of the epoch; measurements later than the checkpoint that a run resumes from are void."""
        assert isinstance(module, PretrainModule)
        self.history = {epoch: found for epoch, found in self.history.items() if epoch <= module.epoch}
        self._mark = time.perf_counter()

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Measure, log, draw."""
        assert isinstance(module, PretrainModule)
        started = time.perf_counter()
        epoch = -(-trainer.global_step // module.steps_per_epoch)
        everything = trainer.sanity_checking or trainer.global_step >= module.total_steps

        def due(every: int) -> bool:
            return everything or epoch % every == 0

        chosen = {name: d for name, d in self.diagnostics.items() if due(d.every_n_epochs)}
        found = measure(module.encoder, self.batches, chosen, self.indices, module.device)
        if self.layer_probe is not None and self.probe is not None:
            if due(self.layer_probe.every_n_epochs):
                found.merge(self.layer_probe.score(*self.probe.more_features, self.num_classes))
            self.probe.more_features = [], []
        if self.gradients is not None and not trainer.sanity_checking:
            found.merge(self.gradients.findings())
        if not found.curves and not found.pictures:
            return
        record(trainer, scalars(found))
        if trainer.is_global_zero:
            spec: EncoderSpec = module.encoder.spec  # type: ignore[assignment]
            self._write(trainer, found, spec, epoch, started)
            self.history[epoch] = found
            self._mirror(trainer, epoch)
            self._check(trainer, found, spec)
        seconds = time.perf_counter() - started
        costs = {"diagnostics/seconds": seconds}
        line = f"diagnostics  {len(self.indices)} images  {seconds:.1f} s"
        if not trainer.sanity_checking:
            costs["diagnostics/share_of_epoch"] = seconds / (time.perf_counter() - self._mark)
            line += f"  {100 * costs['diagnostics/share_of_epoch']:.1f} % of the epoch"
        record(trainer, costs)
        if trainer.is_global_zero:
            self.console.print(line, highlight=False, soft_wrap=True)

    def _write(self, trainer: pl.Trainer, found: Findings, spec: EncoderSpec, epoch: int, started: float) -> None:
        """Numbers and figures, into the run folder; a full disk costs these and a warning, not the run."""
        name = f"epoch_{epoch:04d}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            seconds = time.perf_counter() - started
            head = {"epoch": epoch, "step": trainer.global_step, "seconds": round(seconds, 3)}
            write_json(self.folder / f"{name}.json", head | to_plain(found))
            if not self.figures:
                return
            earlier = {e: f for e, f in self.history.items() if 0 < e < epoch}
            sheets = {"": epoch_sheet(found, self.history.get(0) if epoch else None, earlier, epoch, spec)}
            sheets |= {f"_{key}": draw(picture) for key, picture in found.pictures.items()}
            paths = {}
            for suffix, figure in sheets.items():
                paths[suffix or "_curves"] = self.folder / f"{name}{suffix}.png"
                write_whole(paths[suffix or "_curves"], to_png(figure, dpi=110))
            if (wandb := self._wandb(trainer)) is not None:
                wandb.log_images({f"pictures/{key[1:]}": path for key, path in paths.items()}, trainer.global_step)
        except OSError as error:
            if not self._failed:
                # stacklevel 1: as a warning of lightning's, which calls this, it would be silenced.
                text = f"Diagnostics cannot be written to {self.folder} ({error.strerror}); training goes on."
                warnings.warn(text, stacklevel=1)
            self._failed = True

    def _mirror(self, trainer: pl.Trainer, epoch: int) -> None:
        """One line plot per curve into W&B: over depth, one line per epoch."""
        wandb = self._wandb(trainer)
        if wandb is None:
            return
        history = {e: found for e, found in sorted(self.history.items()) if e <= epoch}  # later ones are void
        for name in history[epoch].curves:
            lines = {e: found.curves[name] for e, found in history.items() if name in found.curves}
            epochs = list(lines)
            if len(epochs) > MAX_LINES:
                last = len(epochs) - 1
                epochs = [epochs[last * i // (MAX_LINES - 1)] for i in range(MAX_LINES)]
            wandb.log_lines(
                f"depth/{name}",
                [lines[e].layer for e in epochs],
                [lines[e].value for e in epochs],
                [f"epoch {e}" if e else "untrained" for e in epochs],
                lines[epochs[-1]].quantity.title,
                trainer.global_step,
            )

    def _check(self, trainer: pl.Trainer, found: Findings, spec: EncoderSpec) -> None:
        """Alarms; of the untrained network only what is broken, for its attention is uniform by nature."""
        if self.health is None:
            return
        alarms = self.health.check(found, spec)
        if trainer.sanity_checking:
            alarms = [alarm for alarm in alarms if alarm.rule == "not a number"]
        now = {(alarm.curve, frozenset(alarm.values)) for alarm in alarms}
        wandb = self._wandb(trainer)
        for alarm in alarms:
            if (alarm.curve, frozenset(alarm.values)) in self._alarmed:
                continue  # said before, of the same blocks
            self.console.print(f"[bold]Health:[/bold] {alarm}", highlight=False, soft_wrap=True)
            if wandb is not None:
                wandb.alert(f"{trainer.global_step}: {alarm.rule}", str(alarm))
        self._alarmed = now

    @staticmethod
    def _wandb(trainer: pl.Trainer) -> Wandb | None:
        return next((logger for logger in trainer.loggers if isinstance(logger, Wandb)), None)


def scalars(found: Findings) -> dict[str, float]:
    """Metric keys and values of all curves.

    >>> from harmonize.types import Curve, Quantity
    >>> scalars(Findings({"nmi": Curve(Quantity("NMI", "", "", ""), [1, 2], [0.5, 0.25], [0.0, 0.0])}))
    {'diagnostics/nmi/layer_01': 0.5, 'diagnostics/nmi/layer_02': 0.25}
    """
    return {
        f"diagnostics/{name}/layer_{layer:02d}": value
        for name, curve in found.curves.items()
        for layer, value in zip(curve.layer, curve.value, strict=True)
    }
