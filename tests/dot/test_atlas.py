"""An atlas knows what holds a factor, where an axis belongs, and how far along it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import networkx as nx
import torch
from torch import nn

from fxprune.discovery.dependency import dependency_graph
from fxprune.draw.atlas import Atlas
from fxprune.rules.statements import Axis
from fxprune.trace import trace
from tests.models import tiny
from tests.oracle import Net, discover, graph_of

ROOT = Path(__file__).parents[2]


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


def test_a_tied_weight_is_used_where_its_modules_use_it() -> None:
    """A traced graph reads it by one name; both ends of the model hung on the last of them."""
    atlas = Atlas(dependency_graph(trace(tiny("gpt2", n_layer=1), dynamic=False)))
    users = {name: {b.tensor for b in atlas.graph[Axis(name, 1)]} - atlas.weights for name in TIED}
    assert all(any(user.startswith(op) for user in users[name]) for name, op in TIED.items()), users
    assert atlas.rank(Axis("transformer.wte.weight", 1)) < atlas.rank(Axis("lm_head.weight", 1))


TIED = {"transformer.wte.weight": "embedding", "lm_head.weight": "alias"}


def test_residual_sums_are_found_along_the_width(small: nx.Graph) -> None:
    assert Atlas(small).sums == []
    net = Net(lambda net, x: (y := net.up(x)) + net.down(y.tanh()), up=nn.Linear(3, 4), down=nn.Linear(4, 4))
    atlas = Atlas(graph_of(discover(net, {"x": torch.randn(2, 3)})))
    (axis,) = atlas.sums
    assert axis.dim == 1 and atlas.is_sum(axis) and atlas.is_activation(axis)


CODE = """
import sys
import fxprune
from tests.models import tiny
graph = fxprune.dependency_graph(fxprune.trace(tiny("llama"), dynamic=False), "masked")
fxprune.write_dot(graph, sys.argv[1] + "/layer.dot", layer=0)
fxprune.write_dot(graph, sys.argv[1] + "/model.dot", everything=True)
"""


def test_pictures_are_the_same_in_every_process(tmp_path: Path) -> None:
    """Sets of names have another order in each process; a way that another is as short as was drawn now and then."""
    drawn = []
    for seed in ("0", "1", "2"):
        (tmp_path / seed).mkdir()
        env = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", CODE, str(tmp_path / seed)], check=True, cwd=ROOT, env=env)
        drawn.append([(tmp_path / seed / name).read_text() for name in ("layer.dot", "model.dot")])
    assert drawn[0] == drawn[1] == drawn[2]
