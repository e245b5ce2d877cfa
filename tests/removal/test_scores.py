"""Scores of positions become scores of units, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxprune.discovery.groups import Group
from fxprune.errors import UnknownNameError
from fxprune.removal.scores import REDUCTIONS, score_groups, unit_scores
from tests.oracle import Net, discover, groups_of


@pytest.fixture(scope="module")
def group() -> Group:
    """Three units of two positions each, in two members."""

    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        hidden = net.a(x).view(2, 3, 2).mean(dim=-1, keepdim=True).expand(2, 3, 2)
        return net.b(hidden.reshape(2, 6))

    (found,) = (
        group
        for group in groups_of(
            discover(Net(body, a=nn.Linear(5, 6, bias=False), b=nn.Linear(6, 4)), {"x": torch.randn(2, 5)})
        )
        if group.size == 3
    )
    return found


def positions(group: Group) -> dict[tuple[str, int], torch.Tensor]:
    """Positions of each member scored 1, 2, ..; those of the second ten times as much."""
    return {(m.name, m.axis): torch.arange(1.0, 7) * 10**i for i, m in enumerate(group.parameters)}


def test_positions_of_a_unit_are_added_up(group: Group) -> None:
    first, second = group.parameters
    assert (first.name, second.name) == ("a.weight", "b.weight")
    assert unit_scores(group, first, positions(group)).tolist() == [3, 7, 11]
    assert unit_scores(group, second, positions(group)).tolist() == [30, 70, 110]


@pytest.mark.parametrize(
    ("reduction", "first"),
    [("sum", 33), ("prod", 90), ("max", 30), ("mean", 16.5), ("first", 3), ("last", 30)],
)
def test_members_are_reduced(group: Group, reduction: str, first: float) -> None:
    scores = score_groups([group], positions(group), reduction)
    assert scores.units[group.name].shape == (3,)
    assert scores.units[group.name][0] == first


def test_a_reduction_that_nobody_knows_is_told(group: Group) -> None:
    assert list(REDUCTIONS) == ["sum", "prod", "max", "mean", "first", "last"]
    with pytest.raises(UnknownNameError, match="'mean'"):
        score_groups([group], positions(group), "means")
