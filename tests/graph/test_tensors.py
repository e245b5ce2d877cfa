"""Parameters and buffers are read, replaced and listed by name."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from fxprune.errors import PassError
from fxprune.graph.tensors import (
    as_parameter,
    copy_tensor,
    delete_tensor,
    device_of,
    get_tensor,
    names_by_identity,
    on_meta,
    require_weights,
    set_tensor,
    weights,
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


def test_a_tensor_is_replaced_where_it_stands() -> None:
    module = Tied()
    for name in ("a.weight", "shift"):
        new = as_parameter(torch.zeros(2), get_tensor(module, name))
        set_tensor(module, name, new)
        assert get_tensor(module, name) is new
    assert {name for name, _ in module.named_buffers()} == {"shift"}
    assert "a.weight" in dict(module.named_parameters())
    delete_tensor(module, "a.weight")
    assert "a.weight" not in dict(module.named_parameters())


def test_a_parameter_stays_one_and_is_trained_where_it_was() -> None:
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    made = as_parameter(torch.zeros(3), frozen)
    assert isinstance(made, nn.Parameter) and not made.requires_grad
    assert not isinstance(as_parameter(torch.zeros(3), torch.ones(2)), nn.Parameter)
    twin = copy_tensor(frozen)
    assert isinstance(twin, nn.Parameter) and torch.equal(twin, frozen) and twin.data_ptr() != frozen.data_ptr()


def test_tied_tensors_have_all_their_names() -> None:
    module = Tied()
    names = names_by_identity(module)
    assert names[id(module.a.weight)] == ("a.weight", "b.weight")
    assert names[id(module.shift)] == ("shift",)


def test_weights_are_those_the_graph_reads_each_once_in_order() -> None:
    module = Tied()
    graph_module = reading(module, "shift", "a.bias", "shift")
    assert [name for name, _ in weights(graph_module)] == ["shift", "a.bias"]
    assert device_of(graph_module) == torch.device("cpu")
    assert device_of(reading(module)) == torch.device("cpu")


def test_weights_without_values_are_refused_in_the_name_of_the_pass() -> None:
    whole, empty = reading(Tied(), "a.bias"), reading(Tied().to("meta"), "a.bias")
    assert (on_meta(whole), on_meta(empty)) == (False, True)
    require_weights(whole, "some-pass")
    with pytest.raises(PassError, match=r"some-pass.*on meta"):
        require_weights(empty, "some-pass")
