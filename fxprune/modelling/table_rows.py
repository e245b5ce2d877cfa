"""Modules that take, of a table made for all units, the rows of those they have."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

__all__ = ["INPUTS", "select_inputs"]

INPUTS = "fxprune_inputs"
"""The attribute of a module that holds what :func:`select_inputs` was given."""


class _SelectInputs:
    """A forward pre-hook that selects units of what is passed to a module."""

    part_of_model: ClassVar[bool] = True  # without it the model computes something else, so copies have it too

    def __init__(self, names: list[str], entries: Mapping[str, Mapping[str, Any]]) -> None:
        self.names, self.entries = names, entries

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        placed = dict(zip(self.names, args, strict=False))
        chosen = {name: self._chosen(name, value) for name, value in placed.items()}
        named = {name: self._chosen(name, value) for name, value in kwargs.items()}
        return (*chosen.values(), *args[len(placed) :]), named

    def _chosen(self, name: str, value: Any) -> Any:
        entry = self.entries.get(name)
        if entry is None or not isinstance(value, torch.Tensor) or value.dim() <= entry["axis"]:
            return value
        axis, units = entry["axis"], entry["of"]
        if value.shape[axis] % units:
            return value  # one row for all units: it broadcasts
        apart = value.unflatten(axis, (-1, units))
        runs = [apart.narrow(axis + 1, first, count) for first, count in _runs(entry["kept"])]
        return (torch.cat(runs, dim=axis + 1) if len(runs) > 1 else runs[0]).flatten(axis, axis + 1)


def _runs(kept: list[int]) -> list[tuple[int, int]]:
    """Return the first number and the length of each run of consecutive numbers."""
    starts = [i for i in range(len(kept)) if i == 0 or kept[i] != kept[i - 1] + 1]
    return [(kept[i], end - i) for i, end in zip(starts, [*starts[1:], len(kept)], strict=True)]


def select_inputs(module: nn.Module, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Let a module take no more of a table than it has units for, such as a bias of each attention head.

    The model makes the table for all units, by their number, and passes it to every block; a block that lost some takes
    the rows of those it has.

    Args:
        module: a module of a model.
        entries: by argument of its forward: ``axis``, ``of`` (how many units the table has there for each sample) and
            ``kept`` (the numbers of those that go in).
    """
    held = {name: dict(entry) for name, entry in entries.items()}
    vars(module)[INPUTS] = held
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    module.register_forward_pre_hook(_SelectInputs(names, held), with_kwargs=True)
