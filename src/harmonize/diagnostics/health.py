"""When a curve says that something has gone wrong: rules with thresholds (docs/diagnostics.md, "Health")."""

from __future__ import annotations

import math
from dataclasses import dataclass

from harmonize.types import Curve, EncoderSpec, Findings


@dataclass(frozen=True)
class Alarm:
    """One rule that one network breaks.

    Attributes:
        rule: ``attention collapse``, ``uniform attention``, ``dimensional collapse`` or ``not a number``.
        curve: The curve that says so.
        values: Block number -> value, of the blocks concerned.
        threshold: What the values are compared with, in words.
        meaning: What it means for the user.
    """

    rule: str
    curve: str
    values: dict[int, float]
    threshold: str
    meaning: str

    def __str__(self) -> str:
        listed = ", ".join(f"block {layer}: {value:.3g}" for layer, value in self.values.items())
        return f"{self.rule}: {self.curve} {self.threshold} ({listed}): {self.meaning}."


@dataclass(frozen=True)
class Health:
    """The thresholds.

    Attributes:
        nmi: Attention collapse below it, where attention is not uniform.
        entropy: Uniform attention above it (entropy relative to log N).
        rank: Dimensional collapse below it, as a share of the rank that so many images could have.
    """

    nmi: float = 0.02
    entropy: float = 0.99
    rank: float = 0.05

    def check(self, found: Findings, spec: EncoderSpec) -> list[Alarm]:
        """The alarms that the curves give; curves that were not measured give none."""
        curves = found.curves
        alarms = [
            Alarm("not a number", name, bad, "is not finite", "the weights or the activations are broken")
            for name, curve in curves.items()
            if (bad := {i: x for i, x in zip(curve.layer, curve.value, strict=True) if not math.isfinite(x)})
        ]
        entropy = _values(curves.get("attention_entropy"))
        uniform = {i: x for i, x in entropy.items() if x > self.entropy}
        if uniform:
            meaning = "attention does not choose; nothing can be read from distance or mutual information there"
            alarms.append(
                Alarm("uniform attention", "attention_entropy", uniform, f"is above {self.entropy:g}", meaning)
            )
        collapsed = {i: x for i, x in _values(curves.get("nmi")).items() if x < self.nmi and i not in uniform}
        if collapsed:
            meaning = "all queries attend to the same places"
            alarms.append(Alarm("attention collapse", "nmi", collapsed, f"is below {self.nmi:g}", meaning))
        possible = min(found.num_images - 1, spec.width)
        low = {i: x for i, x in _values(curves.get("image_effective_rank")).items() if i and x < self.rank * possible}
        if low:
            threshold = f"is below {self.rank * possible:.3g} ({self.rank:g} of the possible {possible})"
            meaning = "features of different images use few directions"
            alarms.append(Alarm("dimensional collapse", "image_effective_rank", low, threshold, meaning))
        return alarms


def _values(curve: Curve | None) -> dict[int, float]:
    """Block number -> value, of what is finite."""
    if curve is None:
        return {}
    return {i: x for i, x in zip(curve.layer, curve.value, strict=True) if math.isfinite(x)}
