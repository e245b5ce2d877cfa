"""Test the part of a dependency graph that a picture shows, and its labels."""

from __future__ import annotations

import itertools

import networkx as nx
from hypothesis import given
from hypothesis import strategies as st

from fxprune.draw.atlas import Atlas
from fxprune.draw.view import Labels, _Web, contracted, plural, searched


def test_activations_between_parameters_are_contracted_to_one_line(small: nx.Graph) -> None:
    atlas = Atlas(small)
    shown = [axis for axis, data in small.nodes(data=True) if data["role"] == "parameter"]
    view = contracted(atlas, "title", shown)
    assert view.title == "title" and view.axes == tuple(atlas.in_order(shown)) and view.trigger is None
    units = next(group for group in atlas.groups if group.size == 4)
    lines = [(str(c.source.tensor), str(c.target.tensor)) for c in view.couplings if units.factor in c.paths]
    assert set(itertools.chain(*lines)) == {"a.weight", "a.bias", "b.weight"} and len(lines) == 2


def test_a_search_starts_at_the_trigger_and_shows_activations(small: nx.Graph) -> None:
    atlas = Atlas(small)
    units = next(group for group in atlas.groups if group.size == 4)
    view = searched(atlas, "title", units)
    assert view.trigger == units.trigger and set(view.axes) == set(atlas.holding[units.factor])
    assert any(axis.tensor not in atlas.weights for axis in view.axes)
    assert sum(line.in_tree for line in view.couplings) == len(view.axes) - 1
    inside = searched(atlas, "title", units, [axis for axis in view.axes if axis != units.trigger])
    assert inside.trigger is None and len(inside.axes) == len(view.axes) - 1


@given(st.integers(3, 9), st.sets(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=20), st.data())
def test_neighbours_hold_a_minimum_spanning_tree(size: int, pairs: set[tuple[int, int]], data: st.DataObject) -> None:
    """The pairs that are kept have the same minimum spanning forest as all pairs (Mehlhorn 1988)."""
    graph = nx.Graph()
    graph.add_nodes_from(range(size))
    graph.add_edges_from((a, b) for a, b in pairs if a != b and a < size and b < size)
    ends = data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=size, unique=True))
    full, few = nx.Graph(), nx.Graph()
    for a, b in itertools.combinations(ends, 2):
        if nx.has_path(graph, a, b):
            full.add_edge(a, b, weight=nx.shortest_path_length(graph, a, b))
    for (a, b), path in _Web(graph, ends).neighbours().items():
        assert path[0] == a and path[-1] == b and nx.is_path(graph, path)
        few.add_edge(a, b, weight=len(path) - 1)
    total = [nx.minimum_spanning_tree(g).size("weight") for g in (full, few)]
    assert total[0] == total[1]
    assert set(map(frozenset, nx.connected_components(full))) == set(map(frozenset, nx.connected_components(few)))


def test_an_axis_has_a_short_label_and_a_full_description(small: nx.Graph) -> None:
    atlas = Atlas(small)
    labels = Labels(atlas)
    units = next(group for group in atlas.groups if group.size == 4)
    assert units.factor is not None and units.trigger is not None
    assert labels.unit(units.factor) == labels.kind(units)
    assert labels.label(units.trigger).splitlines()[0] == f"{units.trigger.tensor}[{units.trigger.dim}]"
    assert f"group {units.name}: 4 units, {labels.removal(units)}" in labels.about(units.trigger)
    frozen = next(axis for axis in small.nodes if axis.tensor == "b.weight" and axis.dim == 0)
    assert "frozen, 2 units: " in labels.about(frozen)


def test_counts_have_their_plural() -> None:
    assert (plural(1, "axis", "axes"), plural(2, "axis", "axes"), plural(1200, "unit")) == (
        "1 axis",
        "2 axes",
        "1,200 units",
    )
