"""Values that change over training, as pure functions of the share of the run that is done."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence


def cosine(fraction: float, start: float, end: float) -> float:
    """Half a cosine from ``start`` (fraction 0) to ``end`` (fraction 1).

    >>> cosine(0.5, 0.0, 1.0)
    0.5
    """
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * fraction))


def momentum(fraction: float, base: float) -> float:
    """MoCo v3's momentum: ``1 - (1 - base) * (1 + cos(pi * fraction)) / 2``, from ``base`` up to 1.

    Source: MoCo v3 ``main_moco.py`` (``adjust_moco_momentum``).

    >>> momentum(0.0, 0.99), momentum(1.0, 0.99)
    (0.99, 1.0)
    """
    return cosine(fraction, base, 1.0)


def learning_rate(
    fraction: float,
    peak: float,
    *,
    warmup: float = 0.0,
    warmup_lr: float = 0.0,
    decay: str = "cosine",
    min_lr: float = 0.0,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
    power: float = 1.0,
) -> float:
    """Learning rate of an optimiser step.

    Linear warm-up, then half a cosine or a polynomial from the peak to the minimum, or steps, or nothing. Everything is
    a share, so that a run of another length keeps its shape.

    Args:
        fraction: Share of the run that is done before the step.
        peak: Learning rate at the end of the warm-up.
        warmup: Length of the warm-up, as a share of all steps.
        warmup_lr: Where the warm-up starts, as a share of the peak.
        decay: ``cosine``, ``polynomial``, ``multistep`` or ``constant``.
        min_lr: Where cosine and polynomial end, as a share of the peak.
        milestones: Of ``multistep``, as shares of all steps.
        gamma: Factor at each milestone.
        power: Of ``polynomial``; 1: a straight line.

    Raises:
        ValueError: ``decay`` is something else.

    Source:
        MoCo v3 ``main_moco.py`` and MAE ``util/lr_sched.py`` (cosine), SimMIM ``lr_scheduler.py`` (multistep),
        mmsegmentation ``PolyLR`` (polynomial, which there runs from the first step on, warm-up included).

    >>> learning_rate(0.1, 1.0, warmup=0.2)
    0.5
    >>> round(learning_rate(0.6, 1.0, warmup=0.2), 6)
    0.5
    """
    if fraction < warmup:
        return peak * (warmup_lr + (1 - warmup_lr) * fraction / warmup)
    if decay == "constant":
        return peak
    if decay == "multistep":
        return peak * gamma ** bisect_right(sorted(milestones), fraction)
    done = (fraction - warmup) / (1 - warmup) if warmup < 1 else 1.0
    if decay == "cosine":
        return peak * (min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * done)))
    if decay == "polynomial":
        return peak * (min_lr + (1 - min_lr) * (1 - done) ** power)
    raise ValueError(f"decay={decay} must be cosine, polynomial, multistep or constant.")


def weight_schedule(value: float | Mapping[str, float | str]) -> Callable[[float], float]:
    """The weight lambda over training.

    Args:
        value: A number in [0, 1], or a mapping: ``schedule`` (``linear``, ``cosine`` or ``step``), ``start``, ``end``,
            and for ``step`` the share of the run ``at`` which start becomes end (default 0.5).

    Returns:
        A function of the share of the run that is done.

    Raises:
        ValueError: If a number is outside [0, 1] or the mapping has other keys.

    >>> weight_schedule({"schedule": "linear", "start": 0.0, "end": 0.4})(0.5)
    0.2
    """
    if not isinstance(value, Mapping):
        constant = _unit(value, "lambda")
        return lambda fraction: constant
    unknown = set(value) - {"schedule", "start", "end", "at"}
    kind = value.get("schedule")
    if unknown or kind not in ("linear", "cosine", "step") or not {"start", "end"} <= set(value):
        raise ValueError(
            f"lambda={dict(value)} is not a schedule; give schedule (linear, cosine or step), start and end, "
            "and for step also at"
        )
    start, end, at = (_unit(value.get(key, 0.5), f"lambda.{key}") for key in ("start", "end", "at"))
    if kind == "linear":
        return lambda fraction: start + (end - start) * fraction
    if kind == "cosine":
        return lambda fraction: cosine(fraction, start, end)
    return lambda fraction: start if fraction < at else end


def _unit(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{key}={value} must be a number between 0 and 1")
    return float(value)
