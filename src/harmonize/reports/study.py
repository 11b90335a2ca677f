"""The page of ``harmonize report``: findings, then every study with its figures, interactive, in one file."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from harmonize.files import finite, write_whole
from harmonize.reports import interactive
from harmonize.reports.comparison import (
    Cell,
    Group,
    markdown_table,
    metric_head,
    metric_rows,
    over_setting,
    trade_off,
    trade_off_axes,
)
from harmonize.reports.figures import depth_figure, depth_names
from harmonize.reports.files import from_plain, to_plain
from harmonize.reports.html import (
    definition_html,
    depth_table,
    figure_place,
    number,
    page,
    section_title,
    slug,
    table,
)
from harmonize.reports.references import references_for
from harmonize.reports.style import to_png
from harmonize.types import EncoderSpec, Findings

MARKS = {"supported": "✓", "contradicted": "✗", "not supported": "–", "not tested": "·"}
COLUMNS = (
    *("study", "claim", "source", "verdict", "more", "less", "difference", "low", "high", "effect"),
    *("more_values", "less_values", "remark"),
)
NOTE = (
    "Each verdict rests on the 95 % interval of a difference of two means over seeds (Welch's t). Intervals are not "
    "corrected for their number: of every twenty, one misses the truth by chance."
)


@dataclass(frozen=True)
class Finding:
    """A claim and what became of it, in words and numbers.

    Attributes:
        claim: In words.
        source: Where it is from.
        verdict: A key of :data:`MARKS`.
        more: The side that is claimed to be larger.
        less: The other side.
        quantity: What is compared.
        more_values: One per run.
        less_values: One per run.
        difference: Of the means; NaN if it cannot be had, as the next three.
        low: Lower end of the 95 % interval.
        high: Upper end.
        effect: Hedges' g.
        remark: What a reader should know.
    """

    claim: str
    source: str
    verdict: str
    more: str
    less: str
    quantity: str
    more_values: Cell
    less_values: Cell
    difference: float
    low: float
    high: float
    effect: float
    remark: str


@dataclass(frozen=True)
class Study:
    """One question and the runs that answer it.

    Attributes:
        name: Short.
        question: In a sentence.
        commands: That made the runs.
        groups: Of runs that differ in their seed alone.
        curves: Names of the curves to show; None: all that there are.
        over: A setting that is a number, and its value in each group; None: there is none.
        axes: Results over an axis to show: key of ``by_layer`` -> name of the axis.
        pictures: Picture file -> caption.
        findings: The claims.
    """

    name: str
    question: str
    commands: list[str]
    groups: list[Group]
    curves: list[str] | None = None
    over: tuple[str, list[float]] | None = None
    axes: dict[str, str] = field(default_factory=dict)
    pictures: dict[Path, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def found(self) -> dict[str, Findings]:
        """The diagnostics of every group."""
        return {one.name: one.trained for one in self.groups}

    @property
    def untrained(self) -> dict[str, Findings]:
        """Those of the untrained network, by the first group that has any."""
        return dict([(one.name, one.untrained) for one in self.groups if one.untrained.curves][:1])

    @property
    def shown(self) -> list[str]:
        """Names of the curves to show that there are."""
        return [name for name in depth_names(self.found.values()) if self.curves is None or name in self.curves]


def study_page(studies: Sequence[Study], heading: str, command: str) -> str:
    """The page, HTML.

    Args:
        studies: In the order in which they are shown.
        heading: Of the page.
        command: The command that made it.

    Raises:
        ConfigError: plotly is not installed.
    """
    contents = "\n".join(
        f'<li><a href="#{slug(study.name)}">{escape(_title(study.name))}</a> <span>{escape(study.question)}</span></li>'
        for study in studies
    )
    body = "\n".join(map(_section, studies))
    findings = [(study, finding) for study in studies for finding in study.findings]
    head = f"<style>{MORE_STYLE}</style>\n<script>{interactive.library()}</script>"
    top = _findings(findings) if findings else ""
    return page(heading, top, contents, body, command, head=head, script=interactive.FOLLOW_THE_PAGE)


def write_findings(folder: Path, studies: Sequence[Study]) -> None:
    """Write ``findings.csv`` and ``FINDINGS.md``, the table of all claims, into a folder."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for study in studies:
        for f in study.findings:
            numbers = ["" if math.isnan(x) else f"{x:.6g}" for x in (f.difference, f.low, f.high, f.effect)]
            cells = [" ".join(f"{value:.6g}" for value in cell.values) for cell in (f.more_values, f.less_values)]
            words = [study.name, f.claim, f.source, f.verdict, f"{f.quantity}: {f.more}", f.less]
            writer.writerow([*words, *numbers, *cells, f.remark])
    write_whole(folder / "findings.csv", text.getvalue().encode())
    write_whole(folder / "FINDINGS.md", findings_markdown(studies).encode())


