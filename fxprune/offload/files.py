"""Tensors in memory-mapped files, and the cache from which an interrupted run resumes.

The operating system reads the pages of such tensors when they are used, and writes them back when memory is short.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import fx

from fxprune.graph.facts import Source, facts_of
from fxprune.graph.tensors import as_parameter, get_tensor, set_tensor

__all__ = [
    "apart",
    "is_shelved",
    "put_values",
    "recalled",
    "remembering",
    "shelved",
    "stored",
    "unremembered",
    "written_through",
]

_LEAST = 1 << 16
"""Bytes of a tensor below which it stays in memory: a mapping takes whole pages, and there may be only so many."""

_UNWRITTEN = 1 << 26
"""Bytes that may be on their way to files while the next are computed: less than a part of a model takes anyway."""

_PAUSE = 0.05
"""Seconds between two looks at files that grow."""

_shelf: ContextVar[Path | None] = ContextVar("shelf", default=None)
_memory: ContextVar[Path | None] = ContextVar("memory", default=None)


@contextmanager
def shelved(folder: Path, memory: Path | None = None) -> Iterator[None]:
    """Keep tensors that passes make, and that last, in files of a folder.

    The files have no name once they are open, so that the space is free when the last tensor in one is gone, however
    the process ends.

    Args:
        folder: on a disk with room for them.
        memory: a folder for what is found out on the way; a second run of the same passes on the same data, with this
            folder as the first left it, does not find it out again.
    """
    tokens = _shelf.set(folder), _memory.set(memory)
    try:
        yield
        _writers.wait(0)
    finally:
        _shelf.reset(tokens[0])
        _memory.reset(tokens[1])


@contextmanager
def _remembered_in(folder: Path | None) -> Iterator[None]:
    token = _memory.set(folder)
    try:
        yield
    finally:
        _memory.reset(token)


def apart(name: str) -> AbstractContextManager[None]:
    """Keep what is found out here apart from what the same passes find out at another place of the same run.

    Args:
        name: of the place: the same in a second run, and of no other place beside it.
    """
    folder = _memory.get()
    return _remembered_in(None if folder is None else folder / name)


def unremembered() -> AbstractContextManager[None]:
    """Neither remember what is found out here nor take up what was."""
    return _remembered_in(None)


def is_shelved() -> bool:
    """Whether what lasts is kept in files, for want of memory."""
    return _shelf.get() is not None


def recalled(name: str) -> Path | None:
    """Return the file of this name that an earlier run left; None where there is none."""
    folder = _memory.get()
    path = None if folder is None else folder / name
    return path if path is not None and path.exists() else None


@contextmanager
def remembering(name: str) -> Iterator[Path | None]:
    """Yield a path to write to for a later run; None where none is to be. It has its name when it is complete."""
    folder = _memory.get()
    if folder is None:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{name}.part"
    yield unfinished
    os.replace(unfinished, folder / name)


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same values in a file, where tensors are to be in files; else the tensor as it is."""
    folder = _shelf.get()
    if folder is None or tensor.nbytes < _LEAST or tensor.device.type != "cpu":
        return tensor
    handle, name = tempfile.mkstemp(dir=folder)
    try:
        os.truncate(handle, tensor.nbytes)
        mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        mapped.copy_(tensor)
    except BaseException:  # whatever it is, the file is not for anyone
        os.close(handle)
        raise
    finally:
        os.unlink(name)
    _writers.start(handle, tensor.nbytes)
    return mapped


@contextmanager
def written_through(folder: Path) -> Iterator[None]:
    """Have what others write into a folder written to the disk at once, where tensors are to be in files.

    Pages of files that are not on the disk yet cannot be given up, and a system that limits the memory of a process may
    end it for them.

    Args:
        folder: of the files, and of folders with more.
    """
    if _shelf.get() is None:
        yield
        return
    done = threading.Event()
    flusher = threading.Thread(target=_flush, args=(folder, done), daemon=True)
    flusher.start()
    try:
        yield
    finally:
        done.set()
        flusher.join()


def _flush(folder: Path, done: threading.Event) -> None:
    """Write files that grew to the disk, again and again until all is done."""
    sizes: dict[Path, int] = {}
    while not done.wait(_PAUSE):
        with suppress(OSError):  # a file that has gone meanwhile, or that cannot be synced, is looked at again
            for path in folder.rglob("*"):
                size = path.stat().st_size if path.is_file() else 0
                if size > sizes.get(path, 0):
                    _sync(path)
                    sizes[path] = size


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Writer(threading.Thread):
    """Writes what was put into a mapped file to the disk, and closes it."""

    def __init__(self, handle: int, size: int) -> None:
        super().__init__(daemon=True)
        self.handle, self.size = handle, size
        self.error: OSError | None = None

    def run(self) -> None:
        try:
            os.fsync(self.handle)
        except OSError as error:
            self.error = error
        finally:
            os.close(self.handle)


class _Writers:
    """Files that are written while the next tensors are computed: few bytes at a time.

    Pages that are not written yet cannot be given up where memory is short. Waiting for each file takes as long as all
    else where others use the disk too.
    """

    def __init__(self) -> None:
        self.pending: deque[_Writer] = deque()

    def start(self, handle: int, size: int) -> None:
        """Begin to write a file; go on once no more than :data:`_UNWRITTEN` bytes are on their way.

        Raises:
            OSError: one that was begun before, or this one, could not be written.
        """
        writer = _Writer(handle, size)
        writer.start()
        self.pending.append(writer)
        self.wait(_UNWRITTEN)

    def wait(self, size: int) -> None:
        """Go on once no more than ``size`` bytes are on their way.

        Raises:
            OSError: a file that was begun could not be written.
        """
        while self.pending and (sum(one.size for one in self.pending) > size or not self.pending[0].is_alive()):
            first = self.pending.popleft()
            first.join()
            if first.error is not None:
                raise first.error


_writers = _Writers()


def put_values(graph_module: fx.GraphModule, name: str, value: torch.Tensor) -> None:
    """Give the tensor ``name`` other values: in place where the model holds it too and is to change, else anew."""
    old, source = get_tensor(graph_module, name), facts_of(graph_module).get(Source)
    if source is not None and source.shares:
        old.copy_(value)
    else:
        set_tensor(graph_module, name, as_parameter(stored(value.to(old.dtype).contiguous()), old))
