"""Groups found in a traced graph."""

from __future__ import annotations

import torch
from fxprune.passes.find_groups import FindGroupsPass
from torch import nn

from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Groups
from fxprune.graph.facts import facts_of
from fxprune.pipeline.registry import load_pass
from fxprune.removal.scores import Scores
from fxprune.trace import trace
from tests.oracle import Net


def test_groups_are_recorded_and_scores_of_older_ones_dropped() -> None:
    net = Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(10, 12), b=nn.Linear(12, 5))
    dense = trace(net, {"x": torch.randn(2, 10)}).graph_module
    assert not FindGroupsPass()(dense).modified
    facts = facts_of(dense)
    assert [(group.kind, group.size) for group in facts[Groups]] == [("mlp", 12)]
    assert facts[Dependencies].axes.parameters == ("a.weight", "a.bias", "b.weight", "b.bias")
    assert facts[Groups].of_kinds(("head",)) == () and len(facts[Groups].of_kinds(("mlp",))) == len(facts[Groups])
    load_pass("l1")(dense)
    assert Scores in facts
    FindGroupsPass()(dense)
    assert Scores not in facts
