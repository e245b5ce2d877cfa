"""What is known about shapes, and when it still holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxprune
from fxprune.graph.compat import fake_mode
from fxprune.graph.facts import facts_of
from fxprune.graph.shapes import ShapedCalls, calls_of, described, same_shapes, usable


def test_calls_tell_targets_and_literals_apart() -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(-1, 2, 3).sum(1)

    traced = fxprune.trace(Affine(Net()), {"x": torch.ones(4, 6)})
    graph = traced.graph_module.graph
    before = calls_of(graph)
    assert facts_of(traced.graph_module)[ShapedCalls].calls == before
    view = next(node for node in graph.nodes if "reshape" in str(node.target))
    view.args = (view.args[0], [*view.args[1][:-2], 3, 2])
    assert {name for name, call in calls_of(graph).items() if call != before[name]} == {view.name}


def test_values_agree_in_shape_stride_type_and_kind() -> None:
    mode = fake_mode()
    with mode:
        x, turned, short = torch.empty(3, 4), torch.empty(4, 3).T, torch.empty(3, 4, dtype=torch.half)
    assert same_shapes(x, x.clone()) and same_shapes((x, 3), [x, 3])
    for other in (turned, short, x[:2], (x, x), 3, torch.empty(3, 4)):
        assert not same_shapes(x, other)
    assert usable((x, 3), mode) and not usable(x, fake_mode()) and not usable(None, mode)
    assert not usable(torch.empty(3), mode)


def test_arguments_are_described_by_what_decides_the_shape_of_a_result() -> None:
    mode = fake_mode()
    with mode:
        x, other, number = torch.empty(3, 4), torch.empty(3, 4), torch.tensor(3)
    same = ([x, 2], None, "relu"), ([other, 2], None, "relu")
    assert described(same[0]) == described(same[1]) and hash(described(same[0])) == hash(described(same[1]))
    for one, two in (([x, 2], (x, 2)), ([x, 2], [x, 2.0]), (x, x[:2]), (x, x.half()), (1, True)):
        assert described(one) != described(two)
    for unknown in (number, torch.empty(3), {"a": x}):
        with pytest.raises(TypeError):
            described(unknown)


def test_sizes_that_vary_agree_if_they_are_spelled_alike() -> None:
    traced = fxprune.trace(Affine(nn.Identity()), {"x": torch.ones(4, 6)})
    x = next(node.meta["val"] for node in traced.graph_module.graph.nodes if node.op == "placeholder")
    size = x.shape[0]
    assert not isinstance(size, int)
    assert same_shapes(size * 2, size * 2) and not same_shapes(size, size * 2)
    assert not same_shapes(size, 4)


class Affine(nn.Module):
    """A module behind a linear layer, since one without weights is not traced."""

    def __init__(self, rest: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.rest = rest

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer, then the module."""
        return self.rest(self.linear(x))
