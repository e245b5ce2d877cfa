"""Whether what a module does depends on its dtype, or on its mode, is seen by the calls that it makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.trace.repeats.grouping import Dependence, dependence
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
    found = dependence(model.eval(), {"x": torch.ones(2, 3)}, torch.float32, torch.bfloat16)
    assert not found.mode and dependence(model.train(), {"x": torch.ones(2, 3)}, torch.float32, torch.bfloat16) == found
    return found.dtype


@pytest.mark.parametrize("name", FOLLOWS)
def test_what_only_follows_the_dtype_does_not_depend_on_it(name: str) -> None:
    assert first(FOLLOWS[name]) == ""


@pytest.mark.parametrize("name", DEPENDS)
def test_what_depends_on_it_is_named_by_the_first_call_that_differs(name: str) -> None:
    assert "torch." in first(DEPENDS[name])


def test_a_language_model_does_not_depend_on_its_dtype() -> None:
    model = tiny("llama")
    inputs = {"input_ids": torch.zeros(2, 7, dtype=torch.long)}
    assert dependence(model, inputs, torch.float32, torch.bfloat16) == Dependence()


def test_a_module_that_does_not_run_is_left_to_tracing() -> None:
    assert first(lambda m, x: m.b(x)) == ""


@pytest.mark.parametrize(
    ("body", "call"),
    [
        (lambda m, x: m.drop(m.a(x)), "dropout"),
        (lambda m, x: torch.nn.functional.dropout(m.a(x), 0.5, m.training), "dropout"),
        (lambda m, x: m.a(x).relu() if m.training else m.a(x), "relu"),
        (lambda m, x: m.norm(m.a(x)), "batch_norm"),
        (lambda m, x: torch.nn.functional.dropout(m.a(x), p=0.0, training=m.training), ""),
        (lambda m, x: m.a(x).relu(), ""),
    ],
    ids=["module", "function", "branch", "batch norm", "idle dropout", "none"],
)
def test_what_differs_in_training_is_named(body: Callable[[Any, torch.Tensor], torch.Tensor], call: str) -> None:
    model = Net(body, a=nn.Linear(3, 4), drop=nn.Dropout(0.5), norm=nn.BatchNorm1d(4))
    inputs = {"x": torch.ones(2, 3)}
    for other in (torch.float32, torch.bfloat16):
        found = dependence(model.train(), inputs, torch.float32, other)
        assert call in found.mode and bool(found.mode) == bool(call) and not found.dtype
        assert dependence(model.eval(), inputs, torch.float32, other) == Dependence()
