"""Comparison of a graph with its module, by outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxprune
from fxprune.errors import PassError
from fxprune.graph.facts import facts_of
from fxprune.trace.fidelity import _TOLERANCE, Fidelity, SideBySide, compare_with_module, require_gradients, tolerance
from tests.models import tiny
from tests.oracle import Net


def test_a_graph_of_a_language_model_is_the_model() -> None:
    found = facts_of(fxprune.trace(tiny("llama", num_hidden_layers=1)).graph_module)[Fidelity]
    assert found.error is not None and found.error <= 1e-6
    assert found.gradients is not None and found.gradients <= 1e-4
    assert found.unlike == () and found.where == "" and found.notes == ()
    assert tolerance(torch.float32) == tolerance(torch.float64) == 1e-5
    assert tolerance(torch.bfloat16) > tolerance(torch.float16) > 1e-3


def test_nothing_is_compared_on_meta_or_without_a_check() -> None:
    model = two()
    assert facts_of(fxprune.trace(model, X, check=False).graph_module)[Fidelity] == Fidelity(None)
    assert facts_of(fxprune.trace(model.to("meta"), X).graph_module)[Fidelity] == Fidelity(None)


def test_the_first_difference_of_outputs_is_named() -> None:
    model = two()
    graph_module = changed(model, torch.ops.aten.relu.default, torch.ops.aten.tanh.default)
    found = compare_with_module(graph_module, model, X)
    assert found.where.endswith(" in b") and found.error is not None and found.error > 0.01


def test_passes_that_need_gradients_refuse_those_that_differ() -> None:
    graph_module = fxprune.trace(two(), X).graph_module
    require_gradients(graph_module, "taylor")
    facts_of(graph_module).put(Fidelity(0.0, 1.0, ("a.weight", "a.bias")))
    with pytest.raises(PassError, match=r"pass taylor: the gradients of a\.weight and 1 more"):
        require_gradients(graph_module, "taylor")


X = {"x": torch.randn(2, 5, 3)}


def two() -> Net:
    """Two layers."""
    return Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(3, 4), b=nn.Linear(4, 2))


def changed(model: nn.Module, old: object, new: object) -> fx.GraphModule:
    graph_module = fxprune.trace(model, X).graph_module
    for node in graph_module.graph.nodes:
        if node.target is old:
            node.target = new
    graph_module.recompile()
    return graph_module


def test_a_graph_and_its_module_are_the_same_to_the_last_digit() -> None:
    model = two()
    pair = SideBySide(fxprune.trace(model, X).graph_module, model, X)
    assert pair.error(pair.inputs) == 0
    second = pair.resized((3, 4))
    assert second is not None and second["x"].shape == (3, 4, 3) and pair.error(second) == 0
    found = pair.gradients()
    assert set(found) == {name for name, _ in model.named_parameters()} and max(found.values()) <= _TOLERANCE
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_may_differ_though_values_are_the_same() -> None:
    model = two()
    graph_module = fxprune.trace(model, X).graph_module
    node = next(n for n in graph_module.graph.nodes if n.target is torch.ops.aten.relu.default)
    with graph_module.graph.inserting_after(node):
        stopped = graph_module.graph.call_function(torch.ops.aten.detach.default, (node,))
    node.replace_all_uses_with(stopped, lambda user: user is not stopped)
    pair = SideBySide(graph_module, model, X)
    assert pair.error(pair.inputs) == 0
    assert {name for name, value in pair.gradients().items() if value > _TOLERANCE} == {"a.weight", "a.bias"}


def test_a_gradient_that_is_zero_but_for_rounding_is_compared_with_those_beside_it() -> None:
    """The key bias of a model that ran another kernel than its graph was said to have a backward of its own."""
    torch.manual_seed(0)
    query, key, value = (nn.Linear(8, 8) for _ in range(3))

    def attend(m: nn.Module, x: torch.Tensor, kernel: Callable[..., Any]) -> torch.Tensor:
        q, k, v = (getattr(m, name)(x)[:, None] for name in ("q", "k", "v"))
        return kernel(q, k, v)[:, 0]

    def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT * 8**-0.5).softmax(-1) @ v

    def double(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return written_out(q.double(), k.double(), v.double()).float()

    parts, inputs = {"q": query, "k": key, "v": value}, {"x": torch.randn(2, 5, 8)}
    model = Net(lambda m, x: attend(m, x, written_out), **parts)
    graph_module = fxprune.trace(Net(lambda m, x: attend(m, x, double), **parts), inputs).graph_module
    found = SideBySide(graph_module, model, inputs).gradients()
    assert "k.bias" in found and max(found.values()) <= 1e-3


def test_a_graph_that_fails_is_infinitely_far_and_a_module_that_fails_says_nothing() -> None:
    model = two()
    graph_module = fxprune.trace(model, X).graph_module
    pair = SideBySide(graph_module, model, X)
    assert pair.error({"x": torch.randn(2, 5, 9)}) is None
    broken = SideBySide(changed(model, torch.ops.aten.relu.default, torch.ops.aten.numpy_T.default), model, X)
    assert broken.error(broken.inputs) == float("inf")
