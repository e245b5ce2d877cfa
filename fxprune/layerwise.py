"""Models whose layers have widths of their own, built by stock classes from a config and a few plain facts.

This file and ``selecting`` stand alone: a checkpoint of such a model carries a copy of both, so that transformers can
load it where fxprune is not installed. They import nothing else of ours.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from fxprune.selecting import select_inputs

__all__ = [
    "PLACE",
    "SECTION",
    "AnyWidths",
    "Layerwise",
    "amend_config",
    "block_builder",
    "layer_config",
    "layers_of",
    "restructure",
]

Builder = Callable[[PreTrainedConfig, int], nn.Module]

SECTION = "fxprune"
"""The config entry with what no config field can say: where blocks are, attributes and shapes set by hand."""
PLACE = f"{SECTION}_place"
"""The attribute of a layer whose class builds another kind at its index: it is built at ``index`` with ``fields``."""

_LIVE = ("_attn_implementation_internal", "_experts_implementation_internal")
_INDICES = ("idx", "index", "layer_id")
_HETEROGENEOUS = "_heterogeneity_spec"
_ALLOWED = "allow_global_per_layer_attribute_access"


class AnyWidths:
    """A config that holds widths its stock class refuses; to be mixed in before that class."""

    def validate(self) -> None:
        """Widths that differ from layer to layer, or that do not divide each other, are the point."""

    validate_architecture = validate


class Layerwise:
    """A model that builds its layers from ``config.per_layer_config``; to be mixed in before its stock class."""

    config: Any

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        """The stock model is built, then the layers that differ are built again."""
        section = dict(vars(config).get(SECTION) or {})
        layers = layers_of(config)
        for name in (_HETEROGENEOUS, _ALLOWED) if section and "layers" not in section else ():
            vars(config).pop(name, None)
        vars(_part(config, section)).update(section.get("built_with", {}))
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        assert isinstance(self, nn.Module)
        restructure(self, layers, section)
        vars(_part(self.config, section)).update(section.get("holds", {}))

    def initialize_weights(self) -> None:
        """The stock method fills what no checkpoint holds; where widths are in its way, the checkpoint holds it all."""
        assert isinstance(self, nn.Module)
        filling: list[Any] = [module for module in self.modules() if hasattr(type(module), "_init_weights")]
        for module in filling:
            vars(module)["_init_weights"] = _patient(module._init_weights)
        try:
            super().initialize_weights()  # type: ignore[misc]
        finally:
            for module in filling:
                del vars(module)["_init_weights"]

    @classmethod
    def is_custom_code(cls) -> bool:
        """Checkpoints hold the names that the stock class gives to weights on disk."""
        return False

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """The stock method saves, then the config is told how layers differ."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            layers = vars(self).get("fxprune_layer_fields", {})
            amend_config(save_directory, layers, vars(self.config).get(SECTION) or {})


