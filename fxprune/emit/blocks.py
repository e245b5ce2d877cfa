"""Blocks taken out of a model, and the tables passed to those that remain."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fxprune.emit.layout import BlockStack, Layout
from fxprune.emit.load import run_on_meta
from fxprune.emit.snapshot import Number, build_on_meta, keep_blocks, part_of, take_snapshot
from fxprune.graph.context import Refusal
from fxprune.graph.facts import within
from fxprune.modelling.blocks import BUILT_AT, builder_of, names_index, renumber
from fxprune.modelling.table_rows import INPUTS

__all__ = ["Inputs", "Numbered", "combined_inputs", "find_inputs", "remove_blocks"]


def remove_blocks(model: PreTrainedModel, removed: Collection[str], layout: Layout) -> None:
    """Take blocks out of a model and tell its config; the others get their new index.

    Args:
        model: the slim model, with as many blocks as the dense one; changed in place.
        removed: module paths of the blocks that go.
        layout: where blocks are.
    """
    for stack in layout.stacks:
        kept = [index for index, path in enumerate(stack.paths()) if path not in removed]
        if len(kept) < len(stack.blocks):
            _shorten(model, layout, stack, kept)


def _shorten(model: PreTrainedModel, layout: Layout, stack: BlockStack, kept: Sequence[int]) -> None:
    """Shorten one list of blocks. The config counts those of the first alone."""
    counted = stack is layout.stacks[0]
    blocks, whole = model.get_submodule(stack.path), part_of(model.config, layout.part)
    shorter = copy.deepcopy(whole)
    if counted:
        keep_blocks(shorter, layout.count_field, layout.depth, kept)
    for new, old in enumerate(kept):
        move = _Move(whole, shorter, old, new)
        move.renumber(blocks.get_submodule(str(old)))
        if counted:
            move.mark(blocks.get_submodule(str(old)))
    for config in _configs(model, layout) if counted else ():
        keep_blocks(config, layout.count_field, layout.depth, kept)
    for old in reversed(range(len(stack.blocks))):
        if old not in kept and isinstance(blocks, nn.ModuleList):
            del blocks[old]


def _configs(model: PreTrainedModel, layout: Layout) -> list[PreTrainedConfig]:
    """Return the config that the blocks are built from, and those that they hold."""
    whole = part_of(model.config, layout.part)
    held = [vars(m).get("config") for path in layout.blocks() for m in model.get_submodule(path).modules()]
    return list({id(config): config for config in (whole, *held) if isinstance(config, PreTrainedConfig)}.values())


@dataclass(frozen=True)
class _Move:
    """A block that moves up: built where it was and where it goes, what differs with the place is its index.

    Args:
        whole: config of all blocks.
        shorter: config of the kept blocks.
        old: index before.
        new: index after.
    """

    whole: PreTrainedConfig
    shorter: PreTrainedConfig
    old: int
    new: int

    def renumber(self, block: nn.Module) -> None:
        """Give attributes that hold the block's index the new one."""
        if self.old == self.new:
            return
        before, after = _numbers(block, self.whole, self.old), _numbers(block, self.shorter, self.new)

        def follows(path: str, name: str) -> bool:
            key = (path, name)
            if key in before and key in after:
                return (before[key], after[key]) == (self.old, self.new)
            return names_index(name)

        renumber(block, self.old, self.new, follows)

    def mark(self, block: nn.Module) -> None:
        """Note on a block of a kind that its class does not build at its new index where it was built."""
        if BUILT_AT in vars(block):
            return
        here, there = _built(block, self.whole, self.old), _built(block, self.shorter, self.new)
        if here is None or there is None or _kinds(here) == _kinds(there):
            return
        plain = {name: value for name, value in vars(self.whole).items() if type(value) in (int, list, tuple)}
        fields = {name: value for name, value in plain.items() if vars(self.shorter)[name] != value}
        vars(block)[BUILT_AT] = {"index": self.old, "fields": fields}


def _kinds(block: nn.Module) -> dict[str, type]:
    tensors = {name: type(p) for name, p in block.named_parameters(remove_duplicate=False)}
    return {**{path: type(module) for path, module in block.named_modules()}, **tensors}


def _built(block: nn.Module, config: PreTrainedConfig, index: int) -> nn.Module | None:
    """Return a block like this one, built on ``meta``; None where its class refuses."""
    builder = builder_of(block)
    built = None if builder is None else build_on_meta(builder, copy.deepcopy(config), index)
    return None if isinstance(built, Refusal) else built


