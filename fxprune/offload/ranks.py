"""Several processes that prune one model: samples sharded, sums all-reduced, so that all make the same decisions.

Sharded and offloaded models are recognised by the marks that torch and accelerate leave on modules.
"""

from __future__ import annotations

import hashlib
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from fxprune.errors import CalibrationError, PassError, UnsupportedModelError
from fxprune.graph.context import setting

_FOLDER = (
    "Prune the folder it was loaded from with fxprune.prune_checkpoint, which reads a part of the model at a time, "
    "or pass the model as it is without a device_map and before it is sharded"
)


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds only a part of some weights."""
    return any(hasattr(parameter, "placements") for parameter in model.parameters())


def check_unsharded(model: nn.Module, remedy: str = _FOLDER) -> None:
    """Refuse a model some of whose weights are sharded or offloaded; the error names the parameter or module."""
    for path, module in model.named_modules():
        if "_fsdp_wrapped_module" in module._modules:
            what = "its weights are sharded over processes (FSDP)"
            raise UnsupportedModelError(what, where=path or type(model).__name__, remedy=remedy)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements"):
            what = "it is sharded over processes (a DTensor)"
            raise UnsupportedModelError(what, where=name, remedy=remedy)
    for path, module in model.named_modules():
        empty = next((name for name, value in module.named_parameters(recurse=False) if value.is_meta), None)
        if empty is not None and any(getattr(hook, "offload", False) for hook in hooks_of_accelerate([module])):
            what, where = "a device_map has offloaded it, and it is there only while its layer runs", f"{path}.{empty}"
            raise UnsupportedModelError(what, where=where.removeprefix("."), remedy=remedy)


def check_one_device(model: nn.Module) -> None:
    """Refuse a model whose weights are on several devices; the error names the parameter."""
    named = list(model.named_parameters())
    first, device = named[0][0], named[0][1].device
    mapped = any(hooks_of_accelerate(model.modules()))
    for name, parameter in named:
        if parameter.device != device:
            # accelerate refuses model.to for a model that it has dispatched
            remedy = _FOLDER if mapped else f"Move the whole model to one device, as in model.to({str(device)!r})"
            what = f"is on {parameter.device} while {first} is on {device}"
            raise UnsupportedModelError(what, where=name, remedy=remedy)


def input_device(model: nn.Module) -> torch.device | None:
    """The device for inputs: that of the first parameter, or where a hook puts it; None without parameters."""
    first = next(model.parameters(), None)
    if first is None or not first.is_meta:
        return None if first is None else first.device
    places = (getattr(hook, "execution_device", None) for hook in hooks_of_accelerate(model.modules()))
    place = next((place for place in places if isinstance(place, str | int | torch.device)), None)
    return first.device if place is None else torch.device(place)


def hooks_of_accelerate(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """The hooks that accelerate has put on modules, including those in sequences."""
    for module in modules:
        pending = [getattr(module, "_hf_hook", None)]
        while pending:
            hook = pending.pop(0)
            if hook is not None:
                yield hook
            pending.extend(getattr(hook, "hooks", ()))


T = TypeVar("T")

_BUCKET = 1 << 25
"""Bytes below which tensors are all-reduced together: a call costs as much as some megabytes on the link."""

_alone: ContextVar[bool] = ContextVar("alone", default=False)
"""Whether this process does something that the others wait for, and that they take no part in."""


@contextmanager
def _together() -> Iterator[None]:
    """Raise a :class:`~fxprune.errors.PassError` that says so where a collective fails because a process is gone."""
    try:
        yield
    except RuntimeError as error:
        lost = re.search("gloo|nccl|connection (closed|reset)|peer", str(error), re.IGNORECASE)
        if not (isinstance(error, dist.DistError) or lost):
            raise
        why = "Its own message tells why, or the system's if it ran out of memory"
        remedy = f"{why}; repeat the command, which resumes if weights are on disk"
        what = "another process has ended, or cannot be reached"
        raise PassError(what, where=f"process {dist.get_rank()}", remedy=remedy) from error


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and not _alone.get() and dist.get_world_size() > 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _is_distributed() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if _is_distributed() else 1


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def check_enough(samples: Sequence[Any]) -> None:
    """Raise :class:`~fxprune.errors.CalibrationError` if there are fewer samples than processes."""
    if len(samples) < world_size():
        what = f"{len(samples)} samples for {world_size()} processes"
        remedy = "Pass at least one sample for each process, or start fewer"
        raise CalibrationError(what, where="calibration", remedy=remedy)


def deal(pieces: Sequence[T]) -> tuple[T, ...]:
    """Return this process's share of some pieces of work: piece ``i`` is done by process ``i % processes``."""
    return tuple(pieces[rank() :: world_size()])


