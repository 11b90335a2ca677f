"""Fixtures in the official layouts, and the maps from official parameter names to ours."""

import argparse
import os
from pathlib import Path

import pytest
import torch

from harmonize.backbones.timm_vit import ViTEncoder

GOLDEN = Path(os.environ.get("HARMONIZE_GOLDEN") or Path(__file__).parent / "data")


def names(kind: str) -> list[str]:
    """All fixtures of one kind: every NAME.pth beside NAME_expected.pt whose name begins with the kind."""
    found = sorted(p.stem for p in GOLDEN.glob(f"{kind}*.pth") if (GOLDEN / f"{p.stem}_expected.pt").exists())
    assert found, f"no {kind} fixture in {GOLDEN}"
    return found


def checkpoint(name: str) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(GOLDEN / f"{name}.pth", weights_only=True)


def expected(name: str) -> dict:
    return torch.load(GOLDEN / f"{name}_expected.pt", weights_only=True)


def strip(state: dict, prefix: str) -> dict:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def vit(config: dict, **options) -> ViTEncoder:
    return ViTEncoder(
        config["img_size"],
        config["patch_size"],
        config["embed_dim"],
        config["depth"],
        config["num_heads"],
        **options,
    )


def assert_equal(actual, expected, what: str = "") -> None:
    """Equal at fp32 rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6, msg=lambda m: f"{what}: {m}")


def assert_equal_gradient(actual, expected, what: str) -> None:
    """Equal at fp32 rounding, where an element also carries the rounding of the large numbers that cancelled in it.

    The official fp32 gradients themselves differ from an fp64 run of the same step by up to 1.4e-5 of the tensor's
    largest element; ours, in an order of summation that depends on the processor, may lie as far on the other side.
    """
    atol = 1e-6 + 2.8e-5 * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=atol, msg=lambda m: f"{what}: {m}")


def assert_same_gradients(module: torch.nn.Module, official: dict[str, torch.Tensor], ours: dict[str, str]) -> None:
    """Every gradient the official code produced equals ours, and we produce no other.

    Args:
        module: After backward.
        official: Official parameter name -> gradient.
        ours: Official parameter name -> name in ``module``; a slice of it after "#": "qkv.bias#0:48".
    """
    parameters = dict(module.named_parameters())
    assert set(official) == set(ours), set(official) ^ set(ours)
    seen = set()
    for theirs, gradient in official.items():
        name, _, part = ours[theirs].partition("#")
        seen.add(name)
        actual = parameters[name].grad
        assert actual is not None, f"{name} has no gradient"
        if part:
            start, stop = (int(i) for i in part.split(":"))
            actual = actual[start:stop]
        assert_equal_gradient(actual.reshape(gradient.shape), gradient, theirs)
    extra = {n for n, p in parameters.items() if p.grad is not None} - seen
    assert not extra, f"gradients that the official code does not have: {sorted(extra)}"


@pytest.fixture(autouse=True)
def _fp32():
    torch.manual_seed(0)
