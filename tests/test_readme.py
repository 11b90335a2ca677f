"""No command in the documentation goes untested: every ```bash block of every page is parsed, and each command checked.

Commands of harmonize are composed and checked in this process (and training runs for some steps); make
targets, scripts, extras and build arguments must exist; links must lead somewhere. A ```text block that begins with
`$ command` shows a mistake and the very words that answer it. A kind of command without a checker fails until it gets
one.
"""

from __future__ import annotations

import ast
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from harmonize.cli import COMMANDS, TOOLS, _with_key, main
from harmonize.config import check_config, compose
from harmonize.types import ConfigError

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("*.md", "docs/**/*.md", "docker/*.md", "benchmarks/*.md", "experiments/*.md", "experiments/*/*.md")
PAGES = sorted(page for folder in FOLDERS for page in ROOT.glob(folder))
# Commands stand in bash blocks, so that none hides in a block that is not read.
LANGUAGES = {"bash", "text", "yaml", "json", "python", "bibtex", "math"}
FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```$", re.M | re.S)


def commands(page: str) -> Iterator[list[str]]:
    """The commands in a page's bash blocks as words, without comments, leading ``NAME=value`` and shell operators."""
    for _, language, block in FENCE.findall(page):
        if language != "bash":
            continue
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
            lexer.whitespace_split = True
            for operator, words in itertools.groupby(lexer, key=lambda word: set(word) <= set(";&|")):
                command = list(itertools.dropwhile(lambda w: re.match(r"[A-Z_]+=", w), words))
                if not operator and command:
                    yield command


def every_command() -> list[pytest.param]:
    found = {tuple(c): f"{p.relative_to(ROOT)}: {shlex.join(c)}" for p in PAGES for c in commands(p.read_text())}
    return [pytest.param(list(command), id=name) for command, name in found.items()]


# ---- one checker per program ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """An image folder of two classes, to stand for the reader's own."""
    root = tmp_path_factory.mktemp("images")
    for index in range(160):
        folder = root / f"class_{index % 2}"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (index, 100, 255 - index)).save(folder / f"{index}.png")
    return root


def overrides_of(arguments: list[str], images: Path) -> list[list[str]]:
    """The overrides of every job that a command of harmonize starts, with an existing folder for the reader's."""
    words = iter(arguments)
    overrides = []
    for word in words:
        if word in {"--cfg", "--config-dir"}:
            next(words)
        elif word not in {"-m", "--multirun", "--help"}:
            overrides.append(re.sub(r"^data\.root=.*", f"data.root={images}", word))
    parsed = OverridesParser.create().parse_overrides(overrides)
    choices = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()] if o.is_sweep_override() else [text]
        for o, text in zip(parsed, overrides, strict=True)
    ]
    jobs = [list(job) for job in itertools.product(*choices)]
    assert len(jobs) == 1 or {"-m", "--multirun"} & set(arguments), "a sweep needs -m"
    return jobs


def check_make(arguments: list[str], images: Path) -> None:
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
    assert set(arguments) <= set(targets)


def check_python(arguments: list[str], images: Path) -> None:
    first, *rest = arguments
    if first in {"train.py", "evaluate.py", "analyze.py"}:
        check_harmonize([first.removesuffix(".py"), *rest], images)
    elif first != "-m":
        ast.parse((ROOT / first).read_text(), first)
    elif rest[0] != "venv":
        assert (ROOT / f"{rest[0].replace('.', '/')}.py").is_file()


def check_harmonize(arguments: list[str], images: Path) -> None:
    """Whether a checkpoint exists is for the machine that has it."""
    command, *rest = arguments
    if "--config-dir" in rest:  # with files that the page shows: tests/test_docs.py runs it
        return
    if command in TOOLS:
        source = (ROOT / "src" / f"{TOOLS[command].replace('.', '/')}.py").read_text()
        assert all(f'"{word}"' in source for word in rest if word.startswith("--")), arguments
        settings = [word for word in rest if "=" in word and not word.startswith("--")]
        for job in overrides_of(settings, images):
            check_config(compose(job), machine=False)
        return
    assert command in COMMANDS
    rest = [_with_key(word, COMMANDS[command]) for word in rest]
    for job in overrides_of(rest, images):
        if command in ("analyze", "evaluate") and {"--help", "--cfg"} & set(rest):
            job = ["checkpoint=any", *job]
        check_config(compose(job, command), machine=False, command=command)


def check_pip(arguments: list[str], images: Path) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    extras = re.fullmatch(r"\.(?:\[(.+)\])?", arguments[-1])
    assert arguments[:-1] == ["install", "-e"]
    assert extras is not None
    assert all(re.search(rf"^{extra} = \[", project, re.M) for extra in (extras[1] or "").split(",") if extra)


def check_docker(arguments: list[str], images: Path) -> None:
    text = (ROOT / "docker" / "Dockerfile").read_text()
    if arguments[0] == "build":
        assert (ROOT / arguments[arguments.index("-f") + 1]).is_file()
        given = [value.split("=") for flag, value in itertools.pairwise(arguments) if flag == "--build-arg"]
        assert {name for name, _ in given} <= set(re.findall(r"^ARG (\w+)", text, re.M))
        assert {value for name, value in given if name == "DEVICE"} <= set(re.findall(r" AS (\w+)$", text, re.M))
    else:
        assert arguments[0] == "run"
        image = next(i for i, word in enumerate(arguments) if re.fullmatch(r"harmonize(:\w+)?", word))
        assert 'ENTRYPOINT ["harmonize"]' in text
        check_harmonize(arguments[image + 1 :], images)


def check_wandb(arguments: list[str], images: Path) -> None:
    from wandb.cli.cli import cli

    assert arguments[0] in cli.commands


def check_activate(arguments: list[str], images: Path) -> None:
    assert arguments == [".venv/bin/activate"]


CHECKERS = {
    "make": check_make,
    "python": check_python,
    "python3": check_python,
    "harmonize": check_harmonize,
    "pip": check_pip,
    "docker": check_docker,
    "wandb": check_wandb,
    ".": check_activate,
}


@pytest.mark.parametrize("command", every_command())
def test_command(command, images):
    program, *arguments = command
    assert program in CHECKERS, f"nothing checks {program!r}: give it a checker in {Path(__file__).name}"
    CHECKERS[program](arguments, images)


def test_a_wrong_command_is_noticed(images):
    page = "```bash\nA=1 python train.py loss=hybrid \\\n  loss.lambdda=0.2 && make demos\n```\n```text\nmake it\n```\n"
    train, make = commands(page)
    assert train == ["python", "train.py", "loss=hybrid", "loss.lambdda=0.2"]
    with pytest.raises(ConfigError, match=r"loss\.lambda"):
        check_python(train[1:], images)
    with pytest.raises(AssertionError):
        check_make(make[1:], images)


def test_commands_of_analyze_are_checked(images):
    page = "```bash\npython analyze.py checkpoint=outputs/a,timm:b -m data=folder data.root=x\n"
    page += "harmonize analyze --help\nharmonize analyze checkpoint=a data.root=x\npython analyze.py tsne=true\n```\n"
    sweep, show_help, no_data, no_checkpoint = commands(page)
    check_python(sweep[1:], images)
    check_harmonize(show_help[1:], images)
    with pytest.raises(ConfigError, match="add data=NAME"):
        check_harmonize(no_data[1:], images)
    with pytest.raises(ConfigError, match="checkpoint must be given"):
        check_python(no_checkpoint[1:], images)


