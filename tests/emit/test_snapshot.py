"""Shapes and attributes read off modules, and how they differ."""

from __future__ import annotations

import pytest
from torch import nn

from fxprune.emit.snapshot import MISSING_AXIS, is_number, mismatches, shapes_of, take_snapshot


@pytest.mark.parametrize(
    ("value", "answer"), [(3, True), ((3, 4), True), (True, False), ((), False), ((1, True), False), ([3], False)]
)
def test_numbers(value: object, answer: bool) -> None:
    assert is_number(value) is answer


def test_tied_and_unsaved_tensors_have_shapes() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    shapes = shapes_of(model)
    assert shapes["0.weight"] == shapes["1.weight"] == (2, 3)
    assert shapes["2.running_mean"] == (2,) and shapes["2.num_batches_tracked"] == ()


def test_a_snapshot_leaves_out_what_is_skipped() -> None:
    snapshot = take_snapshot(nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(5)), skip=("1",))
    assert snapshot.shapes == {"0.weight": (4,), "0.bias": (4,)}
    assert snapshot.numbers == {("0", "normalized_shape"): (4,)}
    assert snapshot.scalars == {("0", "eps"): 1e-5, ("0", "elementwise_affine"): True}


def test_mismatches_name_axes() -> None:
    have = {"a": (2, 3), "b": (4,), "c": (1,), "d": (5,)}
    want = {"a": (2, 4), "b": (4,), "c": (1, 1), "e": (5,)}
    assert mismatches(have, want) == {("a", 1), ("c", MISSING_AXIS), ("d", MISSING_AXIS), ("e", MISSING_AXIS)}
