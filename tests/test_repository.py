"""Promises about the repository as a whole, which no single part could keep."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import harmonize

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Pieced together, so that this file does not hold what it looks for.
HOSTS = [
    "pypi" + ".org",
    "python" + "hosted.org",
    "download.pytorch" + ".org",
    "pypi.nvidia" + ".com",
    "npmjs" + ".org",
    "deb.debian" + ".org",
    "index-url" + "=http",
]
HOMES = "|".join(["work", "root", "opt", "home", "Users"])
MACHINE_PATH = re.compile(rf"(?<![\w.:/*{{}}$-])/(?:{HOMES})/\w")


def committed() -> list[Path]:
    """The files that git holds or would hold after `git add`."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [path for name in names if name and (path := ROOT / name).is_file()]


def lines_matching(pattern: re.Pattern[str]) -> list[str]:
    """``file:line: text`` for every line of a committed text file that the pattern finds."""
    found = []
    for path in committed():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:  # A picture or a tensor, not a text.
            continue
        hits = (
            f"{path.relative_to(ROOT)}:{i}: {line.strip()}" for i, line in enumerate(lines, 1) if pattern.search(line)
        )
        found.extend(hits)
    return found


def test_no_registry_is_named():
    """Which index pip and uv ask is a setting of the machine, never of the project."""
    assert lines_matching(re.compile("|".join(map(re.escape, HOSTS)))) == []


def test_no_path_of_one_machine():
    assert lines_matching(MACHINE_PATH) == []


@pytest.mark.parametrize(("text", "found"), [("a /%s/x", True), ('"/%s/x"', True), ("https://a.org/%s/x", False)])
def test_the_pattern_for_paths(text, found):
    assert bool(MACHINE_PATH.search(text % "home")) is found


def test_no_large_file():
    """Run folders, checkpoints and data sets stay outside; figures are small."""
    assert [str(p.relative_to(ROOT)) for p in committed() if p.stat().st_size > 2 * 2**20] == []


def test_every_text_ends_its_last_line():
    texts = [p for p in committed() if p.suffix in {".py", ".md", ".yaml", ".toml", ".cff"} and p.stat().st_size]
    assert [str(p.relative_to(ROOT)) for p in texts if not p.read_bytes().endswith(b"\n")] == []


def requirements(extra: str | None = None) -> dict[str, SpecifierSet]:
    """Package -> allowed versions, of the core or of one extra."""
    texts = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    return {(r := Requirement(text)).name: r.specifier for text in texts}


@pytest.mark.parametrize(
    ("package", "version", "why"),
    [
        ("lightning", "2.6.2", "a malicious upload"),
        ("lightning", "2.6.3", "a malicious upload"),
        ("hydra-core", "1.4.0", "1.3 is what conf/ is written for"),
        ("omegaconf", "2.4.0", "hydra-core 1.3 needs an older one"),
    ],
)
def test_versions_that_must_not_be_installed(package, version, why):
    assert version not in requirements()[package], why


@pytest.mark.parametrize(("version", "supported"), [("3.9", False), ("3.10", True), ("3.13", True), ("3.14", False)])
def test_python_versions(version, supported):
    assert (version in SpecifierSet(PROJECT["requires-python"])) is supported


def test_torch_and_torchvision_are_not_pinned():
    """The installer takes the newest torch and the torchvision that belongs to it."""
    for package in ("torch", "torchvision"):
        assert {s.operator for s in requirements()[package]} == {">="}


def test_extras():
    assert set(PROJECT["optional-dependencies"]) >= {"slurm", "report", "analysis", "data", "export", "dev"}
    assert {"pytest", "pytest-xdist", "ruff", "mypy"} <= set(requirements("dev"))


def test_changelog_and_citation_know_the_version():
    newest = re.search(r"^## \[(.+?)\] - (unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None
    assert newest[1] == harmonize.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == harmonize.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["references"][0]["identifiers"][0] == {"type": "other", "value": "arXiv:2305.00729"}


def test_every_experiment_folder_says_how_to_repeat_it():
    for folder in (p for p in (ROOT / "experiments").glob("*") if p.is_dir() and any(p.iterdir())):
        readme = folder / "README.md"
        assert readme.is_file(), f"{folder.relative_to(ROOT)} has no README.md"
        assert re.search(r"^```bash\n(.*\n)*?(python|harmonize|make) .*", readme.read_text(), re.M), (
            f"{readme.relative_to(ROOT)} has no ```bash block with the command"
        )


def test_every_experiment_config_says_how_to_run_it():
    for path in sorted((ROOT / "conf" / "experiment").glob("*.yaml")):
        header = [line for line in path.read_text().splitlines() if line.startswith("#") and "@package" not in line]
        command = re.compile(rf"(python \w+\.py|harmonize \w+) .*\bexperiment={path.stem}\b")
        assert any(map(command.search, header)), f"{path.relative_to(ROOT)}: its header lacks its command"


def test_ci_script_runs_the_tests_last():
    script = (ROOT / ".ci" / "run").read_text().split()
    assert script[-2:] == ["make", "test"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
