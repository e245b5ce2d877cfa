"""Config fields that give a block its wanted shapes: solved for one by one, and combined, the likeliest first.

Every value is rebuilt and compared, so a slope that holds only nearby costs one build and gives no wrong answer.
"""

from __future__ import annotations

import functools
import heapq
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations, islice, product

from torch import nn
from transformers import PreTrainedConfig

from fxprune.emit.layout import Rebuilder
from fxprune.emit.patch import Patches, leaf_patches, scope_patches
from fxprune.emit.snapshot import (
    MISSING_AXIS,
    Axis,
    Number,
    Shape,
    Snapshot,
    build_on_meta,
    mismatches,
    shapes_of,
    take_snapshot,
)
from fxprune.graph.facts import within

Fields = Mapping[str, int]


def with_companions(rebuilder: Rebuilder, base: Fields, fields: Fields) -> dict[str, int]:
    """Extend an assignment by the fields that must move along with it while shapes stay the same.

    A field moves by the ratio of one that has moved in two cases: the config class fills it in from that field where
    it is left out, and it held that value; or moving it restores an integer attribute of a module, such as a quotient
    of both fields, that no longer agrees with the fields.
    """
    dense, found = rebuilder.observe(base), dict(fields)
    if dense is None:
        return found
    changed = {name: (rebuilder.value(base, name), value) for name, value in fields.items()}
    ratios = {name: Fraction(value, old) for name, (old, value) in changed.items() if old and old != value}
    scales = {Fraction(1), *ratios.values()}
    for name, value in _proportional(rebuilder, base, fields, ratios):
        now, following = rebuilder.observe({**base, **found}), rebuilder.observe({**base, **found, name: value})
        if now is None or following is None or following.shapes != now.shapes:
            continue
        fewer = len(_unscaled(dense, following, scales)) < len(_unscaled(dense, now, scales))
        if fewer or any(_is_default_of(rebuilder.config, leader, name) for leader in fields):
            found[name] = value
    return found


def _proportional(
    rebuilder: Rebuilder, base: Fields, fields: Fields, ratios: Mapping[str, Fraction]
) -> Iterator[tuple[str, int]]:
    """Yield the fields that have not moved, each with its value scaled like a field that has.

    Candidates are the fields that the constructor reads and those that held the same number as a moved field.
    """
    for leader, ratio in ratios.items():
        for name, held in vars(rebuilder.config).items():
            near = name in rebuilder.reads.integers or held == rebuilder.value(base, leader)
            value = rebuilder.value(base, name) if near and name not in fields else None
            if value and (value * ratio).denominator == 1 and value * ratio > 0:
                yield name, int(value * ratio)


def _unscaled(dense: Snapshot, now: Snapshot, scales: set[Fraction]) -> set[tuple[str, str]]:
    """Return the integer attributes that changed by another ratio than any field."""

    def scaled(old: Number, new: Number) -> bool:
        before, after = (value if isinstance(value, tuple) else (value,) for value in (old, new))
        if len(before) != len(after):
            return False
        return all(b == a or (b != 0 and Fraction(a, b) in scales) for b, a in zip(before, after, strict=True))

    both = now.numbers.keys() & dense.numbers.keys()
    return {key for key in both if not scaled(dense.numbers[key], now.numbers[key])}


def _is_default_of(config: PreTrainedConfig, leader: str, name: str) -> bool:
    """Whether a config class fills in one field with the value of another, and the field has that value."""
    held = vars(config)
    value = held.get(leader)
    if type(value) is not int or held.get(name) != value:
        return False
    for number in (value, 2 if value == 1 else 1):  # 1 divides everything, and configs insist on divisibility
        made = build_on_meta(type(config).from_dict, {**config.to_dict(), leader: number, name: None})
        if not isinstance(made, PreTrainedConfig) or vars(made).get(name) != number:
            return False
    return True


_FIRST_GUESSES = ((8, 16), (4, 8), (2, 4), (1, 2))
"""Two values tried for a field without one; large ones first, since a width may have a floor."""
_SLOPES = 3
"""Slopes measured for a field: several, since a table with an entry for every second channel moves unevenly."""


