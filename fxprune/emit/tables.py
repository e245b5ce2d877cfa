"""Tables that a model makes by number for all units and passes to its blocks, which take the rows they need."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fxprune.emit.layout import Layout
from fxprune.emit.load import run_on_meta
from fxprune.graph.blocks import within
from fxprune.modelling.table_rows import INPUTS

__all__ = ["Inputs", "Numbered", "combined_inputs", "find_inputs"]

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
        watch = _Watch(found.setdefault(path, {}), units, kept)
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


class _Watch:
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
