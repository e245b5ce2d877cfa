"""Tests: weights moved to a compute device part by part, and precision there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import ArgumentError, PassError
from fxprune.offload import prefetch as precision
from fxprune.offload.prefetch import (
    Carrier,
    at_place,
    autocast,
    carrier_to,
    carrying,
    check_device,
    current_carrier,
    has_bf16,
    narrowed,
    place_of,
    to_place,
)
from tests.models import tiny
from tests.oracle import discover


class Noting(Carrier):
    """Carries to the CPU, by copies, and notes what it copies."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.begun: list[float] = []

    def begin(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Note the first number of a tensor."""
        self.begun.append(float(tensor.flatten()[0]))
        return super().begin(tensor.clone())


def numbered(count: int) -> list[torch.Tensor]:
    return [torch.full((2,), float(i)) for i in range(count)]


def test_what_was_copied_ahead_is_not_copied_again() -> None:
    carrier, (a, b, c) = Noting(), numbered(3)
    carrier.ahead([a, b, a])
    assert carrier.begun == [0, 1]
    first, second, again = carrier.carry([a, b, a])
    assert carrier.begun == [0, 1] and first is again and torch.equal(second, b)
    carrier.carry([c])
    carrier.carry([c])
    assert carrier.begun == [0, 1, 2], "the last one is there"


def test_it_holds_what_comes_next_alone() -> None:
    carrier, (a, b, c) = Noting(), numbered(3)
    carrier.ahead([a, b])
    carrier.ahead([b, c])
    carrier.carry([b, c])
    assert carrier.begun == [0, 1, 2]
    carrier.carry([a])
    assert carrier.begun == [0, 1, 2, 0], "a was given up"
    carrier.ahead([b])
    carrier.close()
    carrier.carry([b])
    assert carrier.begun[-2:] == [1, 1]


def test_a_weight_that_was_written_to_is_copied_anew() -> None:
    carrier, (a, _) = Noting(), numbered(2)
    carrier.ahead([a])
    a.add_(5)
    (moved,) = carrier.carry([a])
    assert torch.equal(moved, a)
    a.add_(5)
    assert torch.equal(carrier.carry([a])[0], a)


def test_passes_that_do_not_want_it_compute_where_the_weights_are() -> None:
    dense, carrier = discover(tiny("llama")), Noting()
    carrier.device = torch.device("meta")
    with carrying(carrier):
        assert current_carrier() is None and place_of(dense) == torch.device("cpu")
        with at_place(True):
            assert current_carrier() is carrier and place_of(dense).type == "meta"
            with at_place(False):
                assert current_carrier() is None
    with at_place(True):
        assert current_carrier() is None, "none is offered any more"
    with carrying(None), at_place(True):
        assert current_carrier() is None


def test_none_is_needed_where_the_weights_are_there() -> None:
    cpu = torch.device("cpu")
    assert carrier_to(None, cpu) is None and carrier_to("cpu", cpu) is None and check_device(None) is None
    assert to_place("text", cpu) == "text"
    value = torch.ones(1)
    assert to_place(value, cpu) is value


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", 3.5])
def test_a_device_that_is_not_there_is_refused(device: object) -> None:
    with pytest.raises(ArgumentError) as caught:
        check_device(device)
    assert caught.value.where == "device" and caught.value.remedy


CPU = torch.device("cpu")


def test_bfloat16_is_native_or_not() -> None:
    assert has_bf16(torch.device("xpu")) and not has_bf16(torch.device("meta"))


class Pair(nn.Module):
    """A product, and one that takes tensors of one type alone."""

    def __init__(self, strict: bool) -> None:
        super().__init__()
        self.map, self.strict = nn.Linear(4, 4), strict

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.map(x)
        return x.clone().index_add(0, torch.arange(len(x)), y) if self.strict else y


def trial_of(model: nn.Module) -> tuple[torch.fx.GraphModule, Callable[[], torch.Tensor]]:
    """The graph of a model, and a run of it."""
    x = torch.randn(3, 4)
    graph_module = fxprune.trace(model, {"x": x}).graph_module
    return graph_module, lambda: graph_module(x)


@pytest.mark.parametrize("native", [True, False])
def test_products_of_float32_alone_are_narrowed(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: native)
    graph_module, trial = trial_of(Pair(strict=False))
    assert narrowed("auto", graph_module, trial, "a") is native
    assert narrowed("bf16", graph_module, trial, "a") and not narrowed("float32", graph_module, trial, "a")
    half, _ = trial_of(Pair(strict=False))
    half.to(torch.bfloat16)
    assert not narrowed("bf16", half, trial, "a")


def test_memory_that_ran_out_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    graph_module, _ = trial_of(Pair(strict=False))

    def full() -> torch.Tensor:
        raise torch.OutOfMemoryError

    for asked in ("auto", "bf16"):
        with pytest.raises(torch.OutOfMemoryError):
            narrowed(asked, graph_module, full, "a")


def test_where_an_op_refuses_it_nothing_is_narrowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    graph_module, trial = trial_of(Pair(strict=True))
    assert not narrowed("auto", graph_module, trial, "a")
    with pytest.raises(PassError, match="a: an op refuses bfloat16"):
        narrowed("bf16", graph_module, trial, "a")


@pytest.mark.parametrize("narrow", [True, False])
def test_in_its_context_products_alone_are_narrow(narrow: bool) -> None:
    x = torch.randn(4, 4)
    with autocast(CPU, narrow):
        assert (x @ x).dtype == (torch.bfloat16 if narrow else torch.float32)
        assert (x + x).dtype == x.softmax(-1).dtype == torch.float32
