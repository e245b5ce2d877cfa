"""Facts are known by class, forgotten when stale, and missed with a reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from torch import fx, nn

from fxprune.errors import CalibrationError, PassError
from fxprune.graph.facts import Change, Fact, Facts, Notes, Runnable, add_note, facts_of, set_facts


@dataclass(frozen=True)
class Count(Fact):
    """Something that holds of a graph only."""

    about: ClassVar[Change] = "graph"
    number: int


@dataclass(frozen=True)
class Sum(Fact):
    """Something that holds of weights only."""

    about: ClassVar[Change] = "weights"
    missing_error: ClassVar[type[PassError]] = CalibrationError
    remedy: ClassVar[str] = "Or add up by hand"
    total: float


def known(*facts: Fact) -> Facts:
    """Facts about some graph."""
    found = Facts()
    for fact in facts:
        found.put(fact)
    return found


def test_there_is_one_fact_of_a_class() -> None:
    facts = known(Count(1), Count(2), Runnable())
    assert facts[Count].number == 2
    assert Count in facts and Sum not in facts and facts.get(Sum) is None
    assert list(facts) == [Count(2), Runnable()]


@pytest.mark.parametrize(
    ("change", "left"), [("graph", {Notes}), ("weights", {Notes, Count}), ("nothing", {Notes, Count, Sum})]
)
def test_a_change_makes_stale_what_is_about_it(change: Change, left: set[type[Fact]]) -> None:
    facts = known(Notes(), Count(1), Sum(2.0))
    facts.drop_about(change, "some-pass")
    assert {type(fact) for fact in facts} == left
    facts.drop_about("graph", "some-pass", but=tuple(left))
    assert {type(fact) for fact in facts} == left


def test_what_is_missing_is_an_error_of_its_kind_that_says_what_made_it_stale() -> None:
    facts = known(Sum(2.0))
    with pytest.raises(PassError, match="the fact Count is not known"):
        facts[Count]
    facts.drop(Sum, "some-pass")
    with pytest.raises(CalibrationError, match=r"the fact Sum is stale since pass some-pass.*Or add up by hand"):
        facts[Sum]
    facts.put(Sum(3.0))
    assert facts[Sum].total == 3.0


def test_a_copy_goes_its_own_way() -> None:
    facts = known(Count(1))
    twin = facts.copy()
    twin.put(Count(2))
    facts.drop(Count, "some-pass")
    assert twin[Count].number == 2 and Count not in facts


def test_notes_are_added_once_to_a_graph_that_is_known() -> None:
    graph_module = fx.symbolic_trace(nn.ReLU())
    with pytest.raises(PassError, match=r"nothing is known.*fxprune\.trace"):
        facts_of(graph_module)
    set_facts(graph_module, Facts())
    for line in ("one", "two", "one"):
        add_note(graph_module, line)
    assert facts_of(graph_module)[Notes].lines == ("one", "two")