def _numbers(block: nn.Module, config: PreTrainedConfig, index: int) -> Mapping[tuple[str, str], Number]:
    built = _built(block, config, index)
    return {} if built is None else take_snapshot(built).numbers


Numbered = Mapping[str, Mapping[int, Sequence[int]]]
"""By module path of a block (empty for all blocks), by number of units before, the numbers of those that remain."""

Inputs = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""By module path and argument, what :func:`fxprune.modelling.table_rows.select_inputs` takes."""

Shrunk = Mapping[str, tuple[int, list[int]]]
"""By module path, how many units there were and the numbers of those that remain."""

_SAMPLES = 7
"""A batch size unlike any number of heads, so that an axis of all samples' units is told from one of a sample's."""


def find_inputs(
    model: PreTrainedModel, slim: nn.Module, layout: Layout, numbered: Numbered
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what modules with fewer units than before are passed for all of them, found by running the dense model.

    An argument counts if one of its axes has the length of all units, for one sample or for all samples together.

    Args:
        model: a copy of the dense model on ``meta``, to be thrown away.
        slim: the slim model on ``meta``, before blocks are taken out.
        layout: where the blocks are.
        numbered: which units remain.

    Returns:
        What :func:`fxprune.modelling.table_rows.select_inputs` takes, by dense module path.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path, (units, kept) in _shrunk(model, slim, layout, numbered).items():
        watch = _TableWatch(found.setdefault(path, {}), units, kept)
        model.get_submodule(path).register_forward_pre_hook(watch, with_kwargs=True)
    run_on_meta(model, samples=_SAMPLES)
    taking = {path: entries for path, entries in found.items() if entries}
    # a block may count the units of the attention that it passes the table on to: it is cut once, where it ends up
    return {path: entries for path, entries in taking.items() if not any(within(inner, (path,)) for inner in taking)}


def _shrunk(model: nn.Module, slim: nn.Module, layout: Layout, numbered: Numbered) -> Shrunk:
    """Return the modules with fewer units: an attribute that held the old number holds that of those that remain."""
    found: dict[str, tuple[int, list[int]]] = {}
    twins: dict[str, nn.Module] = dict(slim.named_modules())
    for block in layout.blocks():
        known = {**numbered.get("", {}), **numbered.get(block, {})}
        for path, module in model.get_submodule(block).named_modules(prefix=block) if known else ():
            lost = _lost_units(module, twins.get(path), _of_module(module, known))
            found.update({path: lost} if lost else {})
    return found


def _of_module(module: nn.Module, known: Mapping[int, Sequence[int]]) -> dict[int, Sequence[int]]:
    """Return which units remain of those that a module selects already, counted among these, and of all."""
    found = dict(known)
    for entry in vars(module).get(INPUTS, {}).values():
        if entry["of"] in known:
            left = set(known[entry["of"]])
            found[len(entry["kept"])] = [i for i, unit in enumerate(entry["kept"]) if unit in left]
    return found


def _lost_units(
    dense: nn.Module, slim: nn.Module | None, known: Mapping[int, Sequence[int]]
) -> tuple[int, list[int]] | None:
    """Return how many units a module had and those it still has, if an attribute of the slim one says so."""
    there = {} if slim is None else vars(slim)
    held = [(value, there.get(name)) for name, value in vars(dense).items() if type(value) is int]
    return next(((units, list(kept)) for units, kept in known.items() if (units, len(kept)) in held), None)


class _TableWatch:
    """A forward pre-hook that notes the arguments with an axis of units."""

    def __init__(self, found: dict[str, dict[str, Any]], units: int, kept: list[int]) -> None:
        self.found, self.units, self.kept = found, units, kept

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            axis = next(self._axes(value), None) if isinstance(value, torch.Tensor) else None
            if axis is not None:
                self.found[name] = {"axis": axis, "of": self.units, "kept": self.kept}

    def _axes(self, value: torch.Tensor) -> Iterator[int]:
        for size in (_SAMPLES * self.units, self.units):
            yield from (axis for axis, length in enumerate(value.shape) if length == size)


def combined_inputs(model: nn.Module, more: Inputs) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what the modules of the dense model select already, less what they no longer select of that.

    Args:
        model: the dense model, itself perhaps a slim one.
        more: by its module paths.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path, module in model.named_modules():
        held = vars(module).get(INPUTS, {})
        if held or path in more:
            found[path] = {name: dict(entry) for name, entry in held.items()}
        for name, entry in more.get(path, {}).items():
            first = found[path].get(name)
            kept = entry["kept"] if first is None else [first["kept"][i] for i in entry["kept"]]
            found[path][name] = {**(first or entry), "kept": kept}
    return found
