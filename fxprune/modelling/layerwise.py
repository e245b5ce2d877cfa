"""Stock classes whose blocks have widths of their own: overrides of a model while it is built, and the classes."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from fxprune.modelling.blocks import CannotBuildError, block_config, builder_of
from fxprune.modelling.table_rows import select_inputs

OVERRIDES = "fxprune_overrides"
"""Attribute of a model with the overrides it was built with, as far as they cannot be read off it."""


@dataclass(frozen=True)
class Overrides:
    """Differences of a model from the one that its stock class builds from its config; JSON values throughout.

    Blocks, modules and tensors are named by their paths in the model.

    Args:
        block_fields: by block, the config fields in which it differs from the model's config.
        absent: by block, fields of the model's config that its own config lacks.
        built_at: by block whose class builds another kind at its index, the ``index`` at which it builds this kind,
            and the ``fields`` of the config there.
        built_with: config fields that the model's class needs at these values while it is built.
        written_afterwards: config fields that are set to these values once the model is built.
        attributes: by module, attributes that are set once it is built.
        shapes: by parameter or buffer, its shape if no field sets it.
        buffers: the same for buffers that a checkpoint must hold although the class makes them itself.
        inputs: by module, the entries of :func:`select_inputs`.
    """

    block_fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    absent: Mapping[str, Sequence[str]] = field(default_factory=dict)
    built_at: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    built_with: Mapping[str, Any] = field(default_factory=dict)
    written_afterwards: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    buffers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    inputs: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    def below(self, root: str) -> Overrides:
        """Overrides of a module of the model, by names in that module; ``root`` is its path, empty for the model."""
        if not root:
            return self
        found: dict[str, dict[str, Any]] = {}
        for entry in fields(self):
            if entry.name not in ("built_with", "written_afterwards"):
                values: Mapping[str, Any] = getattr(self, entry.name)
                inside = {path: value for path, value in values.items() if f"{path}.".startswith(f"{root}.")}
                found[entry.name] = {path[len(root) + 1 :]: value for path, value in inside.items()}
        return replace(self, **found)


def build_blocks(
    model: nn.Module,
    config_of: Callable[[str], PreTrainedConfig],
    overrides: Overrides,
    like: nn.Module | None = None,
) -> None:
    """Rebuild the blocks of a model that have a config or a kind of their own.

    Args:
        config_of: returns the config that a block is built from, by its path.
        like: the model from whose blocks the classes are taken; by default ``model`` itself.

    Raises:
        CannotBuildError: a block's class requires more than a config and an index, or it is not in a list of modules.
    """
    source = model if like is None else like
    for path in dict.fromkeys((*overrides.block_fields, *overrides.absent, *overrides.built_at)):
        parent, _, index = path.rpartition(".")
        blocks = model.get_submodule(parent)
        if not isinstance(blocks, nn.ModuleList):
            raise CannotBuildError(f"{path}: not in a list of modules")
        build = builder_of(source.get_submodule(path), overrides.built_at.get(path))
        if build is None:
            raise CannotBuildError(f"{path}: its class is not called with a config and an index")
        own = block_config(config_of(path), overrides.block_fields.get(path, {}), overrides.absent.get(path, ()))
        blocks[int(index)] = build(own, int(index))


def apply_overrides(model: nn.Module, overrides: Overrides) -> None:
    """Set the attributes, shapes and inputs that no config field drives, of a model with its blocks in place."""
    for path, values in overrides.attributes.items():
        held = vars(model.get_submodule(path))
        for name, value in values.items():
            kind = type(held.get(name))
            held[name] = kind(value) if issubclass(kind, tuple) else value  # JSON has lists for tuples
    for name, shape in {**overrides.shapes, **overrides.buffers}.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        old = owner._parameters.get(leaf)
        if old is not None:
            owner._parameters[leaf] = nn.Parameter(_fitted(old.detach(), shape), requires_grad=old.requires_grad)
        elif (buffer := owner._buffers.get(leaf)) is not None:
            owner._buffers[leaf] = _fitted(buffer, shape)
        if name in overrides.buffers:
            owner._non_persistent_buffers_set.discard(leaf)
    for path, entries in overrides.inputs.items():
        select_inputs(model.get_submodule(path), entries)


def _fitted(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Copy of a tensor in another shape: cut, or repeated from the start; new values if that cannot be."""
    if tensor.is_meta or tensor.dim() != len(shape) or 0 in tensor.shape:
        return tensor.new_empty(tuple(shape)).zero_()
    for axis, size in enumerate(shape):
        index = torch.arange(size, device=tensor.device) % tensor.shape[axis]
        tensor = tensor.index_select(axis, index)
    return tensor.clone()


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
    _keep_in_fp32_modules_strict: Any

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
        build_blocks(self, lambda _: _blocks_config(self.config, section), own)
        apply_overrides(self, own)
        # in half precision, a loader casts all that a checkpoint holds, and frequencies of positions need float32
        precise = {name for name in own.buffers if self.get_buffer(name).dtype == torch.float32}
        vars(self)["_keep_in_fp32_modules_strict"] = precise.union(self._keep_in_fp32_modules_strict or ())
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
            vars(module)["_init_weights"] = partial(_fill, module._init_weights)
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


def _fill(fill: Callable[[nn.Module], None], module: nn.Module) -> None:
    """Fill a module by stock code, which may fail if all its tensors are in the checkpoint."""
    try:
        fill(module)
    except (RuntimeError, ValueError, IndexError):  # stock code that initialises by the dense widths
        if module._non_persistent_buffers_set:
            raise


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
    known = {entry.name for entry in fields(Overrides)} - {"block_fields"}
    values = {name: value for name, value in section.items() if name in known}
    if not all(isinstance(value, Mapping) for value in (layers, *values.values())):
        raise ValueError(f"the entry {SECTION!r} is not one that was written for a pruned model")
    return Overrides(block_fields={f"{blocks}.{int(i)}": dict(own) for i, own in layers.items()}, **values)


def section_of(overrides: Overrides, where: Mapping[str, Any]) -> dict[str, Any]:
    """Section of a config with the given overrides, and ``class``, ``blocks`` and ``part``; see ``SECTION``."""
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
        section: ``class``, ``blocks`` and ``part``; see ``SECTION``.
        depth: number of layers that the config states; None if it states none.
    """
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    nested = config[section["part"]] if section.get("part") else config
    nested.update(overrides.built_with)
    written = section_of(overrides, section)
    layers = written.pop("layers")
    # transformers counts the layers before it knows the class and its names of fields
    separate = bool(section.get("part")) or "per_layer_config" in config or depth is None
    config[SECTION] = written | ({"layers": layers} if separate else {})
    if layers and not separate:
        config["per_layer_config"] = layers
        config.setdefault("num_hidden_layers", depth)
        config[_ALLOWED] = True  # else stock config classes cannot even be loaded, for a tokenizer say
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config | more, file, indent=2, sort_keys=True)


def _blocks_config(config: Any, section: Mapping[str, Any]) -> Any:
    """Config that describes the blocks: a nested one, or the model's own."""
    return getattr(config, section["part"]) if section.get("part") else config
