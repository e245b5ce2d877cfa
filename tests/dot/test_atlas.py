"""An atlas knows what holds a factor, where an axis belongs, and how far along it is."""

from __future__ import annotations

import networkx as nx

from fxprune.dot.atlas import Atlas


def test_axes_are_found_by_factor_and_stand_in_order_of_execution(small: nx.Graph) -> None:
    atlas = Atlas(small)
    units = next(group for group in atlas.groups if group.size == 4)
    assert units.factor is not None and atlas.by_factor[units.factor] is units
    assert atlas.weights == {"a.weight", "a.bias", "b.weight", "b.bias"}
    held = [axis for axis in atlas.in_order(atlas.holding[units.factor]) if axis.tensor in atlas.weights]
    assert [f"{axis.tensor}[{axis.dim}]" for axis in held] == ["a.weight[0]", "a.bias[0]", "b.weight[1]"]
    assert [atlas.module(axis) for axis in held] == ["a", "a", "b"]
    assert all(atlas.factors(axis) == [units.factor] for axis in held)


def test_an_input_axis_comes_half_a_step_before_the_output_axis(small: nx.Graph) -> None:
    atlas = Atlas(small)
    rank = {f"{axis.tensor}[{axis.dim}]": atlas.rank(axis) for axis in small.nodes}
    assert rank["a.weight[1]"] == rank["a.weight[0]"] - 0.5
    assert rank["a.weight[0]"] == rank["a.bias[0]"] < rank["b.weight[1]"] < rank["b.weight[0]"]
