"""How a model differs from what its class builds from its config, and norm epsilons."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Groups
from fxprune.emit import structure
from fxprune.emit.emitted import stock_check
from fxprune.emit.emitter import emit
from fxprune.emit.patch import NormEpsilons, enlarged_epsilons, find_epsilons, set_attributes
from fxprune.emit.snapshot import shapes_of
from fxprune.emit.structure import Structure, describe_structure
from fxprune.errors import CheckpointError
from fxprune.graph.facts import facts_of
from fxprune.modelling.layerwise import Overrides
from fxprune.removal.plan import Plan
from fxprune.removal.removal import RescaledNumber
from fxprune.trace import trace
from tests.checkpoint.small import narrow
from tests.models import all_tensors, tiny, token_ids
from tests.oracle import Net
from tests.remembered import grouped, model_of, pruned


def test_buffers_of_other_values_are_kept() -> None:
    model: Any = tiny("llama")
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 2
    assert describe_structure(model).overrides.buffers == {"model.rotary_emb.inv_freq": [4]}
    assert describe_structure(model.to("meta")).is_stock, "values that are not there cannot differ"


def test_a_module_of_the_user_and_a_class_that_refuses_its_config_stop_it() -> None:
    model = narrow()
    model.probe = nn.Identity()
    with pytest.raises(CheckpointError, match=r"probe: only one of the model and its config has it"):
        describe_structure(model)
    model = tiny("llama", num_hidden_layers=1)
    vars(model.config)["hidden_size"] = 47
    assert "47" in describe_structure(model).refusal
    vars(model.config)["hidden_act"] = "none such"
    with pytest.raises(CheckpointError, match="cannot be built from its config"):
        describe_structure(model)


def test_every_difference_makes_it_more_than_its_class_builds() -> None:
    assert Structure(Overrides(), {}).is_stock and not Structure(Overrides(), {}, "no").is_stock
    for part in fields(Overrides):
        assert not Structure(Overrides(**{part.name: {"": {}}}), {}).is_stock


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_class_of_a_slim_model_builds_its_shapes(family: str) -> None:
    """Class and config of a model whose layers differ built one of other widths, and nobody said so."""
    model = pruned(family, importance="l2", kinds=("mlp", "head"), ratio=0.2, ranking="global", protect=()).model
    wanted, kind, config = shapes_of(model), type(model), model.config
    assert len({shape for name, shape in wanted.items() if "mlp" in name}) > 4, "layers differ"
    again = kind(config)
    assert shapes_of(again) == wanted and all(bool(value.isfinite().all()) for value in again.parameters())
    again.load_state_dict(model.state_dict())
    ids = token_ids()
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    copies = (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), type(config).from_dict(config.to_dict()))
    for other in (*copies, type(config)(**config.to_dict())):
        assert shapes_of(AutoModelForCausalLM.from_config(other)) == wanted
        inner = AutoModel.from_config(other)
        assert shapes_of(inner) == shapes_of(model.base_model)
    labelled = AutoModelForSequenceClassification.from_config(config)
    assert {name for name, shape in shapes_of(labelled).items() if wanted.get(name) != shape} == {"score.weight"}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is kind and torch.equal(other(ids).logits, model(ids).logits)
    dense = tiny(family)
    assert type(dense) is not kind and isinstance(model, type(dense))
    assert type(AutoModelForCausalLM.from_config(dense.config)) is type(dense)


def test_parameters_on_meta_are_those_of_one_thread() -> None:
    with ThreadPoolExecutor(1) as pool, structure._parameters_on_meta():
        assert nn.Linear(2, 2).weight.is_meta and not pool.submit(nn.Linear, 2, 2).result().weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


def plan(*widths: int, removed: tuple[str, ...] = ()) -> Plan:
    """A plan that leaves the first channels of each layer."""
    kept = {}
    for layer, width in enumerate(widths):
        for name, axis in {"gate": 0, "up": 0, "down": 1}.items():
            kept[f"model.layers.{layer}.mlp.{name}_proj.weight"] = {axis: list(range(width))}
    return Plan(kept, removed)


def test_widths_that_all_layers_share_are_expressed() -> None:
    graph_module = grouped("llama", num_hidden_layers=2)
    before = model_of(graph_module).model.layers[0].mlp.up_proj.weight
    facts = facts_of(graph_module)
    accepts = stock_check(graph_module, facts[Dependencies].axes, facts[Groups].all)
    assert accepts(plan(24, 24)) and not accepts(plan(24, 32))
    assert accepts(Plan({}, ("model.layers.1",))), "one layer fewer"
    assert model_of(graph_module).model.layers[0].mlp.up_proj.weight is before and not before.is_meta


def test_every_plan_passes_without_a_stock_class() -> None:
    graph_module = trace(nn.Linear(2, 2), {"input": torch.ones(1, 2)}).graph_module
    axes = facts_of(grouped("llama", num_hidden_layers=2))[Dependencies].axes
    assert stock_check(graph_module, axes, ())(plan(1, 2))


X = {"x": torch.randn(3, 6, generator=torch.Generator().manual_seed(0))}


class Norm(nn.Module):
    """A norm with its epsilon as an attribute, and perhaps other attributes."""

    def __init__(self, **held: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6) + 1)
        vars(self).update(held)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (6,), self.weight, self.eps)  # type: ignore[arg-type]


def two(first: Norm, second: Norm, *, again: bool = False) -> Any:
    """One norm behind the other, and perhaps the first once more."""

    def body(m: Any, x: torch.Tensor) -> Any:
        x = m.second(m.first(x))
        return m.first(x) if again else x

    return Net(body, first=first, second=second)


def changes_in(model: nn.Module, *numbers: int) -> tuple[Any, dict[tuple[str, tuple[Any, ...]], RescaledNumber]]:
    """The graph of a model, and its norms of these numbers with twice what they add."""
    graph = trace(model, X).graph_module.graph
    norms = [node for node in graph.nodes if "rms_norm" in str(node.target)]
    return graph, {
        (norms[i].name, ("args", 3)): RescaledNumber(norms[i].args[3], 2 * norms[i].args[3]) for i in numbers
    }  # type: ignore[arg-type, operator, misc]


def test_what_is_not_one_attribute_of_its_own_is_reported() -> None:
    model = two(Norm(eps=0.5), Norm(eps=0.25, other=0.25))
    graph, changes = changes_in(model, 1)
    assert any("several attributes are 0.25" in line for line in find_epsilons(graph, model, changes).reasons)
    model.second.eps = model.second.other = 0.3
    assert find_epsilons(graph, model, changes).reasons == ("second: no attribute is 0.25, which its norm adds",)
    model = two(Norm(eps=0.5), Norm(eps=0.25), again=True)
    graph, changes = changes_in(model, 0, 1)
    assert find_epsilons(graph, model, changes).reasons == ("first.eps: rms_norm_2 reads it too, and does not change",)
    graph, changes = changes_in(model, 0, 2)
    last = list(changes)[-1]
    reasons = find_epsilons(graph, model, {**changes, last: RescaledNumber(0.5, 0.7)}).reasons
    assert reasons == ("first.eps: two norms read it and need different values",)


def test_large_numbers_show_what_small_ones_hide_and_are_put_back() -> None:
    model = two(Norm(eps=1e-7), Norm(eps=1e-8))
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
    assert set_attributes(model, {("first", "eps"): 0.2}) == {("first", "eps"): 1e-7} and model.first.eps == 0.2


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
