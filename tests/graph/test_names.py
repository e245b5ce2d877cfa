"""Names of tensors in a graph."""

from __future__ import annotations

import torch
from torch import fx

from fxprune.graph.tensors import maker_of, output_name, starred, tensor_name


def test_weights_go_by_their_own_name_and_the_rest_by_their_node() -> None:
    graph = fx.Graph()
    weight = graph.create_node("get_attr", "model.a.weight", name="a_weight")
    both = graph.call_function(torch.ops.aten.topk.default, (weight, 2))
    assert tensor_name(weight) == "model.a.weight" and tensor_name(both) == "topk_default"
    assert output_name(both, 1) == output_name("topk_default", 1) == "topk_default#1"
    assert maker_of("topk_default#1") == "topk_default" and maker_of("model.a.weight") == "model.a.weight"


def test_numbers_of_blocks_are_starred_and_others_are_not() -> None:
    names = ("model.layers.12.mlp.fc1.weight[0]", "h.0/head.2", "layers.3", "a.0.b.1[1]", "plain")
    assert [starred(name) for name in names] == [
        "model.layers.*.mlp.fc1.weight[0]",
        "h.*/head.2",
        "layers.*",
        "a.*.b.*[1]",
        "plain",
    ]
