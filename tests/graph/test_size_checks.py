"""Checks among the nodes of a graph: what they say, and which inputs they refuse without running anything else."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from fxprune.graph.shapes import limits_of, refusal

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


def test_sizes_that_a_check_cannot_be_worked_out_for_are_refused() -> None:
    graph = fx.Graph()
    size = graph.call_function(aten.sym_size.int, (graph.placeholder("x"), 0))
    parts = graph.call_function(operator.mod, (12, graph.call_function(operator.floordiv, (size, 4))))
    graph.call_function(aten._assert_scalar.default, (graph.call_function(operator.eq, (parts, 0)), "parts of twelve"))
    graph.output(size)
    made = fx.GraphModule(nn.Module(), graph)
    assert [refusal(made, {"x": torch.zeros(n)}) for n in (8, 20, 3)] == ["", "parts of twelve", "mod divides by zero"]
