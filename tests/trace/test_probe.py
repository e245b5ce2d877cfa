"""A graph and its module side by side: the same, apart by values, by gradients, by shapes, and where first."""

from __future__ import annotations

import torch
from torch import fx, nn

import fxprune
from fxprune.trace.fidelity import TOLERANCE, Probe

X = {"x": torch.randn(2, 5, 3)}


class Two(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, tokens, 2)."""
        return self.b(self.a(x).relu())  # type: ignore[no-any-return]


def changed(model: nn.Module, old: object, new: object) -> fx.GraphModule:
    graph_module = fxprune.trace(model, X).graph_module
    for node in graph_module.graph.nodes:
        if node.target is old:
            node.target = new
    graph_module.recompile()
    return graph_module


def test_a_graph_and_its_module_are_the_same_to_the_last_digit() -> None:
    model = Two()
    probe = Probe(fxprune.trace(model, X).graph_module, model, X)
    assert probe.error(probe.inputs) == 0
    second = probe.resized((3, 4))
    assert second is not None and second["x"].shape == (3, 4, 3) and probe.error(second) == 0
    found = probe.gradients()
    assert set(found) == {name for name, _ in model.named_parameters()} and max(found.values()) <= TOLERANCE
    assert all(parameter.grad is None for parameter in model.parameters())


def test_another_op_is_seen_and_the_first_module_apart_named() -> None:
    model = Two()
    probe = Probe(changed(model, torch.ops.aten.relu.default, torch.ops.aten.tanh.default), model, X)
    error = probe.error(probe.inputs)
    assert error is not None and error > 0.01
    assert probe.first_apart().endswith(" in b")


def test_other_gradients_are_seen_though_values_are_the_same() -> None:
    model = Two()
    graph_module = fxprune.trace(model, X).graph_module
    node = next(n for n in graph_module.graph.nodes if n.target is torch.ops.aten.relu.default)
    with graph_module.graph.inserting_after(node):
        stopped = graph_module.graph.call_function(torch.ops.aten.detach.default, (node,))
    node.replace_all_uses_with(stopped, lambda user: user is not stopped)
    probe = Probe(graph_module, model, X)
    assert probe.error(probe.inputs) == 0
    assert {name for name, value in probe.gradients().items() if value > TOLERANCE} == {"a.weight", "a.bias"}


def test_a_graph_that_fails_is_infinitely_far_and_a_module_that_fails_says_nothing() -> None:
    model = Two()
    graph_module = fxprune.trace(model, X).graph_module
    probe = Probe(graph_module, model, X)
    assert probe.error({"x": torch.randn(2, 5, 9)}) is None
    broken = Probe(changed(model, torch.ops.aten.relu.default, torch.ops.aten.numpy_T.default), model, X)
    assert broken.error(broken.inputs) == float("inf")
