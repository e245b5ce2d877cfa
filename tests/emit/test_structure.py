"""How a model differs from what its class builds from its config."""

from __future__ import annotations

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from fxprune.emit import structure
from fxprune.emit.snapshot import shapes_of
from fxprune.emit.structure import Structure, describe_structure, parse_config
from fxprune.errors import CheckpointError
from fxprune.modelling.layerwise import Overrides
from tests.checkpoint.small import narrow
from tests.models import tiny, token_ids
from tests.remembered import pruned


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


def test_every_difference_has_words() -> None:
    overrides = Overrides(
        absent={"b": ["n"]}, built_with={"n": 1}, attributes={"": {}}, shapes={"x": [], "y": []}, inputs={"a": {}}
    )
    told = Structure(overrides, {}, "no").differences
    assert told[0] == "its config class refuses these widths: no" and told[1] == "its blocks differ in width"
    assert told[3].endswith("an attribute of: the model") and told[4].endswith("x and 1 more") and len(told) == 6


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


def test_numbers_that_json_has_not_are_read() -> None:
    data = parse_config('{"a": {"__float__": "Infinity"}, "b": [{"__float__": "NaN"}], "c": {"d": 1}}')
    assert data["a"] == math.inf and math.isnan(data["b"][0]) and data["c"] == {"d": 1}
    with pytest.raises(ValueError):
        parse_config("{")
