"""Test the part of a dependency graph that a picture shows, and its labels."""

from __future__ import annotations

import itertools

import networkx as nx
from hypothesis import given
from hypothesis import strategies as st

from fxprune.draw.view import _Web


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
