"""The legend says what colours and signs of a picture mean, and no more than are in it."""

from __future__ import annotations

import re

import networkx as nx
import pytest
import torch
from torch import nn

from fxprune.discovery.dependency import dependency_graph
from fxprune.draw.atlas import Atlas, find_folds
from fxprune.draw.graphviz import Legend, hue_of
from fxprune.draw.view import View, Words, contracted, searched
from fxprune.trace import trace


def legend(atlas: Atlas, view: View) -> str:
    return Legend(atlas, view, Words(atlas, view.folds), lambda factor: "#123456").table()


def test_groups_and_signs_of_the_picture_are_told(small: nx.Graph) -> None:
    atlas = Atlas(small)
    shown = [axis for axis, data in small.nodes(data=True) if data["role"] == "parameter"]
    text = legend(atlas, contracted(atlas, "title", shown))
    (units,) = (group for group in atlas.groups if group.size == 4)
    assert f'BGCOLOR="#123456" BORDER="1" WIDTH="24"></TD><TD ALIGN="LEFT">{units.name}</TD>' in text
    assert "points the way the data goes" in text and "frozen: cannot be removed" in text
    assert not re.findall("stream|residual|dashed|thick|plan|go as a whole|widest", text)
    text = legend(atlas, searched(atlas, "title", units))
    assert "the search went this way" in text and "dashed" in text and "the way the data goes" not in text


class Stack(nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        parts = ((nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 6)) for width in widths)
        self.layers = nn.ModuleList(nn.Sequential(*part) for part in parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize(("widths", "cells"), [((5, 5), []), ((5, 10, 8), ["50", "100", "80"])])
def test_uneven_widths_have_a_cell_for_each_block(widths: tuple[int, ...], cells: list[str]) -> None:
    graph = dependency_graph(trace(Stack(*widths).eval(), {"x": torch.randn(2, 6)}))
    atlas = Atlas(graph)
    folds = find_folds(atlas)
    view = View("title", tuple(graph.nodes), (), folds=folds)
    text = legend(atlas, view)
    assert re.findall(r">(\d+)</TD>", text.partition("of the widest block")[2].partition(">mlp</TD>")[2]) == cells
    assert ("of the widest block" in text) == bool(cells)
    assert "thick frame" in text and hue_of("channel", strong=True) in text