@_together()
def gathered(mine: Sequence[T]) -> list[T]:
    """Results of all processes, in the order of the pieces that :func:`deal` gave out."""
    if not _is_distributed():
        return list(mine)
    held: list[Sequence[T]] = [()] * world_size()
    dist.all_gather_object(held, mine)
    return [held[i % len(held)][i // len(held)] for i in range(sum(map(len, held)))]


@_together()
def broadcast_dealt(tensor: torch.Tensor) -> None:
    """Copy each slice along the first axis to all, in place, from the process that :func:`deal` gives its index."""
    count = world_size()
    for source in range(min(count, len(tensor)) if count > 1 else 0):
        part = tensor[source::count].contiguous()
        dist.broadcast(part, source)
        tensor[source::count] = part


def batch_for_all(batch: int, samples: int) -> int:
    """The size of batches: ``batch``, or less if there are otherwise fewer batches of the samples than processes."""
    return max(1, min(batch, samples // world_size()))


def shard_indices(count: int) -> range:
    """Return the indices of this process's share of ``count`` pieces, padded past the end to equal length everywhere.

    A model sharded over processes runs in all of them or in none. An index past the end stands for piece
    ``index % count``, whose result is dropped.
    """
    processes = world_size()
    return range(rank(), -(-count // processes) * processes, processes)


@_together()
def all_reduce(tensors: Iterable[torch.Tensor]) -> None:
    """Sum tensors over processes, in place; all pass the same number, of the same shapes, in the same order."""
    for bucket in _buckets(tensors) if _is_distributed() else ():
        if len(bucket) == 1:
            dist.all_reduce(bucket[0])
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield runs of tensors of one dtype and device, of :data:`_BUCKET` bytes at most or one larger tensor."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        alike = bucket and (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
        if bucket and not (alike and size + tensor.nbytes <= _BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def own_elements(count: int) -> slice:
    """This process's share of the elements of a tensor, in order, as :func:`start_gather` and others divide them."""
    size = -(-count // world_size())
    return slice(min(rank() * size, count), min((rank() + 1) * size, count))


_AT_ONCE, _PIECES = 1 << 25, 4
"""Bytes of a tensor that one collective takes, or a fourth of a larger one: gloo copies them once more."""


def _chunks(own: torch.Tensor) -> list[slice]:
    """Slices of the elements of a tensor that each process has, for one collective each."""
    size, count = len(own), world_size()
    most = max(1, max(_AT_ONCE, own.nbytes * count // _PIECES) // (own.itemsize * count))
    return [slice(begin, min(begin + most, size)) for begin in range(0, size, most)]


@_together()
def reduce_to_own(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum a tensor over processes in ``dtype``, and return this process's share of its elements: reduce-scatter."""
    flat, count = tensor.reshape(-1), world_size()
    if count == 1:
        return flat.to(dtype)
    size = -(-len(flat) // count)
    own, share = flat.new_empty(size, dtype=dtype), own_elements(len(flat))
    for chunk in _chunks(own):
        pieces = [flat[i * size : (i + 1) * size][chunk].to(dtype).contiguous() for i in range(count)]
        length = chunk.stop - chunk.start
        if len(pieces[-1]) < length:
            pieces = [nn.functional.pad(piece, (0, length - len(piece))) for piece in pieces]
        dist.reduce_scatter(own[chunk], pieces)
    return own[: share.stop - share.start]


@_together()
def start_gather(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start to assemble a tensor of which each process reads its share; the returned function waits, and returns it.

    All must call it for the same tensors in the same order. It is for tensors in files that are mapped, of which pages
    are read where they are used; of one whose elements lie in another order, all of it is read.
    """
    count = world_size()
    size = -(-tensor.numel() // count)
    own, whole = tensor.new_empty(size), tensor.new_empty(size * count)
    share = tensor.detach().reshape(-1)[own_elements(tensor.numel())]
    own[: len(share)] = share
    gathering = [
        dist.all_gather([piece[chunk] for piece in whole.split(size)], own[chunk], async_op=True)
        for chunk in _chunks(own)
    ]

    @_together()
    def finish() -> torch.Tensor:
        for one in gathering:
            one.wait()
        return whole[: tensor.numel()].view(tensor.shape)

    return finish


@_together()
def check_same(find: Callable[[], Mapping[str, Any]], where: str) -> None:
    """Compare values over processes; raise an error in all of them if one differs.

    Collectives of processes that compute different things match by chance, or wait for each other for ever.

    Args:
        find: gives the values of this process by their names in a message, compared by ``repr``; not called in a single
            process.
        where: what they decide.

    Raises:
        PassError: a process has other values than the first; raised in all of them.
    """
    if not _is_distributed():
        return
    mine = {name: hashlib.sha256(repr(value).encode()).hexdigest() for name, value in find().items()}
    held: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(held, mine)
    for number, digests in enumerate(held):
        names = [name for name in held[0] | digests if digests.get(name) != held[0].get(name)]
        if names:
            what = f"process {number} and the first process differ in {', '.join(names)}"
            remedy = "Start all processes with the same command, model and data, and folders that all of them share"
            raise PassError(what, where=where, remedy=remedy)


@_together()
def broadcast_object(value: T) -> T:
    """Return the first process's value in each process."""
    if not _is_distributed():
        return value
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


@_together()
def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Copy the first process's tensors to all, in place."""
    for tensor in tensors if _is_distributed() else ():
        dist.broadcast(tensor, 0)


@_together()
def barrier() -> None:
    """Wait for all processes, however long one of them writes."""
    if _is_distributed():
        dist.barrier(_waiting_group())


def run_on_first(work: Callable[[], T], refusal: type[Exception]) -> T | None:
    """Run some work, such as writing, in the first process; others return None, or raise ``refusal`` if it fails.

    They wait as long as it takes. The work runs as in a single process: collectives in it would find nobody.
    """
    if not _is_distributed():
        return work()
    group = _waiting_group()
    failed = ["the first process was stopped"]
    found: T | None = None
    try:
        if is_first():
            with setting(_alone, True):
                found = work()
            failed = [""]
    except Exception as error:  # whatever it is, the others must not wait for ever
        failed = [f"the first process: {error}"]
        raise
    finally:
        with _together():
            dist.broadcast_object_list(failed, group=group)
    if failed[0]:
        raise refusal(failed[0])
    return found


def decide_on_first(decide: Callable[[], T], refusal: type[Exception]) -> T:
    """Return in each process what ``decide`` returns in the first; others raise ``refusal`` if it fails there."""
    return broadcast_object(run_on_first(decide, refusal))  # type: ignore[return-value]


_waiting: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()


def _waiting_group() -> dist.ProcessGroup:
    """All processes, which wait for the first to write: unlike a collective, that takes as long as the disk takes."""
    world = dist.group.WORLD
    assert world is not None
    if world not in _waiting:
        _waiting[world] = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    return _waiting[world]


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that ``torchrun`` started in one group inside this context; do nothing in a single one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")  # weights may stay on the CPU
    try:
        yield
    finally:
        dist.destroy_process_group()
