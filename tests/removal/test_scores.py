"""Scores of units from scores of positions, and their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fxprune.discovery.groups import Group
from fxprune.errors import PlanError, UnknownNameError
from fxprune.removal.removal import REDUCTIONS, Scores, score_groups, unit_scores
from tests.oracle import Net, discover, groups_of


@pytest.fixture(scope="module")
def group() -> Group:
    """Three units of two positions each, in two members."""

    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        hidden = net.a(x).view(2, 3, 2).mean(dim=-1, keepdim=True).expand(2, 3, 2)
        return net.b(hidden.reshape(2, 6))

    dense = discover(Net(body, a=nn.Linear(5, 6, bias=False), b=nn.Linear(6, 4)), {"x": torch.randn(2, 5)})
    (found,) = (group for group in groups_of(dense) if group.size == 3)
    return found


def positions(group: Group) -> dict[tuple[str, int], torch.Tensor]:
    """Positions of each member scored 1, 2, ..; those of the second ten times as much."""
    return {(m.name, m.axis): torch.arange(1.0, 7) * 10**i for i, m in enumerate(group.parameters)}


def test_positions_of_a_unit_are_added_up_and_members_reduced(group: Group) -> None:
    first, second = group.parameters
    assert (first.name, second.name) == ("a.weight", "b.weight")
    assert unit_scores(group, first, positions(group)).tolist() == [3, 7, 11]
    assert unit_scores(group, second, positions(group)).tolist() == [30, 70, 110]
    wanted = {"sum": 33, "prod": 90, "max": 30, "mean": 16.5, "first": 3, "last": 30}
    assert list(REDUCTIONS) == list(wanted)
    for reduction, unit in wanted.items():
        scores = score_groups([group], positions(group), reduction).units[group.name]
        assert scores.shape == (3,) and scores[0] == unit
    with pytest.raises(UnknownNameError, match="'mean'"):
        score_groups([group], positions(group), "means")


def test_scores_are_kept_bit_by_bit(group: Group, tmp_path: Path) -> None:
    scores = Scores({group.name: np.array([0.1, 1e-300, 7.0]), "other": np.ones((2, 3))}, "l2{reduction=max}")
    scores.save(tmp_path / "scores.safetensors")
    again = Scores.load(tmp_path / "scores.safetensors")
    assert again.source == "l2{reduction=max}" and set(again.units) == set(scores.units)
    assert all((again.units[name] == row).all() and row.dtype == np.float64 for name, row in scores.units.items())
    assert again == scores and again != Scores(scores.units, "l1") and again != Scores({}, again.source)
    assert again != Scores({**scores.units, "other": np.zeros((2, 3))}, again.source) and again != 3


def test_a_file_that_holds_no_scores_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({"w": torch.ones(2)}, file)
    with pytest.raises(PlanError, match="no scores of version 1"):
        Scores.load(file)


@pytest.mark.parametrize("row", [np.ones(4), np.ones((1, 3)), np.array([1, np.nan, 2])])
def test_scores_of_another_model_are_refused(group: Group, row: np.ndarray) -> None:
    Scores({group.name: np.ones(3)}).check([group])
    with pytest.raises(PlanError, match=f"{group.name}: its (units|scores) .*Use scores of this model"):
        Scores({group.name: row}).check([group])
    with pytest.raises(PlanError, match="stranger: no such group"):
        Scores({"stranger": np.ones(3)}).check([group])
