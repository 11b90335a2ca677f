"""Are the packages those that harmonize is made for, and do they fit each other?"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata

from harmonize.checks.findings import Finding, Patient, first_line, installed, ok, problem, warning

STOLEN = {("lightning", "2.6.2"), ("lightning", "2.6.3")}
"""Uploads that were not the project's own, and read the credentials of whoever imported them."""


def packages(patient: Patient) -> Iterator[Finding]:
    """Python and every package that is needed, or installed for an extra, against the ranges in pyproject.toml."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    python = ".".join(map(str, sys.version_info[:3]))
    allowed = metadata.metadata("harmonize")["Requires-Python"]
    fits = python in SpecifierSet(allowed)
    if not fits:
        yield problem(f"Python {python} is not supported ({allowed}).", "Make a new environment with another Python.")
    needed = [Requirement(text) for text in metadata.requires("harmonize") or ()]
    core = {r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})}
    wrong = 0
    for name, ranges in {r.name: r.specifier for r in needed}.items():
        version = installed(name)
        if (name, version) in STOLEN:
            wrong += 1
            yield problem(
                f"{name} {version} is a malicious upload.",
                "Remove it at once, and change the passwords and keys that this account can read.",
            )
        elif version is None and name in core:
            wrong += 1
            yield problem(f"{name} is not installed.", f"pip install '{name}{ranges}'")
        elif version is not None and not ranges.contains(version, prereleases=True):
            wrong += 1
            report = problem if name in core else warning
            yield report(f"{name} {version} is outside of its range ({ranges}).", f"pip install '{name}{ranges}'")
    if fits and not wrong:
        yield ok(f"Python {python} and {len(core)} packages are in the ranges of pyproject.toml.")


def torch_loading(patient: Patient) -> Iterator[Finding]:
    """Torch and torchvision are two halves of one build; only running an operation shows whether they fit."""
    names = f"torch {installed('torch')} and torchvision {installed('torchvision')}"
    try:
        import torch
        import torchvision.ops

        boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.1]])
        kept = torchvision.ops.nms(boxes, torch.tensor([1.0, 0.5]), 0.5).tolist()
    except Exception as error:  # ImportError, OSError or RuntimeError, depending on what is missing
        yield problem(
            f"{names} do not work together: {first_line(error)}.",
            "Install both in one command, from one index: pip install --force-reinstall torch torchvision",
        )
        return
    assert kept == [0], kept
    yield ok(f"{names} work together (torchvision::nms runs).")
