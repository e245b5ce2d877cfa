"""What a model has otherwise than its stock class builds it: plain data, and the actions that make it so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from fxprune.modelling.block_config import block_config
from fxprune.modelling.blocks import CannotBuildError, block_builder, list_and_index
from fxprune.modelling.table_rows import select_inputs

__all__ = ["OVERRIDES", "Overrides", "apply_overrides", "build_blocks"]

OVERRIDES = "fxprune_overrides"
"""The attribute of a model that holds the overrides it was built with, as far as they cannot be read off it."""


@dataclass(frozen=True)
class Overrides:
    """What a model has otherwise than its stock class builds it from its config; JSON values throughout.

    Blocks, modules and tensors go by their names in the model.

    Args:
        block_fields: by block, the config fields in which it differs from the model's config.
        absent: by block, fields of the model's config that its own config lacks.
        built_at: by block whose class builds another kind at its index, the ``index`` at which it builds this kind,
            and the ``fields`` of the config there.
        built_with: config fields that the model's class wants at these values while it is built.
        written_afterwards: config fields that are given these values once the model is built.
        attributes: by module, attributes that are set once it is built.
        shapes: by parameter or buffer, the shape it has where no field gives it that.
        buffers: the same of buffers that a checkpoint has to hold although the class makes them itself.
        inputs: by module and argument, what :func:`select_inputs` takes.
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
        """Return the overrides of a module of the model, by names in that module.

        Args:
            root: its path; empty for the model itself.
        """
        whole = {"built_with", "written_afterwards"}
        named = {entry.name: getattr(self, entry.name) for entry in fields(Overrides) if entry.name not in whole}
        return replace(self, **{name: _below(values, root) for name, values in named.items()}) if root else self


def _below(values: Mapping[str, Any], root: str) -> dict[str, Any]:
    inside = {path: value for path, value in values.items() if f"{path}.".startswith(f"{root}.")}
    return {path[len(root) + 1 :]: value for path, value in inside.items()}


def build_blocks(
    model: nn.Module, config: PreTrainedConfig, overrides: Overrides, like: nn.Module | None = None
) -> None:
    """Build those blocks of a model again that have a config or a kind of their own.

    Args:
        model: as its stock class builds it.
        config: the config that its blocks are built from.
        overrides: which blocks differ, and how.
        like: the model whose blocks say of which class to build them; by default ``model`` itself.

    Raises:
        CannotBuildError: a block's class asks for more than a config and an index.
    """
    source = model if like is None else like
    for path in dict.fromkeys((*overrides.block_fields, *overrides.absent, *overrides.built_at)):
        blocks, index = list_and_index(model, path)
        block = source.get_submodule(path)
        build = block_builder(type(block), overrides.built_at.get(path), vars(block))
        if build is None:
            raise CannotBuildError(f"{path}: its class is not called with a config and an index")
        own = block_config(config, overrides.block_fields.get(path, {}), overrides.absent.get(path, ()))
        blocks[index] = build(own, index)


def apply_overrides(model: nn.Module, overrides: Overrides) -> None:
    """Set the attributes, shapes and inputs of a model that no config field drives.

    Args:
        model: with its blocks as they are to be.
        overrides: what is set.
    """
    for path, values in overrides.attributes.items():
        _set_attributes(model.get_submodule(path), values)
    for name, shape in {**overrides.shapes, **overrides.buffers}.items():
        _resize(model, name, shape)
    for name in overrides.buffers:
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._non_persistent_buffers_set.discard(leaf)
    for path, entries in overrides.inputs.items():
        select_inputs(model.get_submodule(path), entries)


def _set_attributes(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Set attributes; a list, as JSON has them, becomes a tuple where there was one."""
    held = vars(module)
    for name, value in values.items():
        kind = type(held.get(name))
        held[name] = kind(value) if issubclass(kind, tuple) else value


def _resize(model: nn.Module, name: str, shape: Sequence[int]) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    old = owner._parameters.get(leaf)
    if old is not None:
        new = torch.empty(tuple(shape), dtype=old.dtype, device=old.device)
        owner._parameters[leaf] = nn.Parameter(new, requires_grad=old.requires_grad)
    elif (buffer := owner._buffers.get(leaf)) is not None:
        owner._buffers[leaf] = torch.empty(tuple(shape), dtype=buffer.dtype, device=buffer.device)
