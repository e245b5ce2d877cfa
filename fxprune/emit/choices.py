"""Ways to give one block its wanted shapes, likeliest first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice, product

from torch import nn

from fxprune.emit.layout import Rebuilder
from fxprune.emit.patch import Patches, leaf_patches, merged, scope_patches
from fxprune.emit.snapshot import MISSING_AXIS, Axis, Shape, Snapshot, mismatches, shapes_of, take_snapshot
from fxprune.emit.solve import Search, explicit_fields, minimal, with_companions
from fxprune.graph.facts import within

__all__ = ["Choice", "Outside", "SharedWidths", "choices_for", "gap_between", "shared_widths_for"]

_MOST_SOLUTIONS = 3
"""Bounds the time: each is combined with every choice for the blocks. Those with the fewest fields come first."""


@dataclass(frozen=True)
class SharedWidths:
    """One way to give everything around the blocks its wanted shapes.

    Args:
        fields: config fields that the whole model is built with.
        written_afterwards: config fields that no class accepts while it is built, and their values afterwards.
    """

    fields: Mapping[str, int]
    written_afterwards: Mapping[str, int] = field(default_factory=dict)

    def patches(self, rebuilder: Rebuilder, wanted: Mapping[str, Shape], extra: Mapping[str, int]) -> Patches:
        """Return attributes to set outside the blocks, given further fields that the whole model is built with."""
        module = rebuilder.build({**self.fields, **extra})
        return {} if module is None else leaf_patches(module, wanted, rebuilder.skip)


def shared_widths_for(rebuilder: Rebuilder, wanted: Mapping[str, Shape]) -> list[SharedWidths]:
    """Return ways to reach the wanted shapes outside the blocks, the likeliest first.

    Args:
        rebuilder: the model around its blocks.
        wanted: shapes by name outside the blocks.
    """
    dense = rebuilder.observe({})
    if dense is None:
        return []
    wrong = mismatches(dense.shapes, wanted)
    if not wrong:
        return [SharedWidths({})]
    optional = explicit_fields(rebuilder, dense)
    search = Search(rebuilder, optional, wanted)
    solutions = [minimal(rebuilder, {}, fields, optional) for fields in search.solutions()]
    solutions.sort(key=len)
    found = [SharedWidths(fields) for fields in solutions[:_MOST_SOLUTIONS]]
    partial = SharedWidths(minimal(rebuilder, {}, search.best, optional)) if search.best else None
    written_afterwards = {} if found else _foreseen(search)
    return [*found, *([partial] if partial else []), SharedWidths({}, written_afterwards)]


def _foreseen(search: Search) -> dict[str, int]:
    """Return the one field that would mend every wrong axis, were its value not refused by a constructor."""
    wrong = search.wrong({}) or frozenset()
    axes = [axis for axis in wrong if axis[1] != MISSING_AXIS]
    for name in search.rebuilder.known(search.base):
        values = [search.steps({}, name, frozenset({axis})) for axis in axes]
        if not axes or not all(value and value == values[0] for value in values):
            continue
        if search.rebuilder.observe({**search.base, name: values[0][0]}) is None:
            return {name: values[0][0]}
    return {}


Outside = Callable[[Mapping[str, int]], int]
"""Counts the shapes outside the blocks that an assignment of config fields would get wrong."""
_MOST_COMBINATIONS = 8
"""Bounds the ways to size the parts of a block apart, whose number is a product; the likeliest come first."""


@dataclass(frozen=True)
class Choice:
    """One way to build a block.

    Args:
        fields: config fields of this block, relative to the model's dense config.
        patches: attributes to set afterwards, by module path within the block.
        gap: tensors that the fields alone do not reach, in words; empty where they reach all.
        as_dense: whether integer attributes start from those of the dense block, not of the rebuilt one.
    """

    fields: Mapping[str, int]
    patches: Patches = field(default_factory=dict)
    gap: tuple[str, ...] = ()
    as_dense: bool = False


def choices_for(
    block: nn.Module,
    rebuilder: Rebuilder | None,
    bases: Sequence[Mapping[str, int]],
    wanted: Mapping[str, Shape],
    outside: Outside,
) -> Iterator[Choice]:
    """Yield different ways to reach the wanted shapes, the likeliest first; each is looked for as it is asked for.

    First config fields alone, then fields for what they reach and attributes for the rest as a block of
    another size would have them, last the attributes of the resized tensors' own modules alone.

    Args:
        block: the dense block.
        rebuilder: builds it again; None where its class cannot be called.
        bases: fields to start from: those that the whole model changes, else none.
        wanted: shapes by name within the block.
        outside: number of shapes outside the blocks that an assignment would get wrong.
    """
    if rebuilder is None:
        have = shapes_of(block)
        patches, gap = leaf_patches(block, wanted), gap_between(have, wanted)
        yield Choice({}) if have == wanted else Choice({}, patches, gap, as_dense=True)
        return
    found: list[Choice] = []
    for base in bases:
        for choice in _from(block, rebuilder, base, wanted, outside):
            if choice not in found:
                found.append(choice)
                yield choice
        if found and not found[0].gap:
            break
    last = _by_leaves(block, rebuilder, {}, wanted)
    if last not in found:
        yield last


def _from(
    block: nn.Module, rebuilder: Rebuilder, base: Mapping[str, int], wanted: Mapping[str, Shape], outside: Outside
) -> Iterator[Choice]:
    dense = rebuilder.observe(base)
    if dense is None:
        return
    if not mismatches(dense.shapes, wanted):
        yield Choice(base)
        return
    optional = explicit_fields(rebuilder, dense)
    fixed = {**base, **optional}
    search = Search(rebuilder, fixed, wanted)
    solved = [with_companions(rebuilder, fixed, fields) for fields in search.solutions()]
    direct = [minimal(rebuilder, base, fields, optional) for fields in solved]
    rank = _Rank(rebuilder, base, take_snapshot(block), wanted, outside)
    for fields in sorted(direct, key=rank) if len(direct) > 1 else direct:
        yield Choice({**base, **fields})
    partial = {**base, **minimal(rebuilder, base, search.best, optional)}
    yield from _virtual(block, rebuilder, {**fixed, **search.best}, partial, rank)


@dataclass(frozen=True)
class _Rank:
    """An order of assignments: little harm elsewhere first, then few changed floats, then few fields."""

    rebuilder: Rebuilder
    base: Mapping[str, int]
    dense: Snapshot
    wanted: Mapping[str, Shape]
    outside: Outside

    def __call__(self, fields: Mapping[str, int]) -> tuple[int, int, int, int]:
        full = {**self.base, **fields}
        seen = self.rebuilder.observe(full)
        if seen is None:
            return (len(self.wanted), 0, 0, 0)
        scalars = sum(self.dense.scalars.get(key, value) != value for key, value in seen.scalars.items())
        return (self.outside(full), len(mismatches(seen.shapes, self.wanted)), scalars, len(fields))


def _virtual(
    block: nn.Module, rebuilder: Rebuilder, here: Mapping[str, int], partial: Mapping[str, int], rank: _Rank
) -> list[Choice]:
    """Return choices with attributes as in a block of the wanted sizes where they change, and of others elsewhere."""
    now, module = rebuilder.observe(here), rebuilder.build(partial)
    if now is None or module is None:
        return []
    wrong = mismatches(now.shapes, rank.wanted)
    if not wrong or any(axis == MISSING_AXIS for _, axis in wrong):
        return []
    moves = _moves(rebuilder, here, wrong, rank)
    if not moves and len(parts := _apart(wrong)) > 1:
        each = [[*_moves(rebuilder, here, part, rank), {}] for part in parts]
        moves = [functools.reduce(merged, combined, {}) for combined in islice(product(*each), _MOST_COMBINATIONS)]
    found: list[Choice] = []
    inside = dict(module.named_modules())
    for moved in moves:
        here_too = {path: patch for path, patch in moved.items() if path in inside}
        patches = merged(here_too, leaf_patches(module, rank.wanted))
        found.append(Choice(partial, patches, gap_between(shapes_of(module), rank.wanted)))
    return [*_distinct(found), _by_leaves(block, rebuilder, partial, rank.wanted)]


def _apart(wrong: frozenset[Axis]) -> list[frozenset[Axis]]:
    """Return axes by the part of the block that they are in: each part may be that of a block of another size."""
    parts: dict[str, set[Axis]] = {}
    for name, axis in sorted(wrong):
        parts.setdefault(name.partition(".")[0], set()).add((name, axis))
    return [frozenset(part) for part in parts.values()]


def _moves(rebuilder: Rebuilder, here: Mapping[str, int], wrong: frozenset[Axis], rank: _Rank) -> list[Patches]:
    """Return attributes as in blocks whose sizes are those wanted on the axes in ``wrong``, the likeliest first."""
    now = rebuilder.observe(here)
    if now is None:
        return []
    search = Search(rebuilder, here, rank.wanted, wrong)
    solutions = search.solutions()
    for fields in list(solutions) or [{}]:
        solutions.extend(search.scaled(fields, _ratios(now, rank.wanted, wrong)))
    solutions = [with_companions(rebuilder, here, fields) for fields in solutions]
    solutions.sort(key=lambda fields: rank({**here, **fields}))
    seen = (rebuilder.observe({**here, **fields}) for fields in solutions)
    return [
        {path: patch for path, patch in scope_patches(now, after, wrong).items() if not _sized_apart(path, after, rank)}
        for after in seen
        if after is not None
    ]


def _sized_apart(path: str, after: Snapshot, rank: _Rank) -> bool:
    """Whether a module holds tensors alone, and they are of other sizes than wanted: its attributes follow from them.

    Where they are as wanted, an attribute that no tensor tells, such as in how many groups a norm is taken, is right.
    """
    inside = {name: shape for name, shape in after.shapes.items() if within(name, (path,))}
    is_leaf = all(name.rpartition(".")[0] == path for name in inside)
    return is_leaf and any(rank.wanted.get(name, shape) != shape for name, shape in inside.items())


def _ratios(now: Snapshot, wanted: Mapping[str, Shape], wrong: frozenset[Axis]) -> frozenset[Fraction]:
    return frozenset(Fraction(wanted[name][axis], now.shapes[name][axis]) for name, axis in wrong)


def _by_leaves(
    block: nn.Module, rebuilder: Rebuilder, fields: Mapping[str, int], wanted: Mapping[str, Shape]
) -> Choice:
    """Return the block with its dense attributes, save for the modules that own a resized tensor."""
    module = rebuilder.build(fields)
    as_dense = module is None or (not fields and shapes_of(module) != shapes_of(block))
    source = block if module is None or as_dense else module
    return Choice(fields, leaf_patches(source, wanted), gap_between(shapes_of(source), wanted), as_dense)


def gap_between(have: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> tuple[str, ...]:
    """Return the tensors whose shapes differ, in words."""
    names = sorted({name for name, _ in mismatches(have, wanted)})
    return tuple(f"{name}: wanted {wanted.get(name)}, obtained {have.get(name)}" for name in names)


def _distinct(choices: list[Choice]) -> list[Choice]:
    found: list[Choice] = []
    for choice in choices:
        if choice not in found:
            found.append(choice)
    return found
