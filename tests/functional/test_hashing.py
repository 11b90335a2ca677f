"""The fingerprint changes with everything that weights are, and with nothing else."""

import hashlib

import pytest
import torch

from harmonize.functional.hashing import weights_hash

STATE = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(True), "c": torch.zeros(0, 2, dtype=torch.bfloat16)}


def test_the_definition():
    by_hand = hashlib.sha256()
    by_hand.update(b"a torch.bool ();\x01")
    by_hand.update(b"b torch.float32 (2, 3);" + STATE["b"].numpy().tobytes())
    by_hand.update(b"c torch.bfloat16 (0, 2);")
    assert weights_hash(STATE) == by_hand.hexdigest()


def test_order_and_memory_layout_do_not_matter():
    other = dict(reversed(STATE.items()))
    other["b"] = torch.arange(12.0).view(2, 6)[:, :3].clone()
    other["b"] = STATE["b"].T.contiguous().T  # columns first
    other["b"].requires_grad_()
    assert weights_hash(other) == weights_hash(STATE)


@pytest.mark.parametrize(
    "change",
    [
        {"b": torch.arange(6.0).view(3, 2)},
        {"b": torch.arange(6.0).view(2, 3).nextafter(torch.tensor(9.0))},
        {"b": torch.arange(6, dtype=torch.float64).view(2, 3)},
        {"d": torch.ones(1)},
    ],
)
def test_everything_else_does(change):
    assert weights_hash(STATE | change) != weights_hash(STATE)
