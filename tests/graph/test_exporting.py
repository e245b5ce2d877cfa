"""An export that is under way can be asked which node stands for a tensor, and be told."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxprune.graph.context import as_exported, compiled_later, current_tracer, node_of, track, unseen, untraced
from fxprune.trace.repeats.watch import CallLog


class Doubled(nn.Module):
    """Doubles its input, but tells the export that it does not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input, as far as a graph knows."""
        tracer: Any = current_tracer()
        if tracer is None:
            return x * 2
        node = node_of(x, tracer)
        assert node is not None and node.op == "placeholder"
        with untraced():
            y = x * 2
        assert node_of(y, tracer) is None
        track(y, node, tracer)
        return y.relu()


def test_a_tensor_stands_for_the_node_that_the_export_is_told() -> None:
    program = torch.export.export(Doubled(), (torch.ones(2, 3),), strict=False)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.aten.relu.default]
    assert current_tracer() is None


def test_code_finds_that_it_is_exported_and_modes_see_no_calls() -> None:
    with as_exported(), CallLog() as log:
        assert torch.compiler.is_exporting() and torch.compiler.is_compiling()
        with unseen():
            torch.ones(2).relu()
        assert log.calls == []
    assert not torch.compiler.is_exporting() and not torch.compiler.is_compiling()


def test_code_of_a_graph_is_written_once_it_is_run() -> None:
    graph = torch.fx.symbolic_trace(Doubled()).graph
    with compiled_later() as waiting:
        module = torch.fx.GraphModule(nn.Module(), graph)
        assert not hasattr(module, "_code") and set(waiting) == {module}
    assert torch.equal(module(torch.ones(3)), torch.full((3,), 2.0))
    assert "return" in module.code
