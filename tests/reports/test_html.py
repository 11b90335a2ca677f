"""The report: all of it in one file that needs nothing else, readable on a phone."""

import csv
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from harmonize import __version__
from harmonize.reports.files import from_plain
from harmonize.reports.html import Network, slug, write_report
from harmonize.types import Curve, Findings
from tests.reports.browser import told_by
from tests.reports.synthetic import findings, make_pictures, quantity, spec

COMMAND = "python analyze.py checkpoint='a & b.pth' <here>"
HEADING = "MoCo v3 & a <hybrid>"
# Enough for every figure of the paper; drawing all curves takes minutes on a busy machine.
SHOWN = {"attention_distance", "nmi", "attention_entropy", "head_similarity", "translation_share", "fourier", "cka"}
SHOWN |= {"fourier_attention", "token_effective_rank", "layer_probe_linear", "fourier_spectrum"}
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags balance, and keeps ids, links, addresses to load from and texts by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.anchors: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            elif key in {"href", "xlink:href"} and value.startswith("#"):
                self.anchors.append(value[1:])
            elif key in {"src", "href", "xlink:href", "srcset", "data", "poster", "action"}:
                self.loads.append(value)
            self.anchors += re.findall(r"url\(#([^)]*)\)", value or "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in {*self.open}:
            self.texts.setdefault(tag, []).append(data)


def networks() -> list[Network]:
    deep = findings(depth=12, num_heads=2)
    before = findings(depth=12, num_heads=2, shift=0.4, pictures=False)
    shallow = findings(depth=4, num_heads=2, seed=3)
    deep.pictures, shallow.pictures = make_pictures(3), make_pictures(2)
    for found in (deep, before, shallow):
        found.curves = {name: curve for name, curve in found.curves.items() if name in SHOWN}
        found.surfaces = {name: surface for name, surface in found.surfaces.items() if name in SHOWN}
    return [
        Network("MoCo v3", deep, before, spec(), {"checkpoint": "vit-b-300ep.pth.tar"}, ["<b>no</b> class token"]),
        Network("hybrid, λ = 0.2", shallow, None, spec(depth=4)),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "of two networks"
    write_report(path, networks(), HEADING, COMMAND)
    return path


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page((folder / "report.html").read_text())


def test_the_page_is_well_formed_and_its_links_lead_somewhere(page):
    assert len(page.ids) == len(set(page.ids))
    assert {*page.anchors} <= {*page.ids}
    assert page.texts["h1"] == [HEADING]
    assert "b" in page.tags, "a warning names its network"
    assert "<b>no</b> class token" in "".join(page.texts["li"]), "words of others stay words"
    assert page.texts["pre"] == [COMMAND]


def test_the_page_loads_nothing_and_runs_nothing(folder, page):
    assert page.loads
    assert all(load.startswith("data:") for load in page.loads)
    assert "script" not in page.tags
    style = "".join(page.texts["style"])
    assert "@import" not in style
    assert "url(" not in style
    assert len((folder / "report.html").read_bytes()) < 6e6


def test_the_sections_follow_the_paper(page):
    titles = [title for title in page.texts["h2"] if title.startswith(("Figure", "Beyond"))]
    numbers = [title.split(":")[0] for title in titles]
    figures = ["2", "3", "4", "5", "6", "7", "8", "10", "E.2"]
    assert numbers == [*(f"Figure {figure}" for figure in figures), "Beyond the paper"]


def test_every_figure_is_there_with_its_definition_and_numbers(page):
    found = networks()[0].findings
    titles = [text.strip() for text in page.texts["h3"]]
    for thing in (*found.curves.values(), *found.surfaces.values(), *found.pictures.values()):
        assert thing.quantity.title in titles
        assert thing.quantity.definition in page.texts["figcaption"]
    value = found.curves["attention_distance"].value[0]
    cells = page.texts["td"]
    assert "116.5" in cells
    assert f"{value:.1f} ± 1.2" in cells
    assert "nan" not in " ".join(cells).lower()
    assert page.tags.count("details") == page.tags.count("svg")


def test_figures_lie_in_files_as_well(folder):
    names = {path.name for path in (folder / "figures").iterdir()}
    for stem in ("attention_distance", "fourier", "cka", "cka_surface", "token_moves_moco-v3"):
        assert {f"{stem}.png", f"{stem}.svg"} <= names
    assert "token_moves_hybrid-lambda-0-2.png" in names
    assert "fourier_attention.png" not in names
    assert not [name for name in names if name.endswith(".tmp")]


def test_the_json_file_holds_what_was_measured(folder):
    content = json.loads((folder / "diagnostics.json").read_text())
    assert (content["format"], content["harmonize"], content["command"]) == (1, __version__, COMMAND)
    first, second = content["networks"]
    assert first["name"] == "MoCo v3"
    assert first["details"] == {"checkpoint": "vit-b-300ep.pth.tar"}
    assert first["warnings"] == ["<b>no</b> class token"]
    assert first["encoder"]["image_size"] == [224, 224]
    assert from_plain(first).curves["nmi"] == networks()[0].findings.curves["nmi"]
    assert from_plain(first["untrained"]).num_images == 256
    assert second["untrained"] is None


def test_the_csv_file_holds_the_untrained_network_too(folder):
    with open(folder / "diagnostics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["network"] for row in rows} == {"MoCo v3", "MoCo v3 (untrained)", "hybrid, λ = 0.2"}
    assert {row["layer"] for row in rows if row["diagnostic"] == "nmi"} == {str(block) for block in range(1, 13)}


def test_what_has_no_number_has_no_figure(tmp_path):
    curve = Curve(quantity("X"), [1, 2], [math.nan] * 2, [math.nan] * 2)
    found = Findings({"x": curve, "y": replace(curve, value=[1.0, 2.0], error=[0.0, math.nan])}, num_images=1)
    write_report(tmp_path, [Network("a", found, None, spec())], "Nothing", "harmonize analyze")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"y.png", "y.svg"}
    text = (tmp_path / "report.html").read_text()
    assert 'class="warning"' not in text
    Page(text)


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_networks_need_names_of_their_own(tmp_path, names):
    with pytest.raises(ValueError, match="a name of its own"):
        write_report(tmp_path, [Network(name, Findings(), None, spec()) for name in names], "", "")


def test_names_of_files():
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("???") == "network"


def test_networks_whose_names_make_the_same_file_name(tmp_path):
    some = findings(depth=2, num_heads=2)
    some = Findings(pictures={"token_scatter": some.pictures["token_scatter"]})
    write_report(tmp_path, [Network(name, some, None, spec()) for name in ("a b", "a-b")], "", "")
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"token_scatter_a-b", "token_scatter_a-b-2"}


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not on PATH")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(folder, tmp_path, width):
    """No error in the console, and nothing wider than the screen, tables opened."""
    tell = "onload = () => parent.postMessage(document.documentElement.scrollWidth, '*')"
    told = told_by((folder / "report.html").read_text(), tell, width, tmp_path)
    assert int(told) <= width
