"""How a model differs from what its class builds from its config."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.emit.structure import Structure, describe_structure, parse_config, pruned_class, stock_class, stock_config
from fxprune.errors import CheckpointError
from fxprune.modelling.layerwise import AnyWidths, Layerwise
from fxprune.modelling.overrides import Overrides
from tests.checkpoint.small import narrow
from tests.models import tiny


@pytest.fixture(scope="module")
def slim() -> Any:
    return narrow()


def test_a_stock_model_needs_no_words() -> None:
    model = tiny("llama")
    structure = describe_structure(model)
    assert structure.is_stock and structure.differences == () and structure.overrides == Overrides()
    assert structure.where == {"class": type(model).__name__, "blocks": "model.layers", "part": ""}


def test_widths_attributes_and_shapes_that_no_field_sets_are_reported(slim: Any) -> None:
    structure = describe_structure(slim)
    assert structure.overrides == Overrides(block_fields={"model.layers.1": {"intermediate_size": 24}})
    assert structure.differences == ("its blocks differ in width",)
    model = copy.deepcopy(slim)
    layer = model.model.layers[0]
    layer.mlp.up_proj.out_features = 5
    layer.mlp.up_proj.weight = nn.Parameter(torch.zeros(5, 48))
    overrides = describe_structure(model).overrides
    assert overrides.attributes == {"model.layers.0.mlp.up_proj": {"out_features": 5}}
    assert overrides.shapes == {"model.layers.0.mlp.up_proj.weight": [5, 48]}


def test_buffers_of_other_values_are_kept() -> None:
    model: Any = tiny("llama")
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 2
    assert describe_structure(model).overrides.buffers == {"model.rotary_emb.inv_freq": [4]}
    assert describe_structure(model.to("meta")).is_stock, "values that are not there cannot differ"


def test_a_module_of_the_user_and_a_class_that_refuses_its_config_stop_it(slim: Any) -> None:
    model = copy.deepcopy(slim)
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


def test_a_pruned_class_is_like_its_stock_class() -> None:
    model = tiny("llama", num_hidden_layers=1)
    stock, config = type(model), type(model.config)
    pruned = pruned_class(stock, config)
    assert issubclass(pruned, Layerwise) and issubclass(pruned, stock) and pruned.__name__ == stock.__name__
    assert issubclass(pruned.config_class, AnyWidths) and stock_config(pruned.config_class) is config
    assert pruned_class(stock, pruned.config_class).config_class is pruned.config_class
    assert stock_class(model) is stock
    model.__class__ = pruned
    assert stock_class(model) is stock


def test_numbers_that_json_has_not_are_read() -> None:
    data = parse_config('{"a": {"__float__": "Infinity"}, "b": [{"__float__": "NaN"}], "c": {"d": 1}}')
    assert data["a"] == math.inf and math.isnan(data["b"][0]) and data["c"] == {"d": 1}
    with pytest.raises(ValueError):
        parse_config("{")
