"""Ways to give one block, and the model around the blocks, their wanted shapes; the likeliest first."""

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

__all__ = ["Choice", "SharedWidths", "choices_for", "shared_widths_for"]

_MOST_SOLUTIONS = 3
"""Bounds the time: each is combined with every choice for the blocks. Those with the fewest fields come first."""


@dataclass(frozen=True)
class SharedWidths:
    """One way to give everything around the blocks its wanted shapes.

    Args:
        fields: config fields that the whole model is built with.
        written_afterwards: config fields whose values no class accepts while it is built; set once it is built.
    """

    fields: Mapping[str, int]
    written_afterwards: Mapping[str, int] = field(default_factory=dict)

    def patches(self, rebuilder: Rebuilder, wanted: Mapping[str, Shape], extra: Mapping[str, int]) -> Patches:
        """Return attributes to set outside the blocks, given further fields that the whole model is built with."""
        module = rebuilder.build({**self.fields, **extra})
        return {} if module is None else leaf_patches(module, wanted, rebuilder.skip)


def shared_widths_for(rebuilder: Rebuilder, wanted: Mapping[str, Shape]) -> list[SharedWidths]:
    """Return ways to reach the wanted shapes outside the blocks, the likeliest first."""
    dense = rebuilder.observe({})
    if dense is None:
        return []
    if not mismatches(dense.shapes, wanted):
        return [SharedWidths({})]
    optional = explicit_fields(rebuilder, dense)
    search = Search(rebuilder, optional, wanted)
    solutions = [minimal(rebuilder, {}, fields, optional) for fields in search.solutions()]
    solutions.sort(key=len)
    found = [SharedWidths(fields) for fields in solutions[:_MOST_SOLUTIONS]]
    partial = [SharedWidths(minimal(rebuilder, {}, search.best, optional))] if search.best else []
    return [*found, *partial, SharedWidths({}, {} if found else _refused_field(search))]


def _refused_field(search: Search) -> dict[str, int]:
    """Return the one field that would fix every wrong axis if its value were not refused by a constructor."""
    wrong = search.wrong({}) or frozenset()
    axes = [axis for axis in wrong if axis[1] != MISSING_AXIS]
    for name in search.rebuilder.known(search.base):
        values = [search.steps({}, name, frozenset({axis})) for axis in axes]
        if not axes or not all(value and value == values[0] for value in values):
            continue
        if search.rebuilder.observe({**search.base, name: values[0][0]}) is None:
            return {name: values[0][0]}
    return {}


_MOST_COMBINATIONS = 8
"""Bounds the ways to size the parts of a block separately, whose number is a product; the likeliest come first."""


