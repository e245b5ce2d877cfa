"""Test pictures as Graphviz text: clusters, boxes, lines and legend."""

from __future__ import annotations

import re

import networkx as nx
import pydot
import pytest

from fxprune.draw.atlas import Atlas, find_folds
from fxprune.draw.graphviz import Legend, _quoted, draw, hue_of
from fxprune.draw.view import Labels, View, contracted
from tests.draw.test_atlas import block, stacked


def legend(atlas: Atlas, view: View) -> str:
    return Legend(atlas, view, Labels(atlas, view.folds), lambda factor: "#123456").table()


@pytest.mark.parametrize(("widths", "cells"), [((5, 5), []), ((5, 10, 8), ["50", "100", "80"])])
def test_uneven_widths_have_a_cell_for_each_block(widths: tuple[int, ...], cells: list[str]) -> None:
    graph = stacked(*map(block, widths))
    atlas = Atlas(graph)
    folds = find_folds(atlas)
    view = View("title", tuple(graph.nodes), (), folds=folds)
    text = legend(atlas, view)
    assert re.findall(r">(\d+)</TD>", text.partition("of the widest block")[2].partition(">mlp</TD>")[2]) == cells
    assert ("of the widest block" in text) == bool(cells)
    assert "thick frame" in text and hue_of("channel", strong=True) in text


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
