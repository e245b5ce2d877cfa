"""Floats, flags and buffers that a slim model takes over."""

from __future__ import annotations

import functools

import torch
from torch import nn

from fxprune.emit.patch import carry_over


def scaled(x: torch.Tensor, by: float) -> torch.Tensor:
    """A function of a user."""
    return x * by


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    """Two modules of one structure."""
    return nn.Sequential(nn.LayerNorm(4)), nn.Sequential(nn.LayerNorm(4))


def test_scales_stay_and_sizes_do_not() -> None:
    dense, slim = pair()
    vars(dense[0]).update(scale=0.5, heads=6, mode="wide", _private=1.5, nothing=None)
    vars(slim[0]).update(scale=0.7, heads=4, mode="narrow", _private=2.5, nothing=0.1)
    carry_over(dense, slim)
    held = vars(slim[0])
    assert (held["scale"], held["heads"], held["mode"], held["_private"]) == (0.5, 4, "wide", 2.5)
    assert held["nothing"] is None


def test_what_the_user_put_on_a_module_comes_along_where_it_is_safe() -> None:
    dense, slim = pair()
    apply, bound = functools.partial(scaled, by=2.0), functools.partial(scaled, by=nn.Identity())
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
