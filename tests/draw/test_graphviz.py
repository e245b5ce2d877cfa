"""Test pictures as Graphviz text: clusters, boxes, lines and legend."""

from __future__ import annotations

import colorsys
import itertools
import re

import networkx as nx
import pydot
import pytest
import torch

from fxprune.discovery.dependency import dependency_graph
from fxprune.discovery.groups import KINDS
from fxprune.draw.atlas import Atlas, find_folds
from fxprune.draw.graphviz import Legend, _quoted, draw, hue_of
from fxprune.draw.view import Labels, View, contracted, searched
from fxprune.trace import trace
from tests.draw.test_atlas import Block, Stack


def test_each_kind_has_a_hue_of_its_own_in_every_shade() -> None:
    hues = {}
    for kind in (*KINDS, "kv_head"):
        shades = [hue_of(kind, shade, strong) for shade in range(3) for strong in (False, True)]
        assert len(set(shades)) == len(shades)
        channels = ([int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5)] for shade in shades)
        found = [colorsys.rgb_to_hls(*rgb)[0] for rgb in channels]
        assert max(found) - min(found) < 0.02
        hues[kind] = found[0]
    ordered = sorted(hues.values())
    assert min(b - a for a, b in itertools.pairwise(ordered)) > 0.05
    assert hue_of("head") == hue_of("query_head") != hue_of("kv_head")


def legend(atlas: Atlas, view: View) -> str:
    return Legend(atlas, view, Labels(atlas, view.folds), lambda factor: "#123456").table()


def test_the_legend_explains_groups_and_signs_of_the_picture(small: nx.Graph) -> None:
    atlas = Atlas(small)
    shown = [axis for axis, data in small.nodes(data=True) if data["role"] == "parameter"]
    text = legend(atlas, contracted(atlas, "title", shown))
    (units,) = (group for group in atlas.groups if group.size == 4)
    assert f'BGCOLOR="#123456" BORDER="1" WIDTH="24"></TD><TD ALIGN="LEFT">{units.name}</TD>' in text
    assert "the arrow follows the data" in text and "frozen: cannot be removed" in text
    assert not re.findall("stream|residual|dashed|thick|plan|removed as a whole|widest", text)
    text = legend(atlas, searched(atlas, "title", units))
    assert "the arrow follows the search" in text and "dashed" in text and "follows the data" not in text


@pytest.mark.parametrize(("widths", "cells"), [((5, 5), []), ((5, 10, 8), ["50", "100", "80"])])
def test_uneven_widths_have_a_cell_for_each_block(widths: tuple[int, ...], cells: list[str]) -> None:
    graph = dependency_graph(trace(Stack(*map(Block, widths)).eval(), {"x": torch.randn(2, 6)}))
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
