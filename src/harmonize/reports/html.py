"""The report: one folder with figures, numbers and a self-contained HTML page laid out by the paper's figures."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path

from matplotlib.figure import Figure

from harmonize import __version__
from harmonize.files import write_whole
from harmonize.reports.figures import (
    ATTENTION,
    depth_figure,
    depth_names,
    depth_points,
    is_heat_map,
    surface_figure,
)
from harmonize.reports.files import to_plain, write_csv
from harmonize.reports.pictures import draw
from harmonize.reports.references import Reference, references_for
from harmonize.reports.style import to_png, to_svg
from harmonize.types import EncoderSpec, Findings, Quantity, Surface

BEYOND = "Beyond the paper"
# What the figures of arXiv:2305.00729 are about, in our words.
SUBJECTS = {
    "Figure 2": "where two queries look",
    "Figure 3": "how far attention reaches",
    "Figure 4": "how much attention depends on the query",
    "Figure 5": "how alike heads, blocks and tokens are",
    "Figure 6": "what self-attention does to tokens",
    "Figure 7": "how many directions the representations use",
    "Figure 8": "which frequencies the representations hold",
    "Figure 10": "what every block knows about the classes",
    "Figure E.2": "how tokens cluster",
}
MAX_TABLE_COLUMNS = 12


@dataclass
class Network:
    """One network of a report.

    Attributes:
        name: As in legends; no two networks share one.
        findings: What the diagnostics found in it.
        untrained: What they found in the same encoder before training, or None.
        spec: The encoder.
        details: Further lines of the table of networks, for example ``{"checkpoint": "vit-b-300ep.pth.tar"}``.
        warnings: What a reader has to know before trusting the numbers.
    """

    name: str
    findings: Findings
    untrained: Findings | None
    spec: EncoderSpec
    details: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass
class Card:
    """One figure of the page.

    Attributes:
        quantities: What it shows; the first gives title and place.
        file: Name of its image files, without ending.
        group: Name of the picture whose versions, one per network, share a row; empty for plots of all networks.
        note: Stands after the title.
        plot: HTML of the figure.
        table: HTML of its numbers, or nothing.
    """

    quantities: list[Quantity]
    file: str
    group: str
    note: str
    plot: str
    table: str


def write_report(
    folder: Path,
    networks: list[Network],
    heading: str,
    command: str,
    overview: str = "",
    spread: str = "standard error over the images",
) -> None:
    """Write ``report.html``, ``diagnostics.json``, ``diagnostics.csv`` and ``figures/`` into a folder.

    All networks are drawn into the same axes, over block numbers, so they may differ in depth.

    Args:
        folder: Made if need be; files of an earlier report are overwritten.
        networks: At least one.
        heading: Of the page.
        command: The command that made the report, which repeats it.
        overview: HTML that stands before the figures.
        spread: What the bands of the curves are one of.

    Raises:
        ValueError: If there is no network or two of them share a name.
    """
    names = [network.name for network in networks]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"networks={names}: a report needs at least one network, each with a name of its own")
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)

    found = {network.name: network.findings for network in networks}
    untrained = {network.name: network.untrained for network in networks if network.untrained}
    cards = [
        *_curve_cards(figures, found, untrained, [network.spec for network in networks]),
        *_surface_cards(figures, found),
        *_picture_cards(figures, found),
    ]
    plain = [
        {"name": n.name, "details": n.details, "warnings": n.warnings, "encoder": asdict(n.spec)}
        | to_plain(n.findings)
        | {"untrained": to_plain(n.untrained) if n.untrained else None}
        for n in networks
    ]
    content = {"format": 1, "harmonize": __version__, "command": command, "networks": plain}
    write_whole(folder / "diagnostics.json", (json.dumps(content, allow_nan=False) + "\n").encode())
    write_csv(folder / "diagnostics.csv", found | {f"{name} (untrained)": f for name, f in untrained.items()})
    write_whole(folder / "report.html", _page(networks, cards, heading, command, overview, spread).encode())


def slug(text: str) -> str:
    """Plain letters, digits and hyphens, for file names and anchors.

    >>> slug("Figure E.2"), slug("hybrid, λ = 0.2")
    ('figure-e-2', 'hybrid-lambda-0-2')
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("λ", "lambda")).strip("-") or "network"


