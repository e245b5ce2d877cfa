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


@pytest.fixture(scope="module")
def graph_test_lookup() -> nx.Graph:
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
def test_short_names_are_found(graph_test_lookup: nx.Graph, name: str, dim: int | None, found: tuple[str, int]) -> None:
    assert find_axis(graph_test_lookup, name, dim) == found


@pytest.mark.parametrize(
    ("name", "dim", "error", "says"),
    [
        ("end", None, ArgumentError, r"end\.weight: has 2 axes, 0 and 1\. Name one, as in end\[0\]"),
        ("end.weight", 2, ArgumentError, r"end\.weight: there is no axis 2: it has 2 axes, 0 and 1"),
        ("end.weight[-1]", None, ArgumentError, "there is no axis -1"),
        ("1.2.bias", 3, ArgumentError, "it has 1 axis, 0"),
        ("end[0]", 1, ArgumentError, "axis 0 and axis 1 are requested"),
        (
            "2.weight",
            0,
            ArgumentError,
            r"ambiguous: it may be model\.0\.0\.2\.weight, model\.0\.1\.2\.weight",
        ),
        ("0.*.2", 0, ArgumentError, "the name is ambiguous"),
        ("ned.weight", 0, UnknownNameError, r"Did you mean 'end\.weight'"),
        ("ed", 0, UnknownNameError, "Did you mean 'end'"),
        ("", 0, UnknownNameError, "unknown parameter or buffer"),
    ],
)
def test_a_wrong_axis_or_name_is_refused(
    graph_test_lookup: nx.Graph, name: str, dim: int | None, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        find_axis(graph_test_lookup, name, dim)


def test_explain_takes_short_names(graph_test_lookup: nx.Graph) -> None:
    assert explain(graph_test_lookup, ("1.2", 1)) == explain(graph_test_lookup, ("model.0.1.2.weight", 1)) != []


def test_groups_are_found_by_the_end_of_their_name(graph_test_lookup: nx.Graph) -> None:
    groups = find_groups(graph_test_lookup)
    names = [group.name for group in groups]
    assert find_group(groups, names[0]).name == names[0]
    with pytest.raises(UnknownNameError, match="Did you mean"):
        find_group(groups, names[0][:-1] + "x")
