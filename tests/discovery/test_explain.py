"""Explanations, and look-up of axes and groups by abbreviated names."""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import pytest
import torch
from torch import nn

import fxprune
from fxprune.discovery.dependency import dependency_graph
from fxprune.discovery.explain import explain, find_axis, find_group
from fxprune.discovery.groups import find_groups
from fxprune.errors import ArgumentError, UnknownNameError
from fxprune.trace import trace


def test_each_step_has_the_rule_of_its_op_also_in_pictures(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    graph = dependency_graph(trace(net, {"input": torch.randn(2, 7, 5)}))
    linear = "linear  input[b, s, i], weight[o, i], bias[o] -> out[b, s, o]  sums i"
    steps = [("linear", linear), ("relu", "relu  self[a, b, c] -> out[a, b, c]"), ("linear_1", linear)]
    assert [(step.node, step.rule) for step in explain(graph, ("2.weight", 1))] == steps
    assert graph.graph["axes"].rules == dict(steps)
    fxprune.write_dot(graph, tmp_path / "net.dot", everything=True)
    assert "relu  self[a, b, c] → out[a, b, c]" in (tmp_path / "net.dot").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def lookup() -> nx.Graph:
    layers = (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6)) for _ in range(2))
    net = nn.ModuleDict({"layers": nn.Sequential(*layers), "end": nn.Linear(6, 3, bias=False)})
    model = nn.Sequential()
    model.add_module("model", nn.Sequential(net["layers"]))
    model.add_module("end", net["end"])
    return dependency_graph(trace(model.eval(), {"input": torch.randn(2, 6)}))


@pytest.mark.parametrize(
    ("name", "dim", "found"),
    [
        ("model.0.1.2.weight", 1, ("model.0.1.2.weight", 1)),
        ("1.2.weight", 0, ("model.0.1.2.weight", 0)),
        ("1.2", 1, ("model.0.1.2.weight", 1)),
        ("1.2.bias", None, ("model.0.1.2.bias", 0)),
        ("1.2.weight[1]", None, ("model.0.1.2.weight", 1)),
        ("end[0]", 0, ("end.weight", 0)),
        ("relu", 1, ("relu", 1)),
    ],
)
def test_short_names_are_found(lookup: nx.Graph, name: str, dim: int | None, found: tuple[str, int]) -> None:
    assert find_axis(lookup, name, dim) == found


@pytest.mark.parametrize(
    ("name", "dim", "error", "says"),
    [
        ("end", None, ArgumentError, r"end\.weight: has 2 axes, 0 and 1\. Name one, as in end\[0\]"),
        ("end.weight", 2, ArgumentError, r"end\.weight: there is no axis 2: it has 2 axes, 0 and 1"),
        ("end.weight[-1]", None, ArgumentError, "there is no axis -1"),
        ("1.2.bias", 3, ArgumentError, "it has 1 axis, 0"),
        ("end[0]", 1, ArgumentError, "axis 0 and axis 1 are requested"),
        ("2.weight", 0, ArgumentError, r"ambiguous: it may be model\.0\.0\.2\.weight, model\.0\.1\.2\.weight"),
        ("0.*.2", 0, ArgumentError, "the name is ambiguous"),
        ("ned.weight", 0, UnknownNameError, r"Did you mean 'end\.weight'"),
        ("ed", 0, UnknownNameError, "Did you mean 'end'"),
        ("", 0, UnknownNameError, "unknown parameter or buffer"),
    ],
)
def test_a_wrong_axis_or_name_is_refused(
    lookup: nx.Graph, name: str, dim: int | None, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        find_axis(lookup, name, dim)


def test_explain_takes_short_names_and_groups_are_found_by_the_end_of_theirs(lookup: nx.Graph) -> None:
    assert explain(lookup, ("1.2", 1)) == explain(lookup, ("model.0.1.2.weight", 1)) != []
    groups = find_groups(lookup)
    names = [group.name for group in groups]
    assert find_group(groups, names[0]).name == names[0]
    with pytest.raises(UnknownNameError, match="Did you mean"):
        find_group(groups, names[0][:-1] + "x")