def _curve_cards(
    folder: Path, found: Mapping[str, Findings], untrained: Mapping[str, Findings], specs: Sequence[EncoderSpec]
) -> Iterator[Card]:
    for name in depth_names(found.values()):
        references = list(dict.fromkeys(r for spec in specs for r in references_for(name, spec)))
        figure = depth_figure(name, found, untrained, references)
        curves = [f.curves[key] for key in (name, name + ATTENTION) for f in found.values() if key in f.curves]
        quantities = list(dict.fromkeys(curve.quantity for curve in curves))
        plot = inline_svg(save_figure(folder, name, figure), f"{slug(name)}-", quantities[0].title)
        yield Card(quantities, name, "", "", plot, depth_table(name, found, untrained, references))


def _surface_cards(folder: Path, found: Mapping[str, Findings]) -> Iterator[Card]:
    for name in dict.fromkeys(name for findings in found.values() for name in findings.surfaces):
        surfaces = {label: f.surfaces[name] for label, f in found.items() if name in f.surfaces}
        surfaces = {label: s for label, s in surfaces.items() if any(math.isfinite(v) for row in s.value for v in row)}
        if not surfaces:
            continue
        file = f"{name}_surface"  # a curve may have the same name
        quantity = next(iter(surfaces.values())).quantity
        svg = save_figure(folder, file, surface_figure(name, surfaces))
        note = "all pairs of blocks" if is_heat_map(name, surfaces) else ""
        tables = "".join(_surface_table(label, surface) for label, surface in surfaces.items())
        yield Card([quantity], file, "", note, inline_svg(svg, f"{slug(file)}-", quantity.title), tables)


def _picture_cards(folder: Path, found: Mapping[str, Findings]) -> Iterator[Card]:
    slugs: dict[str, str] = {}
    for label in found:
        text = slug(label)
        slugs[label] = text if text not in slugs.values() else f"{text}-{len(slugs) + 1}"
    for name in dict.fromkeys(name for findings in found.values() for name in findings.pictures):
        for label, findings in found.items():
            if name not in findings.pictures:
                continue
            picture = findings.pictures[name]
            file = f"{name}_{slugs[label]}"
            figure = draw(picture)
            save_figure(folder, file, figure)
            data = base64.b64encode((folder / f"{file}.png").read_bytes()).decode()
            text = escape(f"{picture.quantity.title}, {label}")
            width, height = (round(inches * 100) for inches in figure.get_size_inches())
            plot = f'<img src="data:image/png;base64,{data}" alt="{text}" width="{width}" height="{height}">'
            yield Card([picture.quantity], file, name, label, plot, "")


def save_figure(folder: Path, name: str, figure: Figure) -> str:
    """Write a figure as PNG and SVG; the SVG's text."""
    svg = to_svg(figure)
    figure.set_layout_engine("none")  # the layout just found is kept; finding it takes half of the time
    write_whole(folder / f"{name}.png", to_png(figure))
    write_whole(folder / f"{name}.svg", svg.encode())
    return svg


