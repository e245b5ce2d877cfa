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
    Constants,
    Fact,
    Facts,
    Notes,
    Runnable,
    Source,
    add_note,
    facts_of,
    find_blocks,
    fork,
    owner_block,
    set_facts,
    unshare,
    within,
)
from fxprune.graph.tensors import get_tensor, set_tensor, weights
from fxprune.offload.files import write_values
from fxprune.trace.capture import trace
from tests.models import tiny
from tests.oracle import Net


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


def test_there_is_one_fact_of_a_class() -> None:
    facts = known(Count(1), Count(2), Runnable())
    assert facts[Count].number == 2
    assert Count in facts and Sum not in facts and facts.get(Sum) is None
    assert list(facts) == [Count(2), Runnable()]
    facts = known(Count(1))  # a copy goes its own way
    twin = facts.copy()
    twin.put(Count(2))
    facts.drop(Count, "some-pass")
    assert twin[Count].number == 2 and Count not in facts


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


def test_notes_are_added_once_to_a_graph_that_is_known() -> None:
    graph_module = fx.symbolic_trace(nn.ReLU())
    with pytest.raises(PassError, match=r"nothing is known.*fxprune\.trace"):
        facts_of(graph_module)
    set_facts(graph_module, Facts())
    for line in ("one", "two", "one"):
        add_note(graph_module, line)
    assert facts_of(graph_module)[Notes].lines == ("one", "two")


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU())


class Other(nn.Sequential):
    """A block of another class."""


def test_blocks_are_the_outermost_and_neither_plain_layers_nor_different_modules() -> None:
    assert find_blocks(tiny("llama")) == tuple(f"model.layers.{i}" for i in range(3))
    nested = nn.ModuleDict({"stack": nn.ModuleList(nn.ModuleList([block(), block()]) for _ in range(2))})
    assert find_blocks(nested) == ("stack.0", "stack.1")
    assert find_blocks(nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])) == ()
    assert find_blocks(nn.ModuleList([block(), Other(nn.Linear(3, 3))])) == ()
    mixed = [Other(nn.Linear(3, 3)), block(), Other(nn.Linear(3, 3))]
    assert find_blocks(nn.ModuleList(mixed)) == ("0", "1", "2")
    assert find_blocks(nn.Sequential(*mixed)) == ()


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("m.layers.1", "m.layers.1"),
        ("m.layers.1.a.weight", "m.layers.1"),
        ("m.layers.10.a", None),
        ("m.norm", None),
        ("layers.1", None),
        ("m.layers.1.", "m.layers.1"),
        ("", None),
    ],
)
def test_names_belong_to_the_block_they_lie_in(name: str, owner: str | None) -> None:
    blocks = ("m.layers.0", "m.layers.1")
    assert owner_block(name, blocks) == owner
    assert within(name, blocks) == (owner is not None and name != owner)


def test_tensors_have_their_names_in_the_model_and_constants_have_none() -> None:
    net = Net(lambda net, x: net.b(net.a(x)) * torch.arange(3), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    net.b.weight = net.a.weight
    inputs = {"x": torch.randn(2, 3)}
    facts = facts_of(trace(net, inputs).graph_module)
    source, (constant,) = facts[Source], facts[Constants].names
    assert source.model is net and source.example_inputs == inputs and source.shares and source.dense is None
    assert [names for names in source.names.values() if len(names) > 1] == [("a.weight", "b.weight")]
    assert source.names["a.bias"] == ("a.bias",)
    assert source.names[constant] == ()


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


def test_a_fork_computes_the_same_from_the_same_tensors_and_can_be_unshared() -> None:
    net = Net(lambda net, x: net.b(net.a(x)), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    net.b.weight = net.a.weight
    graph_module = trace(net, {"x": torch.randn(2, 3)}).graph_module
    twin, x = fork(graph_module), torch.randn(2, 3)
    assert torch.equal(twin(x=x), graph_module(x=x))
    assert all(a is b for (_, a), (_, b) in zip(weights(twin), weights(graph_module), strict=True))
    assert [node.name for node in twin.graph.nodes] == [node.name for node in graph_module.graph.nodes]
    before, notes = graph_module.a.bias, facts_of(graph_module)[Notes].lines
    set_tensor(twin, "a.bias", torch.zeros(3))
    add_note(twin, "a note")
    assert get_tensor(graph_module, "a.bias") is before
    assert facts_of(twin)[Notes].lines == (*notes, "a note") and facts_of(graph_module)[Notes].lines == notes
    assert facts_of(graph_module)[Source].shares and not facts_of(twin)[Source].shares
    twin = fork(graph_module)
    unshare(twin, graph_module)
    mine, theirs = dict(weights(twin)), dict(weights(graph_module))
    assert all(torch.equal(mine[name], theirs[name]) and mine[name] is not theirs[name] for name in theirs)
    assert len({id(tensor) for tensor in mine.values()}) == len({id(tensor) for tensor in theirs.values()})
    assert all(isinstance(tensor, nn.Parameter) for tensor in mine.values())
