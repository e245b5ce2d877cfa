"""In what precision products are computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import PassError
from fxprune.offload import prefetch as precision
from fxprune.offload.prefetch import autocast, has_bf16, narrowed

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
