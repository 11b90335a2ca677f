"""The networks that a command looks at: from what ``checkpoint`` names to an encoder and the data to show it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from harmonize.backbones.timm_models import TimmEncoder
from harmonize.backbones.timm_vit import ViTEncoder
from harmonize.checkpoints import own
from harmonize.checkpoints.keys import KeyRow
from harmonize.checkpoints.official import build, interpret, kind_of
from harmonize.checkpoints.own import OwnCheckpoint, find_file
from harmonize.checkpoints.reading import CheckpointFile, read_file
from harmonize.checkpoints.resizing import resize_state
from harmonize.checkpoints.single_file import architecture_of, open_exported
from harmonize.config import composer, instantiate, locate, to_plain
from harmonize.data.module import DataModule
from harmonize.evaluation.classifier import Head
from harmonize.files import digest
from harmonize.functional.hashing import weights_hash
from harmonize.functional.seeding import mix_int
from harmonize.types import ConfigError, EncoderSpec, FeatureSpec

TIMM = "timm:"


@dataclass
class Loaded:
    """An encoder to analyse.

    Attributes:
        name: What figures call it.
        checkpoint: As the user wrote it.
        encoder: In eval mode.
        untrained: The same architecture at its random initialisation, in eval mode.
        architecture: Equal for encoders whose untrained networks are the same.
        family: Whose layout the file has.
        note: What the file is.
        details: For the report's table.
        warnings: What a reader must know.
        data: The ``data`` section that it was trained with, or None.
        objective: What it was trained with, where that is known: ``contrastive``, ``mim``, ``mae``, ``hybrid 0.2``,
            ``dino``, ``ibot``, ``beit``; else empty.
        head: The classifier in the checkpoint, or None.
        keys: What has become of every tensor of the file.
        heads_from: Where the number of heads of another project's network is from.
        config: The configuration of a run of harmonize.
        step: Optimiser steps of that run.
        derived_from: Recipe of official weights that it is, or began with, such as ``mae``: their licence holds on.
    """

    name: str
    checkpoint: str
    encoder: nn.Module
    untrained: nn.Module | None = None
    architecture: str = ""
    family: str = ""
    note: str = ""
    details: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    data: dict[str, Any] | None = None
    objective: str = ""
    head: Head | None = None
    keys: list[KeyRow] = field(default_factory=list)
    heads_from: str = ""
    config: dict[str, Any] | None = None
    step: int | None = None
    derived_from: str = ""

    @property
    def spec(self) -> EncoderSpec:
        """The encoder's."""
        return self.encoder.spec  # type: ignore[return-value]

    @cached_property
    def fingerprint(self) -> str:
        """The first digits of the SHA-256 of the encoder's weights, which are frozen."""
        return weights_hash(self.encoder.state_dict())[:16]


def load_network(checkpoint: str, name: str, cfg: DictConfig, untrained: bool = False) -> Loaded:
    """The encoder that an entry of ``checkpoint`` names, frozen and in eval mode.

    Args:
        checkpoint: The entry.
        name: What to call it.
        cfg: Its ``seed``, ``image_size``, ``resize``, ``branch`` and ``num_heads`` say how to read it.
        untrained: Also build the same architecture at its random initialisation.

    Raises:
        ConfigError: It cannot be read, or is no encoder.
    """
    if checkpoint.startswith(TIMM):
        loaded = _load_timm(checkpoint, name, cfg, untrained)
    else:
        file = replace(read_file(find_file(checkpoint)), name=checkpoint)
        kind = kind_of(file)
        given = {"branch": cfg.branch != "auto", "num_heads": cfg.num_heads is not None}
        if kind != "official" and (key := next((key for key, is_given in given.items() if is_given), None)):
            raise ConfigError(f"{key}={cfg[key]} is for other projects' files; {checkpoint} is harmonize's own.")
        load = {"own": _load_own, "exported": _load_exported, "official": _load_official}[kind]
        loaded = load(file, name, cfg, untrained)
    for module in (loaded.encoder, loaded.untrained, loaded.head):
        if module is not None:
            module.requires_grad_(False).eval()
    return loaded


