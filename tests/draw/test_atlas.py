"""Test the indexed dependency graph and the folding of equal blocks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from torch import nn

from fxprune.discovery.dependency import dependency_graph
from fxprune.draw.atlas import Atlas, block_ranges, find_folds
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
    """The dependency graph of a few blocks."""
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
