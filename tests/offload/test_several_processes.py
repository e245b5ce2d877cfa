"""Collectives of two and three processes: one decision, one error, and waiting for the first to write."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import fxprune
from fxprune.errors import FxpruneError
from fxprune.offload import ranks
from fxprune.offload.files import cached, caching, offload_to, uncache
from fxprune.offload.ranks import (
    all_reduce,
    barrier,
    check_same,
    decide_on_first,
    own_elements,
    reduce_to_own,
    run_on_first,
    start_gather,
)
from tests.forked import in_processes
from tests.models import tiny


def test_small_tensors_of_several_dtypes_are_summed_in_buckets(tmp_path: Path) -> None:
    def work(rank: int) -> list[list[float]]:
        tensors = [
            torch.full((2, 3), rank + 1.0),
            torch.arange(4, dtype=torch.int64)[::2] + rank,
            torch.tensor(rank + 0.5),
            torch.ones(5, 2).T * rank,
            torch.empty(0),
        ]
        all_reduce(iter(tensors))
        return [tensor.flatten().tolist() for tensor in tensors]

    found = in_processes(work, 3, tmp_path)
    assert found[0] == found[1] == found[2] == [[6.0] * 6, [3, 9], [4.5], [3.0] * 10, []]


@pytest.mark.parametrize("at_once", [ranks._AT_ONCE, 24, 1])
def test_each_process_gets_its_share_of_a_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Of three, the last has fewer of seven elements; of two elements it has none. By one collective, or several."""
    monkeypatch.setattr(ranks, "_AT_ONCE", at_once)

    def work(rank: int) -> list[list[float]]:
        found = [
            reduce_to_own(torch.arange(size).bfloat16().view(1, -1) * (rank + 1), torch.float32) for size in (7, 2)
        ]
        for size in (7, 2):
            mine = torch.full((size,), -1.0)
            mine[own_elements(size)] = float(rank)
            assert start_gather(mine)().tolist() == [i // -(-size // 3) for i in range(size)]
        return [one.tolist() for one in found]

    assert in_processes(work, 3, tmp_path) == [[[0, 6, 12], [0]], [[18, 24, 30], [6]], [[36], []]]
    assert reduce_to_own(torch.ones(2, 3), torch.float32).tolist() == [1] * 6


def test_the_first_writes_for_longer_than_a_collective_may_take(tmp_path: Path) -> None:
    """The others waited in a broadcast of the default group, and gave up after its timeout."""

    def write() -> int:
        time.sleep(1.5)
        check_same(lambda: {"alone": 1}, where="what runs in one process alone")
        return 7

    def work(rank: int) -> list[object]:
        found: list[object] = [run_on_first(write, FxpruneError), decide_on_first(lambda: rank + 3, FxpruneError)]
        barrier()
        try:
            decide_on_first(lambda: 1 // rank, FxpruneError)
        except (ZeroDivisionError, FxpruneError) as error:
            found.append(type(error).__name__)
        return found

    found = in_processes(work, 2, tmp_path, timeout=0.7)
    assert found == [[7, 3, "ZeroDivisionError"], [None, 3, "FxpruneError"]]


def test_the_first_process_says_what_is_done(tmp_path: Path) -> None:
    """Each process looked into a folder of its own, and one that lacked a file waited for the others for ever."""

    def work(rank: int) -> list[object]:
        with offload_to(tmp_path, tmp_path):
            before = cached("scores")
            with caching("scores") as file:
                if file is not None:
                    file.write_text(str(rank))
            with caching(f"parts/{rank}", own=True) as file:
                assert file is not None
                file.write_text("")
            barrier()
            seen = cached("scores")
            own = [cached(f"parts/{place}", own=True) is not None for place in range(3)]
            uncache("parts")
            barrier()
            return [before, seen and seen.read_text(), own, (tmp_path / "parts").exists()]

    assert in_processes(work, 2, tmp_path) == [[None, "0", [True, True, False], False]] * 2


def test_processes_that_end_with_other_weights_all_raise_it(tmp_path: Path) -> None:
    """On several GPUs, or from other files, each went on with weights of its own, and those of the first were saved."""
    models = [tiny("llama"), tiny("llama")]
    with torch.no_grad():
        models[1].lm_head.weight[0, 0] += 1

    def work(rank: int) -> str:
        try:
            fxprune.prune(models[rank], importance="l2", ratio=0.2, kinds="mlp", protect=(), verify=False)
        except FxpruneError as error:
            return str(error)
        return ""

    said = in_processes(work, 2, tmp_path)
    assert said[0] == said[1] and "process 1 and the first process differ in the slim weights" in said[0]
