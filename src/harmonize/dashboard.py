"""A workspace and a report in Weights & Biases: losses, probes, diagnostics by depth, gradients, health, system.

What there is to plot is asked of the diagnostics themselves: they look at an untrained network and a few images of
noise, and every curve that comes out is a panel with a line per layer, with the words that the curve brings along.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from harmonize.analysis import Chosen, choose_diagnostics
from harmonize.arguments import Parser
from harmonize.config import check_config, compose, instantiate, load_config, to_plain
from harmonize.diagnostics.health import Health
from harmonize.diagnostics.measure import measure
from harmonize.evaluation.features import extract
from harmonize.training.callbacks.diagnostics import scalars
from harmonize.training.callbacks.gradient_norms import QUANTITIES, trained_layers
from harmonize.training.loggers import has_api_key, quiet_settings
from harmonize.types import Batch, ConfigError, Curve, FaultError, Findings, Quantity

STEP = "trainer/global_step"
TIME = "RelativeTime(Process)"  # what the system is measured over
MAX_GPUS = 8  # of a machine; lines of those that it does not have stay away
TERMS = {"mim": "MIM", "contrastive": "contrastive"}
GROUPS = ("run.name", "loss.lambda")
"""Keys of the configuration: runs that agree in them differ in their seeds, as a rule, and become one line."""

INTRODUCTION = (
    "Made by harmonize dashboard. Runs with the same loss, data, backbone and lambda are one group: lines are their "
    "mean. The x-axis counts optimiser steps. Only what is measured at every step is smoothed."
)


@dataclass(frozen=True)
class Panel:
    """One panel, whatever it is drawn with.

    Attributes:
        title: What stands above it.
        keys: Metrics, or pictures.
        text: How to read it.
        kind: ``lines``, ``bars`` of the latest values, or ``pictures``.
        unit: Of the y-axis.
        noisy: Whether a value belongs to a single step, so that smoothing it shows more.
        log: Whether the y-axis is logarithmic.
        x: Metric on the x-axis of lines.
    """

    title: str
    keys: list[str]
    text: str
    kind: str = "lines"
    unit: str = ""
    noisy: bool = False
    log: bool = False
    x: str = STEP


@dataclass(frozen=True)
class Part:
    """A section of the workspace and of the report."""

    name: str
    text: str
    panels: list[Panel] = field(default_factory=list)


def main(arguments: list[str]) -> int:
    """``harmonize dashboard [--project P] [--entity E] [--depth N | --run FOLDER] [--name NAME] [--no-report]``."""
    parser = Parser(prog="harmonize dashboard", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--project", help="W&B project, made if there is none; default: the run's, else harmonize")
    parser.add_argument("--entity", help="W&B user or team; default: the run's, else your own")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--depth", type=int, help="number of blocks; default: that of the default backbone")
    depth.add_argument("--run", type=Path, metavar="FOLDER", help="a run folder, whose network and diagnostics count")
    parser.add_argument("--name", default="harmonize", help="of the workspace and of the report")
    parser.add_argument("--no-report", action="store_true", help="the workspace alone")
    options = parser.parse_args(arguments)
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError as error:
        raise ConfigError("harmonize dashboard needs wandb-workspaces: pip install 'harmonize[dashboard]'.") from error
    if not has_api_key():
        raise ConfigError("harmonize dashboard needs W&B's API key: run wandb login, or set WANDB_API_KEY.")
    cfg = _config(options.run, options.depth)
    logger = cfg.get("logger") or {}
    project = options.project or logger.get("project") or "harmonize"
    console = Console(highlight=False, soft_wrap=True)
    addresses = publish(
        parts(cfg), project, options.entity or logger.get("entity"), options.name, report=not options.no_report
    )
    for what, url in addresses.items():
        console.print(f"{what}: {url}")
    return 0


def _config(run: Path | None, depth: int | None) -> DictConfig:
    """The configuration of a run, or the default one with so many blocks."""
    if run is not None:
        try:
            return load_config(run / "config.yaml")
        except OSError as error:
            raise ConfigError(f"{run}: no run folder with config.yaml.") from error
    cfg = compose([] if depth is None else [f"backbone.depth={depth}"])
    check_config(cfg, machine=False)
    return cfg


# ---- what is shown -------------------------------------------------------------------------------------------------


def parts(cfg: DictConfig) -> list[Part]:
    """All sections with their panels, of runs like this one."""
    found, gradients, chosen = _look(cfg)
    pictures = found.curves and cfg.diagnostics.figures
    sections = [
        Part("Losses", "The raw terms are unweighted; chance is what guessing gives.", _losses()),
        Part("Probes", "Labels are used here only; the network never sees them.", _probes()),
        Part(
            "Diagnostics by depth",
            "At every validation epoch, one line per layer; layer 00 is the input of the first block. Pictures are in "
            "the order of the epochs.",
            [*_by_layer(found), *(_pictures(found) if pictures else ())],
        ),
        Part("Gradients", "What each loss term asks of the shared backbone.", [*_gradients(), *_by_layer(gradients)]),
        Part(
            "Health",
            "Alarms are also sent as W&B alerts; they flag what deserves a look, not what is proven to be wrong.",
            [*_health(), *(_alarms(chosen.health, found) if chosen.health is not None else ())],
        ),
        Part("System", "Measured by W&B itself, over the time since the run began.", _system()),
    ]
    return [section for section in sections if section.panels]


def _look(cfg: DictConfig) -> tuple[Findings, Findings, Chosen]:
    """What the diagnostics find, what is measured of gradients, and the diagnostics.

    A narrow network on small images has the same curves as the run's own. Values are those of noise: none is shown.
    """
    backbone = to_plain(cfg.backbone)
    small = {"width": 32 * backbone.get("num_heads", 1), "image_size": 32, "patch_size": 8}
    encoder = instantiate(backbone | {key: value for key, value in small.items() if key in backbone}).eval()
    chosen = choose_diagnostics(cfg.get("diagnostics"), encoder.spec) or Chosen()
    index = torch.arange(32)  # as many as a fit of the spectrum's decay needs
    image = torch.randn(len(index), 3, *encoder.spec.image_size)
    batch = Batch(views={}, label=index % 2, index=index, seed=index, image=image)
    found = measure(encoder, [batch], chosen.metrics, index.tolist())
    if chosen.layer_probe is not None:
        features = extract(encoder, [batch], chosen.layer_probe.specs(encoder.spec), torch.device("cpu"))
        found.merge(chosen.layer_probe.score(features, features, num_classes=2))
    layers = trained_layers(name for name, p in encoder.named_parameters() if p.requires_grad)
    nothing = [0.0] * len(layers)
    gradients = {name: Curve(quantity, layers, nothing, nothing) for name, quantity in QUANTITIES.items()}
    return found, Findings(gradients if (cfg.get("callbacks") or {}).get("gradient_norms") else {}), chosen


def _words(quantity: Quantity) -> str:
    """Definition and source, as they stand in figures and files."""
    return f"{quantity.definition} ({quantity.source})"


def _by_layer(found: Findings) -> list[Panel]:
    """A panel per curve."""
    return [
        Panel(
            f"{curve.quantity.title} ({name})",
            list(scalars(Findings({name: curve}))),
            _words(curve.quantity),
            unit=curve.quantity.unit,
        )
        for name, curve in found.curves.items()
    ]


def _pictures(found: Findings) -> list[Panel]:
    everything = Panel("All curves (curves)", ["pictures/curves"], "All curves of an epoch over depth.", "pictures")
    return [everything] + [
        Panel(f"{picture.quantity.title} ({name})", [f"pictures/{name}"], _words(picture.quantity), "pictures")
        for name, picture in found.pictures.items()
    ]


def _losses() -> list[Panel]:
    chance = {"mim": "predicting the mean everywhere", "contrastive": "guessing which image the other view is of"}
    return [
        Panel("Loss", ["train/loss"], "What is minimised.", noisy=True),
        *(
            Panel(
                f"Raw {title} loss",
                [f"train/loss_{term}", f"train/chance_{term}"],
                f"Its chance level is that of {chance[term]}.",
                noisy=True,
            )
            for term, title in TERMS.items()
        ),
        Panel(
            "Mean over the epoch",
            ["epoch/loss", *(f"epoch/loss_{term}" for term in TERMS)],
            "Of the loss and of each raw term: what to compare runs by.",
        ),
        Panel("lambda", ["train/lambda"], "Weight of the contrastive loss in the hybrid."),
        Panel("Learning rate", ["train/lr"], "Warm-up and decay."),
        Panel("Momentum", ["train/momentum"], "Of the momentum network that makes the contrastive loss's keys."),
        Panel(
            "Accuracy of the objective",
            ["train/contrastive_accuracy", "train/supervised_accuracy"],
            "Share of queries that find their own key in the batch; of labels that are predicted.",
            noisy=True,
        ),
    ]


def _probes() -> list[Panel]:
    names = {"knn": "Weighted k-NN", "linear": "Linear probe"}
    beside = "beside the untrained network's, and what naming the commonest class gives."
    return [
        *(
            Panel(
                f"{title}, top-1",
                [f"val/{name}_top1", f"untrained/{name}_top1", "val/chance_top1"],
                f"Accuracy on frozen features of the clean image, {beside}",
            )
            for name, title in names.items()
        ),
        Panel(
            "Evaluations of the finished network, top-1",
            ["evaluate/linear_probe/top1", "evaluate/fine_tune/top1", "evaluate/knn/top1 k=20, temperature=0.07"],
            "Where evaluate lists them, as in evaluate=[knn,linear_probe].",
            "bars",
        ),
    ]


def _gradients() -> list[Panel]:
    return [
        Panel(
            "Gradient norm of each raw term",
            [f"train/grad_norm_{term}" for term in TERMS],
            "Of the unweighted terms, on the shared backbone: the term with the larger one has the say.",
            log=True,
        ),
        Panel(
            "Cosine between the terms' gradients",
            ["train/grad_cosine"],
            "Above 0 the terms help each other, below 0 they fight.",
        ),
        Panel(
            "Gradient norm of the loss",
            ["train/grad_norm"],
            "Of all that is trained, before clipping.",
            noisy=True,
            log=True,
        ),
    ]


def _health() -> list[Panel]:
    return [
        Panel(
            "Skipped steps",
            ["train/skipped_steps"],
            "Since the beginning, because loss or gradient were not finite. Should stay at 0.",
        ),
        Panel(
            "Spread of queries and keys",
            ["train/query_std", "train/key_std"],
            "Near 1: spread over the sphere. Near 0: collapse, all images have one embedding.",
            noisy=True,
        ),
        Panel("Norm of queries", ["train/query_norm"], "Before normalisation. Should not run away.", noisy=True),
        Panel("Images per second", ["train/images_per_second"], "Over all devices, without validation."),
        Panel(
            "Share of time before a step",
            ["train/data_wait", "train/augmentation"],
            "Waiting for the loader: near 0 if it keeps up. Moving and augmenting batches: on a GPU a large share only "
            "says that the host runs ahead.",
        ),
        Panel("GPU memory of PyTorch", ["train/gpu_memory_gib"], "The most that was allocated.", unit="GiB"),
        Panel(
            "Share of the epoch that diagnostics take",
            ["diagnostics/share_of_epoch"],
            "Above a few percent: raise diagnostics.every_n_epochs.",
        ),
    ]


def _alarms(health: Health, found: Findings) -> list[Panel]:
    """The curves that alarms go by, with their thresholds."""
    rules = {
        "nmi": f"Attention collapse: alarm below {health.nmi:g}",
        "attention_entropy": f"Uniform attention: alarm above {health.entropy:g}",
        "image_effective_rank": f"Dimensional collapse: alarm below {100 * health.rank:g} % of the possible rank",
    }
    return [
        Panel(title, list(scalars(Findings({name: found.curves[name]}))), found.curves[name].quantity.definition)
        for name, title in rules.items()
        if name in found.curves
    ]


def _system() -> list[Panel]:
    def gpus(measure: str) -> list[str]:
        return [f"system/gpu.{i}.{measure}" for i in range(MAX_GPUS)]

    rows = [
        ("GPU utilisation", gpus("gpu"), "Share of time in which a kernel runs.", "%"),
        ("GPU memory", gpus("memoryAllocated"), "Of all processes.", "%"),
        ("GPU power", gpus("powerWatts"), "Says more about the load than utilisation.", "W"),
        ("CPU", ["system/cpu"], "Of this process.", "%"),
        ("Memory of the process", ["system/proc.memory.rssMB"], "Without loader workers.", "MB"),
        ("Memory of the machine", ["system/memory_percent"], "Workers and caches included.", "%"),
    ]
    return [Panel(title, keys, text, unit=unit, x=TIME) for title, keys, text, unit in rows]


# ---- into W&B ------------------------------------------------------------------------------------------------------


def publish(
    sections: Iterable[Part], project: str, entity: str | None, name: str, report: bool = True
) -> dict[str, str]:
    """Save the workspace and the report, new ones each time; what they are -> where they are.

    Raises:
        FaultError: W&B cannot be reached, or refuses.
    """
    import wandb

    wandb.setup(settings=quiet_settings())
    sections = list(sections)
    found = {}
    try:
        api = wandb.Api()
        owner = entity or api.default_entity
        if owner is None:
            raise ValueError("the key belongs to no user or team: give --entity")
        if project not in {known.name for known in api.projects(owner)}:
            api.create_project(project, owner)
        for what, make in (("Workspace", workspace), ("Report", report_of))[: 1 + report]:
            found[what] = str(make(sections, project, owner, name).save().url)
    except Exception as error:  # W&B raises many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        done = "".join(f" The {what.lower()} is there: {url}" for what, url in found.items())
        advice = f"check key, entity and network, and try again.{done}"
        raise FaultError(f"W&B does not take it ({reason}); {advice}") from error
    return found


def workspace(sections: Iterable[Part], project: str, entity: str, name: str) -> Any:
    """A saved view of a project, not saved yet."""
    from wandb_workspaces import expr
    from wandb_workspaces import workspaces as ws

    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section(name=section.name, panels=[_draw(panel) for panel in section.panels], is_open=True)
            for section in sections
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP),
        runset_settings=ws.RunsetSettings(groupby=[expr.Config(key) for key in GROUPS]),
    )


def report_of(sections: Iterable[Part], project: str, entity: str, name: str) -> Any:
    """The same panels with words on how to read them, not saved yet."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [wr.P(INTRODUCTION), wr.TableOfContents()]
    for section in sections:
        runs = wr.Runset(entity=entity, project=project, groupby=[f"config.{key}" for key in GROUPS])
        grid = wr.PanelGrid(runsets=[runs], panels=[_draw(panel) for panel in section.panels])
        words = wr.UnorderedList(items=[f"{panel.title}: {panel.text}" for panel in section.panels])
        blocks += [wr.H1(section.name), wr.P(section.text), grid, words]
    return wr.Report(project=project, entity=entity, title=name, blocks=blocks, width="fluid")


def _draw(panel: Panel) -> Any:
    """A panel of W&B's."""
    import wandb_workspaces.reports.v2 as wr

    if panel.kind == "pictures":
        return wr.MediaBrowser(title=panel.title, media_keys=panel.keys)
    if panel.kind == "bars":
        return wr.BarPlot(title=panel.title, metrics=[*panel.keys])
    return wr.LinePlot(
        title=panel.title,
        x=panel.x,
        y=[*panel.keys],
        title_y=panel.unit or None,
        log_y=panel.log or None,
        smoothing_type="exponentialTimeWeighted" if panel.noisy else "none",
        smoothing_factor=0.6 if panel.noisy else 0.0,
        smoothing_show_original=panel.noisy,
    )
