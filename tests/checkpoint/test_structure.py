"""What a model's config does not say about it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.checkpoint.structure import Structure, describe
from fxprune.errors import CheckpointError
from fxprune.modelling.overrides import Overrides
from tests.checkpoint.small import narrow
from tests.models import tiny


@pytest.fixture(scope="module")
def slim() -> Any:
    """A model whose second layer is narrower."""
    return narrow()


def test_a_stock_model_needs_no_words() -> None:
    model = tiny("llama")
    structure = describe(model)
    assert structure.is_stock and structure.differences == () and structure.overrides == Overrides()
    assert structure.where == {"class": type(model).__name__, "blocks": "model.layers", "part": ""}


def test_a_block_of_its_own_width_is_told(slim: Any) -> None:
    structure = describe(slim)
    assert structure.overrides == Overrides(block_fields={"model.layers.1": {"intermediate_size": 24}})
    assert structure.differences == ("its blocks differ in width",)


def test_attributes_and_shapes_that_no_field_sets_are_told(slim: Any) -> None:
    model = copy.deepcopy(slim)
    layer = model.model.layers[0]
    layer.mlp.up_proj.out_features = 5
    layer.mlp.up_proj.weight = nn.Parameter(torch.zeros(5, 48))
    overrides = describe(model).overrides
    assert overrides.attributes == {"model.layers.0.mlp.up_proj": {"out_features": 5}}
    assert overrides.shapes == {"model.layers.0.mlp.up_proj.weight": [5, 48]}


def test_buffers_of_other_values_are_kept() -> None:
    model: Any = tiny("llama")
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 2
    assert describe(model).overrides.buffers == {"model.rotary_emb.inv_freq": [4]}
    assert describe(model.to("meta")).is_stock, "values that are not there cannot differ"


def test_a_config_that_its_class_refuses_is_told() -> None:
    model: Any = tiny("llama")
    vars(model.config)["hidden_size"] = 47
    assert "47" in describe_refusal(model)


def describe_refusal(model: Any) -> str:
    """What the config class says."""
    from fxprune.checkpoint.structure import _as_json, _refusal

    return _refusal(type(model.config), _as_json(model.config))


def test_a_module_of_the_user_stops_it(slim: Any) -> None:
    model = copy.deepcopy(slim)
    model.probe = nn.Identity()
    with pytest.raises(CheckpointError, match=r"probe: only the model or what its config builds has it"):
        describe(model)


def test_a_class_that_refuses_its_config_stops_it() -> None:
    model: Any = tiny("llama", num_hidden_layers=1)
    vars(model.config)["hidden_act"] = "none such"
    with pytest.raises(CheckpointError, match="cannot be built from its config"):
        describe(model)


def test_every_difference_has_words() -> None:
    overrides = Overrides(
        absent={"b": ["n"]}, built_with={"n": 1}, attributes={"": {}}, shapes={"x": [], "y": []}, inputs={"a": {}}
    )
    told = Structure(overrides, {}, "no").differences
    assert told[0] == "its config class refuses these widths: no" and told[1] == "its blocks differ in width"
    assert told[3].endswith("an attribute of: the model") and told[4].endswith("x and 1 more") and len(told) == 6
