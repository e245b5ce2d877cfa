"""Weights moved to a compute device part by part, and precision there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import ArgumentError, PassError
from fxprune.offload import prefetch as precision
from fxprune.offload.prefetch import (
    Prefetcher,
    as_device,
    autocast,
    compute_device,
    current_prefetcher,
    free_bytes,
    has_bf16,
    offer_prefetcher,
    prefetcher_to,
    to_device,
    use_bf16,
    use_prefetcher,
)
from tests.oracle import Net


class Recording(Prefetcher):
    """Copies to the CPU, and records the first number of each copy."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.begun: list[float] = []

    def start_copy(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Record the first number of a tensor."""
        self.begun.append(float(tensor.flatten()[0]))
        return super().start_copy(tensor.clone())


def numbered(count: int) -> list[torch.Tensor]:
    return [torch.full((2,), float(i)) for i in range(count)]


def test_what_was_copied_ahead_is_not_copied_again() -> None:
    prefetcher, (a, b, c) = Recording(), numbered(3)
    prefetcher.prefetch([a, b, a])
    assert prefetcher.begun == [0, 1]
    first, second, again = prefetcher.fetch([a, b, a])
    assert prefetcher.begun == [0, 1] and first is again and torch.equal(second, b)
    prefetcher.fetch([c])
    prefetcher.fetch([c])
    assert prefetcher.begun == [0, 1, 2], "the last one is there"


def test_it_holds_only_what_comes_next() -> None:
    prefetcher, (a, b, c) = Recording(), numbered(3)
    prefetcher.prefetch([a, b])
    prefetcher.prefetch([b, c])
    prefetcher.fetch([b, c])
    assert prefetcher.begun == [0, 1, 2]
    prefetcher.fetch([a])
    assert prefetcher.begun == [0, 1, 2, 0], "a was dropped"
    prefetcher.prefetch([b])
    prefetcher.close()
    prefetcher.fetch([b])
    assert prefetcher.begun[-2:] == [1, 1]


def test_a_weight_that_was_written_to_is_copied_again() -> None:
    prefetcher, (a, _) = Recording(), numbered(2)
    prefetcher.prefetch([a])
    a.add_(5)
    (moved,) = prefetcher.fetch([a])
    assert torch.equal(moved, a)
    a.add_(5)
    assert torch.equal(prefetcher.fetch([a])[0], a)


def test_passes_that_do_not_want_it_compute_where_the_weights_are() -> None:
    dense, prefetcher = torch.fx.symbolic_trace(nn.Linear(2, 2)), Recording()
    prefetcher.device = torch.device("meta")
    with offer_prefetcher(prefetcher):
        assert current_prefetcher() is None and compute_device(dense) == torch.device("cpu")
        with use_prefetcher(True):
            assert current_prefetcher() is prefetcher and compute_device(dense).type == "meta"
            with use_prefetcher(False):
                assert current_prefetcher() is None
    with use_prefetcher(True):
        assert current_prefetcher() is None, "none is offered any more"
    with offer_prefetcher(None), use_prefetcher(True):
        assert current_prefetcher() is None


def test_no_prefetcher_is_needed_on_the_device_of_the_weights() -> None:
    cpu = torch.device("cpu")
    assert prefetcher_to(None, cpu) is None and prefetcher_to("cpu", cpu) is None and as_device(None) is None
    assert to_device("text", cpu) == "text"
    value = torch.ones(1)
    assert to_device(value, cpu) is value


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", 3.5])
def test_a_device_that_is_not_there_is_refused(device: object) -> None:
    with pytest.raises(ArgumentError) as caught:
        as_device(device)
    assert caught.value.where == "device" and caught.value.remedy


def strict(net: Any, x: torch.Tensor) -> torch.Tensor:
    """A product that takes tensors of one type alone."""
    return x.clone().index_add(0, torch.arange(len(x)), net.map(x))


def trial_of(
    body: Callable[[Any, torch.Tensor], torch.Tensor],
) -> tuple[torch.fx.GraphModule, Callable[[], torch.Tensor]]:
    """The graph of a network with a linear map, and a run of it."""
    x = torch.randn(3, 4)
    graph_module = fxprune.trace(Net(body, map=nn.Linear(4, 4)), {"x": x}).graph_module
    return graph_module, lambda: graph_module(x)


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_for_float32_graphs_on_native_devices(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    assert has_bf16(torch.device("xpu")) and not has_bf16(torch.device("meta"))
    monkeypatch.setattr(precision, "has_bf16", lambda device: native)
    graph_module, trial = trial_of(lambda net, x: net.map(x))
    assert use_bf16("auto", graph_module, trial, "a") is native
    assert use_bf16("bf16", graph_module, trial, "a") and not use_bf16("float32", graph_module, trial, "a")

    def full() -> torch.Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        use_bf16("bf16", graph_module, full, "a")
    graph_module.to(torch.bfloat16)
    assert not use_bf16("bf16", graph_module, trial, "a")


def test_bfloat16_is_off_if_an_op_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    graph_module, trial = trial_of(strict)
    assert not use_bf16("auto", graph_module, trial, "a")
    with pytest.raises(PassError, match="a: an op refuses bfloat16"):
        use_bf16("bf16", graph_module, trial, "a")


@pytest.mark.parametrize("enabled", [True, False])
def test_only_products_are_in_bfloat16(enabled: bool) -> None:
    x = torch.randn(4, 4)
    with autocast(torch.device("cpu"), enabled):
        assert (x @ x).dtype == (torch.bfloat16 if enabled else torch.float32)
        assert (x + x).dtype == x.softmax(-1).dtype == torch.float32


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_the_memory_that_its_cgroup_allows(version: int, tmp_path: Path) -> None:
    """A process with a limit saw the memory of its host, took it for its own, and was killed."""
    own, root = tmp_path / "cgroup", tmp_path / "root"
    own.write_text("3:cpu,cpuacct:/\n4:memory:/a/b\n0::/\n" if version == 1 else "0::/a/b\n")
    inner, outer = (root / ("memory" if version == 1 else "") / name for name in ("a/b", "a"))
    inner.mkdir(parents=True)
    limit, used = ("memory.limit_in_bytes", "total_rss") if version == 1 else ("memory.max", "anon")
    assert precision._cgroup_free(root, own) == precision._cgroup_free(root, tmp_path / "none") == float("inf")
    (inner / limit).write_text("1000\n")
    (inner / "memory.stat").write_text(f"cache 700\n{used} 300\n")
    (outer / limit).write_text("max\n" if version == 2 else "9223372036854771712\n")
    (outer / "memory.stat").write_text(f"{used} 400\n")
    assert precision._cgroup_free(root, own) == 700, "pages of files can be evicted"
    (outer / limit).write_text("900\n")
    assert precision._cgroup_free(root, own) == 500, "so may what another process of the pod takes not be"
    (outer / limit).write_text("300\n")
    assert precision._cgroup_free(root, own) == 0
    assert 0 < free_bytes(torch.device("cpu")) < 1 << 60
