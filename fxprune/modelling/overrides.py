"""Overrides: differences of a model from its stock class as plain data, and the functions that apply them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from fxprune.modelling.block_config import block_config
from fxprune.modelling.blocks import CannotBuildError, block_builder, flags_of, list_and_index
from fxprune.modelling.table_rows import select_inputs

__all__ = ["OVERRIDES", "Overrides", "apply_overrides", "build_blocks"]

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
        """Overrides of a module of the model, by names in that module.

        Args:
            root: its path; empty for the model itself.
        """
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
    model: nn.Module, config: PreTrainedConfig, overrides: Overrides, like: nn.Module | None = None
) -> None:
    """Rebuild the blocks of a model that have a config or a kind of their own.

    Args:
        model: as its stock class builds it.
        config: the config that its blocks are built from.
        overrides: which blocks differ, and how.
        like: the model from whose blocks the classes are taken; by default ``model`` itself.

    Raises:
        CannotBuildError: a block's class requires more than a config and an index.
    """
    source = model if like is None else like
    for path in dict.fromkeys((*overrides.block_fields, *overrides.absent, *overrides.built_at)):
        blocks, index = list_and_index(model, path)
        block = source.get_submodule(path)
        build = block_builder(type(block), overrides.built_at.get(path), flags_of(block))
        if build is None:
            raise CannotBuildError(f"{path}: its class is not called with a config and an index")
        own = block_config(config, overrides.block_fields.get(path, {}), overrides.absent.get(path, ()))
        blocks[index] = build(own, index)


def apply_overrides(model: nn.Module, overrides: Overrides) -> None:
    """Set the attributes, shapes and inputs of a model that no config field drives.

    Args:
        model: with its blocks in place.
        overrides: the values to set.
    """
    for path, values in overrides.attributes.items():
        held = vars(model.get_submodule(path))
        for name, value in values.items():
            kind = type(held.get(name))
            held[name] = kind(value) if issubclass(kind, tuple) else value  # JSON has lists for tuples
    for name, shape in {**overrides.shapes, **overrides.buffers}.items():
        _resize(model, name, shape)
    for name in overrides.buffers:
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._non_persistent_buffers_set.discard(leaf)
    for path, entries in overrides.inputs.items():
        select_inputs(model.get_submodule(path), entries)


def _resize(model: nn.Module, name: str, shape: Sequence[int]) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    old = owner._parameters.get(leaf)
    if old is not None:
        owner._parameters[leaf] = nn.Parameter(_fitted(old.detach(), shape), requires_grad=old.requires_grad)
    elif (buffer := owner._buffers.get(leaf)) is not None:
        owner._buffers[leaf] = _fitted(buffer, shape)


def _fitted(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Copy of a tensor in another shape: cut, or repeated from the start; new values if that cannot be."""
    if tensor.is_meta or tensor.dim() != len(shape) or 0 in tensor.shape:
        return tensor.new_empty(tuple(shape)).zero_()
    for axis, size in enumerate(shape):
        index = torch.arange(size, device=tensor.device) % tensor.shape[axis]
        tensor = tensor.index_select(axis, index)
    return tensor.clone()
