"""The documentation site: it is built without a warning, needs no network, and its worked examples run as they stand.

An example is a page of ``docs/extend``: every block whose first line is ``# mine/...`` is a file, every command with
``--config-dir mine`` is run with these files, small, and every function ``test_...`` in them is called.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from PIL import Image

from harmonize.cli import COMMANDS, main
from tests.test_readme import FENCE, PAGES, ROOT, commands

DOCS = ROOT / "docs"
EXAMPLES = sorted((DOCS / "extend").glob("*.md"))
SMALL = {
    "train": "trainer=smoke trainer.max_steps=3 trainer.accelerator=cpu trainer.devices=1 logger=csv "
    "data.image_size=32 data.patch_size=8 data.num_train=16 data.num_val=8 data.batch_size=8 data.num_workers=0 "
    "trainer.sanity=false backbone=vit_pico diagnostics.figures=false",
    "evaluate": "accelerator=cpu num_train=16 num_val=8",
    "analyze": "accelerator=cpu num_images=4 untrained=false tsne=false diagnostics.layer_probe=null",
}
HEADS = {"hybrid": "loss.contrastive.hidden_dim=32", "contrastive": "loss.hidden_dim=32"}


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The built site, once for all processes of a test run; a warning would have ended the build."""
    mine = tmp_path_factory.getbasetemp()
    shared = mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine
    folder, done = shared / "site", shared / "site.done"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    with FileLock(shared / "site.lock"):
        if not done.exists():
            built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
            assert built.returncode == 0, built.stderr[-3000:]
            assert "WARNING" not in built.stderr
            done.touch()
    return folder


def test_no_page_loads_anything_from_elsewhere(site):
    loads = re.compile(r"<(?:script|img|iframe|source|video)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^>]*>")
    linked = re.compile(r"<link\b[^>]*\bhref=[\"']?(?:https?:)?//[^>]*>")
    styled = re.compile(r"@import[^;]*//|url\([\"']?(?:https?:)?//[^)]*\)")
    found = []
    for path in site.rglob("*"):
        if path.suffix in {".html", ".css"}:
            text = path.read_text()
            patterns = (styled,) if path.suffix == ".css" else (loads, linked)
            found += [f"{path.relative_to(site)}: {hit[0]}" for p in patterns for hit in p.finditer(text)]
    assert found == []


def navigation(entry: object) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    for inner in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
        yield from navigation(inner)


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        """Reads mkdocs.yml, whose tags name functions."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
    named = list(navigation(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]))
    assert len(named) == len(set(named))
    assert {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} <= set(named)


def test_what_lies_outside_docs_is_in_the_site(site):
    """Pages, pictures and code that pages link to, and links to them that lead somewhere."""
    home = (site / "project.html").read_text()
    assert 'src="experiments/first_run/curves.png"' in home
    assert (site / "experiments" / "first_run" / "curves.png").is_file()
    assert 'href="CONTRIBUTING.html"' in home
    for path in ("experiments/first_run/index.html", "tests/test_layering.py.html", "LICENSE.html"):
        assert (site / path).is_file(), path
    links = re.compile(r"<(?:a|img)\b[^>]*\b(?:href|src)=\"([^\"#:?]+)[^\":]*\"")
    broken = []
    for page in site.rglob("*.html"):
        if page.name != "404.html":
            targets = {link[1] for link in links.finditer(page.read_text())}
            broken += [f"{page.relative_to(site)}: {t}" for t in targets if not (page.parent / t).exists()]
    assert broken == []


def test_formulas_are_drawn(site):
    blocks = [b for page in DOCS.rglob("*.md") for _, lang, b in FENCE.findall(page.read_text()) if lang == "math"]
    drawn = sum(page.read_text().count('<svg role="img" aria-label=') for page in site.glob("*.html"))
    assert drawn == len(blocks) > 5


def test_the_reference_knows_every_part(site):
    pages = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    parts = [path for path in (ROOT / "src" / "harmonize").glob("*/__init__.py") if path.parent.name != "checks"]
    for part in parts:
        for module in [part.parent, *part.parent.glob("[a-z]*.py")]:
            name = ".".join(module.relative_to(ROOT / "src").with_suffix("").parts)
            assert f'id="{name}"' in pages, f"{name} is not in the API reference"
    assert ":func:" not in pages


def test_every_diagnostic_has_its_section():
    text = (DOCS / "diagnostics_in_pictures.md").read_text()
    default = yaml.safe_load((ROOT / "conf" / "diagnostics" / "default.yaml").read_text())
    named = [name for name, entry in default.items() if isinstance(entry, dict) and name != "health"]
    assert [name for name in named if f"`{name}`" not in text] == []


# ---- worked examples ------------------------------------------------------------------------------------------------


def write_files(page: str, folder: Path) -> list[Path]:
    """The files that a page shows, each named in its first line."""
    written = []
    for _, language, block in FENCE.findall(page):
        head = re.match(r"# (mine/[\w/]+\.(?:py|yaml))\n", block)
        if language in {"python", "yaml"} and head:
            path = folder / head[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block)
            written.append(path)
    return written


def smaller(command: str, rest: list[str]) -> list[str]:
    """The settings of a tiny run of the same kind."""
    loss = next((word.removeprefix("loss=") for word in rest if word.startswith("loss=")), "")
    return [*SMALL[command].split(), *([HEADS[loss]] if loss in HEADS else [])]


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A run folder, for examples that look at one."""
    folder = tmp_path_factory.mktemp("run") / "mine"
    assert main(["train", "loss=mim", *SMALL["train"].split(), "diagnostics=none", f"run.dir={folder}"]) == 0
    return folder


