"""A fork has its own graph and facts, and shares tensors until it is told not to."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from fxprune.graph.facts import Notes, Source, add_note, facts_of, fork, unshare
from fxprune.graph.tensors import get_tensor, set_tensor, weights
from fxprune.trace.capture import trace
from tests.oracle import Net


@pytest.fixture
def graph_module() -> fx.GraphModule:
    net = Net(lambda net, x: net.b(net.a(x)), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    net.b.weight = net.a.weight
    return trace(net, {"x": torch.randn(2, 3)}).graph_module


def test_a_fork_computes_the_same_from_the_same_tensors(graph_module: fx.GraphModule) -> None:
    twin, x = fork(graph_module), torch.randn(2, 3)
    assert torch.equal(twin(x=x), graph_module(x=x))
    assert all(a is b for (_, a), (_, b) in zip(weights(twin), weights(graph_module), strict=True))
    assert [node.name for node in twin.graph.nodes] == [node.name for node in graph_module.graph.nodes]


def test_what_happens_to_a_fork_does_not_happen_to_the_other(graph_module: fx.GraphModule) -> None:
    twin, before, notes = fork(graph_module), graph_module.a.bias, facts_of(graph_module)[Notes].lines
    set_tensor(twin, "a.bias", torch.zeros(3))
    add_note(twin, "a note")
    assert get_tensor(graph_module, "a.bias") is before
    assert facts_of(twin)[Notes].lines == (*notes, "a note") and facts_of(graph_module)[Notes].lines == notes
    assert facts_of(graph_module)[Source].shares and not facts_of(twin)[Source].shares


def test_unshared_tensors_are_copies_and_tied_ones_stay_tied(graph_module: fx.GraphModule) -> None:
    twin = fork(graph_module)
    unshare(twin, graph_module)
    mine, theirs = dict(weights(twin)), dict(weights(graph_module))
    assert all(torch.equal(mine[name], theirs[name]) and mine[name] is not theirs[name] for name in theirs)
    assert len({id(tensor) for tensor in mine.values()}) == len({id(tensor) for tensor in theirs.values()})
    assert all(isinstance(tensor, nn.Parameter) for tensor in mine.values())
