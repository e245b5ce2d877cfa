"""Several processes that prune one model: samples are shared out, and sums over samples added up.

Every process holds the model and runs every pass; what passes sum over samples is summed over processes, so that all
come to the same decisions. With one process, or without a process group of torch, nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from fxprune.errors import CalibrationError

__all__ = ["add_up", "as_first", "first_alone", "is_first", "of_first", "own", "rank", "started", "turns"]

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
