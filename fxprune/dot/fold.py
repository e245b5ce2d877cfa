"""Blocks that are the same but for their numbers: of each such set one is drawn, and stands for all.

Two blocks are the same where their part of the dependency graph is: the same axes made of the same kinds of units, with
the same couplings by the same ops. Sizes may differ, as they do in a slim model, and so may names: those of weights
count from the block on, activations by their place in it, and what comes in from the block before as such.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from fxprune.axes import Factor, render
from fxprune.dot.atlas import Atlas
from fxprune.graph.blocks import owner_block
from fxprune.rules.statements import Axis

__all__ = ["Fold", "find_folds", "numbered"]

_STREAM = "what comes in"


@dataclass(frozen=True)
class Fold:
    """Blocks that are the same; the first is drawn.

    Args:
        blocks: their module paths, in order.
        axes: for each axis of the first block, those in its place in all of them, in order.
        factors: the same of the factors that these axes are made of.
    """

    blocks: tuple[str, ...]
    axes: Mapping[Axis, tuple[Axis, ...]]
    factors: Mapping[Factor, tuple[Factor, ...]]

    @property
    def hidden(self) -> tuple[str, ...]:
        """The blocks that are not drawn."""
        return self.blocks[1:]


def find_folds(atlas: Atlas) -> tuple[Fold, ...]:
    """Return every block of the model, those that are the same together, in order of the first of each.

    Complexity: linear in the size of the graph.
    """
    forms = _Forms(atlas)
    alike: dict[object, list[str]] = {}
    for block in atlas.axes.blocks:
        alike.setdefault(forms.form(block), []).append(block)
    return tuple(forms.fold(blocks) for blocks in alike.values())


class _Forms:
    """What blocks look like without their names."""

    def __init__(self, atlas: Atlas) -> None:
        self.atlas = atlas
        self.home: dict[Axis, str | None] = {}
        known: dict[str, str | None] = {}
        for axis in atlas.graph.nodes:
            module = atlas.module(axis)
            if module not in known:
                known[module] = owner_block(module, atlas.axes.blocks)
            self.home[axis] = known[module]

    @cached_property
    def inside(self) -> dict[str, dict[Axis, str]]:
        """For each block its axes in order, with the name of their tensor in the block."""
        found: dict[str, dict[Axis, str]] = {block: {} for block in self.atlas.axes.blocks}
        places: dict[str, dict[str, int]] = {block: {} for block in self.atlas.axes.blocks}
        for axis, block in self.home.items():
            if block is None:
                continue
            if axis.tensor in self.atlas.weights:
                found[block][axis] = axis.tensor[len(block) + 1 :]
            else:
                found[block][axis] = f"#{places[block].setdefault(axis.tensor, len(places[block]))}"
        return found

    @cached_property
    def edges(self) -> dict[str, list[tuple[Axis, Axis, str]]]:
        """For each block the couplings by ops that are made in it."""
        modules, blocks = self.atlas.axes.modules, self.atlas.axes.blocks
        owners = {node: owner_block(module, blocks) for node, module in modules.items()}
        found: dict[str, list[tuple[Axis, Axis, str]]] = {block: [] for block in blocks}
        for a, b, data in self.atlas.graph.edges(data=True):
            block = owners.get(data["node"])
            if block is not None:
                found[block].append((a, b, data["op"]))
        return found

    @cached_property
    def readers(self) -> dict[str, set[str]]:
        """For each tensor the blocks, other than its own, that it comes into."""
        found: dict[str, set[str]] = {}
        for block, edges in self.edges.items():
            for axis in (axis for a, b, _ in edges for axis in (a, b)):
                if self.home[axis] != block:
                    found.setdefault(axis.tensor, set()).add(block)
        return found

    def form(self, block: str) -> object:
        """What is equal for two blocks that are the same."""
        names, numbers = self.inside[block], dict[Factor, int]()

        def kind(factor: Factor) -> str:
            group, freeze = self.atlas.by_factor.get(factor), self.atlas.axes.frozen.get(factor)
            if group is not None and group.block != block:
                return group.name
            own = numbers.setdefault(factor, len(numbers))
            return f"{freeze.reason} {own}" if freeze is not None else f"{group.kind if group else 'free'} {own}"

        def end(axis: Axis) -> tuple[str, int]:
            if axis in names:
                return names[axis], axis.dim
            shared = axis.tensor in self.atlas.weights or len(self.readers[axis.tensor]) > 1
            return axis.tensor if shared else _STREAM, axis.dim

        nodes = self.atlas.graph.nodes
        axes = tuple((name, axis.dim, render(nodes[axis]["expr"], kind, lambda _: "")) for axis, name in names.items())
        lines = sorted((*sorted((end(a), end(b))), op) for a, b, op in self.edges[block])
        return axes, tuple(lines), block in self.atlas.axes.bypasses

    def fold(self, blocks: Sequence[str]) -> Fold:
        """Blocks of one form, with what is in the same place in each."""
        axes = {column[0]: column for column in zip(*(self.inside[block] for block in blocks), strict=True)}
        factors: dict[Factor, tuple[Factor, ...]] = {}
        for column in axes.values():
            for row in zip(*(self.atlas.factors(axis) for axis in column), strict=True):
                factors.setdefault(row[0], row)
        return Fold(tuple(blocks), axes, factors)


def numbered(blocks: Iterable[str], among: Sequence[str]) -> str:
    """Return module paths of blocks in short, as in ``model.layers.0 to 4, 6 to 10``.

    Args:
        blocks: some blocks of a model, in order.
        among: all of them.
    """
    runs: list[list[str]] = []
    for block in blocks:
        follows = runs and among.index(runs[-1][-1]) + 1 == among.index(block) and _list(runs[-1][-1]) == _list(block)
        if follows:
            runs[-1].append(block)
        else:
            runs.append([block])
    told: list[str] = []
    before = ""
    for run in runs:
        first = run[0] if _list(run[0]) != before else _number(run[0])
        told.append(first if len(run) == 1 else f"{first} to {_number(run[-1])}")
        before = _list(run[0])
    return ", ".join(told)


def _list(block: str) -> str:
    return block.rpartition(".")[0] if re.search(r"\.\d+$", block) else block


def _number(block: str) -> str:
    return block.rpartition(".")[2]
