"""Stock classes that build blocks of their own widths, and the section of the config that says how."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from fxprune.modelling.overrides import OVERRIDES, Overrides, apply_overrides, build_blocks

__all__ = ["SECTION", "AnyWidths", "Layerwise", "amend_config", "overrides_in", "section_of"]

SECTION = "fxprune"
"""Entry of ``config.json`` with the differences that no stock config field expresses.

It holds ``class`` (name of the stock class), ``blocks`` (module path of the list of blocks), ``part`` (name of the
nested config that describes them, or empty), ``layers`` (by index of a block its fields, if ``per_layer_config``
cannot hold them) and the other fields of :class:`Overrides`.
"""

_HETEROGENEOUS = "_heterogeneity_spec"
_ALLOWED = "allow_global_per_layer_attribute_access"


class AnyWidths:
    """Mixin for a config class: allows widths that the stock class refuses."""

    def validate(self) -> None:
        """Accept everything: widths that differ from block to block, or do not divide each other, are the point."""

    validate_architecture = validate


class Layerwise:
    """Mixin for a model class: builds blocks from ``config.per_layer_config``, and keeps in the config how."""

    config: Any

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        """Build the stock model, rebuild the blocks that differ, and set the attributes that no config field drives."""
        config = copy.deepcopy(config)  # entries are removed below, and the caller may build from theirs again
        overrides = overrides_in(config)
        section = dict(vars(config).pop(SECTION, None) or {})
        for name in (_HETEROGENEOUS, _ALLOWED) if section and "layers" not in section else ():
            vars(config).pop(name, None)
        vars(_blocks_config(config, section)).update(overrides.built_with)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        assert isinstance(self, nn.Module)
        root = str(getattr(self, "base_model_prefix", ""))
        is_inner = section.get("blocks", "").startswith(f"{root}.") and not hasattr(self, root)
        own = overrides.below(root if is_inner else "")
        build_blocks(self, _blocks_config(self.config, section), own)
        apply_overrides(self, own)
        initialise: Any = self.init_weights  # of the blocks that were built anew
        initialise()
        vars(self)[OVERRIDES] = overrides
        vars(_blocks_config(self.config, section)).update(overrides.written_afterwards)
        if section:
            vars(self.config)[SECTION] = section_of(overrides, section)

    def initialize_weights(self) -> None:
        """Fill the buffers that no checkpoint holds; stock code may fail on modules that have none."""
        assert isinstance(self, nn.Module)
        filling: list[Any] = [module for module in self.modules() if hasattr(type(module), "_init_weights")]
        for module in filling:
            vars(module)["_init_weights"] = _ignoring_errors(module._init_weights)
        try:
            super().initialize_weights()  # type: ignore[misc]
        finally:
            for module in filling:
                del vars(module)["_init_weights"]

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False: weights on disk have the names that the stock class gives them."""
        return False

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as the stock method does, then write the differences of blocks into the config."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            experts = {"experts_implementation": getattr(self.config, "_experts_implementation", None)}
            more = experts if experts["experts_implementation"] == "eager" else {}  # others may refuse the widths
            section = vars(self.config).get(SECTION) or {}
            depth = getattr(_blocks_config(self.config, section), "num_hidden_layers", None)
            amend_config(save_directory, vars(self)[OVERRIDES], section, depth, **more)


def _ignoring_errors(fill: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """Wrap ``fill``, which may fail on a module whose tensors are all in the checkpoint."""

    def filled(module: nn.Module) -> None:
        try:
            fill(module)
        except (RuntimeError, ValueError, IndexError):  # stock code that initialises by the dense widths
            if module._non_persistent_buffers_set:
                raise

    return filled


def overrides_in(config: PreTrainedConfig) -> Overrides:
    """Read the overrides of a checkpoint from its config.

    The fields of blocks are in the fxprune section if the stock class has per-layer values of its own.

    Raises:
        ValueError: the section is malformed.
    """
    section: dict[str, Any] = dict(vars(config).get(SECTION) or {})
    spec = vars(config).get(_HETEROGENEOUS) if section else None
    layers = section["layers"] if "layers" in section else getattr(spec, "per_layer_overrides", None) or {}
    blocks = section.get("blocks", "")
    earlier = {  # the names in the first releases
        "built_at": {f"{blocks}.{index}": place for index, place in section.get("places", {}).items()},
        "written_afterwards": section.get("holds", {}),
    }
    known = {entry.name for entry in fields(Overrides)} - {"block_fields"}
    values = earlier | {name: value for name, value in section.items() if name in known}
    if not all(isinstance(value, Mapping) for value in (layers, *values.values())):
        raise ValueError(f"the entry {SECTION!r} is not one that was written for a pruned model")
    return Overrides(block_fields={f"{blocks}.{int(i)}": dict(own) for i, own in layers.items()}, **values)


def section_of(overrides: Overrides, where: Mapping[str, Any]) -> dict[str, Any]:
    """Section of a config with the given overrides; see ``SECTION``.

    Args:
        overrides: how the model differs from what its stock class builds.
        where: ``class``, ``blocks`` and ``part``.
    """
    found = {name: where[name] for name in ("class", "blocks", "part") if name in where}
    found |= {entry.name: getattr(overrides, entry.name) for entry in fields(Overrides)}
    own = found.pop("block_fields")
    return found | {"layers": {path.rpartition(".")[2]: dict(values) for path, values in own.items()}}


def amend_config(
    folder: Any, overrides: Overrides, section: Mapping[str, Any], depth: int | None = None, **more: Any
) -> None:
    """Write the overrides of a model into the ``config.json`` of its folder.

    A config with per-layer values refuses to return the model's own value of such a field, which stock model code
    reads. So a model in memory holds a plain config, its blocks hold copies, and only the file has per-layer values.

    Args:
        folder: where the stock method saved the model.
        overrides: how the model differs from what its stock class builds.
        section: ``class``, ``blocks`` and ``part``; see ``SECTION``.
        depth: number of layers that the config states.
        more: further entries.
    """
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    nested = config[section["part"]] if section.get("part") else config
    nested.update(overrides.built_with)
    written = section_of(overrides, section)
    layers = written.pop("layers")
    separate = bool(section.get("part")) or "per_layer_config" in config
    config[SECTION] = written | ({"layers": layers} if separate else {})
    if layers and not separate:
        config["per_layer_config"] = layers
        if depth is not None:  # transformers counts the layers before it knows the class and its names of fields
            config.setdefault("num_hidden_layers", depth)
        config[_ALLOWED] = True  # else stock config classes cannot even be loaded, for a tokenizer say
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config | more, file, indent=2, sort_keys=True)


def _blocks_config(config: Any, section: Mapping[str, Any]) -> Any:
    """Config that describes the blocks: a nested one, or the model's own."""
    return getattr(config, section["part"]) if section.get("part") else config
