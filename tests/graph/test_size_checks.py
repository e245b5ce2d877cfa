"""Checks among the nodes of a graph: what they say, and which inputs they refuse without running anything else."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from fxprune.graph.size_checks import limits_of, refusal

aten = torch.ops.aten


def graph_module() -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    mode = graph.create_node("placeholder", "mode", ("sum",))
    size = graph.call_function(aten.sym_size.int, (x, 1))
    graph.call_function(aten._assert_scalar.default, (graph.call_function(operator.le, (size, 5)), "at most five"))
    graph.call_function(aten._assert_scalar.default, (graph.call_function(operator.eq, (mode, "sum")), "sums"))
    graph.output(graph.call_function(aten.matmul.default, (x, x)))
    return fx.GraphModule(nn.Module(), graph)


def check(**inputs: Any) -> str:
    return refusal(graph_module(), inputs)


def test_limits_are_in_words() -> None:
    assert limits_of(graph_module()) == ("at most five", "sums")


def test_the_first_check_that_refuses_speaks() -> None:
    assert check(x=torch.zeros(2, 5)) == ""  # which the product would refuse: it is not run
    assert check(x=torch.zeros(2, 6)) == check(x=torch.zeros(2, 6), mode="max") == "at most five"
    assert check(x=torch.zeros(2, 5), mode="max") == "sums"