def _load_timm(checkpoint: str, name: str, cfg: DictConfig, with_untrained: bool) -> Loaded:
    model, seed = checkpoint.removeprefix(TIMM), cfg.get("seed", 0)
    torch.manual_seed(mix_int(seed))
    encoder = TimmEncoder(model, image_size=cfg.image_size)
    untrained = None
    if with_untrained:
        torch.manual_seed(mix_int(seed, 1))  # other random weights than those that stand in for missing ones
        untrained = TimmEncoder(model.partition(".")[0], pretrained=False, image_size=cfg.image_size)
    return Loaded(
        name,
        checkpoint,
        encoder,
        untrained=untrained,
        architecture=model.partition(".")[0],
        family="timm",
        details={"checkpoint": checkpoint},
        warnings=[encoder.warning] if encoder.warning else [],
    )


def _load_own(file: CheckpointFile, name: str, cfg: DictConfig, with_untrained: bool) -> Loaded:
    content = own.interpret(file)
    _refuse_foreign(content.config["backbone"], "backbone", file.name)
    node, seed = dict(content.config["backbone"]), content.config.get("seed", 0)

    def build(size: Any) -> nn.Module:
        torch.manual_seed(mix_int(seed))  # as training began
        return instantiate(node | {"image_size": size})

    encoder, weights, size = build(node.get("image_size")), content.weights, node.get("image_size")
    if cfg.image_size not in (None, size) and isinstance(encoder, ViTEncoder):
        if cfg.image_size % encoder.spec.patch_size:
            raise ConfigError(
                f"image_size must be a multiple of the patch size of {file.name}, {encoder.spec.patch_size} px, not "
                f"{cfg.image_size}."
            )
        old, encoder, size = encoder, build(cfg.image_size), cfg.image_size
        positions = str(node.get("positions", "sincos"))
        new_grid: tuple[int, int] = encoder.spec.grid  # type: ignore[union-attr,assignment]
        weights = resize_state(weights, old.spec.grid, new_grid, old.spec.num_prefix_tokens, positions, cfg.resize)
    elif cfg.image_size not in (None, size):
        raise ConfigError(f"image_size must be null or {size}, as {file.name} was trained with, not {cfg.image_size}.")
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"checkpoint={file.name} does not fit its own configuration: {reason}") from error
    what = content.head_facts["origin"] if content.head else f"step {content.step}"
    return Loaded(
        name,
        file.name,
        encoder,
        untrained=build(size) if with_untrained else None,
        architecture=json.dumps([node, size, seed], sort_keys=True),
        family="harmonize",
        note="a checkpoint of harmonize" + (f", with a classifier: {what}" if content.head else f", after {what}"),
        details={"checkpoint": f"{file.name} ({what})"},
        data=content.config.get("data"),
        objective=_objective(content.config.get("loss") or {}),
        head=_own_head(encoder.spec, content) if content.head else None,  # type: ignore[arg-type]
        keys=content.keys,
        config=content.config,
        step=None if content.head else content.step,
        derived_from=str(content.config.get("derived_from", "")),
    )


def _own_head(spec: EncoderSpec, content: OwnCheckpoint) -> Head:
    facts = content.head_facts
    features = [FeatureSpec(**feature) for feature in facts["features"]]
    head = Head(spec, features, len(content.head["linear.bias"]), facts["norm"])
    head.load_state_dict(content.head)
    head.origin, head.classes = facts["origin"], facts["classes"]
    return head


def save_fine_tuned(path: Path, encoder: nn.Module, head: Head, loaded: Loaded, section: DictConfig) -> None:
    """Write a network that an evaluation has fine-tuned, with its classifier, as a checkpoint like any other.

    Args:
        path: The file.
        encoder: Trained.
        head: Trained with it.
        loaded: The network that fine-tuning began with.
        section: The ``data`` section of fine-tuning.
    """
    if isinstance(encoder, ViTEncoder):
        backbone: dict[str, Any] = {"_target_": "harmonize.backbones.timm_vit.ViTEncoder"} | architecture_of(encoder)
        height, width = encoder.spec.image_size
        backbone["image_size"] = height if height == width else [height, width]
    else:
        before = (loaded.config or {}).get("backbone") or {}  # with its tag, which says how images are normalised
        name = before.get("name") or loaded.checkpoint.removeprefix(TIMM)
        size = loaded.spec.image_size[0]
        backbone = {"_target_": "harmonize.backbones.timm_models.TimmEncoder", "name": name}
        backbone |= {"pretrained": False, "image_size": size}
    facts = {
        "features": [asdict(feature) for feature in head.features],
        "norm": isinstance(head.norm, nn.LayerNorm),
        "classes": head.classes,
        "origin": head.origin,
    }
    config = (loaded.config or {}) | {"backbone": backbone, "data": to_plain(section)}
    config["derived_from"] = loaded.derived_from
    own.save(path, encoder, head, facts, config)