def inline_svg(svg: str, prefix: str, title: str) -> str:
    """An SVG to stand inside a page: its ids are prefixed, since matplotlib gives every figure the same ones."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
    label = escape(title)
    return re.sub(
        r'^<svg .*?viewBox="([^"]*)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{label}">',
        svg,
        count=1,
        flags=re.DOTALL,
    )


def depth_table(
    name: str, found: Mapping[str, Findings], untrained: Mapping[str, Findings], references: Sequence[Reference]
) -> str:
    """Blocks down, networks across; after each network its untrained state."""
    columns: dict[str, dict[float, str]] = {}
    for label, findings in found.items():
        for text, one in ((label, findings), (f"{label}, untrained", untrained.get(label))):
            if points := depth_points(one, name):
                columns[text] = {x: number(value, error) for x, value, error in points}
    uniform = {
        label: {float(x): number(value) for x, value in zip(curve.layer, curve.uniform, strict=True)}
        for label, findings in found.items()
        if (curve := findings.curves.get(name)) and curve.uniform
    }
    if len({value for column in uniform.values() for value in column.values()}) == 1:
        columns["uniform attention"] = max(uniform.values(), key=len)
    else:
        columns |= {f"{label}, uniform attention": column for label, column in uniform.items()}
    for reference in references:
        columns[str(reference)] = {x: number(v) for x, v in zip(reference.layer, reference.value, strict=True)}
    blocks = sorted({block for column in columns.values() for block in column})
    half = {block: f"{block + 0.5:g}, self-attention" for block in blocks if block % 1}
    rows = [
        [half.get(block, f"{block:g}"), *(column.get(block, "") for column in columns.values())] for block in blocks
    ]
    return table(["block", *columns], rows)


def _surface_table(label: str, surface: Surface) -> str:
    count = len(surface.columns)
    shown = list(range(count))
    if count > MAX_TABLE_COLUMNS + 1:
        shown = sorted({round(i * (count - 1) / (MAX_TABLE_COLUMNS - 1)) for i in range(MAX_TABLE_COLUMNS)})
    head = ["block", *(f"{surface.columns[j]:.3g}" for j in shown)]
    rows = []
    for i, layer in enumerate(surface.layer):
        errors = surface.error[i] if surface.error else [math.nan] * count
        rows.append([f"{layer:g}", *(number(surface.value[i][j], errors[j]) for j in shown)])
    column = surface.column.replace("/ pi", "/ π")
    some = "" if len(shown) == count else f", {len(shown)} of {count}; all of them are in diagnostics.csv"
    return f"<p>{escape(label)}. Across: {escape(column)}{some}.</p>" + table(head, rows)


def number(value: float, error: float = math.nan) -> str:
    """Value and standard error, with as many digits as the error leaves meaning; a dash for what cannot be had."""
    if not math.isfinite(value):
        return "–"
    if not math.isfinite(error) or error <= 0:
        return f"{value:.4g}"
    digits = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls by itself; the first cell of a row is its heading."""
    lines = ["<tr>" + "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head) + "</tr>"]
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return '<div class="scroll"><table>' + "\n".join(lines) + "</table></div>"


def _page(
    networks: Sequence[Network], cards: Sequence[Card], heading: str, command: str, overview: str, spread: str
) -> str:
    sections: dict[str, list[Card]] = {}
    for card in sorted(cards, key=lambda card: figure_place(card.quantities[0].figure)):
        sections.setdefault(card.quantities[0].figure or BEYOND, []).append(card)
    contents = "\n".join(
        f'<li><a href="#{slug(figure)}">{escape(section_title(figure))}</a> '
        + f"<span>{escape('; '.join(dict.fromkeys(card.quantities[0].title for card in some)))}</span></li>"
        for figure, some in sections.items()
    )
    body = "\n".join(_section(figure, some) for figure, some in sections.items())
    top = f"""{_warnings(networks)}
{_network_table(networks)}
{overview}
<h2>How to read it</h2>
{_how_to_read(networks, spread)}"""
    where = "<p>All numbers: diagnostics.csv and diagnostics.json; all figures as PNG and SVG: figures/.</p>"
    return page(heading, top, contents, body, command, footer=where)


def page(
    heading: str, top: str, contents: str, body: str, command: str, footer: str = "", head: str = "", script: str = ""
) -> str:
    """A whole page, HTML, that needs nothing from elsewhere.

    Args:
        heading: Plain text.
        top: What stands before the contents.
        contents: The items of the list of contents.
        body: The sections.
        command: The command that made the page, plain text.
        footer: What stands below that.
        head: Further elements of the head.
        script: Runs when the page is there.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(heading)}</title>
<style>{STYLE}</style>
{head}
</head>
<body>
<main>
<h1>{escape(heading)}</h1>
{top}
<nav aria-label="Contents"><h2>Contents</h2>
<ul>
{contents}
</ul></nav>
{body}
<footer><p>harmonize {escape(__version__)}. Made by</p><pre class="scroll">{escape(command)}</pre>
{footer}</footer>
</main>
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def _section(figure: str, cards: Sequence[Card]) -> str:
    grids = [
        '<div class="cards">\n' + "\n".join(map(_card, some)) + "\n</div>"
        for _, some in groupby(cards, lambda c: c.group)
    ]
    return f'<section id="{slug(figure)}"><h2>{escape(section_title(figure))}</h2>\n' + "\n".join(grids) + "</section>"


def _card(card: Card) -> str:
    first, *others = card.quantities
    note = f" <span>{escape(card.note)}</span>" if card.note else ""
    words = [definition_html(first)]
    words += [f"<p>Half blocks: {escape(q.definition)}</p>" for q in others if q.definition != first.definition]
    table = f"<details><summary>Numbers</summary>{card.table}</details>" if card.table else ""
    return (
        f'<figure id="{slug(card.file)}"><h3>{escape(first.title)}{note}</h3>\n'
        f'<div class="plot">{card.plot}</div>\n<figcaption>{"".join(words)}{table}</figcaption></figure>'
    )


def definition_html(quantity: Quantity) -> str:
    """What a quantity means, and where it is from."""
    source = f'<p class="source">Source: {escape(quantity.source)}</p>' if quantity.source else ""
    return f"<p>{escape(quantity.definition)}</p>{source}"


def section_title(figure: str) -> str:
    """A figure of the paper with what it is about."""
    subject = SUBJECTS.get(figure)
    return f"{figure}: {subject}" if subject else figure


def figure_place(figure: str) -> tuple[float, str]:
    """A key to sort by: figures of the main text by number, those of the appendix, what is not the paper's."""
    number = re.search(r"Figure (\d+)", figure)
    return (float(number[1]) if number else math.inf, figure or "~")


def _warnings(networks: Sequence[Network]) -> str:
    lines = [f"<li><b>{escape(n.name)}</b>: {escape(text)}</li>" for n in networks for text in n.warnings]
    if not lines:
        return ""
    return f'<div class="warning" role="note"><p>Before you trust the numbers</p><ul>{"".join(lines)}</ul></div>'


def _network_table(networks: Sequence[Network]) -> str:
    """Networks across, what is known of them down: this way a phone shows two of them."""
    known = []
    for network in networks:
        spec = network.spec
        (height, width), (rows, columns) = spec.image_size, spec.grid
        known.append(
            network.details
            | {
                "encoder": f"width {spec.width}, {spec.depth} blocks, {spec.num_heads} heads",
                "images": f"{height} × {width} px",
                "patches": f"{spec.patch_size} px, {rows} × {columns}",
                "images measured": str(network.findings.num_images),
                "untrained network": "measured" if network.untrained else "not measured",
            }
        )
    keys = dict.fromkeys(key for one in known for key in one)
    rows_ = [[key, *(one.get(key, "–") for one in known)] for key in keys]
    return f'<div class="networks">{table(["", *(network.name for network in networks)], rows_)}</div>'


def _how_to_read(networks: Sequence[Network], spread: str) -> str:
    curves = [curve for network in networks for curve in network.findings.curves.values()]
    lines = [f"Curves run over the blocks of the encoder; 0 is the input of the first. The band is one {spread}."]
    if any(curve.uniform for curve in curves):
        lines.append("Dashed: what uniform attention, which looks everywhere alike, would give.")
    if any(network.untrained for network in networks):
        lines.append("Dotted: the untrained network. What lies on this line was there before training.")
    if any(references_for(name, network.spec) for network in networks for name in network.findings.curves):
        lines.append(
            "Grey: curves of arXiv:2305.00729 for ViT-B/16 at 224 px, on other images than these. [NB] digitised from "
            "the official notebooks; [POSTER-V] and [POSTER-R] read off the poster's vector and raster graphics."
        )
    if len(networks) == 1 and any(curve.heads for curve in curves):
        lines.append("Faint dots: single heads.")
    if any(name.endswith(ATTENTION) for network in networks for name in network.findings.curves):
        lines.append("Shaded strips: the self-attention half of each block, where a curve was measured after it too.")
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #59636e; --page: #f5f6f8; --card: #fff; --line: #d9dde2;
  --link: #0b5fa5; --warn: #fff4d6; --warn-line: #d49a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #a3adb8; --page: #14171b; --card: #1e2227;
  --line: #363c44; --link: #7ab8f5; --warn: #3a2f12; --warn-line: #d49a00; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  -webkit-text-size-adjust: 100%; }
main { max-width: 1100px; margin: 0 auto; padding: 16px 12px 48px; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 8px 0 16px; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 36px 0 10px; }
h3 { font-size: 1rem; margin: 0 0 8px; }
h3 span, nav span { color: var(--soft); font-weight: normal; }
a { color: var(--link); }
p { margin: 0 0 8px; }
ul { margin: 0; padding-left: 20px; }
nav li { margin-bottom: 4px; }
nav span { font-size: .9rem; }
.warning { background: var(--warn); border-left: 4px solid var(--warn-line); padding: 10px 14px; margin: 0 0 16px; }
.warning p { font-weight: 600; margin: 0 0 4px; }
.cards + .cards { margin-top: 16px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 16px;
  align-items: start; }
figure { margin: 0; padding: 12px 10px; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  min-width: 0; }
.plot { background: #fff; border-radius: 4px; padding: 4px; }
.plot svg, .plot img { display: block; width: 100%; max-width: 600px; height: auto; margin: 0 auto; }
figcaption { font-size: .9rem; margin-top: 8px; }
.source { color: var(--soft); }
details { margin-top: 4px; }
summary { cursor: pointer; color: var(--link); padding: 4px 0; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 3px 10px 3px 0; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
td { white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; }
th + th { min-width: 6.5em; }
th:first-child { text-align: left; }
.networks table { font-size: .95rem; }
.networks th, .networks td { text-align: left; padding-right: 18px; }
.networks td { white-space: normal; min-width: 9em; overflow-wrap: anywhere; }
pre { font-size: .85rem; margin: 0 0 8px; padding: 8px; background: var(--card); border: 1px solid var(--line); }
footer { margin-top: 40px; color: var(--soft); font-size: .9rem; }
"""
