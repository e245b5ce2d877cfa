"""Taylor scores by several processes: cut alike whatever memory each has, and resumed by another number of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from fxprune.passes.importance import taylor
from torch import fx, nn

from fxprune.errors import PassError
from fxprune.graph.facts import facts_of, fork
from fxprune.graph.tensors import set_tensor
from fxprune.offload import files
from fxprune.pipeline.registry import load_pass
from fxprune.removal.removal import Scores
from tests.forked import in_processes
from tests.oracle import Net, discover


@pytest.fixture(scope="module")
def dense() -> fx.GraphModule:
    """Three residual blocks, and an embedding that is read at both ends."""

    def body(net: Any, ids: torch.Tensor) -> torch.Tensor:
        x = net.embed(ids)
        for up, down in zip(net.up, net.down, strict=True):
            x = x + down(torch.tanh(up(x)))
        return F.linear(x, net.embed.weight)

    torch.manual_seed(0)
    embed, up = nn.Embedding(31, 10), nn.ModuleList(nn.Linear(10, 16) for _ in range(3))
    net = Net(body, embed=embed, up=up, down=nn.ModuleList(nn.Linear(16, 10) for _ in range(3)))
    ids = torch.randint(0, 31, (5, 9))
    graph_module = discover(net, {"x": ids[:2]})
    load_pass("calibrate", data=ids)(graph_module)
    return graph_module


def scored(graph_module: fx.GraphModule, **arguments: Any) -> dict[str, Any]:
    found = load_pass("taylor", **arguments)(fork(graph_module)).graph_module
    return {name: row.tolist() for name, row in facts_of(found)[Scores].units.items()}


def assert_close(found: dict[str, Any], want: dict[str, Any]) -> None:
    assert found.keys() == want.keys()
    for name, row in want.items():
        np.testing.assert_allclose(found[name], row, rtol=1e-3, atol=1e-7)


def test_free_memory_is_that_of_the_first_process(
    dense: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process cut the graph by its own free memory, and sums of different weights were added."""
    want = scored(dense, order="mix", memory="fast")
    monkeypatch.setattr(taylor, "recordable_products", lambda _: {})  # sums for all weights, part by part

    def work(rank: int) -> dict[str, Any]:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=(1 << 40) * rank))
        return scored(dense, order="mix")

    for found in in_processes(work, 2, tmp_path):
        assert_close(found, want)


def test_processes_that_run_other_passes_are_refused(dense: fx.GraphModule, tmp_path: Path) -> None:
    """They waited for each other, or added what did not belong together."""

    other = fork(dense)
    set_tensor(other, "up.0.weight", nn.Parameter(torch.zeros(16, 10, dtype=torch.float64)))

    def work(rank: int) -> list[str]:
        said = []
        for graph_module, order in ((dense, ("first", "mix")[rank]), ((dense, other)[rank], "first")):
            with pytest.raises(PassError) as caught:
                scored(graph_module, order=order, memory="fast")
            said.append(caught.value.what)
        return said

    first, second = in_processes(work, 2, tmp_path)
    differ = "process 1 and the first process differ in"
    assert first == second == [f"{differ} the pass", f"{differ} the weights"]


class Stopped(BaseException):
    """As when a process is killed."""


@pytest.mark.parametrize("again", [1, 3])
def test_another_number_of_processes_resumes(
    dense: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: int
) -> None:
    """Gradients at a cut were kept by the place of a sample in its process, in a folder of each process."""
    want = scored(dense, order="mix", memory="fast")
    cache = tmp_path / "cache"
    save, parts = taylor._GradientSweep._save, list[int]()

    def work(stop: int) -> tuple[dict[str, Any], int]:

        def save_or_stop(sweep: taylor._GradientSweep, number: int, found: Any) -> None:
            save(sweep, number, found)
            parts.append(number)
            if len(parts) == stop:
                raise Stopped

        monkeypatch.setattr(taylor._GradientSweep, "_save", save_or_stop)
        try:
            with files.offload_to(tmp_path, cache):
                return scored(dense, order="mix", memory=1e-9), len(parts)
        except Stopped:
            return {}, stop

    assert in_processes(lambda _: work(3), 2, tmp_path / "begun") == [({}, 3)] * 2
    left = sorted(path.name for path in cache.iterdir())
    assert len(left) == 4 and left[0].startswith("gradients-"), "three parts, and gradients at the last cut alone"
    assert len(list((cache / left[0]).iterdir())) == 5, "of each sample"
    (_, rest), *_ = resumed = in_processes(lambda _: work(-1), again, tmp_path / "again")
    assert rest > 0 and cache.joinpath("scores.safetensors").exists()
    for found, _ in resumed:
        assert_close(found, want)
    assert not {path.name for path in cache.iterdir()}.isdisjoint(left), "parts done before were not done again"
    assert rest + 3 == sum(path.name.startswith("part-") for path in cache.iterdir())