def _load_exported(file: CheckpointFile, name: str, cfg: DictConfig, with_untrained: bool) -> Loaded:
    encoder, stored = open_exported(file.path)
    size = encoder.spec.image_size
    if cfg.image_size is not None and size != (cfg.image_size, cfg.image_size):
        raise ConfigError(
            f"image_size must be null for an exported file, not {cfg.image_size}; export it at that size instead."
        )
    facts = stored.metadata["facts"]
    weight = facts["weight"]
    return Loaded(
        name,
        file.name,
        encoder,
        untrained=_random(stored.architecture, cfg) if with_untrained else None,
        architecture=json.dumps(stored.architecture, sort_keys=True),
        family="harmonize, exported",
        note="the encoder alone, as harmonize export has written it",
        details={"checkpoint": file.name},
        objective=facts["objective"] if weight is None else f"{facts['objective']} {weight:g}",
        step=facts["steps"],
        derived_from=facts["derived_from"],
        keys=[KeyRow("", key, tuple(tensor.shape), "mapped", key) for key, tensor in stored.weights.items()],
    )


def _load_official(file: CheckpointFile, name: str, cfg: DictConfig, with_untrained: bool) -> Loaded:
    official = interpret(file, cfg.branch, cfg.image_size, cfg.resize, cfg.num_heads)
    encoder = build(official)
    head = None
    if (theirs := official.head) is not None:
        feature = FeatureSpec(-1, theirs.pool, norm=theirs.norm is None)
        head = Head(encoder.spec, [feature], len(theirs.bias), norm=theirs.norm is not None)
        norm = {} if theirs.norm is None else dict(zip(("norm.weight", "norm.bias"), theirs.norm, strict=True))
        head.load_state_dict({"linear.weight": theirs.weight, "linear.bias": theirs.bias, **norm})
        head.origin = "the classifier in the file"
    return Loaded(
        name,
        file.name,
        encoder,
        untrained=_random(official.architecture, cfg) if with_untrained else None,
        architecture=json.dumps(official.architecture, sort_keys=True),
        family=official.family,
        note=official.note,
        details={"checkpoint": f"{file.name} ({official.family})"},
        objective=_OBJECTIVES.get(official.family.partition(",")[0], ""),
        head=head,
        keys=official.keys,
        heads_from=official.heads_from,
        derived_from=_DERIVED.get(official.family.partition(",")[0], ""),
    )


_DERIVED = {"MoCo v3": "moco_v3", "MAE": "mae"}
_OBJECTIVES = {"MoCo v3": "contrastive", "SimMIM": "mim", "MAE": "mae", "DINO": "dino", "iBOT": "ibot", "BEiT": "beit"}


def _random(architecture: Mapping[str, Any], cfg: DictConfig) -> ViTEncoder:
    torch.manual_seed(mix_int(cfg.get("seed", 0)))
    return ViTEncoder(**architecture)


def _objective(loss: Mapping[str, Any]) -> str:
    """The name of what a ``loss`` section trains with."""
    names = {
        "Contrastive": "contrastive",
        "MaskedImageModeling": "mim",
        "MaskedAutoencoder": "mae",
        "Hybrid": "hybrid",
        "Supervised": "supervised",
    }
    name = names.get(str(loss.get("_target_")).rpartition(".")[2], "")
    weight = loss.get("lambda")
    return f"{name} {weight:g}" if name == "hybrid" and isinstance(weight, (int, float)) else name


