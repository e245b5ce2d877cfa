"""What becomes of memory that a process frees, where its allocator can be told (that of GNU's C library)."""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed"]

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Options of mallopt, by their numbers in malloc.h."""


def keep_freed() -> bool:
    """Keep what is freed for what comes next, and return whether the allocator does; another does as it did.

    Else each tensor of more than 32 MB, such as what a model says at some hundred tokens, is a mapping of its own that
    the system fills with zeros page by page: up to a quarter of the time of a step of training on a CPU. It is for a
    process whose memory is not short, and that does little else.
    """
    try:
        tell = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(tell(_MMAP_MAX, 0) and tell(_TRIM_THRESHOLD, -1))  # no mappings, and a heap that never shrinks
