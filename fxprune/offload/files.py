"""Tensors in memory-mapped files, and the cache from which an interrupted run resumes."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import fx

from fxprune.errors import FxpruneError
from fxprune.graph.compat import TorchDispatchMode, tree_leaves
from fxprune.graph.context import setting
from fxprune.graph.facts import Source, facts_of
from fxprune.graph.tensors import as_parameter, get_tensor, set_tensor
from fxprune.offload.atomic import atomic_path, wrap_disk_errors
from fxprune.offload.ranks import barrier, broadcast_object, is_first, run_on_first

SMALLEST = 1 << 16
"""Bytes below which a tensor stays in memory: a mapping takes whole pages, and their number is limited."""

_UNWRITTEN = 1 << 26
"""Bytes that may wait to be written while the next tensors are computed; less than a part of a model takes anyway."""

_START_AGAIN = "Delete the folder of the unfinished run, and start again"

_folder: ContextVar[Path | None] = ContextVar("folder", default=None)
_cache: ContextVar[Path | None] = ContextVar("cache", default=None)


@contextmanager
def offload_to(folder: Path | None, cache: Path | None = None) -> Iterator[None]:
    """Keep tensors that passes make, and that last, in files of a folder; in memory with None.

    The files are unlinked once they are open, so that the space is free when the last tensor in one is gone, however
    the process ends. A second run of the same passes on the same data resumes from intermediate results in ``cache``.
    """
    with setting(_folder, folder), setting(_cache, cache):
        try:
            yield
            finish_writes()
        except BaseException:  # whatever was raised
            _writes.clear()  # their errors are not those of a later run; each closes its file
            raise


def resume_scope(name: str) -> AbstractContextManager[None]:
    """Separate the cache of passes that also run elsewhere in the same run, by a name that is the same in each run."""
    folder = _cache.get()
    return setting(_cache, None if folder is None else folder / name)


def is_offloading() -> bool:
    """Whether tensors that last are kept in files."""
    return _folder.get() is not None


def cache_folder() -> Path | None:
    """The folder of the cache of the pass that runs; None if there is no cache."""
    return _cache.get()


def cached(name: str, *, own: bool = False) -> Path | None:
    """Return the cached file ``name`` that an earlier run left; None if there is none.

    The first process decides for all, unless each looks for files of its own.
    """
    folder = _cache.get()
    if folder is None:
        return None
    path = folder / name
    return path if (path.exists() if own else broadcast_object(path.exists())) else None


def write_cached(name: str, write: Callable[[Path], object], *, own: bool = False) -> None:
    """Write the cached file ``name`` by a function of a path; it gets its name once complete. Without a cache, nothing.

    All processes share the cache. The first writes what all of them hold; with ``own`` each writes files of its own.

    Raises:
        FxpruneError: the first process could not write it; raised in the others.
    """
    folder = _cache.get()
    if folder is None:
        return

    def write_whole() -> None:
        with atomic_path(folder / name, parents=True) as unfinished:
            write(unfinished)

    if own:
        write_whole()
    else:
        run_on_first(write_whole, FxpruneError)


def cached_tensors(name: str, *, own: bool = False) -> dict[str, torch.Tensor] | None:
    """Tensors by name in the cached file ``name``, as :func:`cached`; None if there is no such file.

    Raises:
        FxpruneError: the file cannot be read.
    """
    file = cached(name, own=own)
    if file is None:
        return None
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise FxpruneError(f"cannot be read: {error}", where=os.fspath(file), remedy=_START_AGAIN) from error


def require_cached_tensors(name: str, refusal: type[FxpruneError], *, own: bool = False) -> dict[str, torch.Tensor]:
    """The same as :func:`cached_tensors`; ``refusal`` is raised if there is no such file."""
    found = cached_tensors(name, own=own)
    if found is None:
        raise refusal(f"{name} is missing", where="the run to resume", remedy=_START_AGAIN)
    return found


def write_cached_tensors(name: str, tensors: Mapping[str, torch.Tensor], *, own: bool = False) -> None:
    """Write contiguous tensors that share no memory to the cached file ``name``, as :func:`write_cached`."""
    write_cached(name, partial(save_file, {key: value.detach() for key, value in tensors.items()}), own=own)


def uncache(name: str) -> None:
    """Delete a folder in the cache, once all processes are done with it."""
    folder = _cache.get()
    if folder is None:
        return
    barrier()
    if is_first():
        shutil.rmtree(folder / name, ignore_errors=True)


def trim_heap() -> None:
    """Give memory that was freed back to the system, where the allocator can.

    glibc keeps what tensors of up to 32 MB took, such as the gradients of a trace: as much as all weights.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def release_freed() -> None:
    """Give memory that was freed back to the system, as :func:`trim_heap`, inside :func:`offload_to` only."""
    if is_offloading():
        trim_heap()


@cache
def _writers(process: int) -> ThreadPoolExecutor:
    """The threads that write, of one process: they do not live on in one that is forked."""
    return ThreadPoolExecutor(8, thread_name_prefix="fxprune-write")


_writes: deque[tuple[Future[None], int]] = deque()
"""Files on their way to the disk, with their bytes."""


