"""Model and config classes: the stock ones, and those like them that build blocks of any width."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from fxprune.modelling.layerwise import AnyWidths, Layerwise

__all__ = ["parse_config", "pruned_class", "stock_class", "stock_config"]


def stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Return the class of a model, without what a loader of ours mixed in."""
    found: type[PreTrainedModel] = next(c for c in type(model).__mro__ if not issubclass(c, Layerwise))  # type: ignore[assignment]
    return found


def stock_config(config: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Return the class of a config, without what a loader of ours mixed in."""
    found: type[PreTrainedConfig] = next(c for c in config.__mro__ if not issubclass(c, AnyWidths))  # type: ignore[assignment]
    return found


def pruned_class(stock: type[PreTrainedModel], config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """Return a class like ``stock`` that builds blocks of their own widths from a config that allows them."""
    if issubclass(config, AnyWidths):
        relaxed: type[PreTrainedConfig] = config
    else:
        relaxed = type(config.__name__, (AnyWidths, config), {})
    return type(stock.__name__, (Layerwise, stock), {"config_class": relaxed})


def parse_config(text: str) -> dict[str, Any]:
    """Return what a ``config.json`` says; transformers writes infinity and NaN as ``{"__float__": "Infinity"}``.

    Raises:
        ValueError: it is not JSON.
    """

    def decoded(value: dict[str, Any]) -> Any:
        return float(value["__float__"]) if value.keys() == {"__float__"} else value

    found: dict[str, Any] = json.loads(text, object_hook=decoded)
    return found
