"""Claims about groups of runs, and what the runs say: supported, contradicted, or not supported.

A claim says that a quantity is larger in one group than in another. It is supported where the 95 % interval of the
difference of their means (Welch's, over runs that differ in their seed) lies above 0, contradicted where it lies below,
and not supported where it holds 0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harmonize.reports.comparison import Cell, Group
from harmonize.reports.study import MARKS, Finding
from harmonize.types import ConfigError

LAYERS = ("first", "early", "middle", "late", "last", "all", "best", "fall")
"""Of an axis: its first place, thirds, its last place, the mean over all, its largest value, that minus the last."""

SUPPORTED, CONTRADICTED, UNDECIDED, UNTESTED = MARKS


@dataclass(frozen=True)
class Side:
    """One side of a claim.

    Attributes:
        group: Name of the group of runs.
        quantity: A metric, or a curve over blocks or another axis.
        layers: What of the curve is meant, one of :data:`LAYERS`; empty for a metric.
        minus: What is taken off, run by run in the order of their seeds; None: nothing.
    """

    group: str
    quantity: str
    layers: str = ""
    minus: Side | None = None

    def __str__(self) -> str:
        layers = f" ({self.layers})" if self.layers else ""
        return f"{self.group}{layers}" + (f" minus {self.minus}" if self.minus else "")


@dataclass(frozen=True)
class Claim:
    """A testable statement.

    Attributes:
        text: In words.
        more: Where the quantity is claimed to be larger.
        less: Where it is claimed to be smaller.
        source: Where the claim is from, such as ``Figure 4``.
        remark: What a reader of the verdict should know.
    """

    text: str
    more: Side
    less: Side
    source: str = ""
    remark: str = ""


def read_claim(node: Mapping[str, Any]) -> Claim:
    """A claim as ``findings.yaml`` writes it.

    ``quantity`` and ``layers`` hold for both sides, unless a side is a mapping with its own:
    ``{claim: ..., quantity: nmi, layers: late, more: MIM, less: CL}``.

    Raises:
        ConfigError: A part is missing or unknown.

    >>> best = {"group": "MIM", "layers": "best"}
    >>> node = {"claim": "a", "quantity": "nmi", "layers": "late", "more": best, "less": "CL"}
    >>> str(read_claim(node).more), str(read_claim(node).less)
    ('MIM (best)', 'CL (late)')
    """
    unknown = set(node) - {"claim", "quantity", "layers", "more", "less", "source", "remark"}
    missing = {"claim", "more", "less"} - set(node)
    if unknown or missing:
        what = ", ".join(sorted(unknown or missing))
        raise ConfigError(f"Claim {node.get('claim')!r}: {what} {'is unknown' if unknown else 'is missing'}.")

    def side(part: Any) -> Side:
        own = {"group": part} if isinstance(part, str) else dict(part)
        minus = own.pop("minus", None)
        merged = {key: node[key] for key in ("quantity", "layers") if key in node} | own
        if set(merged) - {"group", "quantity", "layers"} or not {"group", "quantity"} <= set(merged):
            raise ConfigError(f"Claim {node['claim']!r}: a side has group, quantity and, if need be, layers and minus.")
        if merged.get("layers", "first") not in LAYERS:
            known = ", ".join(LAYERS)
            raise ConfigError(f"Claim {node['claim']!r}: layers must be one of {known}, not {merged['layers']}.")
        return Side(**merged, minus=None if minus is None else side(minus))

    return Claim(
        str(node["claim"]),
        side(node["more"]),
        side(node["less"]),
        str(node.get("source", "")),
        " ".join(str(node.get("remark", "")).split()),
    )


def judge(claim: Claim, groups: Mapping[str, Group]) -> Finding:
    """What groups of runs say about a claim; without two runs on either side, that it is not tested."""
    more, less = values(claim.more, groups), values(claim.less, groups)
    verdict, difference, low, high, effect = UNTESTED, math.nan, math.nan, math.nan, math.nan
    if min(len(more), len(less)) >= 2:
        difference, low, high = difference_of_means(more, less)
        verdict = SUPPORTED if low > 0 else CONTRADICTED if high < 0 else UNDECIDED
        effect = hedges_g(more, less)
    return Finding(
        claim.text,
        claim.source,
        verdict,
        str(claim.more),
        str(claim.less),
        claim.more.quantity.removeprefix("evaluate/"),
        Cell(more),
        Cell(less),
        difference,
        low,
        high,
        effect,
        claim.remark,
    )


def values(side: Side, groups: Mapping[str, Group]) -> list[float]:
    """One value per run of a side; none if the group or the quantity is not there, or ``minus`` has other runs.

    Raises:
        ConfigError: A curve is meant, but not where on it.
    """
    group = groups.get(side.group)
    if group is None:
        return []
    if side.quantity in group.by_layer:
        if not side.layers:
            raise ConfigError(f"{side.quantity} has a value for every layer: a claim about it needs layers.")
        found = _reduce(group.by_layer[side.quantity], side.layers)
    else:
        found = group.cells[side.quantity].values if side.quantity in group.cells else []
    if side.minus is None:
        return found
    other = values(side.minus, groups)
    return [a - b for a, b in zip(found, other, strict=True)] if len(found) == len(other) else []


def _reduce(curve: Mapping[float, Cell], layers: str) -> list[float]:
    """One value per run of a curve; the input of the first block takes no part."""
    places = sorted(at for at in curve if at > 0)
    third = max(1, len(places) // 3)
    runs = list(zip(*(curve[at].values for at in places), strict=True))
    if layers == "best":
        return [max(run) for run in runs]
    if layers == "fall":
        return [max(run) - run[-1] for run in runs]
    parts = {
        "first": slice(0, 1),
        "early": slice(0, third),
        "middle": slice(third, len(places) - third),
        "late": slice(len(places) - third, None),
        "last": slice(len(places) - 1, None),
        "all": slice(None),
    }
    return [statistics.fmean(run[parts[layers]] or run) for run in runs]


def difference_of_means(more: Sequence[float], less: Sequence[float]) -> tuple[float, float, float]:
    """Difference of two means and its 95 % interval by Welch's t, which lets the two spreads differ.

    Args:
        more: At least two values.
        less: At least two values.

    Returns:
        The difference, and the ends of the interval; NaN where no value differs from its group's others.

    >>> [round(x, 3) for x in difference_of_means([3.0, 4.0, 5.0], [0.0, 1.0, 2.0])]
    [3.0, 0.733, 5.267]
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise ConfigError("Findings need scipy: pip install 'harmonize[report]'.") from error
    difference = statistics.fmean(more) - statistics.fmean(less)
    if statistics.pstdev(more) == statistics.pstdev(less) == 0:
        return difference, math.nan, math.nan
    interval = stats.ttest_ind(more, less, equal_var=False).confidence_interval(0.95)
    return difference, float(interval.low), float(interval.high)


def hedges_g(more: Sequence[float], less: Sequence[float]) -> float:
    """Difference of two means in pooled standard deviations, corrected for small samples (Hedges 1981).

    >>> round(hedges_g([3.0, 4.0, 5.0], [0.0, 1.0, 2.0]), 3)
    2.4
    """
    n, m = len(more), len(less)
    pooled = math.sqrt(((n - 1) * statistics.variance(more) + (m - 1) * statistics.variance(less)) / (n + m - 2))
    if pooled == 0:
        return math.nan
    return (statistics.fmean(more) - statistics.fmean(less)) / pooled * (1 - 3 / (4 * (n + m) - 9))
