"""The memory allocator of the process."""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed"]

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Options of ``mallopt``, from malloc.h."""


def keep_freed() -> bool:
    """Disable trimming in glibc's malloc; False on other allocators.

    By default each tensor above 32 MB, such as the logits of some hundred tokens, is a mapping of its own, which the
    system fills with zeros page by page: up to a quarter of the time of a training step on a CPU. Only for a process
    that has memory to spare and does little else.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))  # no mappings, and a heap that never shrinks
