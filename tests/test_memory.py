"""Freed memory is used again: counted in page faults of a fresh process."""

import json
import platform
import subprocess
import sys

import pytest

CHILD = """
import json, resource, sys, torch
from harmonize.memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use(): torch.empty(2**24).fill_(1.0)
for _ in range(24): use()  # an aligned block needs a hole larger than itself: it takes a while until there is one
before = faults()
for _ in range(8): use()
print(json.dumps([kept, faults() - before]))
"""


def child(mode):
    done = subprocess.run([sys.executable, "-c", CHILD, mode], capture_output=True, text=True, check=True, timeout=200)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another one")
def test_a_large_tensor_takes_the_place_of_the_last():
    kept, faults = child("keep")
    assert kept is True
    _, usual = child("usual")
    assert usual > 8 * 100, "the test measures nothing"  # 64 MiB each: 16,384 pages, or 32 huge ones
    assert faults < usual / 10
