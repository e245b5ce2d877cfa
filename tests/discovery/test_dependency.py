"""The dependency graph: bypasses of blocks, and experts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxprune
from fxprune.axes import Factor, Freeze, new_factor
from fxprune.discovery.dependency import find_bypasses, resolve_experts
from fxprune.rules.statements import AtLeast, Competition, Role, Statements
from tests.oracle import Net, check_removes_exactly, discover, groups_of

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
rand = torch.rand


# name: output of a block from its input and its branch, and whether it can be bypassed
STEPS: dict[str, tuple[Step, bool]] = {
    "sum": (lambda x, y: x + y, True),
    "sums-of-sums": (lambda x, y: (x + y) + y.cos(), True),
    "in-place": (lambda x, y: y.add_(x), True),
    "no-sum": (lambda x, y: y, False),
    "scaled": (lambda x, y: torch.add(y, x, alpha=2), False),
    "product": (lambda x, y: x * y, False),
    "twice-the-input": (lambda x, y: x + y + x, False),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_block_that_only_adds_can_be_bypassed(name: str) -> None:
    step, residual = STEPS[name]
    blocks = nn.Sequential(*(Net(lambda m, x: step(x, m.inner(x).relu()), inner=nn.Linear(6, 6)) for _ in range(2)))
    ends = {"first": nn.Linear(5, 6), "last": nn.Linear(6, 3)}
    model = Net(lambda m, x: m.last(m.blocks(m.first(x))), blocks=blocks, **ends).eval()
    graph = fxprune.trace(model, {"x": torch.randn(2, 5)}).graph_module.graph
    found = find_bypasses(graph, ("blocks.0", "blocks.1"))
    assert sorted(found) == (["blocks.0", "blocks.1"] if residual else [])
    if residual:
        assert found["blocks.0"].source == "linear"
        assert found["blocks.0"].target == found["blocks.1"].source


def stated_over(*roles: Role) -> tuple[Statements, Factor]:
    """A factor of six with roles, over which a softmax runs."""
    stated, factor = Statements(), new_factor(6)
    assert isinstance(factor, Factor)
    for role in roles:
        stated.solver.tag(factor, role)
    stated.competitions.append(Competition(factor, Freeze("a softmax runs over this axis", "softmax")))
    return stated, factor


def test_as_many_units_stay_as_are_picked() -> None:
    stated, factor = stated_over(Role.EXPERT)
    stated.at_least.append(AtLeast(factor, 4))
    assert resolve_experts(stated) == {factor: 4}
    stated, factor = stated_over(Role.EXPERT)
    stated.at_least.append(AtLeast(factor, 6))
    resolve_experts(stated)
    assert "all 6 units are needed" in stated.solver.frozen_factors()[factor].reason


def test_the_axes_of_data_that_no_parameter_produces_are_no_units() -> None:
    """Swin v2 lost one of two coordinates, exactly; a table that weights give units to loses its own with them."""
    coordinates = Net(lambda m, x: x * m.b(m.a(m.at).relu()).T, a=nn.Linear(2, 12), b=nn.Linear(12, 3), at=rand(5, 2))
    check_removes_exactly(coordinates, {"x": rand(3, 5)}, [12])
    scaled = Net(lambda m, x: m.b(m.a(x) * m.by), a=nn.Linear(5, 8), b=nn.Linear(8, 3), by=rand(8))
    check_removes_exactly(scaled, {"x": rand(2, 5)}, [8])


def test_a_parameter_whose_values_are_not_read_keeps_its_units() -> None:
    """That of a tower that sees no image lost the class token of each later image."""
    parts = {"kind": nn.Parameter(rand(7)), "first": nn.Linear(5, 6), "last": nn.Linear(6, 3)}
    typed = Net(lambda m, x: m.last(m.first(x).float().relu().to(m.kind.dtype)), **parts)
    dense = discover(typed, {"x": rand(2, 5)})
    found = {member.name for group in groups_of(dense) for member in group.members}
    assert found == {"first.weight", "first.bias", "last.weight"}


def test_standardised_weights_are_under_a_statistic() -> None:
    """BiT's convolutions normalise their weights by a batch norm of them: removal was taken for exact."""

    def body(m: Net, x: torch.Tensor) -> torch.Tensor:
        weight = m.b.weight
        flat = nn.functional.batch_norm(weight.reshape(1, 5, -1), None, None, training=True)
        return nn.functional.conv2d(m.a(x).relu(), flat.reshape_as(weight))

    net = Net(body, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 5, 2, bias=False))
    found = {group.size: bool(group.renormalised) for group in groups_of(discover(net, {"x": rand(2, 3, 4, 4)}))}
    assert found == {6: True}
