"""Norm epsilons in modules and configs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxprune.emit.emitter import emit
from fxprune.emit.patch import NormEpsilons, enlarged_epsilons, find_epsilons, set_attributes
from fxprune.removal.removal import RescaledNumber
from fxprune.trace import trace
from tests.models import all_tensors, tiny

X = {"x": torch.randn(3, 6, generator=torch.Generator().manual_seed(0))}


class Norm(nn.Module):
    """A norm with its epsilon as an attribute, and perhaps other attributes."""

    def __init__(self, **held: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6) + 1)
        vars(self).update(held)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (6,), self.weight, self.eps)  # type: ignore[arg-type]


class Two(nn.Module):
    """One norm behind the other, and one written in the code around them, or the first once more."""

    def __init__(self, first: Norm, second: Norm, around: str = "") -> None:
        super().__init__()
        self.first, self.second, self.around = first, second, around
        self.small = 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        if self.around == "own":
            return F.rms_norm(x, (6,), self.first.weight, self.small)
        return self.first(x) if self.around == "again" else x  # type: ignore[no-any-return]


def changes_in(model: nn.Module, *numbers: int) -> tuple[Any, dict[tuple[str, tuple[Any, ...]], RescaledNumber]]:
    """The graph of a model, and its norms of these numbers with twice what they add."""
    graph = trace(model, X).graph_module.graph
    norms = [node for node in graph.nodes if "rms_norm" in str(node.target)]
    return graph, {
        (norms[i].name, ("args", 3)): RescaledNumber(norms[i].args[3], 2 * norms[i].args[3]) for i in numbers
    }  # type: ignore[arg-type, operator, misc]


@pytest.mark.parametrize(
    ("second", "around", "numbers", "reason"),
    [
        ({"eps": 0.25, "other": 0.25}, "", (1,), "several attributes are 0.25"),
        ({"eps": 0.25}, "again", (0, 1), "first.eps: rms_norm_2 reads it too, and does not change"),
    ],
)
def test_what_is_not_one_attribute_of_its_own_is_told(
    second: dict[str, float], around: str, numbers: tuple[int, ...], reason: str
) -> None:
    model = Two(Norm(eps=0.5), Norm(**second), around)
    graph, changes = changes_in(model, *numbers)
    assert any(reason in line for line in find_epsilons(graph, model, changes).reasons)


def test_an_epsilon_that_no_attribute_has_or_two_norms_need_otherwise_is_reported() -> None:
    model = Two(Norm(eps=0.5), Norm(eps=0.25), "again")
    graph, changes = changes_in(model, 0, 2)
    last = list(changes)[-1]
    reasons = find_epsilons(graph, model, {**changes, last: RescaledNumber(0.5, 0.7)}).reasons
    assert reasons == ("first.eps: two norms read it and need different values",)
    graph, changes = changes_in(model, 1)
    model.second.eps = 0.3
    assert find_epsilons(graph, model, changes).reasons == ("second: no attribute is 0.25, which its norm adds",)


def test_large_numbers_show_what_small_ones_hide_and_are_put_back() -> None:
    model = Two(Norm(eps=1e-7), Norm(eps=1e-8))
    graph, changes = changes_in(model, 0, 1)
    places = find_epsilons(graph, model, changes)
    before = model(X["x"])
    with enlarged_epsilons(graph, model, places, {path: path for path, _ in places.values}):
        assert model.first.eps == 0.1 and model.second.eps == 0.1 * 1.5
        assert float((model(X["x"]) - before).abs().max()) > 1e-2
        graph.owning_module.recompile()
        torch.testing.assert_close(graph.owning_module(X["x"]), model(X["x"]))
    assert (model.first.eps, model.second.eps) == (1e-7, 1e-8)
    assert [node.args[3] for node in graph.nodes if "rms_norm" in str(node.target)] == [1e-7, 1e-8]
    assert set_attributes(model, {"first": {"eps": 0.2}}) == {"first": {"eps": 1e-7}} and model.first.eps == 0.2


def places_of(model: Any, leave: str = "") -> NormEpsilons:
    """All norms of a model, or all but some, with twice what they add."""
    found = {
        (path, "variance_epsilon"): (module.variance_epsilon, 2 * module.variance_epsilon)
        for path, module in model.named_modules()
        if "variance_epsilon" in vars(module) and (not leave or leave not in path)
    }
    return NormEpsilons(found)


def test_an_emitted_model_has_them_in_its_config_or_in_its_modules() -> None:
    model = tiny("llama", num_hidden_layers=2, rms_norm_eps=1e-3)
    tensors = all_tensors(model)
    for leave, field in (("", 2e-3), ("layers.1", 1e-3)):
        slim: Any = emit(model, tensors, epsilons=places_of(model, leave)).model
        assert slim.config.rms_norm_eps == field
        assert slim.model.norm.variance_epsilon == 2e-3
        assert slim.model.layers[1].input_layernorm.variance_epsilon == (1e-3 if leave else 2e-3)
    refused = emit(model, tensors, epsilons=NormEpsilons(reasons=("norm: no attribute is 1",)))
    assert refused.model is None and refused.reasons == ("norm: no attribute is 1",)