@pytest.fixture
def example(request, run, tmp_path, monkeypatch) -> Path:
    """The folder of one page's example, in which a reader would work: its files, a run, a table of images."""
    write_files(request.param.read_text(), tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    shutil.copytree(run, tmp_path / "outputs" / "mine")
    rows = ["file,label"]
    for i in range(96):
        Image.new("RGB", (32, 32), (2 * i, 100, 255 - 2 * i)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{'leaf' if i % 2 else 'stone'}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    yield tmp_path
    for path in (tmp_path / "mine").glob("*.py"):
        sys.modules.pop(path.stem, None)


def every_example(page: Path) -> list[list[str]]:
    return [command for command in commands(page.read_text()) if "--config-dir" in command]


def test_examples_stand_where_they_are_run():
    assert len(EXAMPLES) >= 4
    assert [page.name for page in PAGES if page not in EXAMPLES and every_example(page)] == []
    assert [page.name for page in EXAMPLES if not every_example(page)] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda page: page.stem, indirect=True)
def test_example_runs(example, request):
    page = request.node.callspec.params["example"]
    for number, (_, script, *rest) in enumerate(every_example(page)):
        command = script.removesuffix(".py")
        assert command in COMMANDS
        rest = [re.sub(r"^data\.root=.*", f"data.root={example / 'table.csv'}", word) for word in rest]
        folder = example / f"results-{number}"
        assert main([command, *rest, *smaller(command, rest), f"run.dir={folder}"]) == 0
        check = getattr(sys.modules[__name__], f"{page.stem}_{command}")
        check(folder)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda page: page.stem, indirect=True)
def test_tests_of_the_example(example, tmp_path):
    tests = [
        test
        for path in sorted((example / "mine").glob("test_*.py"))
        for name, test in inspect.getmembers(importlib.import_module(path.stem), inspect.isfunction)
        if name.startswith("test_")
    ]
    assert tests
    for test in tests:
        folder = tmp_path / "for_tests"
        folder.mkdir()
        test(**({"tmp_path": folder} if inspect.signature(test).parameters else {}))


def metrics(folder: Path) -> set[str]:
    return {key for line in (folder / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}


def objective_train(folder: Path) -> None:
    assert {"train/loss_rotation", "train/rotation_accuracy", "val/knn_top1"} <= metrics(folder)


def diagnostic_train(folder: Path) -> None:
    assert "diagnostics/token_norm/layer_00" in metrics(folder)


def diagnostic_analyze(folder: Path) -> None:
    (network,) = json.loads((folder / "diagnostics.json").read_text())["networks"]
    assert len(network["curves"]["token_norm"]["value"]) == 7


def dataset_train(folder: Path) -> None:
    assert {"train/loss_mim", "train/loss_contrastive", "val/linear_top1"} <= metrics(folder)


def protocol_evaluate(folder: Path) -> None:
    (row,) = json.loads((folder / "results.json").read_text())
    assert (row["protocol"], row["metric"]) == ("class_mean", "top1")
    assert 0 <= row["value"] <= 1
