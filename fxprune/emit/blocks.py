"""Removal of whole blocks from a model, and row selection in the tables passed to those that remain."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from fxprune.emit.layout import BlockStack, Layout
from fxprune.emit.load import run_on_meta
from fxprune.emit.snapshot import build_on_meta, keep_blocks, part_of, take_snapshot, without_storage
from fxprune.graph.context import Refusal
from fxprune.graph.facts import within
from fxprune.modelling.blocks import BUILT_AT, builder_of, names_index, renumber
from fxprune.modelling.table_rows import INPUTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["KeptUnits", "combined_inputs", "find_inputs", "remove_blocks"]


def remove_blocks(model: PreTrainedModel, removed: Collection[str], layout: Layout) -> None:
    """Remove blocks from a model, which is changed in place, and from its config, and renumber the others."""
    for stack in layout.stacks:
        kept = [index for index, path in enumerate(stack.paths()) if path not in removed]
        if len(kept) < len(stack.blocks):
            _shorten(model, layout, stack, kept)


def _shorten(model: PreTrainedModel, layout: Layout, stack: BlockStack, kept: Sequence[int]) -> None:
    """Shorten one list of blocks. The config counts the blocks of the first list only."""
    counted = stack is layout.stacks[0]
    blocks, whole = model.get_submodule(stack.path), part_of(model.config, layout.part)
    shorter = copy.deepcopy(whole)
    if counted:
        keep_blocks(shorter, layout.count_field, layout.depth, kept)
    for new, old in enumerate(kept):
        if old != new or counted:
            _move(blocks.get_submodule(str(old)), (whole, old), (shorter, new), counted)
    if counted:
        held = [vars(m).get("config") for path in layout.blocks() for m in model.get_submodule(path).modules()]
        configs = {id(config): config for config in (whole, *held) if isinstance(config, PreTrainedConfig)}
        for config in configs.values():
            keep_blocks(config, layout.count_field, layout.depth, kept)
    for old in reversed(range(len(stack.blocks))):
        if old not in kept and isinstance(blocks, nn.ModuleList):
            del blocks[old]


def _move(
    block: nn.Module, before: tuple[PreTrainedConfig, int], after: tuple[PreTrainedConfig, int], counted: bool
) -> None:
    """Set the attributes of a block that hold its index, and record where it was built if its class chooses by index.

    It is built at both indices, from the config of all blocks and from that of the kept ones: an attribute that differs
    between the two is the index, and a block of another kind shows that its class chooses the kind by index.
    """
    found: list[nn.Module | None] = []
    for config, index in (before, after):
        builder = builder_of(block)
        built = None if builder is None else build_on_meta(builder, copy.deepcopy(config), index)
        found.append(None if isinstance(built, Refusal) else built)
    here, there = found
    (whole, old), (shorter, new) = before, after
    numbers, numbers_there = ({} if one is None else take_snapshot(one).numbers for one in found)

    def follows(path: str, name: str) -> bool:
        key = (path, name)
        if key in numbers and key in numbers_there:
            return (numbers[key], numbers_there[key]) == (old, new)
        return names_index(name)

    renumber(block, old, new, follows)
    if not counted or BUILT_AT in vars(block) or here is None or there is None or _kinds(here) == _kinds(there):
        return
    plain = {name: value for name, value in vars(whole).items() if type(value) in (int, list, tuple)}
    fields = {name: value for name, value in plain.items() if vars(shorter)[name] != value}
    vars(block)[BUILT_AT] = {"index": old, "fields": fields}


def _kinds(block: nn.Module) -> dict[str, type]:
    tensors = {name: type(p) for name, p in block.named_parameters(remove_duplicate=False)}
    return {**{path: type(module) for path, module in block.named_modules()}, **tensors}


KeptUnits = Mapping[str, Mapping[int, Sequence[int]]]
"""By module path of a block (empty for all blocks) and number of units before, the numbers of those that remain."""

_SAMPLES = 7
"""A batch size unlike any number of heads: it tells an axis of all samples' units from one of a sample's."""


def find_inputs(
    model: PreTrainedModel,
    slim: nn.Module,
    layout: Layout,
    kept_units: KeptUnits,
    inputs: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Find the arguments in which modules with fewer units than before receive all of them, by a dense forward pass.

    An argument counts if one of its axes has the length of all units, for one sample or for all samples together. The
    result is as :func:`fxprune.modelling.table_rows.select_inputs` takes it, by dense module path.

    Args:
        model: a copy of the dense model on ``meta``, to be thrown away.
        slim: the slim model on ``meta``, before blocks are removed.
        inputs: of the shapes that the model runs on, for any number of samples; token ids by default.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path, (units, kept) in _shrunk(model, slim, layout, kept_units).items():
        recorder = partial(_record_tables, found.setdefault(path, {}), units, kept)
        model.get_submodule(path).register_forward_pre_hook(recorder, with_kwargs=True)
    with without_storage():
        tokens = {"input_ids": torch.zeros(1, 5, dtype=torch.long)}
        values = {name: value for name, value in (inputs or tokens).items() if isinstance(value, torch.Tensor)}
        given = {name: torch.empty(_SAMPLES, *value.shape[1:], dtype=value.dtype) for name, value in values.items()}
    run_on_meta(model, given)
    taking = {path: entries for path, entries in found.items() if entries}
    # a block may count the units of the attention that it passes the table on to: select only in the innermost module
    return {path: entries for path, entries in taking.items() if not any(within(inner, (path,)) for inner in taking)}


def _shrunk(
    model: nn.Module, slim: nn.Module, layout: Layout, kept_units: KeptUnits
) -> dict[str, tuple[int, list[int]]]:
    """Return, by path, the modules with fewer units: the number of units before and the numbers of those that remain.

    They are the modules with an attribute that held the old number of units and holds the new one.
    """
    found: dict[str, tuple[int, list[int]]] = {}
    twins: dict[str, nn.Module] = dict(slim.named_modules())
    for block in layout.blocks():
        known = {**kept_units.get("", {}), **kept_units.get(block, {})}
        for path, module in model.get_submodule(block).named_modules(prefix=block) if known else ():
            there = vars(twins[path]) if path in twins else {}
            held = [(value, there.get(name)) for name, value in vars(module).items() if type(value) is int]
            counted = dict(known)  # also among the units that a module of a pruned model selects already
            for entry in vars(module).get(INPUTS, {}).values():
                if entry["of"] in known:
                    left = set(known[entry["of"]])
                    counted[len(entry["kept"])] = [i for i, unit in enumerate(entry["kept"]) if unit in left]
            for units, kept in counted.items():
                if (units, len(kept)) in held:
                    found[path] = (units, list(kept))
                    break
    return found


def _record_tables(
    found: dict[str, dict[str, Any]],
    units: int,
    kept: list[int],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        shape = list(value.shape) if isinstance(value, torch.Tensor) else []
        axes = [shape.index(size) for size in (_SAMPLES * units, units) if size in shape]
        if axes:
            found[name] = {"axis": axes[0], "of": units, "kept": kept}


def combined_inputs(
    model: nn.Module, more: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Compose the row selections that a model has already with further ones, by module path and argument.

    The further ones are counted among the rows that are selected already.
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
