"""Inputs of a graph: tensors, what is read off containers, and the rest."""

from __future__ import annotations

import operator

import torch
from torch import fx

from fxprune.graph.tensors import example_of, input_tensors, is_input


def graph() -> tuple[fx.Graph, dict[str, fx.Node]]:
    found = fx.Graph()
    x = found.placeholder("x")
    xs = found.placeholder("xs")
    first = found.call_function(operator.getitem, (xs, "p"))
    inner = found.call_function(operator.getitem, (first, 0))
    total = found.call_function(torch.add, (x, inner))
    part = found.call_function(operator.getitem, (total, 0))
    found.output(part)
    for node in (x, inner, total, part):
        node.meta["val"] = torch.zeros(2, 3)
    xs.meta["val"], first.meta["val"] = {"p": [torch.zeros(2, 3)]}, [torch.zeros(2, 3)]
    return found, {"x": x, "xs": xs, "first": first, "inner": inner, "total": total, "part": part}


def test_what_is_read_off_an_input_is_an_input() -> None:
    _, nodes = graph()
    assert {name for name, node in nodes.items() if is_input(node)} == {"x", "xs", "first", "inner"}


def test_tensors_are_spelled_as_python_code() -> None:
    found, nodes = graph()
    assert dict(input_tensors(found)) == {nodes["x"]: "x", nodes["inner"]: "xs['p'][0]"}


def test_only_tensors_are_made_anew() -> None:
    made = example_of({"p": [torch.zeros(2), 3], "q": None}, torch.ones_like)
    assert made["p"][0].sum() == 2 and made["p"][1] == 3 and made["q"] is None
