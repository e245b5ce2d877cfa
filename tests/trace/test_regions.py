"""What a mode does to the ops in a region is written into the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

import fxprune
from fxprune.trace.lower import copy_body
from tests.oracle import Net

aten = torch.ops.aten
X = {"x": torch.randn(2, 5, 3)}


def nodes(net: nn.Module, target: object) -> list[Any]:
    return [node for node in fxprune.trace(net, X).graph_module.graph.nodes if node.target is target]


def test_without_gradients_what_leaves_the_region_is_detached_once() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        with torch.no_grad():
            scale = h.abs().mean() + h.sum()
        return h * scale + scale

    (detach,) = nodes(Net(body, a=nn.Linear(3, 4)), aten.detach.default)
    assert len(detach.users) == 2


def test_with_gradients_inside_such_a_region_nothing_of_theirs_is_detached() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.enable_grad():
            return m.a(x)  # type: ignore[no-any-return]

    assert nodes(Net(body, a=nn.Linear(3, 4)), aten.detach.default) == []


def test_under_autocast_inputs_are_cast() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.a(x)  # type: ignore[no-any-return]

    net = Net(body, a=nn.Linear(3, 4))
    (linear,) = nodes(net, aten.linear.default)
    assert {source.meta["val"].dtype for source in linear.all_input_nodes} == {torch.bfloat16}
    assert fxprune.trace(net, X).graph_module(**X).dtype == torch.bfloat16


def test_autocast_of_another_device_does_nothing() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return m.a(x)  # type: ignore[no-any-return]

    assert nodes(Net(body, a=nn.Linear(3, 4)), aten.to.dtype) == []


def test_the_body_of_a_program_is_copied_without_its_regions() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return x.exp().log()

    program = torch.export.export(Net(body), (), X, strict=False)
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            env[node] = graph.placeholder(node.name)
    (result,) = copy_body(program.graph_module, graph, env, "cpu")
    assert [node.target for node in graph.nodes][1:] == [aten.exp.default, aten.log.default, aten.detach.default]
    assert result.target is aten.detach.default
