"""What the values of a configuration must satisfy: a table of single values, then a table of relations between them.

Works on plain containers and needs neither Hydra nor torch, so that a mistake is named within a second. A key that a
configuration does not have (``loss.lambda`` under ``loss=mim``) is not asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]
# Command -> the sections of its configuration, and those that may be null: what they would name is not chosen.
SECTIONS = {
    "train": (
        *("run", "data", "backbone", "loss", "views", "optimizer", "schedule", "trainer", "callbacks", "logger"),
        "scale",
    ),
    "analyze": ("run",),
    "evaluate": ("run", "eval"),
    "inspect": (),
    "export": ("run",),
}
OPTIONAL = {
    "train": ("diagnostics",),
    "analyze": ("data", "diagnostics"),
    "evaluate": ("data",),
    "inspect": (),
    "export": (),
}


def show(value: Any) -> str:
    """A value as one would type it.

    >>> show(None), show(True), show("a"), show("1"), show([1, 2.5]), show({"a": None})
    ('null', 'true', 'a', "'1'", '[1, 2.5]', '{a: null}')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {show(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(show, value)) + "]"
    if isinstance(value, str) and re.fullmatch(r"|true|false|null|[-+.]?\d.*|\s.*|.*\s", value):
        return f"'{value}'"  # so that it is not taken for what it looks like
    return str(value)


# ---- one value -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A test of one value, and the words for what passes it."""

    passes: Callable[[Any], bool]
    allowed: str

    def __or__(self, other: Rule) -> Rule:
        return Rule(lambda v: self.passes(v) or other.passes(v), f"{self.allowed} or {other.allowed}")


def is_number(value: Any, whole: bool = False) -> bool:
    """Whether a value is a finite number (a boolean is not one).

    >>> is_number(0.2), is_number(True), is_number("0.2"), is_number(float("nan")), is_number(2.5, whole=True)
    (True, False, False, False, False)
    """
    kind = int if whole else (int, float)
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def number(interval: str, whole: bool = False) -> Rule:
    """A finite number in an interval such as ``[0, 1)``, whose square brackets include the bound.

    >>> number("[0, 1)").passes(1)
    False
    """
    low, high = (float(bound) for bound in interval[1:-1].split(","))

    def passes(value: Any) -> bool:
        if not is_number(value, whole):
            return False
        above = value >= low if interval[0] == "[" else value > low
        return above and (value <= high if interval[-1] == "]" else value < high)

    kind = "a whole number" if whole else "a number"
    if high < math.inf:
        return Rule(passes, f"{kind} in {interval}")
    return Rule(passes, f"{kind} of at least {low:g}" if interval[0] == "[" else f"{kind} above {low:g}")


def whole(at_least: int) -> Rule:
    """A whole number with a lower bound."""
    return number(f"[{at_least}, inf)", whole=True)


def one_of(*choices: Any) -> Rule:
    """One of several words or numbers; a boolean never passes for 0 or 1."""
    *most, last = dict.fromkeys(map(show, choices))
    words = f"{', '.join(most)} or {last}" if most else last
    return Rule(lambda v: any(v == c and type(v) is type(c) for c in choices), words)


def list_of(rule: Rule, length: int | None = None) -> Rule:
    """A list whose members all pass."""

    def passes(value: Any) -> bool:
        return isinstance(value, list) and length in (None, len(value)) and all(map(rule.passes, value))

    return Rule(passes, f"a list of {length or 'values'}, each {rule.allowed}")


def some(rule: Rule) -> Rule:
    """A list of at least one member, which all pass."""
    members = list_of(rule)
    return Rule(lambda v: v != [] and members.passes(v), f"a list of one value or more, each {rule.allowed}")


def is_weight(value: Any) -> bool:
    """A weight in [0, 1] or a schedule: ``{schedule: linear | cosine | step, start, end}``, for step also ``at``."""
    if not isinstance(value, Mapping):
        return SHARE.passes(value)
    at = {"at"} if value.get("schedule") == "step" else set()
    return (
        value.get("schedule") in ("linear", "cosine", "step")
        and {"schedule", "start", "end"} <= set(value) <= {"schedule", "start", "end"} | at
        and all(SHARE.passes(v) for key, v in value.items() if key != "schedule")
    )


WEIGHT = Rule(
    is_weight,
    "a number in [0, 1] or a schedule of such, as in {schedule: linear, start: 0, end: 1} (linear or cosine) "
    "or {schedule: step, start: 0, end: 1, at: 0.5}",
)


def span(each: Rule) -> Rule:
    """A list of the lowest and the highest value."""
    pair = list_of(each, 2)
    return Rule(lambda v: pair.passes(v) and v[0] <= v[1], f"[lowest, highest], each {each.allowed}")


SHARE = number("[0, 1]")
INSIDE = number("(0, 1)")
POSITIVE = number("(0, inf)")
NOT_NEGATIVE = number("[0, inf)")
NULL = Rule(lambda v: v is None, "null")
BOOL = one_of(True, False)
TEXT = Rule(lambda v: isinstance(v, str) and v != "", "a text")
PATH = Rule(lambda v: isinstance(v, str) and v != "", "a path")
SECTION = Rule(lambda v: isinstance(v, Mapping), "a section with keys")
ACCELERATOR = one_of("auto", "cpu", "gpu")
LAYER = Rule(lambda v: is_number(v, whole=True) and v != 0, "a whole number from 1, or from -1 (the last block) down")
POOL = one_of("cls", "patch_mean", "cls_patch_mean")
RECIPES = ("moco_v3", "simmim", "mae")
LOSSES = ("loss", "loss.contrastive", "loss.mim")  # alone, or as a part of the hybrid

VALUES: dict[str, Rule] = {
    "seed": whole(0),
    "evaluate": list_of(TEXT),
    "checkpoint": Rule(
        lambda v: TEXT.passes(v) or (v != [] and list_of(TEXT).passes(v)),
        "given: a run folder, a checkpoint file, timm:NAME, or a list [A,B]",
    ),
    "branch": one_of("auto", "base", "momentum", "student", "teacher"),
    "resize": one_of("mae", "timm", "dino"),
    "devices": whole(1),
    "num_train": whole(1) | NULL,
    "num_val": whole(1) | NULL,
    "num_heads": whole(1) | NULL,
    "format": one_of("timm", "hf", "safetensors", "onnx"),
    "name": TEXT | NULL,
    "licence": TEXT | NULL,
    "names": NULL | list_of(TEXT),
    "num_images": whole(4),
    "batch_size": whole(1),
    "image_size": whole(1) | NULL,
    "untrained": BOOL,
    "tsne": BOOL,
    "accelerator": ACCELERATOR,
    "run.dir": PATH | NULL,
    "run.root": PATH,
    "run.fresh": BOOL,
    "data.root": PATH | NULL,
    "data.dataset": SECTION,
    "data.image_size": whole(1),
    "data.patch_size": whole(1),
    "data.batch_size": whole(1),
    "data.num_workers": whole(0),
    "data.augment": one_of("auto", "workers", "device"),
    "data.num_train": whole(1) | NULL,
    "data.num_val": whole(1) | NULL,
    "data.eval_crop": number("(0, 1]"),
    "data.val_fraction": INSIDE,
    "data.max_pixels": whole(1),
    "data.shards_at_once": whole(1),
    "data.shard_cache_gb": POSITIVE,
    "data.cache": one_of("auto", True, False),
    "data.cache_size": whole(1) | NULL,
    "data.class_list": PATH | NULL,
    "data.download": BOOL,
    "data.split": one_of("unlabeled", "train"),
    "data.label": one_of("shape", "texture"),
    "data.clutter": SHARE,
    "backbone.patch_size": whole(1),
    "backbone.width": whole(1),
    "backbone.depth": whole(1),
    "backbone.num_heads": whole(1),
    "backbone.num_registers": whole(0),
    "backbone.drop_path": number("[0, 1)"),
    "backbone.layer_scale": POSITIVE | NULL,
    "backbone.positions": one_of("sincos", "sincos_mae", "learned", "none"),
    "backbone.relative_position": one_of("none", "shared", "per_block"),
    "backbone.class_token": BOOL,
    "backbone.freeze_patch_embed": BOOL,
    "backbone.initialization": one_of("timm", "moco_v3", "simmim", "mae"),
    "loss.lambda": WEIGHT,
    "loss.lambda_by_depth": WEIGHT | list_of(SHARE) | NULL,
    "loss.mim_view": one_of("own", "contrastive"),
    "loss.contrastive_input": one_of("clean", "masked"),
    "loss.share_views": BOOL,
    "loss.num_classes": whole(2),
    "loss.smoothing": number("[0, 1)"),
    "loss.contrastive": SECTION,
    "loss.mim": SECTION,
    "scale.hidden_dim": whole(1),
    "scale.decoder_width": whole(1),
    "scale.decoder_depth": whole(1),
    "scale.decoder_heads": whole(1),
    **{
        f"{loss}.{key}": rule
        for loss in LOSSES
        for key, rule in {
            "temperature": POSITIVE,
            "momentum": SHARE,
            "momentum_schedule": one_of("cosine", "constant"),
            "hidden_dim": whole(1),
            "out_dim": whole(1),
            "projector_layers": whole(1),
            "predictor_layers": whole(1),
            "pool": one_of("cls", "patch_mean"),
            "mask_ratio": INSIDE,
            "mask_unit": whole(1) | NULL,
            "norm_pix_loss": BOOL,
            "decoder": one_of("linear", "vit"),
            "decoder_width": whole(1),
            "decoder_depth": whole(1),
            "decoder_heads": whole(1),
            "recipe": TEXT,
            "images_at_once": whole(1) | NULL,
        }.items()
    },
    **{
        f"views.{recipe}.{key}": rule
        for recipe in RECIPES
        for key, rule in {
            "crop_scale": span(number("(0, 1]")),
            "crop_ratio": span(POSITIVE),
            "interpolation": one_of("bilinear", "bicubic"),
            "jitter_prob": SHARE,
            "gray_prob": SHARE,
            "blur_sigma": span(POSITIVE),
            "blur_prob": list_of(SHARE, 2),
            "solarize_threshold": number("[0, 256]"),
            "solarize_prob": list_of(SHARE, 2),
            "flip_prob": SHARE,
        }.items()
    },
    "views.moco_v3.jitter": Rule(
        lambda v: list_of(NOT_NEGATIVE, 4).passes(v) and v[3] <= 0.5,
        "a list of 4, each a number of at least 0, the last at most 0.5",
    ),
    "optimizer.lr": POSITIVE,
    "optimizer.lr_batch": whole(1) | NULL,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.betas": list_of(number("[0, 1)"), 2),
    "optimizer.eps": POSITIVE,
    "optimizer.no_decay": list_of(TEXT),
    "optimizer.clip": POSITIVE | NULL,
    "schedule.warmup": number("[0, 1)"),
    "schedule.warmup_lr": SHARE,
    "schedule.decay": one_of("cosine", "multistep", "constant"),
    "schedule.min_lr": SHARE,
    "schedule.milestones": list_of(INSIDE),
    "schedule.gamma": number("(0, 1]"),
    "trainer.max_epochs": whole(1) | NULL,
    "trainer.max_steps": whole(1) | NULL,
    "trainer.accelerator": ACCELERATOR,
    "trainer.devices": whole(1),
    "trainer.num_nodes": whole(1),
    "trainer.strategy": one_of("ddp", "fsdp"),
    "trainer.precision": Rule(one_of(32, "32", "bf16", "fp16", "auto").passes, "32, bf16, fp16 or auto"),
    "trainer.compile": one_of("auto", True, False),
    "trainer.activation_checkpointing": BOOL,
    "trainer.images_at_once": whole(1) | NULL,
    "trainer.accumulate": whole(1),
    "trainer.log_every_n_steps": whole(1),
    "trainer.val_every_n_epochs": whole(1),
    "trainer.limit_train_batches": whole(1) | NULL,
    "trainer.limit_val_batches": whole(1) | NULL,
    "trainer.deterministic": BOOL,
    "trainer.progress": one_of("auto", True, False),
    "trainer.save_every_minutes": POSITIVE | NULL,
    "trainer.max_skipped_steps": whole(1),
    "trainer.sanity": BOOL,
    "callbacks.probe.feature": SECTION,
    "callbacks.probe.feature.layer": whole(1) | one_of(-1),
    "callbacks.probe.feature.pool": POOL,
    "callbacks.probe.feature.norm": BOOL,
    "callbacks.probe.num_train": whole(1),
    "callbacks.probe.num_val": whole(1),
    "callbacks.probe.k": whole(1),
    "callbacks.probe.temperature": POSITIVE,
    "callbacks.gradient_norms.every_n_steps": whole(1),
    "eval.feature": SECTION,
    "eval.feature.layer": LAYER,
    "eval.feature.pool": POOL,
    "eval.feature.norm": BOOL,
    "eval.features": some(Rule(lambda v: isinstance(v, list) and v != [], "a list of {layer, pool, norm}")),
    "eval.k": whole(1) | some(whole(1)),
    "eval.temperature": POSITIVE | some(POSITIVE),
    "eval.memory": whole(1),
    "eval.l2": NOT_NEGATIVE,
    "eval.pool": POOL,
    "eval.norm": BOOL,
    "eval.lrs": some(POSITIVE),
    "eval.lr": POSITIVE,
    "eval.lr_batch": whole(1) | NULL,
    "eval.epochs": whole(1),
    "eval.batch_size": whole(1),
    "eval.optimizer": one_of("sgd", "lars"),
    "eval.momentum": number("[0, 1)"),
    "eval.weight_decay": NOT_NEGATIVE,
    "eval.batch_norm": BOOL,
    "eval.warmup_epochs": NOT_NEGATIVE,
    "eval.schedule": one_of("iteration", "epoch"),
    "eval.augment": SECTION | NULL,
    "eval.eval_interpolation": one_of("bicubic", "bilinear"),
    "eval.holdout": number("(0, 0.5]"),
    "eval.init_std": NOT_NEGATIVE,
    "eval.layer_decay": number("(0, 1]"),
    "eval.betas": list_of(number("[0, 1)"), 2),
    "eval.no_decay": list_of(TEXT),
    "eval.warmup_lr": SHARE,
    "eval.decay": one_of("cosine", "polynomial", "constant"),
    "eval.min_lr": SHARE,
    "eval.clip": POSITIVE | NULL,
    "eval.accumulate": whole(1),
    "eval.precision": Rule(one_of(32, "32", "bf16", "auto").passes, "32, bf16 or auto"),
    "eval.ema": number("[0, 1)") | NULL,
    "eval.drop_path": number("[0, 1)"),
    "eval.head_init_std": POSITIVE,
    "eval.per_block": BOOL,
    "eval.randaugment": TEXT | NULL,
    "eval.color_jitter": NOT_NEGATIVE,
    "eval.erasing_prob": SHARE,
    "eval.crop_scale": span(number("(0, 1]")),
    "eval.interpolation": one_of("bicubic", "bilinear"),
    "eval.eval_crop": number("(0, 1]") | NULL,
    "eval.mixup": NOT_NEGATIVE,
    "eval.cutmix": NOT_NEGATIVE,
    "eval.mix_prob": SHARE,
    "eval.switch_prob": SHARE,
    "eval.smoothing": number("[0, 1)"),
    "eval.layers": some(LAYER) | NULL,
    "eval.frozen": BOOL,
    "eval.scale": span(POSITIVE),
    "eval.data": SECTION | NULL,
    "eval.decode_head": SECTION,
    "eval.root": PATH | NULL,
    "eval.head": one_of("auto", "checkpoint", "probe"),
    "eval.modes": some(one_of("faithful", "matched")),
    "eval.epsilon": POSITIVE,
    "eval.rms": POSITIVE,
    "eval.bandwidth": POSITIVE,
    "eval.num_frequencies": whole(2),
    "diagnostics.num_images": whole(4),
    "diagnostics.every_n_epochs": whole(1),
    "diagnostics.batch_size": whole(1),
    "diagnostics.figures": BOOL,
    "diagnostics.layer_probe.pool": POOL,
    "diagnostics.layer_probe.norm": BOOL,
    "diagnostics.health.nmi": SHARE,
    "diagnostics.health.entropy": SHARE,
    "diagnostics.health.rank": SHARE,
    "logger.name": one_of("wandb", "csv"),
    "logger.project": TEXT,
    "logger.entity": TEXT | NULL,
    "logger.mode": one_of("auto", "online", "offline"),
}

# Keys of every single diagnostic, whatever its name; the section's value is for those that do not have their own.
EACH_DIAGNOSTIC = {"num_images": whole(1) | NULL, "every_n_epochs": whole(1)}

# Key -> the key that conf/ takes its value from: a mistake there is named there alone.
TAKEN_FROM = {
    "backbone.patch_size": "data.patch_size",
    "diagnostics.num_images": "num_images",
    "diagnostics.batch_size": "batch_size",
    **{f"{loss}.images_at_once": "trainer.images_at_once" for loss in LOSSES},
    **{
        f"{loss}.{key}": f"scale.{key}"
        for loss in LOSSES
        for key in ("hidden_dim", "decoder_width", "decoder_depth", "decoder_heads")
    },
}


# ---- relations: (the keys, a function of their values that names what is wrong) ------------------------------------


def patch_divides_image(image_size: int, patch: int) -> str | None:
    """The image is a whole number of patches."""
    if image_size < patch:
        return f"data.image_size must be at least backbone.patch_size ({patch} px), not {image_size}"
    if image_size % patch:
        return (
            f"backbone.patch_size must divide data.image_size ({image_size} px), which {patch} does not; "
            f"possible: {_divisors(image_size)}"
        )
    return None


def takes_the_data_size(key: str) -> Callable[[Any, int], str | None]:
    """Encoder and views are made for images of one size."""

    def check(size: Any, data_size: int) -> str | None:
        if size == data_size:
            return None
        return f"{key} must be data.image_size ({data_size}), not {show(size)}: set data.image_size alone"

    return check


def mask_unit_fits(key: str) -> Callable[[int, int, int | None], str | None]:
    """SimMIM's masked blocks are whole patches and tile the image."""

    def check(image_size: int, patch: int, unit: int | None) -> str | None:
        value = f"{unit}" if unit else f"null, which means two patches or {2 * patch} px,"
        side = unit or 2 * patch
        if side % patch == 0 and image_size % side == 0:
            return None
        fits = [d for d in range(patch, image_size + 1, patch) if image_size % d == 0]
        return (
            f"{key} must be a multiple of backbone.patch_size ({patch} px) that divides data.image_size "
            f"({image_size} px), which {value} is not; possible: {', '.join(map(str, fits))}"
        )

    return check


def something_stays_visible(key: str) -> Callable[[bool, float, int, int], str | None]:
    """MAE's encoder sees at least one patch, and at least one is hidden."""

    def check(_: bool, ratio: float, image_size: int, patch: int) -> str | None:
        num = (image_size // patch) ** 2
        kept = int(num * (1 - ratio))
        if 0 < kept < num:
            return None
        return f"{key} must leave some of the {num} patches visible and hide some, not keep {kept} as {ratio} does"

    return check


def decoder_heads_divide(prefix: str) -> Callable[[int, int], str | None]:
    """The decoder's attention heads have a whole width, and its positions four equal parts."""

    def check(width: int, heads: int) -> str | None:
        if width % heads or width % 4:
            return f"{prefix}.decoder_width must be divisible by 4 and by {prefix}.decoder_heads ({heads}), not {width}"
        return None

    return check


PARTS: dict[str, tuple[Callable[[Config], bool], str]] = {
    "loss.contrastive": (lambda part: "temperature" in part, "a contrastive loss (contrastive)"),
    "loss.mim": (lambda part: "mask_ratio" in part, "a masked-image-modelling loss (mim or mae)"),
}
"""Part of the hybrid -> whether a loss can be that part, and what can."""


def part_fits(key: str) -> Callable[[Config], str | None]:
    """The hybrid joins a contrastive and a masked-image-modelling objective, and not itself."""
    fits, allowed = PARTS[key]
    return lambda part: None if fits(part) else f"loss@{key} must choose {allowed}"


def recipe_exists(key: str) -> Callable[[str, Config], str | None]:
    """The augmentation recipe that an objective names is one of the views."""

    def check(recipe: str, views: Config) -> str | None:
        return None if recipe in views else f"{key} must be one of the views, {', '.join(views)}, not {show(recipe)}"

    return check


def token_exists(key: str) -> Callable[[str, bool], str | None]:
    """A class token can be read where there is one."""

    def check(pool: str, class_token: bool) -> str | None:
        if pool == "cls" and not class_token:
            return f"{key} must be patch_mean with backbone.class_token=false, not cls"
        return None

    return check


def heads_divide_width(width: int, heads: int) -> str | None:
    """Attention heads have a whole width."""
    return f"backbone.num_heads must divide backbone.width ({width}), which {heads} does not" if width % heads else None


def sincos_needs_four_parts(width: int, positions: str) -> str | None:
    """Sin-cos positions have four parts: sine and cosine of row and column."""
    if str(positions).startswith("sincos") and width % 4:
        return f"backbone.width must be divisible by 4 with backbone.positions={positions}, not {width}"
    return None


def batch_splits(batch: int, devices: int, nodes: int, accumulate: int) -> str | None:
    """The global batch is the same number of images in every micro-batch of every device."""
    parts = devices * nodes * accumulate
    if batch % parts:
        return (
            f"data.batch_size must be divisible by trainer.devices x trainer.num_nodes x trainer.accumulate "
            f"({devices} x {nodes} x {accumulate} = {parts}), which {batch} is not"
        )
    return None


def contrast_needs_two(
    _: float, batch: int, devices: int, nodes: int, accumulate: int, weight: Any = 1.0
) -> str | None:
    """A contrastive micro-batch has another image to contrast with (and batch norm something to average)."""
    parts = devices * nodes * accumulate
    if batch // parts >= 2 or weight == 0:
        return None
    return (
        f"data.batch_size must be at least {2 * parts} for the contrastive loss: two images in every micro-batch "
        f"of every device, not {batch}"
    )


def enough_for_a_batch(num_train: int | None, batch: int, _: Config) -> str | None:
    """An epoch of training has at least one full batch."""
    if num_train is not None and num_train < batch:
        return f"data.batch_size must be at most data.num_train ({num_train}), not {batch}"
    return None


def depth_has_two_losses(by_depth: Any, depth: int, weight: Any, share_views: bool, strategy: str) -> str | None:
    """A weight for each depth takes two losses, each with a pass and with weights of its own."""
    if by_depth is None:
        return None
    if isinstance(by_depth, list) and len(by_depth) != depth:
        return f"loss.lambda_by_depth must have backbone.depth ({depth}) weights, not {len(by_depth)}"
    if not is_number(weight) or not 0 < weight < 1:
        return f"loss.lambda must be a number in (0, 1) with loss.lambda_by_depth, not {show(weight)}"
    if share_views:
        return "loss.share_views must be false with loss.lambda_by_depth, not true"
    if strategy == "fsdp":
        return "trainer.strategy must be ddp with loss.lambda_by_depth, not fsdp"
    return None


def shards_alone(strategy: str, precision: Any, compile_: Any, images_at_once: int | None) -> str | None:
    """What has not been seen to work on sharded weights is refused."""
    if strategy != "fsdp":
        return None
    if precision == "fp16":
        return "trainer.precision must be 32, bf16 or auto with trainer.strategy=fsdp, not fp16"
    if compile_ is True:
        return "trainer.compile must be auto or false with trainer.strategy=fsdp, not true"
    if images_at_once is not None:
        return f"trainer.images_at_once must be null with trainer.strategy=fsdp, not {show(images_at_once)}"
    return None


def some_length(epochs: int | None, steps: int | None) -> str | None:
    """A run has an end."""
    if epochs is None and steps is None:
        return "trainer.max_epochs must be a whole number of at least 1 when trainer.max_steps is null, not null"
    return None


def layer_exists(layer: int, depth: int) -> str | None:
    """The probed block exists."""
    if layer > depth:
        return f"callbacks.probe.feature.layer must be -1 or at most backbone.depth ({depth}), not {layer}"
    return None


def one_value(key: str) -> Callable[[str, Any], str | None]:
    """The probes of every block take one number where k-NN takes a list."""

    def check(target: str, value: Any) -> str | None:
        if target.endswith(".LayerProbe") and isinstance(value, list):
            return f"{key} must be one number with eval=layer_probe, not {show(value)}"
        return None

    return check


def one_name_each(checkpoint: Any, names: list[str] | None) -> str | None:
    """Every checkpoint has its name, or none has."""
    num = len(checkpoint) if isinstance(checkpoint, list) else 1
    if names is not None and len(set(names)) < len(names):
        return f"names must differ from each other, which {show(names)} do not"
    if names is None or len(names) == num:
        return None
    return f"names must be null or a list of {num}, one for each checkpoint, not {show(names)}"


IMAGE = ("data.image_size", "backbone.patch_size")
BATCH = ("data.batch_size", "trainer.devices", "trainer.num_nodes", "trainer.accumulate")
RELATIONS: list[tuple[tuple[str, ...], Callable[..., str | None]]] = [
    (IMAGE, patch_divides_image),
    *(
        ((key, "data.image_size"), takes_the_data_size(key))
        for key in ("backbone.image_size", *(f"views.{recipe}.image_size" for recipe in RECIPES))
    ),
    *(((*IMAGE, f"{p}.mask_unit"), mask_unit_fits(f"{p}.mask_unit")) for p in ("loss", "loss.mim")),
    *(
        ((f"{p}.norm_pix_loss", f"{p}.mask_ratio", *IMAGE), something_stays_visible(f"{p}.mask_ratio"))
        for p in ("loss", "loss.mim")
    ),
    *(((f"{p}.decoder_width", f"{p}.decoder_heads"), decoder_heads_divide(p)) for p in ("loss", "loss.mim")),
    *(((part,), part_fits(part)) for part in PARTS),
    *(((f"{loss}.recipe", "views"), recipe_exists(f"{loss}.recipe")) for loss in LOSSES),
    *(
        ((f"{owner}.pool", "backbone.class_token"), token_exists(f"{owner}.pool"))
        for owner in ("loss", "loss.contrastive", "callbacks.probe.feature", "diagnostics.layer_probe")
    ),
    (("backbone.width", "backbone.num_heads"), heads_divide_width),
    (("backbone.width", "backbone.positions"), sincos_needs_four_parts),
    (BATCH, batch_splits),
    (("loss.temperature", *BATCH), contrast_needs_two),
    (("loss.contrastive.temperature", *BATCH, "loss.lambda"), contrast_needs_two),
    (("data.num_train", "data.batch_size", "trainer"), enough_for_a_batch),
    (("trainer.max_epochs", "trainer.max_steps"), some_length),
    (
        ("loss.lambda_by_depth", "backbone.depth", "loss.lambda", "loss.share_views", "trainer.strategy"),
        depth_has_two_losses,
    ),
    (tuple(f"trainer.{key}" for key in ("strategy", "precision", "compile", "images_at_once")), shards_alone),
    (("callbacks.probe.feature.layer", "backbone.depth"), layer_exists),
    (("checkpoint", "names"), one_name_each),
    (("eval._target_", "eval.k"), one_value("eval.k")),
    (("eval._target_", "eval.temperature"), one_value("eval.temperature")),
]


# ---- both tables ---------------------------------------------------------------------------------------------------

_ABSENT = object()


def get(config: Config, key: str) -> Any:
    """The value at a dotted key, or a sentinel that no rule passes on."""
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return _ABSENT
        node = node[part]
    return node


def violations(config: Config, failed: Iterable[str] = (), command: str = "train") -> Iterator[str]:
    """One sentence for every rule that a configuration breaks; each begins with the key to change.

    Args:
        config: The resolved configuration as plain containers.
        failed: Keys that are known to be wrong: no relation is asked of them, nor of those that are found here.
        command: The command that the configuration is for.

    >>> list(violations({"seed": -1}))[-1]
    'seed must be a whole number of at least 0, not -1.'
    """
    for section in (*SECTIONS[command], *OPTIONAL[command]):
        rule, value = SECTION | NULL if section in OPTIONAL[command] else SECTION, config.get(section)
        if not rule.passes(value):
            yield f"{section} must be {rule.allowed}, not {show(value)}."
    failed = set(failed)
    each = list(_keys_of_diagnostics(config))
    sources = TAKEN_FROM | {f"{place}.{key}": f"diagnostics.{key}" for place, key in each}
    rules = VALUES | {f"{place}.{key}": EACH_DIAGNOSTIC[key] for place, key in each}
    for key, rule in rules.items():
        value = get(config, key)
        if value is not _ABSENT and not rule.passes(value):
            source = sources.get(key)
            if source not in failed or get(config, source) != value:
                yield f"{key} must be {rule.allowed}, not {show(value)}."
            failed.add(key)
    for keys, relation in RELATIONS:
        values = [get(config, key) for key in keys]
        if any(v is _ABSENT for v in values) or failed & set(keys):
            continue
        problem = relation(*values)
        if problem:
            failed.add(problem.split()[0])
            yield f"{problem}."


def _keys_of_diagnostics(config: Config) -> Iterator[tuple[str, str]]:
    """Place of each diagnostic of this configuration, and each key that can be set there."""
    section = config.get("diagnostics")
    for name, part in section.items() if isinstance(section, Mapping) else ():
        if isinstance(part, Mapping) and "_target_" in part:
            yield from ((f"diagnostics.{name}", key) for key in EACH_DIAGNOSTIC)


def _divisors(number: int) -> str:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return ", ".join(map(str, [d for d in divisors if d >= 4][:6] or divisors))
