"""Differences are relative to the outputs, found where they begin, and refused above the tolerance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import fx, nn

from fxprune.axes import Keep
from fxprune.errors import VerificationError
from fxprune.masking.compare import TOLERANCE, compare, find_divergence, masked_outputs, require_equal, slim_outputs
from tests.oracle import Net, axes_of, discover, groups_of, slim_graph

X = {"x": torch.randn(2, 3, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize(
    ("expected", "actual", "difference"),
    [
        ([torch.tensor([0.5])], [torch.tensor([0.25])], 0.25),
        ([torch.tensor([8.0, 1.0])], [torch.tensor([8.0, 3.0])], 0.25),
        ([torch.zeros(2), torch.zeros(2)], [torch.zeros(2), torch.ones(2)], 1.0),
        ([torch.zeros(2)], [torch.zeros(3)], float("inf")),
        ([torch.zeros(2)], [torch.tensor([0.0, float("nan")])], float("inf")),
        ([torch.zeros(0)], [torch.zeros(0)], 0.0),
    ],
)
def test_the_difference_is_relative_to_the_largest_or_one(
    expected: list[torch.Tensor], actual: list[torch.Tensor], difference: float
) -> None:
    assert compare(expected, actual) == difference


def test_a_difference_above_the_tolerance_is_refused() -> None:
    require_equal(TOLERANCE, "here")
    for error in (2 * TOLERANCE, float("inf"), float("nan")):
        with pytest.raises(VerificationError, match=r"here: .*differ by"):
            require_equal(error, "here")


@pytest.fixture(scope="module")
def dense() -> fx.GraphModule:
    return discover(Net(lambda net, x: net.b(net.a(x).tanh()), a=nn.Linear(3, 4), b=nn.Linear(4, 2)), X)


def keep(dense: fx.GraphModule) -> Keep:
    (group,) = groups_of(dense)
    assert group.factor is not None
    return Keep({group.factor: np.array([True, False, True, True])})


def test_masked_and_slim_outputs_are_the_same(dense: fx.GraphModule) -> None:
    masked = masked_outputs(dense, axes_of(dense), keep(dense), (), X)
    slim = slim_graph(dense, keep(dense))
    assert compare(masked, slim_outputs(slim, X)) <= TOLERANCE
    assert compare(masked, slim_outputs(dense, X)) > TOLERANCE
    assert find_divergence(dense, slim, axes_of(dense), keep(dense), (), X) == "the outputs"


def test_the_node_where_two_runs_part_is_named(dense: fx.GraphModule) -> None:
    slim = slim_graph(dense, keep(dense))
    with torch.no_grad():
        dict(slim.named_parameters())["a.bias"].add_(1.0)
    assert find_divergence(dense, slim, axes_of(dense), keep(dense), (), X).endswith("a_bias (a.bias) in the model")