def every_transcript() -> list[tuple[str, str]]:
    """Command and answer of every text block that shows a mistake."""
    blocks = [block for p in PAGES for _, language, block in FENCE.findall(p.read_text()) if language == "text"]
    return [(head, answer.rstrip()) for head, _, answer in (b.partition("\n") for b in blocks) if head.startswith("$ ")]


@pytest.mark.parametrize(("command", "answer"), every_transcript())
def test_a_mistake_is_answered_as_shown(command, answer, capsys):
    _, script, *arguments = shlex.split(command.removeprefix("$ "))
    assert main([script.removesuffix(".py"), *arguments]) == 2
    assert capsys.readouterr().err.rstrip() == answer


README_TRAIN = [c[2:] for c in commands((ROOT / "README.md").read_text()) if c[:2] == ["python", "train.py"]]
README_TRAIN = [c for c in README_TRAIN if "hydra/launcher=slurm" not in c]  # tests/slurm has a cluster

FINE_TUNE = "fine_tune num_train=16 num_val=16 eval.epochs=1 eval.warmup_epochs=0 eval.batch_size=8"


@pytest.fixture(scope="session")
def shards(images, tmp_path_factory) -> Path:
    """The same images in shards."""
    folder = tmp_path_factory.mktemp("shards") / "out"
    assert main(["shards", str(images), str(folder)]) == 0
    return folder


