"""Tensors, names, inputs and argument paths of an fx graph."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fxprune.errors import PassError
from fxprune.graph.tensors import (
    device_of,
    has_meta_weights,
    names_by_identity,
    read_argument,
    require_weights,
    set_argument,
    tensors_of,
    weights,
    with_argument,
)


class Tied(nn.Module):
    """Two linear maps with one weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) + self.shift


def reading(module: nn.Module, *names: str) -> fx.GraphModule:
    """A graph that reads tensors of ``module`` in a given order."""
    graph = fx.Graph()
    graph.output([graph.get_attr(name) for name in names])
    return fx.GraphModule(module, graph)


def test_weights_are_those_the_graph_reads_and_refused_without_values() -> None:
    module = Tied()
    names = names_by_identity(module)
    assert names[id(module.a.weight)] == ("a.weight", "b.weight") and names[id(module.shift)] == ("shift",)
    graph_module = reading(module, "shift", "a.bias", "shift")
    assert [name for name, _ in weights(graph_module)] == ["shift", "a.bias"]
    assert device_of(graph_module) == torch.device("cpu")
    assert device_of(reading(module)) == torch.device("cpu")
    whole, empty = reading(Tied(), "a.bias"), reading(Tied().to("meta"), "a.bias")
    assert (has_meta_weights(whole), has_meta_weights(empty)) == (False, True)
    require_weights(whole, "some-pass")
    with pytest.raises(PassError, match=r"some-pass.*on meta"):
        require_weights(empty, "some-pass")


def graph() -> tuple[fx.Graph, dict[str, fx.Node]]:
    found = fx.Graph()
    x = found.placeholder("x")
    xs = found.placeholder("xs")
    first = found.call_function(operator.getitem, (xs, "p"))
    inner = found.call_function(operator.getitem, (first, 0))
    total = found.call_function(torch.add, (x, inner))
    part = found.call_function(operator.getitem, (total, 0))
    found.output(part)
    for node in (x, inner, total, part):
        node.meta["val"] = torch.zeros(2, 3)
    xs.meta["val"], first.meta["val"] = {"p": [torch.zeros(2, 3)]}, [torch.zeros(2, 3)]
    return found, {"x": x, "xs": xs, "first": first, "inner": inner, "total": total, "part": part}


def test_values_are_read_and_written_where_they_stand() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.add, (x, [1, (2, 3)]), {"sizes": [4, 5]})
    assert read_argument(node, ("args", 1, 1, 0)) == 2
    assert read_argument(node, ("kwargs", "absent")) is None
    set_argument(node, ("args", 1, 1, 0), 7)
    set_argument(node, ("kwargs", "sizes", 1), 8)
    set_argument(node, ("kwargs", "end"), 9)
    assert node.args == (x, [1, (7, 3)])
    assert node.kwargs == {"sizes": [4, 8], "end": 9}
    assert with_argument((node.args, {}), ("args", 1, 0), 5)[0] == (x, [5, (7, 3)])
    assert node.args == (x, [1, (7, 3)])


def test_the_tensors_of_an_output_class_come_in_the_order_of_its_fields_at_any_depth() -> None:
    """InternVL sets ``pooler_output`` last, though its class has it second: its graph seemed to be another model."""
    late = BaseModelOutputWithPooling(last_hidden_state=torch.zeros(1), hidden_states=(torch.zeros(3),))
    late.pooler_output = torch.zeros(2)
    assert [len(tensor) for tensor in tensors_of({"first": torch.zeros(4), "rest": [late]})] == [4, 1, 2, 3]
