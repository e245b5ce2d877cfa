"""A graph knows the model it came from, under which names its tensors are there, and which are not."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from fxprune.graph.facts import Constants, Source, facts_of
from fxprune.offload.files import put_values
from fxprune.trace.capture import trace
from tests.oracle import Net


def test_tensors_have_their_names_in_the_model_and_constants_have_none() -> None:
    net = Net(lambda net, x: net.b(net.a(x)) * torch.arange(3), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    net.b.weight = net.a.weight
    inputs = {"x": torch.randn(2, 3)}
    facts = facts_of(trace(net, inputs).graph_module)
    source, (constant,) = facts[Source], facts[Constants].names
    assert source.model is net and source.example_inputs == inputs and source.shares and source.dense is None
    assert [names for names in source.names.values() if len(names) > 1] == [("a.weight", "b.weight")]
    assert source.names["a.bias"] == ("a.bias",)
    assert source.names[constant] == ()


def test_values_are_put_into_the_tensor_of_the_model_only_if_it_is_to_change() -> None:
    for shares in (True, False):
        model = nn.Linear(3, 2)
        graph_module = trace(model, {"input": torch.randn(2, 3)}).graph_module
        held = facts_of(graph_module)[Source]
        facts_of(graph_module).put(dataclasses.replace(held, shares=shares))
        with torch.no_grad():
            put_values(graph_module, "weight", torch.ones(2, 3, dtype=torch.float64))
        assert bool((model.weight == 1).all()) == shares
        assert graph_module.weight.dtype == torch.float32 and bool((graph_module.weight == 1).all())