def write_results(folder: Path, study: Study) -> None:
    """Write ``RESULTS.md`` and ``figures/`` of a study into a folder, for where nothing is interactive."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    drawn = {
        "trade_off": trade_off(study.groups),
        "over": over_setting(study.groups, *study.over) if study.over is not None else None,
    }
    drawn |= {name: depth_figure(name, study.found, study.untrained) for name in study.shown}
    pictures = []
    for name, figure in drawn.items():
        if figure is not None:
            write_whole(folder / "figures" / f"{name}.png", to_png(figure))
            pictures.append(f"![{name.replace('_', ' ')}](figures/{name}.png)")
    pictures += [f"{text}:\n\n![{text}](figures/{path.name})" for path, text in study.pictures.items()]
    parts = [
        f"# {_title(study.name)}: results",
        f"{study.question} Mean ± standard deviation over seeds. Made by `harmonize report`; "
        "the numbers of all runs are in [results.json](results.json).",
        markdown_table(metric_head(study.groups), metric_rows(study.groups)),
        findings_markdown([study]).strip() if study.findings else "",
        *pictures,
    ]
    write_whole(folder / "RESULTS.md", ("\n\n".join(filter(None, parts)) + "\n").encode())


def findings_markdown(studies: Sequence[Study]) -> str:
    """The claims of all studies as a table in Markdown."""
    rows = [
        [
            f"{MARKS[f.verdict]} {f.verdict}",
            f.claim,
            f.source or study.name,
            _sides(f),
            _interval(f),
            _short(f.effect),
            f"{len(f.more_values.values)} / {len(f.less_values.values)}",
        ]
        for study in studies
        for f in study.findings
    ]
    head = ["", "claim", "from", "measured", "difference (95 % interval)", "effect", "n"]
    return markdown_table(head, rows) + "\n"


def _sides(f: Finding) -> str:
    return f"{f.quantity}: {f.more} {f.more_values}; {f.less} {f.less_values}"


def _interval(f: Finding) -> str:
    if math.isnan(f.low):
        return _short(f.difference)
    return f"{_short(f.difference)} ({_short(f.low)} ... {_short(f.high)})"


def _short(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"


def _findings(findings: Sequence[tuple[Study, Finding]]) -> str:
    counts = {v: sum(f.verdict == v for _, f in findings) for v in MARKS}
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    rows = []
    for study, f in findings:
        notes = "".join(f'<br><span class="source">{escape(text)}</span>' for text in (f.source, f.remark) if text)
        runs = f"{len(f.more_values.values)} and {len(f.less_values.values)} runs"
        rows.append(
            f'<tr><td><span class="verdict {slug(f.verdict)}">{MARKS[f.verdict]} {escape(f.verdict)}</span></td>'
            f'<th scope="row"><a href="#{slug(study.name)}">{escape(f.claim)}</a>{notes}</th>'
            f'<td><span class="source">{escape(f.quantity)}, {runs}</span><br>'
            f"{escape(f.more)}: {f.more_values}<br>{escape(f.less)}: {f.less_values}</td>"
            f"<td>{_interval_svg(f)}<br>{escape(_interval(f))}<br>effect {_short(f.effect)}</td></tr>"
        )
    titles = ("verdict", "claim", "mean ± standard deviation", "difference (95 %), effect (Hedges' g)")
    head = "".join(f'<th scope="col">{text}</th>' for text in titles)
    return (
        f'<section id="findings"><h2>Findings</h2><p>{len(findings)} claims: {escape(summary)}.</p>'
        f'<p class="source">{escape(NOTE)}</p><div class="scroll"><table class="findings"><tr>{head}</tr>'
        + "\n".join(rows)
        + "</table></div></section>"
    )


def _interval_svg(f: Finding) -> str:
    """The interval on a line with 0 in its middle; each claim has its own scale."""
    if math.isnan(f.low):
        return ""
    reach = max(abs(f.low), abs(f.high)) or 1.0
    low, middle, high = (60 + 56 * x / reach for x in (f.low, f.difference, f.high))
    return (
        f'<svg class="interval" viewBox="0 0 120 14" role="img" aria-label="{escape(_interval(f))}">'
        f'<line x1="60" x2="60" y1="0" y2="14" class="zero"/><line x1="{low:.1f}" x2="{high:.1f}" y1="7" y2="7"/>'
        f'<circle cx="{middle:.1f}" cy="7" r="3"/></svg>'
    )


def _section(study: Study) -> str:
    groups = study.groups
    rows = [[key.removeprefix("evaluate/"), *cells] for key, *cells in metric_rows(groups)]
    hours = sum(sum(one.cells["hours"].values) for one in groups if "hours" in one.cells)
    cost = f"<p>Training of these {sum(len(g.folders) for g in groups)} runs: {hours:.2g} hours.</p>" if hours else ""
    commands = f'<pre class="scroll">{escape(chr(10).join(study.commands))}</pre>' if study.commands else ""
    return (
        f'<section id="{slug(study.name)}"><h2>{escape(_title(study.name))}</h2><p>{escape(study.question)}</p>'
        f"{commands}{cost}"
        "<details open><summary>What was reached: mean ± standard deviation over seeds</summary>"
        f"{table(metric_head(groups), rows)}"
        f'</details><div class="cards">{"".join(_cards(study))}</div></section>'
    )


def _cards(study: Study) -> list[str]:
    groups = study.groups
    cards = []
    axes = trade_off_axes(groups)
    if axes is not None and len(groups) > 1:
        across, up = axes
        text = "<p>Error bars: standard deviation over seeds.</p>"
        cards.append(_card(f"{study.name}-trade-off", "Trade-off", interactive.scatter(groups, across, up), text))
        if study.over is not None:
            setting, places = study.over
            lines = {key: [one.cells[key] for one in groups] for key in (across, up)}
            plot = interactive.over_setting(setting, places, lines, f"Results over {setting}")
            cards.append(_card(f"{study.name}-over", escape(f"Results over {setting}"), plot, text))
    found, before = study.found, study.untrained
    for name in sorted(study.shown, key=lambda name: figure_place(_quantity(name, found).figure)):
        quantity = _quantity(name, found)
        references = list(dict.fromkeys(r for one in groups for r in references_for(name, one.spec)))
        plot = interactive.curves(name, found, next(iter(before.values()), None), references)
        numbers = f"<details><summary>Numbers</summary>{depth_table(name, found, before, references)}</details>"
        title = f"{escape(quantity.title)} <span>{escape(section_title(quantity.figure))}</span>"
        cards.append(_card(f"{study.name}-{name}", title, plot, definition_html(quantity) + numbers))
    for key, axis in study.axes.items():
        over = {one.name: one.by_layer[key] for one in groups if key in one.by_layer}
        if over:
            cards.append(_axis_card(f"{study.name}-{key}", key, axis, over))
    for path, caption in study.pictures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
        cards.append(_card(f"{study.name}-{path.stem}", escape(caption), image, ""))
    return cards


def _axis_card(identity: str, key: str, axis: str, over: Mapping[str, Mapping[float, Cell]]) -> str:
    percent = key.startswith("evaluate/")
    scale, title = 100 if percent else 1, key.removeprefix("evaluate/")
    places = sorted({at for curve in over.values() for at in curve})
    rows = [
        [f"{at:.3g}", *(number(scale * c[at].mean, scale * c[at].sd) if at in c else "" for c in over.values())]
        for at in places
    ]
    numbers = f"<details><summary>Numbers{' (%)' * percent}</summary>{table([axis, *over], rows)}</details>"
    return _card(identity, escape(title), interactive.lines_over(axis, over, title, percent), numbers)


def _card(identity: str, title: str, plot: str, text: str) -> str:
    return (
        f'<figure id="{slug(identity)}"><h3>{title}</h3><div class="live">{plot}</div>'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _quantity(name: str, found: Mapping[str, Findings]) -> Any:
    return next(findings.curves[name].quantity for findings in found.values() if name in findings.curves)


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


MORE_STYLE = """
.live { min-height: 60px; }
.live img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #fff; border-radius: 4px; }
.js-plot { width: 100%; min-width: 0; overflow: hidden; }
.findings th, .findings td { text-align: left; white-space: normal; padding: 6px 12px 6px 0; min-width: 5em; }
.findings th[scope=row] { font-weight: normal; min-width: 15em; vertical-align: top; }
.findings td:first-child, .findings td:nth-child(4) { white-space: nowrap; }
details + .cards { margin-top: 16px; }
.verdict { font-weight: 600; padding: 2px 6px; border-radius: 4px; border: 1px solid currentColor; }
.supported { color: #00704f; } .contradicted { color: #b3400a; } .not-supported, .not-tested { color: var(--soft); }
@media (prefers-color-scheme: dark) { .supported { color: #4fd1a5; } .contradicted { color: #ff9b66; } }
.interval { width: 120px; height: 14px; }
.interval line { stroke: currentColor; stroke-width: 2; } .interval .zero { stroke: var(--soft); stroke-width: 1; }
.interval circle { fill: currentColor; }
@media print { nav, .modebar { display: none; } figure { break-inside: avoid; } details > * { display: block; } }
"""


# ---- groups as plain containers --------------------------------------------------------------------------------------


def groups_to_plain(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Groups as JSON can hold them; numbers with six digits."""
    plain = [
        {
            "name": one.name,
            "runs": [path.name for path in one.folders],
            "metrics": {key: cell.values for key, cell in one.cells.items()},
            "by_layer": {
                key: {"at": list(curve), "values": [cell.values for cell in curve.values()]}
                for key, curve in one.by_layer.items()
            },
            "encoder": asdict(one.spec),
            "trained": to_plain(one.trained),
            "untrained": to_plain(one.untrained),
        }
        for one in groups
    ]
    return finite(_rounded(plain))


def groups_from_plain(plain: Sequence[Mapping[str, Any]]) -> list[Group]:
    """What :func:`groups_to_plain` wrote; the folders are names alone."""
    return [
        Group(
            one["name"],
            [Path(name) for name in one["runs"]],
            {key: _cell(values) for key, values in one["metrics"].items()},
            _spec(one["encoder"]),
            [],
            from_plain(one["trained"]),
            from_plain(one["untrained"]),
            {
                key: {at: _cell(values) for at, values in zip(curve["at"], curve["values"], strict=True)}
                for key, curve in one["by_layer"].items()
            },
        )
        for one in plain
    ]


def _cell(values: Sequence[float | None]) -> Cell:
    return Cell([math.nan if value is None else value for value in values])


def _spec(plain: Mapping[str, Any]) -> EncoderSpec:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}
    return EncoderSpec(**values)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value
