"""Tests: graph against module: outputs and gradients compared."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import fxprune
from fxprune.errors import PassError
from fxprune.graph.facts import facts_of
from fxprune.trace.fidelity import TOLERANCE, Fidelity, Probe, assess, require_gradients, tolerance
from tests.models import tiny, token_ids


def test_a_graph_of_a_language_model_is_the_model() -> None:
    found = facts_of(fxprune.trace(tiny("llama")).graph_module)[Fidelity]
    assert found.error is not None and found.error <= 1e-6
    assert found.gradients is not None and found.gradients <= 1e-4
    assert found.apart == () and found.where == "" and found.notes == ()


def test_nothing_is_compared_on_meta_or_without_a_check() -> None:
    model = Two()
    assert facts_of(fxprune.trace(model, X, check=False).graph_module)[Fidelity] == Fidelity(None)
    assert facts_of(fxprune.trace(model.to("meta"), X).graph_module)[Fidelity] == Fidelity(None)


def test_where_outputs_are_apart_is_said() -> None:
    model = Two()
    graph_module = changed(model, torch.ops.aten.relu.default, torch.ops.aten.tanh.default)
    assert assess(graph_module, model, X).where.endswith(" in b")


def test_gradients_that_are_apart_are_refused_to_who_needs_them() -> None:
    graph_module = fxprune.trace(Two(), X).graph_module
    require_gradients(graph_module, "taylor")
    facts_of(graph_module).put(Fidelity(0.0, 1.0, ("a.weight", "a.bias")))
    with pytest.raises(PassError, match=r"pass taylor: the gradients of a\.weight and 1 more"):
        require_gradients(graph_module, "taylor")


def test_the_report_counts_it() -> None:
    report = fxprune.prune(tiny("llama"), token_ids(2, 8), importance="l2", ratio=0.1).report
    assert report.fidelity is not None and report.fidelity <= 1e-6
    assert report.to_dict()["gradient_fidelity"] <= 1e-4


def test_narrow_dtypes_are_compared_with_their_own_precision() -> None:
    assert tolerance(torch.float32) == tolerance(torch.float64) == 1e-5
    assert tolerance(torch.bfloat16) > tolerance(torch.float16) > 1e-3


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
