"""Facts about a graph, its source model and its repeated blocks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx, nn

from fxprune.errors import CalibrationError, PassError
from fxprune.graph.facts import (
    Change,
    Fact,
    Facts,
    Notes,
    Source,
    add_note,
    facts_of,
    set_facts,
)
from fxprune.offload.files import write_values
from fxprune.trace.capture import trace


@dataclass(frozen=True)
class Count(Fact):
    about: ClassVar[Change] = "graph"
    number: int


@dataclass(frozen=True)
class Sum(Fact):
    about: ClassVar[Change] = "weights"
    missing_error: ClassVar[type[PassError]] = CalibrationError
    remedy: ClassVar[str] = "Or add up by hand"
    total: float


def known(*facts: Fact) -> Facts:
    found = Facts()
    for fact in facts:
        found.put(fact)
    return found


@pytest.mark.parametrize(
    ("change", "left"), [("graph", {Notes}), ("weights", {Notes, Count}), ("nothing", {Notes, Count, Sum})]
)
def test_a_change_makes_stale_what_is_about_it(change: Change, left: set[type[Fact]]) -> None:
    facts = known(Notes(), Count(1), Sum(2.0))
    facts.drop_about(change, "some-pass")
    assert {type(fact) for fact in facts} == left
    facts.drop_about("graph", "some-pass", but=tuple(left))
    assert {type(fact) for fact in facts} == left


def test_notes_are_added_once_to_a_graph_that_is_known() -> None:
    graph_module = fx.symbolic_trace(nn.ReLU())
    with pytest.raises(PassError, match=r"nothing is known.*fxprune\.trace"):
        facts_of(graph_module)
    set_facts(graph_module, Facts())
    for line in ("one", "two", "one"):
        add_note(graph_module, line)
    assert facts_of(graph_module)[Notes].lines == ("one", "two")


def test_values_are_put_into_the_tensor_of_the_model_only_if_it_is_to_change() -> None:
    for shares in (True, False):
        model = nn.Linear(3, 2)
        graph_module = trace(model, {"input": torch.randn(2, 3)}).graph_module
        held = facts_of(graph_module)[Source]
        facts_of(graph_module).put(dataclasses.replace(held, shares=shares))
        with torch.no_grad():
            write_values(graph_module, "weight", torch.ones(2, 3, dtype=torch.float64))
        assert bool((model.weight == 1).all()) == shares
        assert graph_module.weight.dtype == torch.float32 and bool((graph_module.weight == 1).all())
