"""A program becomes a plain graph: weights by name, no regions, no asserts, nothing that ties it to a device."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import fx, nn

from fxprune.errors import TraceError
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


def test_regions_are_inlined_and_asserts_go() -> None:
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

    net = Net(body, a=nn.Linear(3, 4, dtype=torch.bfloat16))
    graph_module = lowered(net, torch.randn(2, 3, dtype=torch.bfloat16), dtype=torch.bfloat16)
    literals = [value for node in graph_module.graph.nodes for value in (*node.args, *node.kwargs.values())]
    assert not any(isinstance(value, torch.device | torch.dtype) for value in literals)
    assert graph_module.float()(torch.randn(2, 3)).dtype == torch.float32


def test_containers_come_back_and_what_has_no_fields_is_refused() -> None:
    net = Net(lambda net, x: {"y": net.a(x), "rest": [x, (x,)]}, a=nn.Linear(3, 4))
    found = lowered(net, torch.randn(2, 3))(torch.randn(2, 3))
    assert list(found) == ["y", "rest"] and isinstance(found["rest"][1], tuple)
    named = Net(lambda net, x: Pair(net.a(x), x), a=nn.Linear(3, 4))
    with pytest.raises(TraceError, match=r"namedtuple.* has no named fields"):
        lowered(named, torch.randn(2, 3))
