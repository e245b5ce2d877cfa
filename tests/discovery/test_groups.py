"""Groups by propagation; families and random networks test them end to end."""

from __future__ import annotations

import networkx as nx
import torch
from torch import nn

from fxprune.discovery.groups import Groups, axes_by_factor, find_groups, propagate
from tests.models import tiny
from tests.oracle import Net, discover, graph_of


def test_a_trigger_reaches_what_holds_its_factor() -> None:
    net = Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(10, 12), b=nn.Linear(12, 5))
    graph = graph_of(discover(net, {"x": torch.randn(2, 10)}))
    (group,) = find_groups(graph)
    assert group.factor is not None and group.trigger is not None
    holding = axes_by_factor(graph)[group.factor]
    reached = propagate(graph, group.trigger, holding)
    assert {(m.name, m.axis) for m in group.members} == {("a.weight", 0), ("a.bias", 0), ("b.weight", 1)}
    assert {(m.name, m.axis) for m in group.members} <= reached == holding
    cut = nx.Graph(graph)
    cut.remove_nodes_from([axis for axis in holding if axis.tensor.startswith("relu")])
    assert ("b.weight", 1) not in propagate(cut, group.trigger, holding & set(cut))


def test_kinds_of_a_language_model() -> None:
    found = Groups(find_groups(graph_of(discover(tiny("llama", num_hidden_layers=2)))))
    assert {group.kind for group in found} == {"mlp", "head", "channel", "head_dim", "layer"}
    assert len({group.name for group in found}) == len(found)
    assert [group.size for group in found.of_kinds(("mlp",))] == [88, 88]
