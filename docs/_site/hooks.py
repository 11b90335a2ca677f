"""What MkDocs does for this site beyond its own: pages that lie outside docs/, and formulas.

The Markdown pages of the repository link to each other and to its files as they lie there, so that any viewer of the
repository can follow. Here every file that a page of the site links to joins the site: Markdown pages and pictures as
they are, source code as a page that shows it. Links are rewritten; those to folders become plain text.
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.textpath import TextPath
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from harmonize.reporting import read_studies
from harmonize.reports.study import study_page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\]\([^)]*\))*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
"""A link to a file: exclamation mark of a picture, text (which may be a picture), path, anchor."""
BLOCK = re.compile(r"^( *)(```+|~~~+)([^\n]*)\n(.*?)^\1\2 *$", re.M | re.S)
CODE = {"": "text", ".py": "python", ".yaml": "yaml", ".cff": "yaml", ".sh": "bash", ".toml": "toml"}
"""Ending of the files that are shown as code -> language."""
FINDINGS, FINDINGS_FILE = "<!-- findings -->", ROOT / "experiments" / "FINDINGS.md"
"""A place in a page, and the file whose text is put in there, if there is one."""

sources: dict[str, Path] = {}
"""Path in the site -> file in the repository, of what lies outside docs/."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put into the navigation what its patterns stand for."""
    config.nav = _expand(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/: what the navigation names, and all that pages link to."""
    sources.clear()
    pages = [DOCS / file.src_uri for file in files.documentation_pages()]
    named = [ROOT / ("README.md" if name == "project.md" else name) for name in _names(config.nav)]
    pending = [*pages, *(path for path in named if path.is_file())]
    if FINDINGS_FILE.is_file():
        pending += [target for target in _targets(FINDINGS_FILE) if DOCS not in target.parents]
    seen = set(pages)
    while pending:
        path = pending.pop()
        if path not in seen:
            seen.add(path)
            files.append(_file(path, config))
        if path.suffix == ".md":
            pending += [target for target in _targets(path) if target not in seen and DOCS not in target.parents]
    files.append(File.generated(config, "report.html", content=_report()))
    return files


def _report() -> str:
    """The page of this project's own studies, from the numbers that are kept beside them."""
    path = ROOT / "experiments" / "findings.yaml"
    command = "harmonize report experiments/findings.yaml --kept"
    return study_page(read_studies(path, kept=True), "What the experiments found", command)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links, draw formulas, and put in the findings."""
    source = sources.get(page.file.src_uri, DOCS / page.file.src_uri)
    if source.suffix != ".md":
        return markdown
    markdown = _outside_blocks(markdown, lambda text: _rewritten(text, source.parent, page.file.src_uri))
    if FINDINGS in markdown and FINDINGS_FILE.is_file():
        text = re.sub(r"^# .*\n", "", FINDINGS_FILE.read_text(encoding="utf-8"))
        text = _outside_blocks(text, lambda part: _rewritten(part, FINDINGS_FILE.parent, page.file.src_uri))
        markdown = markdown.replace(FINDINGS, text)
    return BLOCK.sub(lambda block: formula(block[4]) if block[3] == "math" else block[0], markdown)


def formula(tex: str) -> str:
    """A formula as a picture: the TeX of a ``math`` block, which GitHub and GitLab draw as well.

    Matplotlib sets it, so no script is needed in the browser.
    """
    tex = " ".join(tex.split())
    displayed = tex.replace(r"\frac", r"\dfrac")
    with rc_context({"mathtext.fontset": "cm"}):
        path = TextPath((0, 0), f"${displayed}$", size=10)
    box, margin = path.get_extents(), 0.5
    steps = []
    for points, code in path.iter_segments():
        numbers = " ".join(f"{x:.2f}" for x in points * ([1, -1] * (len(points) // 2)))
        steps.append({1: "M", 2: "L", 3: "Q", 4: "C"}[int(code)] + numbers if code != 79 else "Z")
    width, height = box.width + 2 * margin, box.height + 2 * margin
    view = f"{box.x0 - margin:.2f} {-box.y1 - margin:.2f} {width:.2f} {height:.2f}"
    label = html.escape(tex, quote=True)
    size = f"width:{width / 9:.2f}em;height:{height / 9:.2f}em"
    drawing = f'<svg role="img" aria-label="{label}" viewBox="{view}" style="{size}"><path d="{"".join(steps)}"/></svg>'
    return f'<div class="formula" title="{label}">{drawing}</div>'


def _expand(nav: Any) -> Any:
    """The navigation with every pattern replaced by the files that match it, called by their folders."""
    if isinstance(nav, dict):
        return {title: _expand(entry) for title, entry in nav.items()}
    if not isinstance(nav, list):
        return nav
    expanded: list[Any] = []
    for entry in nav:
        if isinstance(entry, str) and "*" in entry:
            for path in sorted(ROOT.glob(entry)):
                title = path.parent.name.replace("_", " ").capitalize()
                expanded.append({title: path.relative_to(ROOT).as_posix()})
        else:
            expanded.append(_expand(entry))
    return expanded


def _names(nav: Any) -> Iterator[str]:
    """The files that a navigation names."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, (list, dict)):
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from _names(entry)


def _targets(page: Path) -> Iterator[Path]:
    """The files that a page links to."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.finditer(text):
        yield from _inner_targets(link, page.parent)


def _inner_targets(link: re.Match[str], folder: Path) -> Iterator[Path]:
    for inner in LINK.finditer(link[2]):
        yield from _inner_targets(inner, folder)
    target = (folder / link[3]).resolve()
    if target.is_file():
        yield target


def _site_path(path: Path) -> str:
    """Where a file of the repository stands in the site."""
    if DOCS in path.parents:
        return path.relative_to(DOCS).as_posix()
    name = path.relative_to(ROOT).as_posix().removeprefix(".")
    if name == "README.md":
        return "project.md"
    return f"{name}.md" if path.suffix in CODE else name


def _file(path: Path, config: MkDocsConfig) -> File:
    """A file from outside docs/ as a part of the site."""
    name = _site_path(path)
    sources[name] = path
    if path.suffix not in CODE:
        return File.generated(config, name, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV)
    code = path.read_text(encoding="utf-8").rstrip("\n")
    title = path.relative_to(ROOT).as_posix()
    content = f"---\nsearch: {{exclude: true}}\n---\n\n# {title}\n\n~~~~{CODE[path.suffix]}\n{code}\n~~~~\n"
    return File.generated(config, name, content=content, inclusion=InclusionLevel.NOT_IN_NAV)


def _rewritten(text: str, folder: Path, page: str) -> str:
    """Markdown of a file in ``folder`` with its links as they are in the site, from the page ``page``."""

    def rewrite(link: re.Match[str]) -> str:
        mark, words, path, anchor = link[1], LINK.sub(rewrite, link[2]), link[3], link[4] or ""
        target = (folder / path).resolve()
        if target.is_dir():
            return words
        if not target.is_file():
            return link[0]  # MkDocs says so
        return f"{mark}[{words}]({posixpath.relpath(_site_path(target), posixpath.dirname(page) or '.')}{anchor})"

    return LINK.sub(rewrite, text)


def _outside_blocks(markdown: str, change: Callable[[str], str]) -> str:
    """Markdown with a change made everywhere but in fenced blocks."""
    parts, end = [], 0
    for block in BLOCK.finditer(markdown):
        parts += [change(markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(markdown[end:])])