def _refuse_foreign(node: Any, place: str, checkpoint: str) -> None:
    """Refuse to build what a checkpoint describes, unless that is a class of harmonize's own.

    A file from elsewhere could name any function of any package to be called.
    """
    package = f"harmonize.{PACKAGE_OF[place]}."
    target = str(node.get("_target_") or "") if isinstance(node, Mapping) else ""
    try:
        built = locate(target) if target.startswith(package) else None
    except ImportError:
        built = None
    nested = json.dumps(node, default=str).count('"_target_"') > 1
    if not isinstance(built, type) or not built.__module__.startswith(package) or nested:
        raise ConfigError(
            f"checkpoint={checkpoint}: its {place} is {target or node!r}, which is no class of {package[:-1]}; nothing "
            "else is built from a file."
        )


PACKAGE_OF = {"backbone": "backbones", "data.dataset": "data"}


def data_section(cfg: DictConfig, networks: list[Loaded], loaded: Loaded) -> DictConfig:
    """The ``data`` section for a network, at its image size: chosen, or the first network's own, or shapes."""
    if cfg.data is not None:
        section, what = OmegaConf.create(to_plain(cfg)["data"]), "the chosen data"
    elif own := next((n for n in networks if n.data is not None), None):
        assert own.data is not None
        _refuse_foreign(own.data.get("dataset"), "data.dataset", own.checkpoint)
        if "${" in json.dumps(own.data, default=str):  # what a reference leads to would be built as well
            raise ConfigError(
                f"checkpoint={own.checkpoint}: its data section refers to other keys ('${{'), which a stored one never "
                "does; nothing is built from it."
            )
        section, what = OmegaConf.create(own.data), "the data that it was trained on"
    else:
        with composer("analyze") as conf:
            section, what = conf.load(["data=shapes"]).data, "shapes"
    size = loaded.spec.image_size
    for node in (section, section.dataset):
        if "image_size" in node:
            node.image_size = max(size)
    loaded.details["data"] = f"{what}: {section.dataset['_target_'].rpartition('.')[2]}"
    return section


def data_module(
    section: DictConfig, dataset: Any, image_size: tuple[int, int], seed: int, **options: Any
) -> DataModule:
    """The images of a ``data`` section for a network; ``options`` are arguments of ``DataModule``."""
    settings = {"num_workers": section.num_workers, "eval_crop": section.eval_crop} | options
    recipes, views = settings.pop("recipes", {}), settings.pop("required_views", {})
    batch_size = settings.pop("batch_size", settings.get("world_size", 1))
    return DataModule(dataset, recipes, views, image_size, batch_size, seed=seed, **settings)


def slug(text: str) -> str:
    """A text as part of a file's name.

    >>> slug("a run: 1")
    'a-run-1'
    """
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)


def short_names(checkpoints: list[str]) -> list[str]:
    """Names for figures: the part of the paths that tells them apart.

    >>> short_names(["outputs/a/checkpoints/last.ckpt", "outputs/b", "timm:vit_tiny_patch16_224"])
    ['a', 'b', 'vit_tiny_patch16_224']
    """
    names = []
    for checkpoint in checkpoints:
        parts = [p for p in Path(checkpoint.removeprefix(TIMM)).parts if p not in ("checkpoints", "last.ckpt")]
        names.append(Path(parts[-1]).stem if parts and parts[-1].endswith((".ckpt", ".pth")) else "".join(parts[-1:]))
    return [n if names.count(n) == 1 else f"{n} {i}" for i, n in enumerate(names, start=1)]


def default_folder(cfg: DictConfig, names: list[str]) -> Path:
    """A pure function of the configuration: the same command writes the same folder."""
    plain = {key: value for key, value in to_plain(cfg).items() if key not in ("run", "hydra")}
    return Path(cfg.run.root).expanduser() / f"{slug('-'.join(names))[:80]}-{digest(plain, 8)}"


def choose_device(accelerator: str) -> torch.device:
    """The device that ``auto``, ``cpu`` or ``gpu`` means here.

    Raises:
        ConfigError: There is no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if accelerator == "gpu" and not has_gpu:
        raise ConfigError("accelerator must be cpu or auto, not gpu: there is no GPU here.")
    return torch.device("cuda" if has_gpu and accelerator != "cpu" else "cpu")