@pytest.mark.parametrize("arguments", README_TRAIN, ids=shlex.join)
def test_readme_training_command_runs(arguments, images, shards, tmp_path, monkeypatch):
    """The command as it stands, then small: few images, three steps, narrow heads, the first two jobs of a sweep.

    The first of them is a process of its own.
    """
    first = arguments == README_TRAIN[0]
    if not {"--help", "--cfg"} & set(arguments):
        small = ["trainer=smoke", "trainer.accelerator=cpu", "trainer.devices=1", "logger=csv", f"run.root={tmp_path}"]
        small += ["data.image_size=32", "data.patch_size=8", "data.num_train=16", "data.num_val=16"]
        small += ["data.batch_size=4", "data.num_workers=0", "trainer.max_steps=3", "scale.hidden_dim=64"]
        if not first:  # what else a run does is the same for all
            small += ["diagnostics=none", "trainer.sanity=false"]
        lengths = ("trainer.", "data.batch_size", "logger", "run.dir")
        kept = [re.sub(r"^(\w[\w.]*=[^,]+,[^,]+),.*", r"\1", a) for a in arguments if not a.startswith(lengths)]
        if any(a.startswith("experiment=") for a in arguments):  # a sweep of its own, with evaluations
            small += ["seed=0", "loss.lambda=0,0.2", f"scale.evaluations.fine_tune='{FINE_TUNE}'"]
        if "-m" in arguments:
            small.append("hydra/launcher=basic")  # all jobs in one process: tests/test_sweeps.py gives each its own
        root = shards if "data=shards" in arguments else images
        arguments = [re.sub(r"^data\.root=.*", f"data.root={root}", a) for a in kept] + small
    if not first:
        monkeypatch.chdir(ROOT)
        assert main(["train", *arguments]) == 0
        return
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- the pages themselves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_name_their_language(page):
    text = page.read_text()
    assert {language for _, language, _ in FENCE.findall(text)} <= LANGUAGES
    for _, language, block in FENCE.findall(text):
        if language == "yaml":
            yaml.safe_load(block)
        elif language == "python":
            ast.parse(block)


def anchors(page: Path) -> set[str]:
    """The anchors that a Markdown page's headings make."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = page if not path else page.parent / path
        assert target.exists(), f"{page.relative_to(ROOT)} links to {link}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{page.relative_to(ROOT)} links to {link}: no such heading"


def test_readme_begins_with_the_two_commands():
    assert list(commands((ROOT / "README.md").read_text()))[:2] == [["make", "demo"], ["make", "test"]]


def test_make_lists_every_target():
    shown = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)
    assert phony is not None
    assert re.findall(r"^  make ([a-z-]+)", shown, re.M) == phony[1].split()
