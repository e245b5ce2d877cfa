"""Numeric properties of elementwise ops, found by calling them on random numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from fxprune.rules.probing import scaled_literal, scaling_power, shift_of
from fxprune.trace import trace

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Two(nn.Module):
    """A function of two tensors."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.unread = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.function(x, y)


def last(function: Function) -> tuple[fx.Node, list[fx.Node]]:
    """The last op of a function, and the inputs."""
    graph = trace(Two(function), {"x": torch.rand(3, 4), "y": torch.rand(3, 4)}).graph_module.graph
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    return nodes[-1], [node for node in graph.nodes if node.op == "placeholder"]


@pytest.mark.parametrize(
    ("function", "power"),
    [
        (lambda x, y: x.rsqrt(), -0.5),
        (lambda x, y: x**3, 3.0),
        (lambda x, y: x * y, 1.0),
        (lambda x, y: y / x, -1.0),
        (lambda x, y: x.relu(), 1.0),
        (lambda x, y: x.sign(), 0.0),
        (lambda x, y: x + y, None),
        (lambda x, y: x.exp(), None),
        (lambda x, y: x + 1, None),
        (lambda x, y: -x, 1.0),
        (lambda x, y: torch.complex(y, x), None),
        (lambda x, y: torch.complex(x, x), 1.0),
    ],
)
def test_scaling_powers(function: Function, power: float | None) -> None:
    """A scaled imaginary part once counted as no scaling, as if a weight had absorbed it."""
    node, (x, _) = last(function)
    assert scaling_power(node, {x: 1.0}) == power
    twice = scaling_power(node, {x: 2.0})
    assert twice == (None if power is None else 2 * power)


@pytest.mark.parametrize(
    "function", [lambda x, y: x + 0.1, lambda x, y: x.clamp(min=0.1), lambda x, y: x - 0.1, lambda x, y: 0.1 - x]
)
def test_an_added_number_or_bound_must_be_scaled_too(function: Function) -> None:
    node, (x, y) = last(function)
    found = scaled_literal(node, {x: -1.0})
    assert found is not None and found[1:] == (1.0, -1.0)
    assert scaled_literal(node, {x: -1.0, y: 1.0}) is None


def test_no_literal_makes_up_for_a_nonlinear_op() -> None:
    node, (x, _) = last(lambda x, y: (2.0 * x).exp())
    assert scaled_literal(node, {node.all_input_nodes[0]: -1.0}) is None
    assert scaling_power(node, {x: 1.0}) == 0.0, "it does not read it"


def test_the_shift_of_an_op_is_found_and_both_inputs_scale() -> None:
    node, (x, y) = last(lambda x, y: x + y)
    assert scaling_power(node, {x: 0.5, y: 0.5}) == 0.5 and scaling_power(node, {x: 0.5, y: 1.0}) is None
    for function, shift in ((lambda x, y: 1 + x, 1.0), (lambda x, y: x - 0.5, -0.5), (lambda x, y: 2 * x, None)):
        assert shift_of(last(function)[0]) == shift