@dataclass(frozen=True)
class Choice:
    """One way to build a block.

    Args:
        fields: config fields of this block, relative to the model's dense config.
        patches: attributes to set afterwards, by module path within the block.
        gap: tensors that the fields alone do not reach, in words; empty if they reach all.
        as_dense: whether integer attributes start from those of the dense block instead of the rebuilt one.
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
    harm: Callable[[Mapping[str, int]], int],
) -> Iterator[Choice]:
    """Yield different ways to reach the wanted shapes, the likeliest first and lazily.

    First config fields alone; then fields as far as they reach and attributes for the rest, as a block of
    another size would have them; last the attributes of the resized tensors' own modules alone.

    Args:
        rebuilder: None if its class cannot be called.
        bases: fields to start from: those that the whole model changes, else none.
        harm: counts the shapes outside the blocks that an assignment of config fields would get wrong.
    """
    if rebuilder is None:
        have = shapes_of(block)
        patches, gap = leaf_patches(block, wanted), shape_gaps(have, wanted)
        yield Choice({}) if have == wanted else Choice({}, patches, gap, as_dense=True)
        return
    ways = _Ways(block, rebuilder, wanted, harm)
    found: list[Choice] = []
    for base in bases:
        for choice in ways.from_base(base):
            if choice not in found:
                found.append(choice)
                yield choice
        if found and not found[0].gap:
            break
    last = ways.by_leaves({})
    if last not in found:
        yield last


@dataclass(frozen=True)
class _Ways:
    """The search for ways to build one block; the arguments are those of :func:`choices_for`."""

    block: nn.Module
    rebuilder: Rebuilder
    wanted: Mapping[str, Shape]
    harm: Callable[[Mapping[str, int]], int]

    @functools.cached_property
    def dense(self) -> Snapshot:
        return take_snapshot(self.block)

    def from_base(self, base: Mapping[str, int]) -> Iterator[Choice]:
        dense = self.rebuilder.observe(base)
        if dense is None:
            return
        if not mismatches(dense.shapes, self.wanted):
            yield Choice(base)
            return
        optional = explicit_fields(self.rebuilder, dense)
        fixed = {**base, **optional}
        search = Search(self.rebuilder, fixed, self.wanted)
        solved = [with_companions(self.rebuilder, fixed, fields) for fields in search.solutions()]
        direct = [minimal(self.rebuilder, base, fields, optional) for fields in solved]
        if len(direct) > 1:
            direct.sort(key=lambda fields: self.rank(base, fields))
        for fields in direct:
            yield Choice({**base, **fields})
        partial = {**base, **minimal(self.rebuilder, base, search.best, optional)}
        yield from self.with_attributes(base, {**fixed, **search.best}, partial)

    def rank(self, base: Mapping[str, int], fields: Mapping[str, int]) -> tuple[int, int, int, int]:
        """Sort key: little harm outside the blocks first, then few wrong axes, few changed floats and few fields."""
        full = {**base, **fields}
        seen = self.rebuilder.observe(full)
        if seen is None:
            return (len(self.wanted), 0, 0, 0)
        scalars = sum(self.dense.scalars.get(key, value) != value for key, value in seen.scalars.items())
        return (self.harm(full), len(mismatches(seen.shapes, self.wanted)), scalars, len(fields))

    def with_attributes(
        self, base: Mapping[str, int], here: Mapping[str, int], partial: Mapping[str, int]
    ) -> list[Choice]:
        """Return choices with the attributes that a block of the wanted sizes has where sizes change.

        ``here`` is the assignment that the search reached from ``base``, with defaults stated explicitly; ``partial``
        is the same without restated defaults, and the block is built with it.
        """
        now, module = self.rebuilder.observe(here), self.rebuilder.build(partial)
        if now is None or module is None:
            return []
        wrong = mismatches(now.shapes, self.wanted)
        if not wrong or any(axis == MISSING_AXIS for _, axis in wrong):
            return []
        moves = self.moves(base, here, wrong)
        parts: dict[str, set[Axis]] = {}
        for name, axis in sorted(wrong):
            parts.setdefault(name.partition(".")[0], set()).add((name, axis))
        if not moves and len(parts) > 1:  # each part of the block may be that of a block of another size
            each = [[*self.moves(base, here, frozenset(part)), {}] for part in parts.values()]
            moves = [functools.reduce(merged, combined, {}) for combined in islice(product(*each), _MOST_COMBINATIONS)]
        found: list[Choice] = []
        inside = dict(module.named_modules())
        gap, leaves = shape_gaps(shapes_of(module), self.wanted), leaf_patches(module, self.wanted)
        for moved in moves:
            choice = Choice(partial, merged({path: own for path, own in moved.items() if path in inside}, leaves), gap)
            if choice not in found:
                found.append(choice)
        return [*found, self.by_leaves(partial)]

    def moves(self, base: Mapping[str, int], here: Mapping[str, int], wrong: frozenset[Axis]) -> list[Patches]:
        """Return attributes as in blocks that have the wanted sizes on the axes in ``wrong``, the likeliest first."""
        now = self.rebuilder.observe(here)
        if now is None:
            return []
        search = Search(self.rebuilder, here, self.wanted, wrong)
        ratios = frozenset(Fraction(self.wanted[name][axis], now.shapes[name][axis]) for name, axis in wrong)
        solutions = search.solutions()
        for fields in list(solutions) or [{}]:
            solutions.extend(search.scaled(fields, ratios))
        solutions = [with_companions(self.rebuilder, here, fields) for fields in solutions]
        solutions.sort(key=lambda fields: self.rank(base, {**here, **fields}))
        found: list[Patches] = []
        for fields in solutions:
            after = self.rebuilder.observe({**here, **fields})
            if after is not None:
                patches = scope_patches(now, after, wrong).items()
                found.append({path: own for path, own in patches if not self.is_resized_leaf(path, after)})
        return found

    def is_resized_leaf(self, path: str, after: Snapshot) -> bool:
        """Whether a module holds tensors only, of other sizes than wanted: its attributes follow from them.

        If they are as wanted, an attribute that no tensor shows, such as the number of groups of a norm, is right.
        """
        inside = {name: shape for name, shape in after.shapes.items() if within(name, (path,))}
        is_leaf = all(name.rpartition(".")[0] == path for name in inside)
        return is_leaf and any(self.wanted.get(name, shape) != shape for name, shape in inside.items())

    def by_leaves(self, fields: Mapping[str, int]) -> Choice:
        """Return the block with its dense attributes, except in the modules that own a resized tensor."""
        module = self.rebuilder.build(fields)
        as_dense = module is None or (not fields and shapes_of(module) != shapes_of(self.block))
        source = self.block if module is None or as_dense else module
        gap = shape_gaps(shapes_of(source), self.wanted)
        return Choice(fields, leaf_patches(source, self.wanted), gap, as_dense)


def shape_gaps(have: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> tuple[str, ...]:
    names = sorted({name for name, _ in mismatches(have, wanted)})
    return tuple(f"{name}: wanted {wanted.get(name)}, obtained {have.get(name)}" for name in names)
