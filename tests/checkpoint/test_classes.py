"""Stock classes, and those like them that build blocks of any width."""

from __future__ import annotations

import math

import pytest

from fxprune.checkpoint.structure import parse_config, pruned_class, stock_class, stock_config
from fxprune.modelling.layerwise import AnyWidths, Layerwise
from tests.models import tiny


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
