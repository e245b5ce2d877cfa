"""Attributes that follow from sizes."""

from __future__ import annotations

import functools

import torch
from torch import nn

from fxprune.emit.patch import Resized, carry_over, leaf_patches, patches_by_hand


def test_groups_of_a_convolution_are_found_by_the_shape_of_its_weight() -> None:
    """A constructor refuses one width that changes alone; RegNet's blocks lose whole groups and channels of each."""
    model = nn.Sequential(nn.Conv2d(32, 32, 3, groups=4), nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(8, 8, 1, groups=2))
    wanted = {"0.weight": (21, 7, 3, 3), "1.weight": (11, 1, 3, 3), "2.weight": (6, 3, 1, 1)}
    found = leaf_patches(model, {**wanted, "0.bias": (21,), "1.bias": (11,), "2.bias": (6,)})
    assert found["0"] == {"in_channels": 21, "out_channels": 21, "groups": 3}
    assert found["1"] == {"in_channels": 11, "out_channels": 11, "groups": 11}
    assert found["2"] == {"in_channels": 6, "out_channels": 6}


def test_the_sides_of_a_window_are_no_units() -> None:
    """Swin's table of biases by head lay in a module with a window of as many sides as there were heads."""

    class Biases(nn.Module):
        """By place and by head."""

        def __init__(self, config: object) -> None:
            super().__init__()
            self.window, self.heads = (2, 2), 2
            self.table = nn.Parameter(torch.zeros(9, 2))

    assert leaf_patches(Biases(None), {"table": (9, 1)}) == {"": {"heads": 1}}


def test_attributes_are_found_by_the_numbers_that_change() -> None:
    """At first all that hold one within its scope, then all but one of a name."""

    class Attention(nn.Module):
        """Heads whose numbers its own code reads."""

        def __init__(self) -> None:
            super().__init__()
            self.heads, self.width, self.hidden, self.flag = 4, 12, 12, True
            self.query, self.out = nn.Linear(12, 12), nn.Linear(12, 12)

    model = nn.ModuleDict({"left": Attention(), "right": Attention()})
    wanted = {"left.query.weight": (9, 12), "left.query.bias": (9,), "left.out.weight": (12, 9), "left.out.bias": (12,)}
    first, second, *_ = patches_by_hand(model, wanted, [Resized("left", {4: 3, 12: 9})])
    inside = {"left.query": {"out_features": 9}, "left.out": {"in_features": 9}}
    assert first == {"left": {"heads": 3, "width": 9, "hidden": 9}, **inside}
    assert second == {"left": {"width": 9, "hidden": 9}, **inside}


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    """Two modules of one structure."""
    return nn.Sequential(nn.LayerNorm(4)), nn.Sequential(nn.LayerNorm(4))


def test_scales_stay_and_sizes_do_not() -> None:
    dense, slim = pair()
    vars(dense[0]).update(scale=0.5, heads=6, mode="wide", _private=1.5, nothing=None, _hooked=True)
    vars(slim[0]).update(scale=0.7, heads=4, mode="narrow", _private=2.5, nothing=0.1)
    carry_over(dense, slim)
    held = vars(slim[0])
    assert (held["scale"], held["heads"], held["mode"], held["_private"]) == (0.5, 4, "wide", 2.5)
    assert held["nothing"] is None and "_hooked" not in held, "a mark of hooks that the slim model lacks"
    dense, slim = pair()  # what the user put on a module comes along where it is safe
    apply, bound = functools.partial(pair, 2.0), functools.partial(pair, by=nn.Identity())
    vars(dense[0]).update(note="mine", apply=apply, bound=bound, count=3, table=torch.ones(2))
    carry_over(dense.eval(), slim)
    held = vars(slim[0])
    assert held["note"] == "mine" and held["apply"] is apply and torch.equal(held["table"], torch.ones(2))
    assert "bound" not in held and "count" not in held and slim[0].training


def test_buffers_that_the_model_added_are_added() -> None:
    dense, slim = pair()
    dense[0].register_buffer("kept", torch.ones(3))
    dense[0].register_buffer("made", torch.ones(2), persistent=False)
    carry_over(dense, slim)
    assert slim[0].kept.is_meta and slim[0].kept.shape == (3,)
    assert slim[0]._non_persistent_buffers_set == {"made"}


def test_a_number_that_equals_a_size_of_a_table_may_be_another() -> None:
    """Heads of a window attention, as many as a window has places: its class took the number of places for heads."""

    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.window_area = 4
            self.table = nn.Parameter(torch.zeros(9, 4))

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.bias = 4, Bias()

    found = list(patches_by_hand(Attention(), {"bias.table": (9, 3)}, [Resized("", {4: 3})]))
    assert {"": {"num_heads": 3}, "bias": {"window_area": 3}} in found
    assert {"": {"num_heads": 3}} in found
