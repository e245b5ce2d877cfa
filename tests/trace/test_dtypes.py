"""Whether what a module does depends on its dtype is seen by the calls that it makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.trace.dtypes import differs_by_dtype
from tests.models import tiny
from tests.oracle import Net

FOLLOWS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "a product": lambda m, x: m.a(x),
    "a mask": lambda m, x: m.a(x).masked_fill(m.a(x) < 0, torch.finfo(x.dtype).min),
    "up and back": lambda m, x: m.a(x).float().to(x.dtype),
    "a number": lambda m, x: m.a(x) * 0.3,
}

DEPENDS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "an eps": lambda m, x: m.a(x) + torch.finfo(x.dtype).eps,
    "a branch": lambda m, x: m.a(x).relu() if x.dtype == torch.float32 else m.a(x),
    "a cast": lambda m, x: m.a(x).to(torch.bfloat16).to(x.dtype),
    "its bytes": lambda m, x: m.a(x) * x.element_size(),
    "autocast": lambda m, x: _under_autocast(m, x),
}


def _under_autocast(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.a(x) * 2  # type: ignore[no-any-return]


def first(body: Callable[[Any, torch.Tensor], torch.Tensor]) -> str:
    model = Net(body, a=nn.Linear(3, 4))
    return differs_by_dtype(model, {"x": torch.ones(2, 3)}, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("name", FOLLOWS)
def test_what_only_follows_the_dtype_does_not_depend_on_it(name: str) -> None:
    assert first(FOLLOWS[name]) == ""


@pytest.mark.parametrize("name", DEPENDS)
def test_what_depends_on_it_is_named_by_the_first_call_that_differs(name: str) -> None:
    assert "torch." in first(DEPENDS[name])


def test_a_language_model_does_not_depend_on_its_dtype() -> None:
    model = tiny("llama")
    inputs = {"input_ids": torch.zeros(2, 7, dtype=torch.long)}
    assert differs_by_dtype(model, inputs, torch.float32, torch.bfloat16) == ""


def test_a_module_that_does_not_run_is_left_to_tracing() -> None:
    assert first(lambda m, x: m.b(x)) == ""
