"""Weights copied to a compute device ahead of their use, while the device is at work, and precision there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import psutil
import torch
from torch import fx

from fxprune.errors import ArgumentError, PassError
from fxprune.graph.context import setting
from fxprune.graph.tensors import device_of, map_tensors, version_of, weights
from fxprune.offload.files import SMALLEST, is_offloading
from fxprune.offload.ranks import broadcast_object, start_gather, world_size

_offered: ContextVar[Prefetcher | None] = ContextVar("offered", default=None)
_used: ContextVar[Prefetcher | None] = ContextVar("used", default=None)


def _key(tensor: torch.Tensor) -> tuple[int, int]:
    """The identity of a tensor, and its version: one that was written to is copied again."""
    return id(tensor), version_of(tensor)


class Prefetcher:
    """Copies weights to a device, some of them ahead.

    It holds the copies made ahead, and of those fetched only the last: the caller holds the rest.
    """

    gathers: ClassVar[bool] = False
    """Whether it takes all processes to fetch a weight."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._ahead: dict[tuple[int, int], tuple[torch.Tensor, Callable[[], torch.Tensor]]] = {}
        self._last: tuple[tuple[int, int], torch.Tensor, torch.Tensor] | None = None

    def prefetch(self, tensors: Iterable[torch.Tensor]) -> None:
        """Start copying the tensors needed next; drop earlier copies made ahead that are not among them."""
        begun, self._ahead = self._ahead, {}
        for tensor in tensors:
            key = _key(tensor)
            if key not in self._ahead:
                self._ahead[key] = begun.pop(key) if key in begun else (tensor, self.start_copy(tensor.detach()))

    def fetch(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return copies on the device; a tensor listed twice has one copy."""
        found: dict[tuple[int, int], torch.Tensor] = {}
        for tensor in tensors:
            key = _key(tensor)
            if key in found:
                continue
            if self._last is None or self._last[0] != key:
                self._last = None  # free it before the next copy takes memory
                begun = self._ahead.pop(key, None)
                finish = self.start_copy(tensor.detach()) if begun is None else begun[1]
                self._last = key, tensor, finish()
            found[key] = self._last[2]
        return [found[_key(tensor)] for tensor in tensors]

    def start_copy(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start copying a tensor; the returned function waits for the copy and returns it."""
        moved = tensor.to(self.device)
        return lambda: moved

    def close(self) -> None:
        self._ahead, self._last = {}, None


class StreamPrefetcher(Prefetcher):
    """Copies through pinned memory, in a thread and a CUDA stream of its own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)
        self._thread = ThreadPoolExecutor(1)

    def start_copy(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Read and copy a tensor, perhaps from a file, in the thread; the device waits for it where it is used."""

        def copy() -> tuple[torch.Tensor, torch.cuda.Event]:
            held = tensor.pin_memory() if tensor.device.type == "cpu" else tensor
            with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                return held.to(self.device, non_blocking=True), self._stream.record_event()

        copying = self._thread.submit(copy)

        def finish() -> torch.Tensor:
            moved, copied = copying.result()
            now = torch.cuda.current_stream(self.device)
            now.wait_event(copied)
            moved.record_stream(now)
            return moved

        return finish

    def close(self) -> None:
        super().close()
        self._thread.shutdown(cancel_futures=True)


class GatheringPrefetcher(Prefetcher):
    """Reads a share of each weight from its file, and gets the rest from the other processes, which do the same.

    All processes must fetch the same weights in the same order: those of a part for all samples, not for each.
    """

    gathers: ClassVar[bool] = True

    def start_copy(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start to gather a tensor; small ones, which are read as fast as they are sent, are read whole."""
        shared = world_size() > 1 and tensor.is_contiguous() and tensor.nbytes >= SMALLEST
        return start_gather(tensor) if shared else super().start_copy(tensor)


def prefetcher_to(device: Any, home: torch.device, *, in_files: bool = False) -> Prefetcher | None:
    """Return a prefetcher to a device; None if no device is named, or it is ``home``, where the weights are.

    Of weights in files several processes read a share each.
    """
    target = as_device(device)
    if target is None or target == home:
        return GatheringPrefetcher(home) if in_files and home.type == "cpu" and world_size() > 1 else None
    return StreamPrefetcher(target) if target.type == "cuda" else Prefetcher(target)


def as_device(device: Any) -> torch.device | None:
    """Return a device with its index; None if none is named.

    Raises:
        ArgumentError: torch does not know it, this machine does not have it, or it cannot compute.
    """
    if device is None:
        return None
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        what, remedy = f"device {device} cannot be used: {reason}", "Leave it out to compute on the CPU"
        raise ArgumentError(what, where="device", remedy=remedy) from error
    if found.type == "meta":
        raise ArgumentError("nothing can be computed on meta", where="device", remedy="Name a device that computes")
    return found


@contextmanager
def offer_prefetcher(prefetcher: Prefetcher | None) -> Iterator[None]:
    """Offer a prefetcher to passes that can compute on its device; close it at the end."""
    if prefetcher is None:
        yield
        return
    with closing(prefetcher), setting(_offered, prefetcher):
        yield


def use_prefetcher(wanted: bool) -> AbstractContextManager[None]:
    """Use the prefetcher on offer, if any, and if wanted or if it leaves weights on their device."""
    offered = _offered.get()
    return setting(_used, offered if wanted or (offered is not None and offered.gathers) else None)


def current_prefetcher() -> Prefetcher | None:
    """The prefetcher in use; None if weights are read where they are."""
    return _used.get()


def gathers_weights() -> bool:
    """Whether each process reads a share of a weight, so that all must fetch it."""
    prefetcher = current_prefetcher()
    return prefetcher is not None and prefetcher.gathers


def read_together(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a weight, of which each process reads a share if it is in a file; all must ask for it."""
    prefetcher = current_prefetcher()
    return prefetcher.fetch([tensor])[0] if prefetcher is not None and prefetcher.gathers else tensor.detach()


def compute_device(graph_module: fx.GraphModule) -> torch.device:
    """The device that a graph runs on: that of the prefetcher in use, else that of its weights."""
    prefetcher = _used.get()
    return device_of(graph_module) if prefetcher is None else prefetcher.device


def to_device(value: Any, device: torch.device) -> Any:
    """Return a tensor on a device; a tensor that is there already, and any other value, as it is."""
    return value.to(device) if isinstance(value, torch.Tensor) and value.device != device else value


def inputs_on_device(graph_module: fx.GraphModule, inputs: Mapping[str, Any]) -> list[Any]:
    """Return the inputs of a graph, in order, on the device that it runs on."""
    device = compute_device(graph_module)
    return [map_tensors(value, lambda tensor: to_device(tensor, device)) for value in inputs.values()]


def free_bytes(device: torch.device) -> float:
    """The bytes of memory that a device has free, as this process sees them; in host memory, what its cgroup allows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _cgroup_free())


def _cgroup_free(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """The bytes that the cgroups of this process, such as that of a container, let it take; infinite without a limit.

    Pages of files are not counted: the kernel evicts them.
    """
    found = math.inf
    lines = own.read_text().splitlines() if own.is_file() else []
    # of cgroups v2 and v1: the mark of a line in /proc/self/cgroup, the folder of the controller, the file with the
    # limit, and the field of memory.stat with the anonymous memory in use
    versions = (("0::", "", "memory.max", "anon "), (":memory:", "memory", "memory.limit_in_bytes", "total_rss "))
    for mark, folder, limit, used in versions:
        path = next((PurePosixPath(line.partition(mark)[2]) for line in lines if mark in line), None)
        for group in () if path is None else (path, *path.parents):
            place = root / folder / str(group).lstrip("/")
            with suppress(OSError, ValueError, StopIteration):  # "max", no such file, or one of another form
                allowed = int((place / limit).read_text())
                stat = (place / "memory.stat").read_text().splitlines()
                found = min(found, allowed - next(int(line[len(used) :]) for line in stat if line.startswith(used)))
    return max(0.0, found)


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 natively, rather than through float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "xpu":
        return True
    can: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def use_bf16(precision: str, graph_module: fx.GraphModule, trial: Callable[[], torch.Tensor], where: str) -> bool:
    """Whether to compute products in runs of a graph in bfloat16.

    Args:
        precision: ``float32`` for no; ``bf16``; or ``auto``: yes if the device computes in it natively and the trial is
            finite. A graph with weights that are not float32 keeps its precision.
        trial: runs the graph; called under :func:`autocast`.

    Raises:
        PassError: ``bf16`` was requested, and an op of the graph refuses it.
    """
    device = compute_device(graph_module)
    floats = [tensor.dtype for _, tensor in weights(graph_module) if tensor.is_floating_point()]
    if precision == "float32" or any(dtype != torch.float32 for dtype in floats):
        return False
    if precision == "auto" and not broadcast_object(has_bf16(device)):
        return False
    try:
        with torch.no_grad(), autocast(device, True):
            finite = bool(trial().isfinite().all())
    except torch.OutOfMemoryError:  # a RuntimeError too, but float32 would need even more
        raise
    except RuntimeError as error:  # an op that takes tensors of one dtype, only one of which was cast
        if precision != "auto":
            what, remedy = f"an op refuses bfloat16: {error}", "Leave precision out, or pass float32"
            raise PassError(what, where=where, remedy=remedy) from error
        finite = False
    return broadcast_object(finite)  # processes try it on samples of their own


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """Return a context in which products, and nothing that needs more digits, are computed in bfloat16.

    No weight in a file is kept in bfloat16: torch would keep those of the whole model.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=not is_offloading())