def _patient(fill: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """``fill``, which may fail on a module that has nothing but what a checkpoint holds."""

    def filled(module: nn.Module) -> None:
        try:
            fill(module)
        except (RuntimeError, ValueError, IndexError):
            if module._non_persistent_buffers_set:
                raise

    return filled


def layers_of(config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    """By layer, the config fields that differ from the model's, as a checkpoint's config holds them.

    They are in the entry of ours where a stock class has per-layer values of its own.
    """
    section = vars(config).get(SECTION) or {}
    spec = vars(config).get(_HETEROGENEOUS) if section else None
    found = section["layers"] if "layers" in section else getattr(spec, "per_layer_overrides", None) or {}
    return {int(index): dict(fields) for index, fields in found.items()}


def amend_config(folder: Any, layers: Mapping[int, Mapping[str, Any]], section: Mapping[str, Any], **more: Any) -> None:
    """The ``config.json`` in ``folder`` says how layers differ.

    A config with per-layer values refuses to tell the model's own value of such a field, which stock model code
    reads. So a model in memory holds a plain config, its layers hold copies, and the file alone has it all.

    Args:
        folder: where the stock method has saved the model.
        layers: by layer, the fields that differ.
        section: what no field can say; see :func:`restructure`.
        more: further entries.
    """
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    _nested(config, section).update(section.get("built_with", {}))
    written = {str(index): dict(fields) for index, fields in layers.items()}
    apart = bool(section.get("part")) or "per_layer_config" in config
    config[SECTION] = dict(section) | ({"layers": written} if apart else {})
    if written and not apart:
        config["per_layer_config"] = written
        config[_ALLOWED] = True  # without it stock config classes cannot even be read, for a tokenizer say
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config | more, file, indent=2, sort_keys=True)


def _nested(config: dict[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = config[section["part"]] if section.get("part") else config
    return nested


def _part(config: Any, section: Mapping[str, Any]) -> Any:
    return getattr(config, section["part"]) if section.get("part") else config


def restructure(model: nn.Module, layers: Mapping[int, Mapping[str, Any]], section: Mapping[str, Any]) -> None:
    """Layers with fields of their own are built again; attributes and shapes that no field drives are set.

    Args:
        model: as its stock class builds it.
        layers: by layer, the config fields that differ from the model's.
        section: ``blocks`` (module path of the layers), ``part`` (the nested config that describes them, or empty),
            ``built_with`` and ``holds`` (config fields that the class wants at other values while it is built, and
            what they are afterwards), ``attributes`` (by module path), ``shapes`` (by parameter or buffer name),
            ``buffers`` (shapes of those that a checkpoint has to hold although the stock class makes them itself),
            ``inputs`` (by module path, see :func:`select_inputs`) and ``places`` (by layer, see ``PLACE``).

    Raises:
        ValueError: a layer's class cannot be called with a config and an index.
    """
    whole = _part(model.config, section)
    places = {int(index): place for index, place in section.get("places", {}).items()}
    blocks: Any = model.get_submodule(section["blocks"]) if layers or places else []
    for index in sorted(layers.keys() | places.keys()):
        vars(blocks[index]).update({PLACE: places[index]} if index in places else {})
        build = block_builder(blocks[index])
        if build is None:
            raise ValueError(f"{section['blocks']}.{index}: its class is not called with a config and an index")
        blocks[index] = build(layer_config(whole, layers.get(index, {})), index)
    for path, values in section.get("attributes", {}).items():
        held = vars(model.get_submodule(path))
        for name, value in values.items():
            kind = type(held.get(name))
            held[name] = kind(value) if issubclass(kind, tuple) else value
    for name, shape in {**section.get("shapes", {}), **section.get("buffers", {})}.items():
        _resize(model, name, shape)
    for name in section.get("buffers", {}):
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._non_persistent_buffers_set.discard(leaf)
    for path, entries in section.get("inputs", {}).items():
        select_inputs(model.get_submodule(path), entries)
    vars(model)["fxprune_layer_fields"] = {index: dict(fields) for index, fields in layers.items()}
    vars(model)["fxprune_built_with"] = dict(section.get("built_with", {}))


def _resize(model: nn.Module, name: str, shape: list[int]) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    old = owner._parameters.get(leaf)
    if old is not None:
        new = torch.empty(shape, dtype=old.dtype, device=old.device)
        owner._parameters[leaf] = nn.Parameter(new, requires_grad=old.requires_grad)
    elif (buffer := owner._buffers.get(leaf)) is not None:
        owner._buffers[leaf] = torch.empty(shape, dtype=buffer.dtype, device=buffer.device)


def block_builder(block: nn.Module) -> Builder | None:
    """How a block's class is called with a config and an index; None where its signature asks for more.

    Args:
        block: a block of the model.
    """
    parameters = [
        parameter
        for parameter in inspect.signature(type(block)).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if not parameters or any(p.default is p.empty for p in parameters[2:]):
        return None
    if len(parameters) > 1 and _takes_index(parameters[1]):
        place = vars(block).get(PLACE, {})
        return lambda config, index: _built_at(type(block), config, index, place)
    if len(parameters) > 1 and parameters[1].default is inspect.Parameter.empty:
        return None
    return lambda config, index: type(block)(config)


def _built_at(kind: type, config: Any, index: int, place: Mapping[str, Any]) -> nn.Module:
    start, held = place.get("index", index), vars(config)
    own = {name: held[name] for name in place.get("fields", {})}
    held.update(place.get("fields", {}))
    block: nn.Module = kind(config, start)
    held.update(own)
    vars(block).update({PLACE: place} if place else {})
    for module in block.modules() if start != index else ():
        names = [name for name, value in vars(module).items() if type(value) is int and value == start]
        vars(module).update({name: index for name in names if name.endswith(_INDICES)})
    return block


def _takes_index(parameter: inspect.Parameter) -> bool:
    return parameter.name.endswith(("idx", "index", "id", "number", "num"))


def layer_config(config: PreTrainedConfig, fields: Mapping[str, Any]) -> PreTrainedConfig:
    """A copy with some fields of its own that follows the model's config in its choice of kernels.

    A later `set_attn_implementation` on the model writes to the model's config alone; blocks that hold a copy
    must see it, or masks and attention kernels would no longer fit.

    Args:
        config: the config of the whole model; kept by reference.
        fields: the values that differ for this layer; written with no validation.
    """
    view = copy.deepcopy(config)
    vars(view).update(fields)
    for name in _LIVE:
        vars(view).pop(name, None)
    vars(view)["_fxprune_parent"] = config
    view.__class__ = _live_class(type(config))
    return view


_LIVE_CLASSES: dict[type, type] = {}


def _live_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    if base not in _LIVE_CLASSES:
        members: dict[str, object] = {name: _followed(name) for name in _LIVE}
        members["__reduce_ex__"] = lambda self, _: (_restore, (base, dict(vars(self))))
        _LIVE_CLASSES[base] = type(base.__name__, (base,), members)
    return _LIVE_CLASSES[base]


def _restore(base: type[PreTrainedConfig], state: dict[str, Any]) -> PreTrainedConfig:
    live = _live_class(base)
    view = live.__new__(live)
    vars(view).update(state)
    return view


def _followed(name: str) -> property:
    def read(self: PreTrainedConfig) -> Any:
        return getattr(vars(self)["_fxprune_parent"], name, None)

    def write(self: PreTrainedConfig, value: Any) -> None:
        """Ignored: the model's config decides."""

    return property(read, write)
