"""The model card: what a reader of an exported file must know, as a README in Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from harmonize import __version__
from harmonize.types import IMAGE_MEAN, IMAGE_STD, EncoderSpec, Result

NOT_STATED = "not stated"
NON_COMMERCIAL = {"moco_v3": "MoCo v3", "mae": "MAE"}
"""Official weights under CC-BY-NC 4.0, by recipe. Source: LICENSE of facebookresearch/moco-v3 and .../mae."""

_CITATION = """@inproceedings{park2023self,
  title     = {What Do Self-Supervised Vision Transformers Learn?},
  author    = {Park, Namuk and Kim, Wonjae and Heo, Byeongho and Kim, Taekyung and Yun, Sangdoo},
  booktitle = {International Conference on Learning Representations},
  year      = {2023},
  note      = {arXiv:2305.00729}
}"""


@dataclass(frozen=True)
class CardFacts:
    """What the encoder itself does not know about its origin; empty where it is not known.

    Attributes:
        objective: For example ``hybrid``.
        weight: lambda of the hybrid, the weight of contrastive learning.
        data: What it was trained on.
        epochs: Epochs finished.
        steps: Optimiser steps finished.
        results: What evaluations found.
        config: The run's configuration, as YAML.
        license: Of the weights, where possible as an SPDX identifier.
        derived_from: Recipe of the official weights that training or this export started from, for example ``mae``.
    """

    objective: str = ""
    weight: float | None = None
    data: str = ""
    epochs: float | None = None
    steps: int | None = None
    results: Sequence[Result] = ()
    config: str = ""
    license: str = NOT_STATED
    derived_from: str = ""

    @property
    def weights_license(self) -> str:
        """Licence of the weights: what is derived from non-commercial ones stays non-commercial."""
        return "CC-BY-NC-4.0" if self.derived_from in NON_COMMERCIAL else self.license


def model_card(name: str, spec: EncoderSpec, facts: CardFacts, snippet: str, fingerprint: Sequence[float]) -> str:
    """A model card in Markdown.

    Args:
        name: Title.
        spec: The encoder's.
        facts: Where it comes from.
        snippet: Python that loads it.
        fingerprint: See :mod:`harmonize.checkpoints.fingerprint`.
    """
    height, width = spec.image_size
    registers = spec.num_prefix_tokens - spec.has_class_token
    trained = {
        "objective": facts.objective,
        "lambda (weight of contrastive learning)": facts.weight,
        "data": facts.data,
        "epochs": facts.epochs,
        "optimiser steps": facts.steps,
        "started from": facts.derived_from and f"the official weights of {_recipe(facts.derived_from)}",
    }
    table = {key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in trained.items()}
    table = {key: value for key, value in table.items() if value not in ("", "None")}
    parts = [
        f"# {name}",
        f"A Vision Transformer, exported by harmonize {__version__}: {spec.depth} blocks of width {spec.width} with "
        f"{spec.num_heads} heads, patches of {spec.patch_size} px, images of {height} x {width} px (height x width), "
        f"{'a' if spec.has_class_token else 'no'} class token, {registers or 'no'} registers.",
        "## How to load it\n\n" + _fenced("python", snippet),
        f"Images are RGB in [0, 1], normalised per colour with mean {_numbers(IMAGE_MEAN)} and standard deviation "
        f"{_numbers(IMAGE_STD)}.",
        "## How it was trained",
        _table(("", ""), list(table.items())) if table else "Not stated.",
        "## Results",
        _results(facts.results) if facts.results else "None were given.",
        "## Licence of the weights",
        f"{facts.weights_license[0].upper()}{facts.weights_license[1:]}.",
    ]
    if facts.derived_from in NON_COMMERCIAL:
        parts.append(
            f"**Warning:** these weights derive from the official weights of {_recipe(facts.derived_from)}, which are "
            "licensed for non-commercial use only (CC-BY-NC 4.0), and keep that licence."
        )
    if facts.config:
        parts += ["## Configuration", _fenced("yaml", facts.config)]
    parts += [
        "## Fingerprint",
        "Sixteen numbers that the features of two fixed images give in fp32 (`harmonize.checkpoints.fingerprint`); "
        "weights that were loaded wrongly give others.",
        _fenced("json", json.dumps([round(number, 6) for number in fingerprint])),
        "## Citation",
        _fenced("bibtex", _CITATION),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(name: str, facts: CardFacts, classifier: bool) -> str:
    """The YAML before a model card from which the Hugging Face hub knows library, task and licence.

    Source: Hugging Face hub documentation, "Model Cards".
    """
    task = "image-classification" if classifier else "image-feature-extraction"
    license_id = facts.weights_license.lower()
    if license_id == NOT_STATED:
        license_id = "unknown"
    known = re.fullmatch(r"[a-z0-9.+-]+", license_id) is not None
    lines = [f"license: {license_id}"] if known else ["license: other", f"license_name: {_yaml(facts.weights_license)}"]
    tags = ["timm", task, "self-supervised-learning", "vision-transformer", "harmonize", "arxiv:2305.00729"]
    lines += [f"model_name: {_yaml(name)}", "library_name: timm", f"pipeline_tag: {task}", "tags:"]
    return "\n".join(["---", *lines, *(f"- {_yaml(tag)}" for tag in tags), "---", "", ""])


def _results(results: Sequence[Result]) -> str:
    def row(result: Result) -> tuple[str, ...]:
        value = f"{result.value:.4g}"
        if result.error is not None:
            value += f" ± {result.error:.2g}"
        if result.interval is not None:
            value += f" ({result.interval[0]:.4g} to {result.interval[1]:.4g})"
        at = f"{result.axis} {result.at:g}" if result.axis and result.at is not None else ""
        what = ", ".join(filter(None, (result.series, at, result.feature, result.note)))
        return result.metric, value, str(result.num_images), what

    errors = "± is the standard error over images; an interval in parentheses has 95 %."
    return _table(("metric", "value", "images", ""), [row(result) for result in results]) + f"\n\n{errors}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[re.sub(r"\s+", " ", cell.replace("|", r"\|")) for cell in row] for row in (header, *rows)]
    cells.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _fenced(language: str, text: str) -> str:
    """A block of code whose fence the text cannot close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _recipe(key: str) -> str:
    return NON_COMMERCIAL.get(key, key)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(map(str, values))


def _yaml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a JSON string is a YAML string
