"""How a slim model is built from a dense one: plain data, and the function that follows it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fxprune.emit.fields import copy_config, keep_layers, part_of, write_fields
from fxprune.emit.layout import Layout, on_meta, survey
from fxprune.emit.patch import Patches
from fxprune.emit.snapshot import Number, is_number, take_snapshot
from fxprune.emit.tables import Inputs, combined_inputs
from fxprune.layerwise import PLACE, block_builder, layer_config
from fxprune.selecting import select_inputs

__all__ = ["Recipe", "new_names", "rebuild"]


@dataclass(frozen=True)
class Recipe:
    """What differs from the dense model. All names are those of the dense model; all values are JSON values.

    Attributes:
        fields: Config fields that the whole model changes.
        layer_fields: By module path of a block, all its config fields that differ from the dense config.
        attributes: By module path, attributes set after construction.
        removed: Module paths of the blocks that are gone.
        noted: Config fields written after construction because no class accepts them at construction.
        inputs: By module path and argument, which units of it go in.
    """

    fields: Mapping[str, int] = field(default_factory=dict)
    layer_fields: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    attributes: Patches = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    noted: Mapping[str, int] = field(default_factory=dict)
    inputs: Inputs = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The recipe as JSON values."""
        return {**asdict(self), "removed": list(self.removed)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe that `as_dict`, and a trip through JSON, came from."""
        attributes = {
            path: {name: tuple(value) if isinstance(value, list) else value for name, value in patch.items()}
            for path, patch in data["attributes"].items()
        }
        removed = tuple(data["removed"])
        noted, inputs = data.get("noted", {}), data.get("inputs", {})
        return cls(data["fields"], data["layer_fields"], attributes, removed, noted, inputs)


def rebuild(dense: PreTrainedModel, recipe: Recipe, layout: Layout | None = None) -> PreTrainedModel:
    """A model of the dense one's class exists on `meta`, with the recipe's widths and layers and no weights.

    Args:
        dense: The dense model, or one of the same config on `meta`; only its structure and scalar attributes
            are read.
        recipe: What differs.
        layout: Where its blocks are, if known.

    Raises:
        ValueError: The class does not build what the recipe asks for.
    """
    layout = layout or survey(dense)
    with on_meta():
        config = copy_config(dense.config)
        write_fields(part_of(config, layout.part), recipe.fields)
        model = type(dense)(config)
        _replace_blocks(model, dense, recipe, layout)
    _keep_scalars(model, dense)
    for path, patch in recipe.attributes.items():
        vars(model.get_submodule(path)).update(patch)
    for path, entries in combined_inputs(dense, recipe.inputs).items():
        select_inputs(model.get_submodule(path), entries)
    _drop_blocks(model, recipe, layout)
    write_fields(part_of(config, layout.part), recipe.noted)
    return model


def _replace_blocks(model: PreTrainedModel, dense: PreTrainedModel, recipe: Recipe, layout: Layout) -> None:
    whole, original = part_of(model.config, layout.part), part_of(dense.config, layout.part)
    for path, (index, block) in layout.blocks().items():
        own = recipe.layer_fields.get(path)
        if path in recipe.removed or (own is None and PLACE not in vars(block)):
            continue
        builder = block_builder(block)
        if builder is None:
            raise ValueError(f"layer {path}: its class cannot be built from a config and an index")
        back = {name: vars(original)[name] for name in recipe.fields if name in vars(original)}
        config = layer_config(whole, {} if own is None else {**back, **own})
        for name in recipe.fields.keys() - back.keys() - own.keys() if own is not None else ():
            vars(config).pop(name, None)
        _list_of(model, path)[index] = builder(config, index)


def _list_of(model: nn.Module, path: str) -> nn.ModuleList:
    blocks = model.get_submodule(path.rpartition(".")[0])
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(f"layer {path}: not in a module list")
    return blocks


def _keep_scalars(model: nn.Module, dense: nn.Module) -> None:
    """Floats, flags and plain tensors keep their dense value: a softmax scale does not follow a head's width.

    Buffers that the model adds to a finished block are added to a rebuilt one.
    """
    twins = dict(model.named_modules())
    for path, module in dense.named_modules():
        twin = twins.get(path)
        if twin is None:
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in (*twin._buffers, *twin._parameters):
                persistent = name not in module._non_persistent_buffers_set
                twin.register_buffer(name, torch.empty_like(buffer, device="meta"), persistent)
        for name, value in vars(module).items():
            if name != "training" and _kept(name, value, vars(twin)):
                twin.__dict__[name] = value


def _kept(name: str, value: object, there: Mapping[str, object]) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if name not in there:
        return _portable(value)
    if name.startswith("_") or is_number(there[name]):
        return False
    return isinstance(value, float | bool | str) or value is None


def _portable(value: object) -> bool:
    """Whether an attribute that only the user's modules have is safe to carry over."""
    if isinstance(value, functools.partial):
        parts = (*value.args, *value.keywords.values())
        return inspect.isfunction(value.func) and not any(isinstance(part, nn.Module) for part in parts)
    return isinstance(value, float | bool | str)


def new_names(recipe: Recipe, layout: Layout) -> Callable[[str], str | None]:
    """Dense tensor and module names are mapped to those of the slim model; None for what is gone."""
    moved: dict[str, str | None] = {}
    for stack in layout.stacks:
        position = 0
        for path in stack.paths():
            moved[path] = None if path in recipe.removed else f"{stack.path}.{position}"
            position += path not in recipe.removed

    def rename(name: str) -> str | None:
        for path in _parents(name):
            if path in moved:
                new = moved[path]
                return None if new is None else new + name[len(path) :]
        return name

    return rename


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _drop_blocks(model: PreTrainedModel, recipe: Recipe, layout: Layout) -> None:
    if not recipe.removed:
        return
    for position, stack in enumerate(layout.stacks):
        kept = [index for index, path in enumerate(stack.paths()) if path not in recipe.removed]
        if len(kept) == len(stack.blocks):
            continue
        blocks = model.get_submodule(stack.path)
        shorter = copy_config(part_of(model.config, layout.part))
        keep_layers(shorter, layout.count_field, layout.depth, kept if position == 0 else range(layout.depth))
        longer = part_of(model.config, layout.part)
        for new, old in enumerate(kept):
            twins = _Twins(longer, shorter, old, new)
            twins.renumber(blocks.get_submodule(str(old)))
            if position == 0:
                twins.mark(blocks.get_submodule(str(old)))
        for config in _configs(model, layout) if position == 0 else ():
            keep_layers(config, layout.count_field, layout.depth, kept)
        for old in reversed(range(len(stack.blocks))):
            if old not in kept and isinstance(blocks, nn.ModuleList):
                del blocks[old]


def _configs(model: PreTrainedModel, layout: Layout) -> list[PreTrainedConfig]:
    found = {id(config): config for config in [part_of(model.config, layout.part)]}
    for path in layout.blocks():
        for module in model.get_submodule(path).modules():
            config = vars(module).get("config")
            if isinstance(config, PreTrainedConfig):
                found[id(config)] = config
    return list(found.values())


@dataclass(frozen=True)
class _Twins:
    """A block built twice, where it was and where it goes: what differs with the place is its index.

    Attributes:
        longer: Config of all layers.
        shorter: Config of the kept layers.
        old: Index before.
        new: Index after.
    """

    longer: PreTrainedConfig
    shorter: PreTrainedConfig
    old: int
    new: int

    def renumber(self, block: nn.Module) -> None:
        """Attributes that hold the block's index take the new one."""
        if self.old == self.new:
            return
        before, after = _numbers(block, self.longer, self.old), _numbers(block, self.shorter, self.new)
        for path, module in block.named_modules():
            for name, value in vars(module).items():
                if type(value) is not int or value != self.old or name.startswith("_"):
                    continue
                key = (path, name)
                known = key in before and key in after
                follows = (before[key], after[key]) == (self.old, self.new) if known else _names_index(name)
                if follows:
                    vars(module)[name] = self.new

    def mark(self, block: nn.Module) -> None:
        """A block of a kind that its class does not build at its new index says where it was built."""
        if PLACE in vars(block):
            return
        here, there = _built(block, self.longer, self.old), _built(block, self.shorter, self.new)
        if here is None or there is None or _kinds(here) == _kinds(there):
            return
        plain = {name: value for name, value in vars(self.longer).items() if type(value) in (int, list, tuple)}
        fields = {name: value for name, value in plain.items() if vars(self.shorter)[name] != value}
        vars(block)[PLACE] = {"index": self.old, "fields": fields}


def _kinds(block: nn.Module) -> dict[str, type]:
    tensors = {name: type(p) for name, p in block.named_parameters(remove_duplicate=False)}
    return {**{path: type(module) for path, module in block.named_modules()}, **tensors}


def _built(block: nn.Module, config: PreTrainedConfig, index: int) -> nn.Module | None:
    builder = block_builder(block)
    try:
        with on_meta():
            return None if builder is None else builder(copy_config(config), index)
    except Exception:
        return None


def _names_index(name: str) -> bool:
    return name.endswith(("idx", "index", "layer_id"))


def _numbers(block: nn.Module, config: PreTrainedConfig, index: int) -> Mapping[tuple[str, str], Number]:
    built = _built(block, config, index)
    return {} if built is None else take_snapshot(built).numbers
