"""Inputs to verify with fit the graph, and are the caller's where there are some."""

from __future__ import annotations

import torch
from torch import nn

from fxprune.data.calibration import make_inputs
from fxprune.trace.capture import trace
from tests import remembered
from tests.oracle import Net


def test_random_ids_are_of_the_embedding_and_depend_on_the_seed() -> None:
    net = Net(lambda net, x: net.out(net.table(x)), table=nn.Embedding(3, 4), out=nn.Linear(4, 3))
    graph_module = trace(net, {"x": torch.zeros(2, 5, dtype=torch.long)}).graph_module
    made = make_inputs(graph_module, None, seed=0)["x"]
    assert made.shape == (2, 16) and made.dtype == torch.long
    assert set(made.flatten().tolist()) == {0, 1, 2}
    assert torch.equal(made, make_inputs(graph_module, None, seed=0)["x"])
    assert not torch.equal(made, make_inputs(graph_module, None, seed=1)["x"])
    flattened = make_inputs(remembered.traced("gpt2"), None, seed=0)["input_ids"]
    assert len(flattened.unique()) > 10, "of the embedding also if the model flattens its ids first"


def test_the_callers_inputs_are_taken_and_fixed_sizes_kept() -> None:
    net = Net(lambda net, x: net.out(x), out=nn.Linear(4, 3))
    graph_module = trace(net, {"x": torch.zeros(2, 5, 4)}).graph_module
    given = torch.randn(1, 3, 4)
    assert make_inputs(graph_module, {"x": given, "other": 1}, seed=0)["x"] is given
    made = make_inputs(graph_module, {"other": 1}, seed=0)["x"]
    assert made.shape == (2, 16, 4) and made.dtype == torch.float32 and made.std() > 0.5
