"""What the C library does with memory that is freed: keep it for the next tensor, or give it back to the system."""

from __future__ import annotations

import ctypes
import platform
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, <malloc.h>
_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the C library keep large blocks that are freed, for the next tensor of that size.

    By default glibc returns blocks beyond 32 MB to the system at once, and every activation of a Vision Transformer is
    paged in anew, zeroed, in every step: 8 % of a ViT-S step's processor time, halved by this. For the whole process.

    Returns:
        Whether this C library can do it.
    """
    libc = _glibc()
    return libc is not None and bool(libc.mallopt(_MMAP_THRESHOLD, _MOST) and libc.mallopt(_TRIM_THRESHOLD, _MOST))


def give_back_freed_memory() -> None:
    """Give all freed memory back to the system now, whatever is kept otherwise."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
