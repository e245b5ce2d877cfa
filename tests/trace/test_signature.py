"""A graph is called as its module: containers, what is no tensor, defaults, and names."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxprune
from fxprune.errors import FxpruneError
from fxprune.trace.lower import add_inputs, called_with, read_leaves


class Takes(nn.Module):
    """A module whose inputs are of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)

    def forward(self, xs: Any, mode: str = "sum", weight: Any = None, more: Any = None) -> torch.Tensor:
        """Return (batch, tokens, 4)."""
        x = xs["p"][0] + xs["q"] if isinstance(xs, dict) else xs
        y = self.a(x) if weight is None else self.a(x * weight)
        return y if mode == "sum" else y * 2  # type: ignore[no-any-return]


T = torch.randn(2, 5, 3)


def graph_of(**inputs: Any) -> fx.GraphModule:
    return fxprune.trace(Takes(), inputs).graph_module


def parameters(graph_module: fx.GraphModule) -> dict[str, Any]:
    found = inspect.signature(graph_module.forward).parameters
    return {name: parameter.default for name, parameter in found.items()}


def test_a_container_is_one_input_and_its_leaves_are_named_after_it() -> None:
    graph_module = graph_of(xs={"p": [T], "q": T})
    assert list(parameters(graph_module)) == ["xs"]
    assert {"xs_p", "xs_p_0", "xs_q"} <= {node.name for node in graph_module.graph.nodes}
    assert graph_module(xs={"p": [T], "q": T}).shape == (2, 5, 4)
    assert graph_module({"p": [T[:, :2]], "q": T[:, :2]}).shape == (2, 2, 4)


def test_inputs_come_in_the_order_of_forward_whatever_the_order_given() -> None:
    assert list(parameters(graph_of(weight=T[:1, :1], mode="sum", xs=T))) == ["xs", "mode", "weight"]


def test_what_is_no_tensor_may_be_left_out_only_if_it_was_what_the_module_takes_it_for() -> None:
    empty = inspect.Parameter.empty
    assert parameters(graph_of(xs=T, mode="sum")) == {"xs": empty, "mode": "sum"}
    assert parameters(graph_of(xs=T, mode="double")) == {"xs": empty, "mode": empty}
    assert parameters(graph_of(xs=T, mode="sum", weight=T[:1, :1], more=None)) == {
        "xs": empty, "mode": empty, "weight": empty, "more": None,
    }  # fmt: skip


def test_another_value_is_refused_and_said_by_name() -> None:
    graph_module = graph_of(xs=T, mode="double")
    assert graph_module(T, "double").shape == (2, 5, 4)
    with pytest.raises(RuntimeError, match="mode='double' and takes no other"):
        graph_module(T, "sum")


def test_a_container_that_is_no_list_tuple_or_dict_is_refused() -> None:
    with pytest.raises(FxpruneError, match="xs"):
        graph_of(xs={T})


def test_placeholders_of_a_program_are_found_in_the_containers_that_it_was_called_with() -> None:
    program = torch.export.export(Takes(), (), {"xs": {"p": [T], "q": T}, "mode": "sum"}, strict=False)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    called = called_with(program, list(zip(nodes, program.graph_signature.input_specs, strict=True)))
    assert list(called) == ["xs", "mode"] and list(called["xs"]) == ["p", "q"]
    graph = fx.Graph()
    made = add_inputs(graph, called, Takes().forward, {"mode"})
    assert made["mode"].name == "mode_input" and made["mode"].args == ("sum",)
    leaves = read_leaves(graph, called, made)
    assert {leaves[called["xs"]["p"][0]].name, leaves[called["xs"]["q"]].name} == {"xs_p_0", "xs_q"}
