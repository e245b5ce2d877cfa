"""Several processes of one test, in a group of their own."""

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["in_processes"]


def in_processes(work: Callable[[int], Any], count: int, folder: Path, timeout: float = 60) -> list[Any]:
    """Results of ``work`` in several processes, each given its rank; they are forks, which saves imports.

    Args:
        folder: where the processes meet; made if it is missing.
        timeout: seconds that a collective waits.
    """
    folder.mkdir(exist_ok=True)
    context = mp.get_context("fork")
    queue = context.Queue()

    def run(rank: int) -> None:
        try:
            place = f"file://{folder / 'meeting'}"
            dist.init_process_group("gloo", place, timedelta(seconds=timeout), world_size=count, rank=rank)
            queue.put((rank, work(rank), ""))
        except BaseException:  # the test shows it
            queue.put((rank, None, traceback.format_exc()))

    processes = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(count)]
    for process in processes:
        process.start()
    found = sorted([queue.get(timeout=900) for _ in processes], key=lambda one: one[0])
    for process in processes:
        process.join()
    failed = [error for *_, error in found if error]
    assert not failed, failed[0]
    return [value for _, value, _ in found]
