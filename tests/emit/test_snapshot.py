"""Snapshots of modules, configs and names."""

from __future__ import annotations

import pytest
from torch import nn

from fxprune.emit.snapshot import (
    MISSING_AXIS,
    mismatches,
    shapes_of,
    slim_name,
    take_snapshot,
)


def test_shapes_and_attributes_of_modules_and_the_axes_on_which_they_differ() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    shapes = shapes_of(model)
    assert shapes["0.weight"] == shapes["1.weight"] == (2, 3)
    assert shapes["2.running_mean"] == (2,) and shapes["2.num_batches_tracked"] == ()
    snapshot = take_snapshot(nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(5)), skip=("1",))
    assert snapshot.shapes == {"0.weight": (4,), "0.bias": (4,)}
    assert snapshot.numbers == {("0", "normalized_shape"): (4,)}
    assert snapshot.scalars == {("0", "eps"): 1e-5, ("0", "elementwise_affine"): True}, "what is skipped is left out"
    have = {"a": (2, 3), "b": (4,), "c": (1,), "d": (5,)}
    want = {"a": (2, 4), "b": (4,), "c": (1, 1), "e": (5,)}
    assert mismatches(have, want) == {("a", 1), ("c", MISSING_AXIS), ("d", MISSING_AXIS), ("e", MISSING_AXIS)}


@pytest.mark.parametrize(
    ("name", "slim"),
    [
        ("a.blocks.0.up.weight", "a.blocks.0.up.weight"),
        ("a.blocks.1.up.weight", None),
        ("a.blocks.1", None),
        ("a.blocks.2.up.weight", "a.blocks.1.up.weight"),
        ("a.blocks.12", "a.blocks.10"),
        ("a.blocks.10.up", None),
        ("a.blocks", "a.blocks"),
        ("a.blocks_more.2", "a.blocks_more.2"),
        ("b.blocks.2", "b.blocks.2"),
        ("norm.weight", "norm.weight"),
    ],
)
def test_blocks_after_a_removed_one_move_up(name: str, slim: str | None) -> None:
    assert slim_name(name, ("a.blocks.1", "a.blocks.10")) == slim
    assert slim_name(name, ()) == name
    assert slim_name("a.last.weight", ("a.last",)) is None
    assert slim_name("a.2.weight", ("a.last",)) == "a.2.weight", "a block without a number moves nothing"
