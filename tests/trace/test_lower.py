"""Lowering of an ``ExportedProgram`` to a plain ``GraphModule`` bound to the real weights."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import pytest
import torch
from torch import fx, nn

import fxprune
from fxprune.errors import FxpruneError, TraceError
from fxprune.trace.lower import lower
from tests.oracle import Net


class Pair(NamedTuple):
    """An output of a type of its own."""

    y: torch.Tensor
    x: torch.Tensor


def lowered(net: nn.Module, x: torch.Tensor, dtype: torch.dtype | None = None) -> fx.GraphModule:
    return lower(torch.export.export(net.eval(), (), {"x": x}, strict=False), net, dtype)


def targets(graph_module: fx.GraphModule, op: str) -> list[Any]:
    return [node.target for node in graph_module.graph.nodes if node.op == op]


def test_weights_are_the_models_own_and_only_those_in_use() -> None:
    net = Net(lambda net, x: net.a(x), a=nn.Linear(3, 4), unused=nn.Linear(3, 4))
    graph_module = lowered(net, torch.randn(2, 3))
    assert targets(graph_module, "get_attr") == ["a.weight", "a.bias"]
    assert graph_module.a.weight is net.a.weight and not hasattr(graph_module, "unused")
    x = torch.randn(2, 3)
    assert torch.equal(graph_module(x), net(x))


def test_regions_are_inlined_and_assertions_dropped() -> None:
    def body(net: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            scale = x.double().to(x.device).sum()
        return net.a(x) * scale.float()

    net = Net(body, a=nn.Linear(3, 4))
    program = torch.export.export(net, (), {"x": torch.randn(2, 3)}, strict=False)
    graph_module = lower(program, net, None)
    assert any("wrap_with" in str(target) for target in (node.target for node in program.graph.nodes))
    assert not any("wrap_with" in str(t) or "assert" in str(t) for t in targets(graph_module, "call_function"))
    x = torch.randn(2, 3)
    assert torch.allclose(graph_module(x), net(x))


def test_devices_and_the_dtype_of_the_model_are_read_at_run_time() -> None:
    def body(net: Any, x: torch.Tensor) -> torch.Tensor:
        return net.a(x) + torch.zeros(4, dtype=torch.bfloat16, device="cpu")

    net = Net(body, unused=nn.Linear(3, 4, dtype=torch.bfloat16), a=nn.Linear(3, 4, dtype=torch.bfloat16))
    graph_module = lowered(net, torch.randn(2, 3, dtype=torch.bfloat16), dtype=torch.bfloat16)
    assert targets(graph_module, "get_attr") == ["a.weight", "a.bias"]  # XLNet's mask embedding stayed for its dtype
    literals = [value for node in graph_module.graph.nodes for value in (*node.args, *node.kwargs.values())]
    assert not any(isinstance(value, torch.device | torch.dtype) for value in literals)
    assert graph_module.float()(torch.randn(2, 3)).dtype == torch.float32


def test_containers_are_returned_and_types_without_fields_refused() -> None:
    net = Net(lambda net, x: {"y": net.a(x), "rest": [x, (x,)]}, a=nn.Linear(3, 4))
    found = lowered(net, torch.randn(2, 3))(torch.randn(2, 3))
    assert list(found) == ["y", "rest"] and isinstance(found["rest"][1], tuple)
    named = Net(lambda net, x: Pair(net.a(x), x), a=nn.Linear(3, 4))
    with pytest.raises(TraceError, match=r"namedtuple.* has no named fields"):
        lowered(named, torch.randn(2, 3))


aten = torch.ops.aten
X = {"x": torch.randn(2, 5, 3)}


def nodes(net: nn.Module, target: object) -> list[Any]:
    return [node for node in fxprune.trace(net, X).graph_module.graph.nodes if node.target is target]


def test_values_of_a_region_without_gradients_are_detached_once() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        with torch.no_grad():
            scale = h.abs().mean() + h.sum()
        return h * scale + scale

    (detach,) = nodes(Net(body, a=nn.Linear(3, 4)), aten.detach.default)
    assert len(detach.users) == 2


def test_under_autocast_inputs_are_cast() -> None:
    """That of another device does nothing, and a nested region with gradients is not detached."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.a(x)  # type: ignore[no-any-return]

    def other(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16), torch.no_grad(), torch.enable_grad():
            return m.a(x)  # type: ignore[no-any-return]

    assert all(nodes(Net(other, a=nn.Linear(3, 4)), op) == [] for op in (aten.to.dtype, aten.detach.default))
    net = Net(body, a=nn.Linear(3, 4))
    (linear,) = nodes(net, aten.linear.default)
    assert {source.meta["val"].dtype for source in linear.all_input_nodes} == {torch.bfloat16}
    assert fxprune.trace(net, X).graph_module(**X).dtype == torch.bfloat16


class Takes(nn.Module):
    """A module with inputs of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)

    def forward(self, xs: Any, mode: str = "sum", weight: Any = None, more: Any = None) -> torch.Tensor:
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


def test_an_input_with_the_name_of_a_weight_gets_another_node_name() -> None:
    net = Net(lambda m, x: x @ m.x, x=nn.Parameter(torch.randn(3, 4)))
    graph_module = lowered(net, torch.randn(2, 3))
    assert {node.name for node in graph_module.graph.nodes} >= {"x", "x_input"}
    assert list(parameters(graph_module)) == ["x"]


def test_an_input_is_optional_only_if_it_was_its_default() -> None:
    empty = inspect.Parameter.empty
    assert parameters(graph_of(xs=T, mode="sum")) == {"xs": empty, "mode": "sum"}
    assert parameters(graph_of(xs=T, mode="double")) == {"xs": empty, "mode": empty}
    found = parameters(graph_of(weight=T[:1, :1], mode="sum", xs=T, more=None))
    assert list(found.items()) == [("xs", empty), ("mode", empty), ("weight", empty), ("more", None)]


def test_another_value_is_refused_by_name_and_an_odd_container_too() -> None:
    graph_module = graph_of(xs=T, mode="double")
    assert graph_module(T, "double").shape == (2, 5, 4)
    with pytest.raises(RuntimeError, match="mode='double' and takes no other"):
        graph_module(T, "sum")
    with pytest.raises(FxpruneError, match="xs"):
        graph_of(xs={T})
