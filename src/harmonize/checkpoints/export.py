"""``harmonize export``: an encoder as files that other programs load, checked before they are in their place.

Formats: ``timm`` (a folder for ``timm.create_model``), ``hf`` (the same with what the Hugging Face hub wants to know),
``safetensors`` (one file, which harmonize loads again) and ``onnx``. ``hf`` is the layout of timm's own models on the
hub: timm loads it as ``hf-hub:USER/NAME`` and the ``transformers`` library through its wrapper for timm, while the
``ViTModel`` of ``transformers`` has neither registers nor LayerScale nor relative positions.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from safetensors.torch import save_file
from torch import Tensor, nn

from harmonize import __version__
from harmonize.backbones.timm_export import TimmHead, TimmModel, load_timm, timm_outputs, to_timm
from harmonize.backbones.timm_vit import ViTEncoder
from harmonize.checkpoints.fingerprint import difference, exact, fingerprint, plain_copy, probe_images
from harmonize.checkpoints.model_card import NOT_STATED, CardFacts, front_matter, model_card
from harmonize.checkpoints.onnx_file import pooled, require_packages, save_onnx
from harmonize.checkpoints.single_file import load_exported, save_encoder
from harmonize.files import write_json
from harmonize.types import IMAGE_MEAN, IMAGE_STD, ConfigError, EncoderSpec, FeatureSpec

FORMATS = ("timm", "safetensors", "onnx", "hf")
MAX_DIFFERENCE = 1e-4
"""See :func:`~harmonize.checkpoints.fingerprint.difference`; features after the final norm have the size of one."""

_MARK = "<!-- files of this harmonize export: {} -->"


class Classifier(Protocol):
    """A linear classifier on an encoder's features (an ``nn.Module``), as evaluations fit and fine-tune them."""

    features: list[FeatureSpec]
    norm: nn.Module
    linear: nn.Linear
    classes: list[str] | None

    def logits(self, encoder: nn.Module, images: Tensor) -> Tensor:
        """Class scores (B, C) of images (B, 3, h, w)."""


@dataclass(frozen=True)
class Exported:
    """What an export has written.

    Attributes:
        files: In the folder; the model card ``README.md`` is one of them.
        snippet: Python that loads the files and runs the network once.
        difference: Of the loaded network's outputs from the encoder's own, see :data:`MAX_DIFFERENCE`.
    """

    files: list[Path]
    snippet: str
    difference: float


def export(
    encoder: ViTEncoder,
    folder: Path,
    format: str,
    *,
    card: CardFacts | None = None,
    head: Classifier | None = None,
    name: str = "encoder",
) -> Exported:
    """Write an encoder for other programs, load it again as they would and compare.

    Args:
        encoder: Any device and precision; files hold fp32.
        folder: Whole or not there; an earlier export in it is replaced.
        format: One of :data:`FORMATS`.
        card: What the model card says about its origin.
        head: A classifier to go with it, for ``timm`` and ``hf``.
        name: Stem of files and title of the model card.

    Raises:
        ConfigError: The format cannot hold this encoder or head, a package is missing, the folder holds something
            else, or the loaded network differs by more than :data:`MAX_DIFFERENCE`.
    """
    folder, facts = folder.expanduser().resolve(), card or CardFacts()
    if format not in FORMATS:
        raise ConfigError(f"format={format} must be one of {', '.join(FORMATS)}.")
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ConfigError(f"name={name!r} must consist of letters, digits and . _ + -, as it becomes a file name.")
    if head is not None and format not in ("timm", "hf"):
        raise ConfigError(f"format={format} exports no classifier; format=timm and format=hf do.")
    if format == "onnx":
        require_packages()
    _refuse_foreign(folder)
    encoder, head = plain_copy(encoder), None if head is None else cast(Any, plain_copy(cast(nn.Module, head)))
    numbers = fingerprint(encoder)
    if not all(map(math.isfinite, numbers)):
        raise ConfigError("The encoder's features are not finite; there is nothing to export.")
    with _written_whole(folder) as new:
        if format == "safetensors":
            deviation, body = _write_safetensors(encoder, new, name, facts, numbers)
        elif format == "onnx":
            deviation, body = _write_onnx(encoder, new, name, facts, numbers)
        else:
            deviation, body = _write_timm(encoder, new, facts, numbers, head, hub=format == "hf")
        if not deviation <= MAX_DIFFERENCE:
            raise ConfigError(
                f"format={format}: the outputs of the exported network differ by {deviation:.1g} from the encoder's, "
                f"more than {MAX_DIFFERENCE:g}; nothing was written."
            )
        files = sorted(["README.md", *(path.name for path in new.iterdir())])
        text = model_card(name, encoder.spec, facts, _snippet(body, folder.name), numbers)
        matter = front_matter(name, facts, head is not None) if format == "hf" else ""
        (new / "README.md").write_text(f"{matter}{text}\n{_MARK.format(' '.join(files))}\n", encoding="utf-8")
    return Exported([folder / file for file in files], _snippet(body, str(folder)), deviation)


