"""Folding of equal blocks, the part of a graph that a picture shows, and Graphviz text."""

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import pydot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxprune.discovery.dependency import dependency_graph
from fxprune.draw.atlas import Atlas, block_ranges, find_folds
from fxprune.draw.graphviz import Legend, _quoted, draw, hue_of
from fxprune.draw.view import Labels, View, _neighbours, contracted
from fxprune.rules.statements import Axis
from fxprune.trace import trace
from tests.models import tiny
from tests.oracle import Net
from tests.tiers import SLOW

ROOT = Path(__file__).parents[2]


def test_a_tied_weight_is_used_where_its_modules_use_it() -> None:
    """A traced graph reads it by one name, to which both ends of the model were once coupled."""
    atlas = Atlas(dependency_graph(trace(tiny("gpt2", n_layer=1), dynamic=False)))
    tied = {"transformer.wte.weight": "embedding", "lm_head.weight": "alias"}
    users = {name: {b.tensor for b in atlas.graph[Axis(name, 1)]} - atlas.weights for name in tied}
    assert all(any(user.startswith(op) for user in users[name]) for name, op in tied.items()), users
    assert atlas.rank(Axis("transformer.wte.weight", 1)) < atlas.rank(Axis("lm_head.weight", 1))


CODE = """
import sys
import fxprune
from tests.models import tiny
graph = fxprune.dependency_graph(fxprune.trace(tiny("llama", num_hidden_layers=2), dynamic=False), "masked")
fxprune.write_dot(graph, sys.argv[1] + "/layer.dot", layer=0)
fxprune.write_dot(graph, sys.argv[1] + "/model.dot", everything=True)
fxprune.write_dot(graph, sys.argv[1] + "/group.dot", group="model/channel")
"""


@pytest.mark.slow
def test_pictures_are_the_same_in_every_process(tmp_path: Path) -> None:
    """Sets are ordered differently in each process, and one of several shortest paths was drawn by chance."""
    drawn = []
    for seed in ("0", "1"):
        (tmp_path / seed).mkdir()
        env = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", CODE, str(tmp_path / seed)], check=True, cwd=ROOT, env=env)
        drawn.append([(tmp_path / seed / name).read_text() for name in ("layer.dot", "model.dot", "group.dot")])
    assert drawn[0] == drawn[1]


WINDOWS = ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("family", "config", "numbers"),
    [
        ("gemma3_text", {"num_hidden_layers": 4, "layer_types": WINDOWS}, [[0, 1, 3], [2]]),
        pytest.param("qwen2_moe", {"num_hidden_layers": 3}, [[0], [1, 2]], marks=SLOW),
    ],
)
def test_blocks_of_equal_structure_are_folded(family: str, config: dict[str, Any], numbers: list[list[int]]) -> None:
    """Windows and experts are structure; the first and the last block are like the others."""
    folds = find_folds(Atlas(dependency_graph(trace(tiny(family, **config), dynamic=False))))
    assert [[int(block.rpartition(".")[2]) for block in fold.blocks] for fold in folds] == numbers


def block(width: int, act: Callable[[torch.Tensor], torch.Tensor] = torch.relu) -> Net:
    return Net(lambda m, x: x + m.down(act(m.up(x))), up=nn.Linear(6, width), down=nn.Linear(width, 6))


def stacked(*blocks: Net) -> nx.Graph:
    model = Net(lambda m, x: m.layers(x), layers=nn.Sequential(*blocks)).eval()
    return dependency_graph(trace(model, {"x": torch.randn(2, 6)}))


def test_widths_may_differ_and_ops_may_not() -> None:
    folds = find_folds(Atlas(stacked(block(5), block(9), block(7, torch.tanh), block(8))))
    assert [fold.blocks for fold in folds] == [("layers.0", "layers.1", "layers.3"), ("layers.2",)]
    assert folds[0].hidden == ("layers.1", "layers.3")
    (units,) = (row for row in folds[0].factors.values() if row[0].size == 5)
    assert [factor.size for factor in units] == [5, 9, 8]
    (row,) = (row for axis, row in folds[0].axes.items() if axis == ("layers.0.up.weight", 0))
    assert row == (("layers.0.up.weight", 0), ("layers.1.up.weight", 0), ("layers.3.up.weight", 0))


def test_blocks_are_named_as_ranges() -> None:
    among = [*(f"model.layers.{i}" for i in range(12)), "other.0", "other.1"]
    assert block_ranges(among[:12], among) == "model.layers.0 to 11"
    assert block_ranges(["model.layers.0", "model.layers.1", "model.layers.4"], among) == "model.layers.0 to 1, 4"
    assert block_ranges(among[11:], among) == "model.layers.11, other.0 to 1"
    assert block_ranges(["front"], ["front", "back"]) == "front"


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
    dot, _ = draw(atlas, view)
    text = dot.to_string()
    assert all(f'"{axis.tensor}[{axis.dim}]" [' in text for axis in view.axes)
    lines = [edge for edge in dot.get_edges() if edge.get("arrowhead") != "none"]
    assert len(lines) == len(view.couplings)
    (whole,) = dot.get_subgraphs()
    assert {cluster.get_label() for cluster in whole.get_subgraphs()} == {'"a"', '"b"'}
    (read,) = pydot.graph_from_dot_data(text)
    assert read.get_subgraphs()[0].get_label() == _quoted('a "title"')
    assert read.get_label().startswith("<<TABLE") and read.get_labelloc() == "b"


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
    for (a, b), path in _neighbours(graph, ends).items():
        assert path[0] == a and path[-1] == b and nx.is_path(graph, path)
        few.add_edge(a, b, weight=len(path) - 1)
    total = [nx.minimum_spanning_tree(g).size("weight") for g in (full, few)]
    assert total[0] == total[1]
    assert set(map(frozenset, nx.connected_components(full))) == set(map(frozenset, nx.connected_components(few)))
