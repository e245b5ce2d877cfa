"""Why an axis is in a group, step by step, each with the rule of its op."""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import pytest
import torch
from torch import nn

import fxprune
from fxprune.discovery.dependency import dependency_graph
from fxprune.discovery.explain import explain


@pytest.fixture
def graph() -> nx.Graph:
    net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    return dependency_graph(fxprune.trace(net, {"input": torch.randn(2, 7, 5)}))


def test_each_step_says_the_rule_of_its_op(graph: nx.Graph) -> None:
    steps = explain(graph, ("2.weight", 1))
    assert [(step.node, step.rule) for step in steps] == [
        ("linear", "linear  input[b, s, i], weight[o, i], bias[o] -> out[b, s, o]  sums i"),
        ("relu", "relu  self[a, b, c] -> out[a, b, c]"),
        ("linear_1", "linear  input[b, s, i], weight[o, i], bias[o] -> out[b, s, o]  sums i"),
    ]


def test_rules_are_in_the_tooltips_of_a_picture(graph: nx.Graph, tmp_path: Path) -> None:
    path = tmp_path / "net.dot"
    fxprune.write_dot(graph, path, everything=True)
    assert "relu  self[a, b, c] → out[a, b, c]" in path.read_text(encoding="utf-8")


def test_every_op_of_a_graph_has_its_rule_as_text(graph: nx.Graph) -> None:
    assert sorted(graph.graph["axes"].rules) == ["linear", "linear_1", "relu"]
