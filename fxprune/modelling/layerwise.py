"""Stock classes that build blocks of their own widths from a config, and what that config says."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedConfig

from fxprune.modelling.overrides import OVERRIDES, Overrides, apply_overrides, build_blocks

__all__ = ["SECTION", "AnyWidths", "Layerwise", "amend_config", "overrides_in", "section_of"]

SECTION = "fxprune"
"""The entry of ``config.json`` with what no stock config field can say.

It holds ``class`` (name of the stock class), ``blocks`` (module path of the list of blocks), ``part`` (name of the
nested config that describes them, or empty), ``layers`` (by index of a block its fields, where ``per_layer_config``
cannot hold them) and the other fields of :class:`Overrides`.
"""

_HETEROGENEOUS = "_heterogeneity_spec"
_ALLOWED = "allow_global_per_layer_attribute_access"


class AnyWidths:
    """A config that holds widths its stock class refuses; to be mixed in before that class."""

    def validate(self) -> None:
        """Accept everything: widths that differ from block to block, or do not divide each other, are the point."""

    validate_architecture = validate


class Layerwise:
    """A model that builds its blocks from ``config.per_layer_config``; to be mixed in before its stock class."""

    config: Any
    part_of_model: ClassVar[str] = ""
    """Where a model of this class is in the one that the config describes: its module path there."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        """Build the stock model, then those blocks again that differ, and set what no config field drives."""
        config = copy.deepcopy(config)  # entries are taken off it, and the caller may build from theirs again
        section = dict(vars(config).get(SECTION) or {})
        overrides = overrides_in(config)
        for name in (_HETEROGENEOUS, _ALLOWED) if section and "layers" not in section else ():
            vars(config).pop(name, None)
        vars(_blocks_config(config, section)).update(overrides.built_with)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        assert isinstance(self, nn.Module)
        own = overrides.below(type(self).part_of_model)
        build_blocks(self, _blocks_config(self.config, section), own)
        apply_overrides(self, own)
        vars(self)[OVERRIDES] = overrides
        vars(_blocks_config(self.config, section)).update(overrides.written_afterwards)

    def initialize_weights(self) -> None:
        """Fill what no checkpoint holds; where widths are in the way of the stock method, it holds everything."""
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
        """Return False: checkpoints hold the names that the stock class gives to weights on disk."""
        return False

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as the stock method does, then write into the config how blocks differ."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            amend_config(save_directory, vars(self)[OVERRIDES], vars(self.config).get(SECTION) or {})


def _patient(fill: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """Return ``fill``, which may fail on a module that has nothing but what a checkpoint holds."""

    def filled(module: nn.Module) -> None:
        try:
            fill(module)
        except (RuntimeError, ValueError, IndexError):  # stock code that fills by widths which are not these
            if module._non_persistent_buffers_set:
                raise

    return filled


def overrides_in(config: PreTrainedConfig) -> Overrides:
    """Return what a checkpoint's config says beyond its stock fields.

    The fields of blocks are in the section of ours where a stock class has per-layer values of its own.

    Raises:
        ValueError: the section of ours is not one.
    """
    section: dict[str, Any] = dict(vars(config).get(SECTION) or {})
    spec = vars(config).get(_HETEROGENEOUS) if section else None
    layers = section["layers"] if "layers" in section else getattr(spec, "per_layer_overrides", None) or {}
    blocks = section.get("blocks", "")
    earlier = {  # as the first releases called these
        "built_at": {f"{blocks}.{index}": place for index, place in section.get("places", {}).items()},
        "written_afterwards": section.get("holds", {}),
    }
    known = {entry.name for entry in fields(Overrides)} - {"block_fields"}
    told = earlier | {name: value for name, value in section.items() if name in known}
    if not all(isinstance(value, Mapping) for value in (layers, *told.values())):
        raise ValueError(f"the entry {SECTION!r} is not one that was written for a pruned model")
    return Overrides(block_fields={f"{blocks}.{int(i)}": dict(own) for i, own in layers.items()}, **told)


def section_of(overrides: Overrides, where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section of a config that says what the stock fields do not; see ``SECTION``.

    Args:
        overrides: how the model differs from what its stock class builds.
        where: ``class``, ``blocks`` and ``part``.
    """
    found = {name: where[name] for name in ("class", "blocks", "part") if name in where}
    found |= {entry.name: getattr(overrides, entry.name) for entry in fields(Overrides)}
    own = found.pop("block_fields")
    return found | {"layers": {path.rpartition(".")[2]: dict(values) for path, values in own.items()}}


def amend_config(folder: Any, overrides: Overrides, section: Mapping[str, Any], **more: Any) -> None:
    """Write into the ``config.json`` of a folder how the blocks of its model differ.

    A config with per-layer values refuses to tell the model's own value of such a field, which stock model code
    reads. So a model in memory holds a plain config, its blocks hold copies, and the file alone has it all.

    Args:
        folder: where the stock method has saved the model.
        overrides: how the model differs from what its stock class builds.
        section: ``class``, ``blocks`` and ``part``; see ``SECTION``.
        more: further entries.
    """
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    nested = config[section["part"]] if section.get("part") else config
    nested.update(overrides.built_with)
    written = section_of(overrides, section)
    layers = written.pop("layers")
    apart = bool(section.get("part")) or "per_layer_config" in config
    config[SECTION] = written | ({"layers": layers} if apart else {})
    if layers and not apart:
        config["per_layer_config"] = layers
        config[_ALLOWED] = True  # without it stock config classes cannot even be read, for a tokenizer say
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config | more, file, indent=2, sort_keys=True)


def _blocks_config(config: Any, section: Mapping[str, Any]) -> Any:
    """Return the config that describes the blocks: a nested one, or the model's own."""
    return getattr(config, section["part"]) if section.get("part") else config
