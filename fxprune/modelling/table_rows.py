"""Row selection: modules that lost units take their rows of a table that the model makes for all units."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

INPUTS = "fxprune_inputs"
"""Attribute of a module with the entries that :func:`select_inputs` was given."""


class _SelectInputs:
    """A forward pre-hook that selects units in the arguments of a module."""

    part_of_model: ClassVar[bool] = True  # without the hook a copy computes something else, so copies keep it

    def __init__(self, names: list[str], entries: Mapping[str, Mapping[str, Any]]) -> None:
        self.names, self.entries = names, entries

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        placed = dict(zip(self.names, args, strict=False))
        chosen = {name: self._select(name, value) for name, value in placed.items()}
        named = {name: self._select(name, value) for name, value in kwargs.items()}
        return (*chosen.values(), *args[len(placed) :]), named

    def _select(self, name: str, value: Any) -> Any:
        entry = self.entries.get(name)
        if entry is None or not isinstance(value, torch.Tensor) or value.dim() <= entry["axis"]:
            return value
        axis, units = entry["axis"], entry["of"]
        if value.shape[axis] % units:
            return value  # it has one row for all units, and broadcasts
        rows = value.unflatten(axis, (-1, units))
        runs = [rows.narrow(axis + 1, first, count) for first, count in _runs(entry["kept"])]
        return (torch.cat(runs, dim=axis + 1) if len(runs) > 1 else runs[0]).flatten(axis, axis + 1)


def _runs(kept: list[int]) -> list[tuple[int, int]]:
    """First number and length of each run of consecutive numbers."""
    starts = [i for i in range(len(kept)) if i == 0 or kept[i] != kept[i - 1] + 1]
    return [(kept[i], end - i) for i, end in zip(starts, [*starts[1:], len(kept)], strict=True)]


def select_inputs(module: nn.Module, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Select the rows of a table for the units that a module has, such as a bias for each attention head.

    The model makes the table for all units, by their number, and passes it to every block.

    Args:
        entries: by argument of its forward: ``axis``, ``of`` (number of units in the table, per sample) and ``kept``
            (the numbers of the units that the module has).
    """
    held = {name: dict(entry) for name, entry in entries.items()}
    vars(module)[INPUTS] = held
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    module.register_forward_pre_hook(_SelectInputs(names, held), with_kwargs=True)
