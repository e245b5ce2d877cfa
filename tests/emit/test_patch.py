"""Attributes that follow a tensor which was resized."""

from __future__ import annotations

import torch
from torch import nn

from fxprune.emit.patch import common_path, leaf_patches, merged, numbers_of, scope_patches
from fxprune.emit.snapshot import take_snapshot
from tests.emit.small import small


def test_the_smallest_common_module() -> None:
    assert common_path(frozenset({"a.b.weight", "a.b.bias"})) == "a.b"
    assert common_path(frozenset({"a.b.weight", "a.c.weight"})) == "a"
    assert common_path(frozenset({"weight"})) == ""


def test_the_second_of_two_sets_wins() -> None:
    assert merged({"a": {"x": 1, "y": 2}}, {"a": {"x": 3}, "b": {"z": 4}}) == {"a": {"x": 3, "y": 2}, "b": {"z": 4}}


def test_a_class_is_asked_through_its_constructor() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6, bias=False))
    wanted = {"0.weight": (5, 4), "0.bias": (5,), "1.weight": (5,), "1.bias": (5,), "2.weight": (6, 5)}
    assert leaf_patches(model, wanted) == {
        "0": {"out_features": 5},
        "1": {"normalized_shape": (5,)},
        "2": {"in_features": 5},
    }
    assert leaf_patches(model, wanted, skip=("0", "1")) == {"2": {"in_features": 5}}


def test_what_the_constructor_does_not_say_is_found_by_its_value() -> None:
    class Table(nn.Module):
        """Its size is not an argument that it keeps."""

        def __init__(self, size: nn.Module) -> None:
            super().__init__()
            self.rows, self.other, self.shape = 6, 3, (6, 3)
            self.weight = nn.Parameter(torch.zeros(6, 4))

    assert leaf_patches(Table(nn.Identity()), {"weight": (5, 4)}) == {"": {"rows": 5, "shape": (5, 3)}}


def test_an_argument_that_takes_the_tensor_away_is_no_defect() -> None:
    class Fickle(nn.Module):
        """Has its tensor at one width alone."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.width = width
            if width == 6:
                self.weight = nn.Parameter(torch.zeros(width))

    assert leaf_patches(Fickle(6), {"weight": (5,)}) == {"": {"width": 5}}


def test_attributes_move_within_the_module_that_changes() -> None:
    before, after = take_snapshot(small().blocks[0]), take_snapshot(small(heads=2, hidden=8).blocks[0])
    assert scope_patches(before, after, frozenset({("mix.weight", 0)})) == {
        "mix": {"in_features": 8, "out_features": 8}
    }
    found = scope_patches(before, after, frozenset({("mix.weight", 0), ("back.weight", 1)}))
    assert found[""] == {"num_heads": 2} and found["back"] == {"in_features": 8, "out_features": 8}


def test_numbers_by_module() -> None:
    assert numbers_of(small().blocks[1])[""] == {"layer_idx": 1, "num_heads": 3, "head_dim": 4}