def _write_timm(
    encoder: ViTEncoder, folder: Path, facts: CardFacts, numbers: list[float], head: Classifier | None, hub: bool
) -> tuple[float, str]:
    """``config.json`` and ``model.safetensors`` as timm's own; the outputs' difference and the code that loads them."""
    model = to_timm(encoder, None if head is None else _timm_head(head, encoder.spec))
    if hub and not model.through_hub:
        raise ConfigError(
            "format=hf: from the hub, timm would resample the relative positions of a grid that is not square; "
            "format=timm writes a folder that can be loaded without that."
        )
    save_file(model.weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", _timm_config(encoder, model, facts, numbers, head))
    with exact():
        images = probe_images(encoder.spec, 2)
        found = timm_outputs(load_timm(folder, model.through_hub), images)
        tokens = encoder(images)
        expected = [tokens, pooled(encoder, tokens)]
        if head is not None:
            found, expected = found[1:], [head.logits(encoder, images)]  # its norm may stand in for the final one
        deviation = difference(found, expected)
    if model.through_hub:
        imports = ["import timm", "import torch"]
        load = ['model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()  # timm 1.0.26 or later']
    else:
        imports = ["import json", "", "import timm", "import torch"]
        load = [
            'config = json.load(open(f"{folder}/config.json"))',
            "model = timm.create_model(  # timm 1.0.26 or later",
            '    config["architecture"],',
            '    checkpoint_path=f"{folder}/model.safetensors",',
            '    pretrained_cfg=config["pretrained_cfg"],',
            '    num_classes=config["num_classes"],',
            '    **config["model_args"],',
            ").eval()",
        ]
    if hub:
        load += [
            '# Publish: huggingface_hub.upload_folder(repo_id="USER/NAME", folder_path=folder); from then on, anyone:',
            '# timm.create_model("hf-hub:USER/NAME", pretrained=True)',
        ]
    spec = encoder.spec
    what = "class scores" if head else f"(B, {spec.width}): {_pooled_name(spec)}"
    body = [*imports, "", "folder = FOLDER", *load, _IMAGES.format(2, *spec.image_size)]
    body += ["with torch.no_grad():", f"    tokens = model.forward_features(images)  # {_tokens_name(spec)}"]
    return deviation, "\n".join([*body, f"    features = model(images)  # {what}"])


def _timm_head(head: Classifier, spec: EncoderSpec) -> TimmHead:
    """A head as timm has them: on the last block, after one norm.

    Raises:
        ConfigError: It reads something else.
    """
    read = head.features[0]
    norm = head.norm if isinstance(head.norm, nn.LayerNorm) else None
    one = len(head.features) == 1 and read.layer in (-1, spec.depth) and read.pool in ("cls", "patch_mean")
    if not one or read.norm is not (norm is None):
        raise ConfigError(
            "timm's classifiers read the class token or the mean of the patch tokens of the last block, after one "
            f"norm; this one reads {' and '.join(map(str, head.features))}{' through a norm' if norm else ''}."
        )
    return TimmHead(read.pool, head.linear, norm)


def _timm_config(
    encoder: ViTEncoder, model: TimmModel, facts: CardFacts, numbers: list[float], head: Classifier | None
) -> dict[str, Any]:
    """``config.json`` of a folder that timm loads. Source: timm ``models/_hub.py``, ``models/_pretrained.py``."""
    num_classes = head.linear.out_features if head else 0
    config: dict[str, Any] = {
        "architecture": model.architecture,
        "num_classes": num_classes,
        "num_features": encoder.spec.width,
        "global_pool": model.model_args["global_pool"],
        "model_args": model.model_args,
        "pretrained_cfg": {
            "input_size": [3, *encoder.spec.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.875,  # of the evaluation view
            "crop_mode": "center",
            "mean": IMAGE_MEAN,
            "std": IMAGE_STD,
            "num_classes": num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "harmonize": {"version": __version__, "fingerprint": numbers},
    }
    if facts.weights_license != NOT_STATED:
        config["pretrained_cfg"]["license"] = facts.weights_license.lower()
    if head is not None and head.classes is not None:
        config["label_names"] = head.classes
    return config


def _write_safetensors(
    encoder: ViTEncoder, folder: Path, name: str, facts: CardFacts, numbers: list[float]
) -> tuple[float, str]:
    """One file for harmonize; see :func:`_write_timm`."""
    save_encoder(encoder, folder / f"{name}.safetensors", facts, numbers)
    with exact():
        images = probe_images(encoder.spec, 2)
        loaded = load_exported(folder / f"{name}.safetensors")
        deviation = difference([loaded(images)], [encoder(images)])
    spec = encoder.spec
    pooling = "tokens[:, 0]" if spec.has_class_token else f"tokens[:, {spec.num_prefix_tokens}:].mean(1)"
    body = [
        "import torch",
        "",
        "from harmonize.checkpoints.single_file import load_exported",
        "",
        "folder = FOLDER",
        f'encoder = load_exported(f"{{folder}}/{name}.safetensors")',
        _IMAGES.format(2, *spec.image_size),
        "with torch.no_grad():",
        f"    tokens = encoder(images)  # {_tokens_name(spec)}",
        f"features = {pooling}  # (B, {spec.width}): {_pooled_name(spec)}",
    ]
    return deviation, "\n".join(body)


def _write_onnx(
    encoder: ViTEncoder, folder: Path, name: str, facts: CardFacts, numbers: list[float]
) -> tuple[float, str]:
    """One file for ONNX Runtime and its like; see :func:`_write_timm`."""
    metadata = {
        "harmonize_version": __version__,
        "fingerprint": json.dumps(numbers),
        "license": facts.weights_license,
        "mean": json.dumps(IMAGE_MEAN),
        "std": json.dumps(IMAGE_STD),
    }
    with exact():
        deviation = save_onnx(encoder, folder / f"{name}.onnx", metadata)
    spec = encoder.spec
    height, width = spec.image_size
    body = [
        "import numpy",
        "import onnxruntime",
        "",
        "folder = FOLDER",
        f'session = onnxruntime.InferenceSession(f"{{folder}}/{name}.onnx", providers=["CPUExecutionProvider"])',
        f'images = numpy.random.default_rng(0).standard_normal((2, 3, {height}, {width}), "float32")  # {_NORMALIZED}',
        'tokens, features = session.run(None, {"images": images})',
        f"# tokens: {_tokens_name(spec)}; features (B, {spec.width}): {_pooled_name(spec)}",
    ]
    return deviation, "\n".join(body)


_NORMALIZED = f"normalised with mean {IMAGE_MEAN} and std {IMAGE_STD}"
_IMAGES = f"images = torch.randn({{}}, 3, {{}}, {{}})  # {_NORMALIZED}"


def _tokens_name(spec: EncoderSpec) -> str:
    registers = spec.num_prefix_tokens - spec.has_class_token
    parts = ["class token"] * spec.has_class_token + [f"{registers} registers"] * (registers > 0)
    return f"(B, {spec.num_prefix_tokens + spec.num_patches}, {spec.width}): {', '.join([*parts, 'patch tokens'])}"


def _pooled_name(spec: EncoderSpec) -> str:
    return "the class token" if spec.has_class_token else "the mean of the patch tokens"


def _snippet(body: str, folder: str) -> str:
    """Code that finds its files in a folder."""
    return body.replace("folder = FOLDER", f"folder = {json.dumps(folder, ensure_ascii=False)}", 1)


def _refuse_foreign(folder: Path) -> None:
    """Refuse to replace anything but an earlier export.

    Raises:
        ConfigError: There is something else.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file; an export needs a folder.")
    card = folder / "README.md"
    mark = re.escape(_MARK).replace(r"\{\}", "(.*)")
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    ours = {name for names in re.findall(mark, text)[-1:] for name in names.split()}
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in ours or not path.is_file())
    if foreign:
        raise ConfigError(
            f"{folder} holds {foreign[0]}, which no export has written; only an empty folder or an earlier export is "
            "replaced."
        )


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder`` that takes its place at the end, unless something goes wrong."""
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{what}") for what in ("new", "old"))
    new.mkdir(parents=True)
    try:
        yield new
        _refuse_foreign(folder)  # again: writing may have taken minutes
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
