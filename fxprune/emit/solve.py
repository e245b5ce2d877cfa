"""Solving for config fields: values that give the wanted shapes.

Each field is moved by a little, the block is rebuilt, and the axes that moved give the slope. A wanted size
then gives the field's value; the rebuilt block is the judge, so a slope that holds only nearby costs a probe
and nothing else.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations, product

from transformers import PreTrainedConfig

from fxprune.emit.layout import Rebuilder
from fxprune.emit.snapshot import MISSING_AXIS, Axis, Number, Shape, Snapshot, build_on_meta, mismatches

__all__ = ["Search", "explicit_fields", "minimal", "with_companions"]

Fields = Mapping[str, int]


def with_companions(rebuilder: Rebuilder, base: Fields, fields: Fields) -> dict[str, int]:
    """Return an assignment with the fields that have to move along with it, shapes staying as they are.

    A field moves along by the ratio of one that has moved if one of two things shows it: the config class fills it in
    from that one where it is left out, and it held just that; or an integer attribute of the module that no longer goes
    with the fields, such as a quotient of both, does so again.

    Args:
        rebuilder: what is built again.
        base: fields that it is compared with.
        fields: what has moved.
    """
    dense, found = rebuilder.observe(base), dict(fields)
    for name, value in _proportional(rebuilder, base, fields) if dense is not None else ():
        now, following = rebuilder.observe({**base, **found}), rebuilder.observe({**base, **found, name: value})
        if dense is None or now is None or following is None or following.shapes != now.shapes:
            continue
        ratios = {Fraction(1), *_ratios(rebuilder, base, fields).values()}
        fewer = len(_astray(dense, following, ratios)) < len(_astray(dense, now, ratios))
        if fewer or any(_fills(rebuilder.config, leader, name) for leader in fields):
            found[name] = value
    return found


def _ratios(rebuilder: Rebuilder, base: Fields, fields: Fields) -> dict[str, Fraction]:
    """Return by how much each field moved, of those that held a value before."""
    pairs = ((name, rebuilder.value(base, name), value) for name, value in fields.items())
    return {name: Fraction(value, old) for name, old, value in pairs if old and old != value}


def _proportional(rebuilder: Rebuilder, base: Fields, fields: Fields) -> Iterator[tuple[str, int]]:
    """Yield fields that have not moved, and what each would be had it moved like one that has.

    They are those that the constructor reads, and those that hold the same number as one that has moved.
    """
    for leader, ratio in _ratios(rebuilder, base, fields).items():
        for name, held in vars(rebuilder.config).items():
            near = name in rebuilder.reads.integers or held == rebuilder.value(base, leader)
            value = rebuilder.value(base, name) if near and name not in fields else None
            if value and (value * ratio).denominator == 1 and value * ratio > 0:
                yield name, int(value * ratio)


def _astray(dense: Snapshot, now: Snapshot, ratios: set[Fraction]) -> set[tuple[str, str]]:
    """Return the integer attributes that changed, and not by the ratio of any field."""
    both = now.numbers.keys() & dense.numbers.keys()
    return {key for key in both if not _in_ratio(dense.numbers[key], now.numbers[key], ratios)}


def _in_ratio(old: Number, new: Number, ratios: set[Fraction]) -> bool:
    before, after = (value if isinstance(value, tuple) else (value,) for value in (old, new))
    if len(before) != len(after):
        return False
    return all(b == a or (b != 0 and Fraction(a, b) in ratios) for b, a in zip(before, after, strict=True))


def _fills(config: PreTrainedConfig, leader: str, name: str) -> bool:
    """Whether a config class gives one field the value of another where it is left out, and it has that value."""
    held = vars(config)
    value = held.get(leader)
    if type(value) is not int or held.get(name) != value:
        return False
    other = 2 if value == 1 else 1  # one divides everything, which configs insist on
    return all(_filled(config, {leader: number, name: None}, name) == number for number in (value, other))


def _filled(config: PreTrainedConfig, fields: Mapping[str, int | None], name: str) -> object:
    """Return what a config class makes of a field; None where it refuses."""
    made = build_on_meta(type(config).from_dict, {**config.to_dict(), **fields})
    return vars(made).get(name) if isinstance(made, PreTrainedConfig) else None


_FIRST_GUESSES = ((8, 16), (4, 8), (2, 4), (1, 2))
"""Two values tried for a field without one; large ones first, since a width may have a floor."""
_SLOPES = 3
"""Slopes measured for a field: several, since a table with an entry for every second channel moves unevenly."""


def explicit_fields(rebuilder: Rebuilder, wanted: Snapshot) -> dict[str, int]:
    """Return the value that stands for the default of each field that is left to one.

    A head width that the class derives from two other fields, unless it is given, becomes a field of its own:
    the number of heads can then change alone.

    Args:
        rebuilder: what is built again.
        wanted: what it gives with the default.
    """
    found: dict[str, int] = {}
    for name in rebuilder.reads.hollow:
        value = _value_of_default(rebuilder, found, name, wanted)
        if value is None:
            continue
        seen = rebuilder.observe({**found, name: value})
        if seen is not None and seen.shapes == wanted.shapes and _same_numbers(seen, wanted, name):
            found[name] = value
    return found


def _same_numbers(seen: Snapshot, wanted: Snapshot, name: str) -> bool:
    return all(seen.numbers.get(key) == value for key, value in wanted.numbers.items() if key[1] != name)


def _value_of_default(rebuilder: Rebuilder, found: Fields, name: str, wanted: Snapshot) -> int | None:
    for low, high in _FIRST_GUESSES:
        first, second = rebuilder.observe({**found, name: low}), rebuilder.observe({**found, name: high})
        if first is None or second is None:
            continue
        if first.shapes.keys() != wanted.shapes.keys():
            return None
        return _on_the_line(first.shapes, second.shapes, wanted.shapes, (low, high))
    return None


def _on_the_line(
    first: Mapping[str, Shape], second: Mapping[str, Shape], wanted: Mapping[str, Shape], at: tuple[int, int]
) -> int | None:
    values: set[Fraction] = set()
    for name, axis in mismatches(first, second):
        if axis == MISSING_AXIS or len(wanted[name]) <= axis:
            return None
        size, moved = first[name][axis], second[name][axis] - first[name][axis]
        values.add(at[0] + Fraction((wanted[name][axis] - size) * (at[1] - at[0]), moved))
    if len(values) != 1:
        return None
    value = values.pop()
    return int(value) if value.denominator == 1 and value > 0 else None


def minimal(rebuilder: Rebuilder, base: Fields, fields: Fields, optional: Fields) -> dict[str, int]:
    """Return an assignment without the fields that restate a default.

    Args:
        rebuilder: what is built again.
        base: fields that stay whatever happens.
        fields: the assignment.
        optional: fields that stand for a default, to be left out where nothing changes.
    """
    kept = {**optional, **fields}
    seen = rebuilder.observe({**base, **kept})
    for name in optional:
        fewer = {key: value for key, value in kept.items() if key != name}
        if name not in fields and rebuilder.observe({**base, **fewer}) == seen:
            kept = fewer
    return kept


@dataclass
class Search:
    """A best-first search over fields, one at a time, as long as fewer axes are wrong.

    Where the fewest are wrong it goes on first: of many fields that each mend axes of their own, any order leads there,
    and a wrong value of one of them would else be tried with all values of the others.

    Args:
        rebuilder: what is built again.
        base: fields fixed beforehand.
        wanted: shapes to reach, by name.
        counted: axes that have to be right; None for all.
        limit: most assignments tried. Each builds a module on ``meta`` in some milliseconds, so this is seconds.
        best: afterwards the assignment that mended the most axes without harming any.
    """

    rebuilder: Rebuilder
    base: Fields
    wanted: Mapping[str, Shape]
    counted: frozenset[Axis] | None = None
    limit: int = 400
    best: dict[str, int] = field(default_factory=dict)
    _tried: set[frozenset[tuple[str, int]]] = field(default_factory=set)

    def wrong(self, fields: Fields) -> frozenset[Axis] | None:
        """Return the axes that are wrong under an assignment; None where it cannot be built."""
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
        fewest = len(start)
        while pending and len(self._tried) < self.limit:
            _, _, fields, wrong = heapq.heappop(pending)
            if not wrong:
                found.append(fields)
                continue
            if wrong <= start and len(wrong) < fewest:
                self.best, fewest = fields, len(wrong)
            for following, left in self._next(fields, wrong):
                # of those that are as good, the last one first: no two have the same number
                heapq.heappush(pending, (len(left), -len(self._tried), following, left))
        return found

    def _next(self, fields: dict[str, int], wrong: frozenset[Axis]) -> Iterator[tuple[dict[str, int], frozenset[Axis]]]:
        for following in self._following(fields, wrong):
            left = self._unseen(following)
            if left is not None and len(left) < len(wrong):
                yield following, left

    def _following(self, fields: dict[str, int], wrong: frozenset[Axis]) -> Iterator[dict[str, int]]:
        """Yield the assignments with one more field that might mend an axis, as they are asked for."""
        for name in self.rebuilder.known({**self.base, **fields}):
            for value in self.steps(fields, name, wrong) if name not in fields else ():
                yield from self._buildable(fields, name, value)

    def _unseen(self, fields: dict[str, int]) -> frozenset[Axis] | None:
        key = frozenset(fields.items())
        if key in self._tried:
            return None
        self._tried.add(key)
        return self.wrong(fields)

    def _buildable(self, fields: dict[str, int], name: str, value: int) -> Iterator[dict[str, int]]:
        """Yield the assignment with one more field, or two more where a constructor insists on divisibility."""
        one = {**fields, name: value}
        if self.wrong(one) is not None:
            yield one
            return
        current = self.rebuilder.value({**self.base, **fields}, name)
        for other in self.rebuilder.known({**self.base, **fields}):
            partner = self.rebuilder.value({**self.base, **fields}, other)
            if other in one or partner is None or not current or partner * value % current:
                continue
            yield {**one, other: partner * value // current}

    def steps(self, fields: Fields, name: str, wrong: frozenset[Axis]) -> list[int]:
        """Return values of a field that would mend one of the wrong axes, by the slopes measured here.

        More than one step is measured: a table with an entry for every second channel moves unevenly.
        """
        here = {**self.base, **fields}
        value, now = self.rebuilder.value(here, name), self.rebuilder.observe(here)
        if value is None or now is None:
            return []
        found: dict[int, None] = {}
        measured = 0
        # even steps first, since many widths must be; then single ones; then those that keep the value divisible
        for delta in dict.fromkeys((2, -2, 1, -1, 4, value, -(value // 2))):
            moved = self.rebuilder.observe({**here, name: value + delta}) if delta and value + delta > 0 else None
            if moved is None or moved.shapes == now.shapes:
                continue
            found.update(dict.fromkeys(self._along(now, moved, wrong, (value, delta))))
            measured += 1
            if measured == _SLOPES:
                break
        return list(found)

    def _along(self, now: Snapshot, moved: Snapshot, wrong: frozenset[Axis], at: tuple[int, int]) -> Iterator[int]:
        value, delta = at
        for name, axis in sorted(wrong):
            if axis == MISSING_AXIS or min(len(s.shapes.get(name, ())) for s in (now, moved)) <= axis:
                continue
            size = now.shapes[name][axis]
            slope = moved.shapes[name][axis] - size
            gap = (self.wanted[name][axis] - size) * delta
            if slope and gap and gap % slope == 0 and value + gap // slope > 0:
                yield value + gap // slope

    def scaled(self, fields: dict[str, int], ratios: frozenset[Fraction]) -> Iterator[dict[str, int]]:
        """Yield the same assignment with one or two more fields scaled, where what counts stays right.

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
                if self._unseen(following) == frozenset():
                    yield following