def offloaded(tensor: torch.Tensor, own: slice | None = None) -> torch.Tensor:
    """Return a tensor of the same values in a file, inside :func:`offload_to`; else the tensor itself.

    Pages that are not written yet cannot be evicted when memory is short, so files are written at once: in threads,
    since waiting for each takes as long as everything else when others use the disk too.

    Args:
        own: the elements, in order, that the file has room for, others being 0; None for all.

    Raises:
        OSError: this file, or one that was begun before, could not be written.
    """
    folder = _folder.get()
    if folder is None or tensor.nbytes < SMALLEST or tensor.device.type != "cpu":
        return tensor

    def write_and_close() -> None:
        with open(handle, "rb") as file:
            os.fsync(file.fileno())

    handle, name = tempfile.mkstemp(dir=folder)
    try:
        os.truncate(handle, tensor.nbytes)
        begin, end, _ = (own or slice(None)).indices(tensor.numel())
        # a mapping of space that is not there ends the process
        os.posix_fallocate(handle, begin * tensor.itemsize, max(1, end - begin) * tensor.itemsize)
        mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        if own is None:
            mapped.view(tensor.shape).copy_(tensor)
        else:
            mapped[own] = tensor.reshape(-1)[own]
    except BaseException:  # whatever was raised, nobody else closes the file
        os.close(handle)
        raise
    finally:
        os.unlink(name)
    _begin_write(write_and_close, tensor.nbytes)
    return mapped.view(tensor.shape)


class _OffloadLarge(TorchDispatchMode):
    def __init__(self, most: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not isinstance(found, torch.Tensor) or found.nbytes <= self.most:
            return found
        taken = (one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor))
        views = found.untyped_storage()._cdata in {one.untyped_storage()._cdata for one in taken}
        return found if views else offloaded(found)


def offload_large(most: float = SMALLEST) -> AbstractContextManager[object]:
    """Move tensors of more than ``most`` bytes to files as ops make them, inside :func:`offload_to`; views stay."""
    return _OffloadLarge(most) if is_offloading() else nullcontext()


def write_back(tensor: torch.Tensor) -> None:
    """Write a tensor that :func:`offloaded` gave to the disk again, once its values have changed; in threads.

    Pages that have changed cannot be evicted before.
    """
    if not is_offloading() or tensor.nbytes < SMALLEST or tensor.device.type != "cpu" or os.name != "posix":
        return
    _begin_write(partial(_sync_pages, tensor), tensor.nbytes)


def _sync_pages(tensor: torch.Tensor) -> None:
    begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.nbytes - begin
    libc = ctypes.CDLL(None, use_errno=True)
    wait_for_disk = 0x0010 if sys.platform == "darwin" else 4  # the flag MS_SYNC
    if libc.msync(ctypes.c_void_p(begin), ctypes.c_size_t(length), wait_for_disk):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def free_disk() -> int:
    """The bytes that the disk of the folder has free, inside :func:`offload_to`; else 0."""
    folder = _folder.get()
    return 0 if folder is None else shutil.disk_usage(folder).free


def _begin_write(write: Callable[[], None], size: int) -> None:
    _writes.append((_writers(os.getpid()).submit(write), size))
    _wait_for_writes(_UNWRITTEN)


def _wait_for_writes(size: int) -> None:
    """Return once at most ``size`` bytes are on their way, and raise the error of a write that failed."""
    while _writes and (sum(waiting for _, waiting in _writes) > size or _writes[0][0].done()):
        _writes.popleft()[0].result()


def finish_writes() -> None:
    """Wait until the tensors in files are on the disk; raises FxpruneError if one could not be written."""
    with wrap_disk_errors(_folder.get() or "", FxpruneError):
        _wait_for_writes(0)


@contextmanager
def sync_writes(folder: Path) -> Iterator[None]:
    """Sync files that others write below a folder to the disk as they grow, inside :func:`offload_to`.

    Pages of files that are not on the disk yet cannot be evicted, and a system that limits the memory of a process may
    kill it for them.
    """
    if not is_offloading():
        yield
        return
    done, sizes = threading.Event(), dict[Path, int]()

    def sync() -> None:
        while not done.wait(0.05):
            with suppress(OSError):  # a file that is gone meanwhile, or cannot be synced: the next round looks again
                for path in folder.rglob("*"):
                    size = path.stat().st_size if path.is_file() else 0
                    if size > sizes.get(path, 0):
                        with path.open("rb") as file:
                            os.fsync(file.fileno())
                        sizes[path] = size

    flusher = threading.Thread(target=sync, daemon=True)
    flusher.start()
    try:
        yield
    finally:
        done.set()
        flusher.join()


def write_values(graph_module: fx.GraphModule, name: str, value: torch.Tensor) -> None:
    """Change the values of the tensor ``name``: in place if the graph shares it with its model, else in a new one."""
    old, source = get_tensor(graph_module, name), facts_of(graph_module).get(Source)
    if source is not None and source.shares:
        old.copy_(value)
    else:
        set_tensor(graph_module, name, as_parameter(offloaded(value.to(old.dtype).contiguous()), old))
