"""Config fields that go with others although no axis shows it, such as key/value heads that are as many as heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction

from transformers import PreTrainedConfig

from fxprune.emit.meta import build_on_meta
from fxprune.emit.rebuilders import Rebuilder
from fxprune.emit.snapshot import Number, Snapshot

__all__ = ["with_companions"]

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