def explicit_fields(rebuilder: Rebuilder, wanted: Snapshot) -> dict[str, int]:
    """Return explicit values for the fields that are unset, where they give the same module as the default.

    A head width that the class derives from two other fields unless it is given becomes a field of its own:
    the number of heads can then change alone.
    """
    found: dict[str, int] = {}
    for name in rebuilder.reads.unset:
        value = _value_of_default(rebuilder, found, name, wanted)
        seen = None if value is None else rebuilder.observe({**found, name: value})
        if value is None or seen is None or seen.shapes != wanted.shapes:
            continue
        if all(seen.numbers.get(key) == number for key, number in wanted.numbers.items() if key[1] != name):
            found[name] = value
    return found


def _value_of_default(rebuilder: Rebuilder, found: Fields, name: str, wanted: Snapshot) -> int | None:
    """Return the value of a field under which shapes are as wanted, by a line through two guesses; None if none is."""
    for low, high in _FIRST_GUESSES:
        first, second = rebuilder.observe({**found, name: low}), rebuilder.observe({**found, name: high})
        if first is None or second is None:
            continue
        if first.shapes.keys() != wanted.shapes.keys():
            return None
        values: set[Fraction] = set()
        for tensor, axis in mismatches(first.shapes, second.shapes):
            if axis == MISSING_AXIS or len(wanted.shapes[tensor]) <= axis:
                return None
            size = first.shapes[tensor][axis]
            slope = Fraction(second.shapes[tensor][axis] - size, high - low)
            values.add(low + (wanted.shapes[tensor][axis] - size) / slope)
        value = values.pop() if len(values) == 1 else Fraction(0)
        return int(value) if value.denominator == 1 and value > 0 else None
    return None


def minimal(rebuilder: Rebuilder, base: Fields, fields: Fields, optional: Fields) -> dict[str, int]:
    """Return an assignment without the fields that restate a default.

    ``optional`` are the fields that state a default explicitly; those that change nothing are left out.
    """
    kept = {**optional, **fields}
    seen = rebuilder.observe({**base, **kept})
    for name in optional:
        fewer = {key: value for key, value in kept.items() if key != name}
        if name not in fields and rebuilder.observe({**base, **fewer}) == seen:
            kept = fewer
    return kept


@dataclass
class _Probes:
    """Snapshots at an assignment and at other values of one field, by value and difference; those that differ only."""

    now: Snapshot
    moved: dict[tuple[int, int], Snapshot]

    @functools.cached_property
    def axes(self) -> frozenset[Axis]:
        """The axes that the field moves."""
        return frozenset().union(*(mismatches(moved.shapes, self.now.shapes) for moved in self.moved.values()))


_PATIENCE = 150
"""Most assignments tried since one was a solution, or fixed more axes than those before without harming any."""


