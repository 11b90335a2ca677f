"""Values that change over training, as pure functions of the share of the run that is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping


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
