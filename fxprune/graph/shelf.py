"""Tensors in files, where there is not the memory for them: the operating system reads and writes their pages."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

__all__ = ["shelved", "stored"]

_LEAST = 1 << 16
"""Bytes of a tensor below which it stays in memory: a mapping takes whole pages, and there may be only so many."""

_shelf: ContextVar[Path | None] = ContextVar("shelf", default=None)


@contextmanager
def shelved(folder: Path) -> Iterator[None]:
    """Keep tensors that passes make, and that last, in files of a folder.

    The files have no name once they are open, so that the space is free when the last tensor in one is gone, however
    the process ends.

    Args:
        folder: on a disk with room for them.
    """
    token = _shelf.set(folder)
    try:
        yield
    finally:
        _shelf.reset(token)


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same values in a file, where tensors are to be in files; else the tensor as it is."""
    folder = _shelf.get()
    if folder is None or tensor.nbytes < _LEAST or tensor.device.type != "cpu":
        return tensor
    handle, name = tempfile.mkstemp(dir=folder)
    try:
        os.truncate(handle, tensor.nbytes)
        mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    finally:
        os.close(handle)
        os.unlink(name)
    return mapped.view(tensor.shape).copy_(tensor)