@dataclass
class Search:
    """A best-first search over fields: one more field at a time, as long as fewer axes are wrong.

    The assignment with the fewest wrong axes is expanded first. Of many fields that each fix axes of their own, any
    order leads to the solution; a depth-first search would try each wrong value of one with all values of the others.

    Args:
        base: fields fixed beforehand.
        counted: axes that must be right; None for all.
        names: fields to change; None for all.
        limit: most assignments tried. Each builds a module on ``meta`` in some milliseconds, so this is seconds.
        best: set by :meth:`solutions`: the assignment that fixed the most axes without harming any.
    """

    rebuilder: Rebuilder
    base: Fields
    wanted: Mapping[str, Shape]
    counted: frozenset[Axis] | None = None
    names: frozenset[str] | None = None
    limit: int = 400
    best: dict[str, int] = field(default_factory=dict)
    _tried: set[frozenset[tuple[str, int]]] = field(default_factory=set)
    _probes: dict[str, _Probes] = field(default_factory=dict)
    """What fields do at the start; they do the same where no field that moves one of their axes has another value."""

    def wrong(self, fields: Fields) -> frozenset[Axis] | None:
        """Return the axes that are wrong under an assignment; None if it cannot be built."""
        seen = self.rebuilder.observe({**self.base, **fields})
        if seen is None:
            return None
        wrong = mismatches(seen.shapes, self.wanted)
        return wrong if self.counted is None else wrong & self.counted

    def solutions(self) -> list[dict[str, int]]:
        """Return the assignments under which nothing is wrong, and set ``best``."""
        start = self.wrong({})
        if start is None:
            return []
        found: list[dict[str, int]] = []
        pending: list[tuple[int, int, dict[str, int], frozenset[Axis]]] = [(len(start), 0, {}, start)]
        fewest, until = len(start), _PATIENCE
        while pending and len(self._tried) < min(until, self.limit):
            _, _, fields, wrong = heapq.heappop(pending)
            if not wrong or (wrong <= start and len(wrong) < fewest):
                until = len(self._tried) + _PATIENCE
            if not wrong:
                found.append(fields)
                continue
            if wrong <= start and len(wrong) < fewest:
                self.best, fewest = fields, len(wrong)
            for following in self._following(fields, wrong):
                left = self._untried(following)
                if left is not None and len(left) < len(wrong):
                    # the negative count makes ties unique and prefers the latest of equally good assignments
                    heapq.heappush(pending, (len(left), -len(self._tried), following, left))
        return found

    def _following(self, fields: dict[str, int], wrong: frozenset[Axis]) -> Iterator[dict[str, int]]:
        """Yield assignments with one more field, or two more where a constructor insists on divisibility."""
        here = {**self.base, **fields}
        known = [name for name in self.rebuilder.known(here) if self.names is None or name in self.names]
        for name in known:
            current = self.rebuilder.value(here, name)
            for value in self.steps(fields, name, wrong) if name not in fields else ():
                one = {**fields, name: value}
                if self.wrong(one) is not None:
                    yield one
                    continue
                for other in known:
                    partner = self.rebuilder.value(here, other)
                    if other in one or partner is None or not current or partner * value % current:
                        continue
                    yield {**one, other: partner * value // current}

    def _untried(self, fields: dict[str, int]) -> frozenset[Axis] | None:
        """Return the wrong axes of an assignment that was not tried yet, and note it; None if it was."""
        key = frozenset(fields.items())
        if key in self._tried:
            return None
        self._tried.add(key)
        return self.wrong(fields)

    def steps(self, fields: Fields, name: str, wrong: frozenset[Axis]) -> list[int]:
        """Return values of a field that would fix one of the wrong axes, by slopes measured at an assignment."""
        start = self._probes.get(name)
        others = [self._probes.get(other) for other in fields]
        if start is not None and all(other and start.axes.isdisjoint(other.axes) for other in others):
            probes = start
        else:
            probes = self._probe({**self.base, **fields}, name)
            if not fields:
                self._probes[name] = probes
        found: dict[int, None] = {}
        for (value, delta), moved in probes.moved.items():
            for tensor, axis in sorted(wrong):
                before, after = (s.shapes.get(tensor, ()) for s in (probes.now, moved))
                if axis == MISSING_AXIS or min(len(before), len(after)) <= axis:
                    continue
                # the line through two observations reaches the wanted size of the axis there
                slope, gap = after[axis] - before[axis], (self.wanted[tensor][axis] - before[axis]) * delta
                if slope and gap and gap % slope == 0 and value + gap // slope > 0:
                    found[value + gap // slope] = None
        return list(found)

    def _probe(self, here: Fields, name: str) -> _Probes:
        value, now = self.rebuilder.value(here, name), self.rebuilder.observe(here)
        if value is None or now is None:
            return _Probes(Snapshot({}, {}, {}), {})
        found = _Probes(now, {})
        # even steps first, since many widths must be even; then single ones; then those that keep divisibility
        for delta in dict.fromkeys((2, -2, 1, -1, 4, value, -(value // 2))):
            moved = self.rebuilder.observe({**here, name: value + delta}) if delta and value + delta > 0 else None
            if moved is not None and moved.shapes != now.shapes:
                found.moved[value, delta] = moved
            if len(found.moved) == _SLOPES:
                break
        return found

    def scaled(self, fields: dict[str, int], ratios: frozenset[Fraction]) -> Iterator[dict[str, int]]:
        """Yield the assignment with one or two more fields scaled, where the counted axes stay right.

        Where a class divides one field by another, both must shrink for the quotient to stay.
        """
        here = {**self.base, **fields}
        options: dict[str, list[int]] = {}
        for name in self.rebuilder.known(here):
            value = self.rebuilder.value(here, name)
            if name in fields or value is None:
                continue
            sizes = (value * ratio for ratio in ratios)
            options[name] = [int(size) for size in sizes if size.denominator == 1 and size > 0]
        for names in (*combinations(options, 1), *combinations(options, 2)):
            for values in product(*(options[name] for name in names)):
                following = {**fields, **dict(zip(names, values, strict=True))}
                if self._untried(following) == frozenset():
                    yield following


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
        patches: attributes to set afterwards, by module path within the block and name.
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
    likely: frozenset[str] = frozenset(),
) -> Iterator[Choice]:
    """Yield different ways to reach the wanted shapes, the likeliest first and lazily.

    First config fields alone; then fields as far as they reach and attributes for the rest, as a block of
    another size would have them; last the attributes of the resized tensors' own modules alone.

    Args:
        rebuilder: None if its class cannot be called.
        bases: fields to start from: those that the whole model changes, else none.
        harm: counts the shapes outside the blocks that an assignment of config fields would get wrong.
        likely: names of fields, such as those that a like block was built by, that are tried before all.
    """
    if rebuilder is None:
        have = shapes_of(block)
        patches, gap = leaf_patches(block, wanted), _shape_gaps(have, wanted)
        yield Choice({}) if have == wanted else Choice({}, patches, gap, as_dense=True)
        return
    ways = _Ways(block, rebuilder, wanted, harm)
    found: list[Choice] = []
    for base in bases:
        for choice in ways.from_base(base, likely):
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

    def from_base(self, base: Mapping[str, int], likely: frozenset[str]) -> Iterator[Choice]:
        """Yield the ways by fields alone, those of ``likely`` names before all, then those with attributes."""
        dense = self.rebuilder.observe(base)
        if dense is None:
            return
        if not mismatches(dense.shapes, self.wanted):
            yield Choice(base)
            return
        if likely:
            yield from self.solved(base, {}, likely)[1]
        optional = explicit_fields(self.rebuilder, dense)
        search, found = self.solved(base, optional)
        yield from found
        fixed = {**base, **optional}
        best = with_companions(self.rebuilder, fixed, search.best)
        partial = {**base, **minimal(self.rebuilder, base, best, optional)}
        yield from self.with_attributes(base, {**fixed, **best}, partial)

    def solved(
        self, base: Mapping[str, int], optional: Mapping[str, int], names: frozenset[str] | None = None
    ) -> tuple[Search, list[Choice]]:
        """Return a search over the fields of some names, and the choices without a gap."""
        fixed = {**base, **optional}
        search = Search(self.rebuilder, fixed, self.wanted, names=names)
        found = [with_companions(self.rebuilder, fixed, fields) for fields in search.solutions()]
        found = [minimal(self.rebuilder, base, fields, optional) for fields in found]
        if len(found) > 1:
            found.sort(key=lambda fields: self.rank(base, fields))
        return search, [Choice({**base, **fields}) for fields in found]

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
    ) -> Iterator[Choice]:
        """Yield choices with the attributes that a block of the wanted sizes has where sizes change.

        ``here`` is the assignment that the search reached from ``base``, with defaults stated explicitly; ``partial``
        is the same without restated defaults, and the block is built with it.
        """
        now, module = self.rebuilder.observe(here), self.rebuilder.build(partial)
        wrong = frozenset[Axis]() if now is None else mismatches(now.shapes, self.wanted)
        if module is None or not wrong or any(axis == MISSING_AXIS for _, axis in wrong):
            return
        moves = self.moves(base, here, wrong)
        parts: dict[str, set[Axis]] = {}
        for name, axis in sorted(wrong):
            parts.setdefault(name.partition(".")[0], set()).add((name, axis))
        if not moves and len(parts) > 1:  # each part of the block may be that of a block of another size
            each = [[*self.moves(base, here, frozenset(part)), {}] for part in parts.values()]
            combined = islice(product(*each), _MOST_COMBINATIONS)
            moves = [functools.reduce(operator.or_, patches) for patches in combined]
        inside = dict(module.named_modules())
        gap, leaves = _shape_gaps(shapes_of(module), self.wanted), leaf_patches(module, self.wanted)
        for moved in moves:
            yield Choice(partial, {key: value for key, value in moved.items() if key[0] in inside} | leaves, gap)
        yield self.by_leaves(partial)

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
                found.append({key: value for key, value in patches if not self.is_resized_leaf(key[0], after)})
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
        gap = _shape_gaps(shapes_of(source), self.wanted)
        return Choice(fields, leaf_patches(source, self.wanted), gap, as_dense)


def _shape_gaps(have: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> tuple[str, ...]:
    names = sorted({name for name, _ in mismatches(have, wanted)})
    return tuple(f"{name}: wanted {wanted.get(name)}, obtained {have.get(name)}" for name in names)
