"""Keeping freed memory, so that a training step on a CPU does not ask the system for the same pages over and over."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, <malloc.h>
_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the C library keep large blocks that are freed, for the next tensor of that size.

    By default glibc returns blocks beyond 32 MB to the system at once, and every activation of a Vision Transformer is
    paged in anew, zeroed, in every step: a tenth of its time. Memory is still given back where that is asked for
    (``malloc_trim``, after every batch of the diagnostics). For the whole process.

    Returns:
        Whether this C library can do it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _MOST)) and bool(mallopt(_TRIM_THRESHOLD, _MOST))
