"""Several processes that prune one model: samples sharded, sums all-reduced.

What accelerate and torch leave on a module tells which it is; neither of them is asked.

Every process holds the model and runs every pass; what passes sum over samples is summed over processes, so that all
come to the same decisions. With one process, or without a process group of torch, nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from fxprune.errors import CalibrationError, UnsupportedModelError

__all__ = [
    "add_up",
    "as_first",
    "check_loaded",
    "check_together",
    "check_whole",
    "first_alone",
    "input_device",
    "is_first",
    "is_sharded",
    "of_first",
    "own",
    "rank",
    "started",
    "turns",
]

_FOLDER = (
    "Prune the folder it was loaded from with fxprune.prune_checkpoint, which reads a part of the model at a time, "
    "or pass the model as it is without a device_map and before it is sharded"
)


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of some weights alone."""
    return any(hasattr(parameter, "placements") for parameter in model.parameters())


def check_whole(model: nn.Module, remedy: str = _FOLDER) -> None:
    """Refuse a model that holds a part of its weights alone.

    Args:
        model: the model.
        remedy: which way to go instead.

    Raises:
        UnsupportedModelError: names the parameter or module.
    """
    for path, module in model.named_modules():
        if "_fsdp_wrapped_module" in module._modules:
            what = "its weights are sharded over processes (FSDP)"
            raise UnsupportedModelError(what, where=path or type(model).__name__, remedy=remedy)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements"):
            what = "it is sharded over processes (a DTensor)"
            raise UnsupportedModelError(what, where=name, remedy=remedy)
    for path, module in model.named_modules():
        own = next((name for name, value in module.named_parameters(recurse=False) if value.is_meta), None)
        if own is not None and any(getattr(hook, "offload", False) for hook in _hooks(module)):
            raise UnsupportedModelError(
                "a device_map has offloaded it, and it is there only while its layer runs",
                where=f"{path}.{own}" if path else own,
                remedy=remedy,
            )


def check_loaded(model: nn.Module, where: str) -> None:
    """Refuse a model to train that is not whole, or has no weights yet; one on several devices trains there.

    Args:
        model: the model.
        where: what it was passed as.

    Raises:
        UnsupportedModelError: says what is in the way.
    """
    check_whole(model, "Pass the whole model, which arguments={'fsdp': True} shards for training")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedModelError("its weights are on meta", where=where, remedy="Load the weights first")


def check_together(model: nn.Module) -> None:
    """Refuse a model whose weights are on several devices.

    Raises:
        UnsupportedModelError: names the parameter.
    """
    named = list(model.named_parameters())
    first, device = named[0][0], named[0][1].device
    mapped = any(True for module in model.modules() for _ in _hooks(module))
    for name, parameter in named:
        if parameter.device != device:
            raise UnsupportedModelError(
                f"is on {parameter.device} while {first} is on {device}",
                where=name,
                remedy=_FOLDER if mapped else f"Move the whole model to one device, as in model.to({str(device)!r})",
            )


def input_device(model: nn.Module) -> torch.device | None:
    """Return where the inputs of a model go: to its first parameter, or where that is put when it is used.

    None where the model has no parameters.
    """
    first = next(model.parameters(), None)
    if first is None or not first.is_meta:
        return None if first is None else first.device
    places = (getattr(hook, "execution_device", None) for module in model.modules() for hook in _hooks(module))
    place = next((place for place in places if isinstance(place, str | int | torch.device)), None)
    return first.device if place is None else torch.device(place)


def _hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks that accelerate has put on a module, those in sequences too."""
    pending = [getattr(module, "_hf_hook", None)]
    while pending:
        hook = pending.pop(0)
        if hook is not None:
            yield hook
        pending.extend(getattr(hook, "hooks", ()))


T = TypeVar("T")


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _together() else 0


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def own(samples: Sequence[T]) -> tuple[T, ...]:
    """Return the part of the samples that this process takes.

    Raises:
        CalibrationError: there are fewer samples than processes.
    """
    if not _together():
        return tuple(samples)
    rank, count = dist.get_rank(), dist.get_world_size()
    if len(samples) < count:
        raise CalibrationError(
            f"{len(samples)} samples for {count} processes",
            where="calibration",
            remedy="Pass a sample at least for each process, or start fewer",
        )
    return tuple(samples[rank::count])


def turns(count: int) -> range:
    """Return which of ``count`` pieces of work this process does; as many in each, so that some reach past the end.

    A model whose weights are spread over processes runs in all of them or in none. What is past the end is done again
    from the start, ``piece % count``, and does not count.
    """
    if not _together():
        return range(count)
    processes = dist.get_world_size()
    return range(dist.get_rank(), -(-count // processes) * processes, processes)


def add_up(tensors: Iterable[torch.Tensor]) -> None:
    """Add tensors up over processes, in place; all give as many, of the same shapes, in the same order."""
    for tensor in tensors if _together() else ():
        dist.all_reduce(tensor)


def of_first(value: T) -> T:
    """Return what the first process passed, in each of them."""
    if not _together():
        return value
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def as_first(tensors: Iterable[torch.Tensor]) -> None:
    """Give tensors the values that they have in the first process, in place."""
    for tensor in tensors if _together() else ():
        dist.broadcast(tensor, 0)


def first_alone(work: Callable[[], T], refusal: type[Exception]) -> T | None:
    """Let the first process do some work, such as writing, while the others wait for it; they return None.

    Args:
        work: what is done.
        refusal: raised in the others where the first one fails.
    """
    if not _together():
        return work()
    if not is_first():
        failed = of_first("")
        if failed:
            raise refusal(failed)
        return None
    failed = "the first process was stopped"
    try:
        found = work()
        failed = ""
    except Exception as error:  # whatever it is, the others have to be told
        failed = f"the first process: {error}"
        raise
    finally:
        of_first(failed)
    return found


@contextmanager
def started() -> Iterator[None]:
    """Make the processes that ``torchrun`` started one group, for as long as this lasts; alone, do nothing."""
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


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
