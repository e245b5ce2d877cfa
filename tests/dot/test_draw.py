"""A view as Graphviz text."""

from __future__ import annotations

import networkx as nx
import pydot

from fxprune.draw.atlas import Atlas
from fxprune.draw.graphviz import _quoted, draw
from fxprune.draw.view import contracted


def test_every_axis_is_a_box_and_every_coupling_a_line(small: nx.Graph) -> None:
    atlas = Atlas(small)
    view = contracted(
        atlas, 'a "title"', [axis for axis, data in small.nodes(data=True) if data["role"] == "parameter"]
    )
    dot = draw(atlas, view)
    text = dot.to_string()
    assert all(f'"{axis.tensor}[{axis.dim}]" [' in text for axis in view.axes)
    lines = [edge for edge in dot.get_edges() if edge.get("arrowhead") != "none"]
    assert len(lines) == len(view.couplings)
    (whole,) = dot.get_subgraphs()
    assert {cluster.get_label() for cluster in whole.get_subgraphs()} == {'"a"', '"b"'}
    (read,) = pydot.graph_from_dot_data(text)
    assert read.get_subgraphs()[0].get_label() == _quoted('a "title"')
    assert read.get_label().startswith("<<TABLE") and read.get_labelloc() == "b"


def test_strings_are_quoted() -> None:
    assert _quoted('a\\b "c"\nd') == '"a\\\\b \\"c\\"\\nd"'
