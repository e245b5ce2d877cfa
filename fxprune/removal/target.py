"""Targets: the size or speed that a model is to have after a prune."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fxprune.errors import ArgumentError, RatioError
from fxprune.pipeline.arguments import refuse, whole_number
from fxprune.removal.formats import FORMATS

DEFAULT_RATIO = 0.2
"""The fraction to remove where neither a ratio nor a target is given."""

WANTED = (
    "a size as in '100M' (parameters), '80MB' (bytes of weights), '80MB@q4_k_m' (bytes of a GGUF file), '6GB' with a "
    "context (memory), or a part of the dense model as in '0.8x params', '0.5x macs', '0.5x kv', '1.3x decode'"
)

_WORDS = re.compile(r"([\d._]+)\s*([a-zA-Z]*)\s*(.*)")

_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_BYTES = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_BYTES |= {"kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40}
_FACTOR = "x"

PHASES = ("prefill", "decode")
"""Timed phases: reading a prompt, and generating one token."""


@dataclass(frozen=True)
class Target:
    """A size or speed that a model is to have after a prune.

    Args:
        text: as it was asked for.
        budget: the quantity, by the name of a budget; a phase alone where no table of times is named.
        amount: the wanted amount, in the unit of the budget; 0 if it is a part of the dense model's.
        part: the wanted part of the dense model's amount; 0 if it is an amount.
    """

    text: str
    budget: str
    amount: float = 0.0
    part: float = 0.0

    def of(self, dense: float) -> float:
        """The wanted amount, given that of the dense model."""
        return self.amount or self.part * dense


@dataclass(frozen=True)
class Reached:
    """What a target asked for, in ``word``, and what the dense and the slim model have of it."""

    target: str
    word: str
    asked: float
    dense: float
    slim: float

    def __str__(self) -> str:
        off = self.slim / self.asked - 1
        sizes = f"{self.dense:,.0f} to {self.slim:,.0f} {self.word}"
        return f"Target {self.target}: {sizes}, {self.asked:,.0f} asked for ({off:+.1%})"


def parse_target(value: Any, context: int | None = None) -> Target:
    """The target that a text states, or a number of parameters.

    Args:
        context: tokens; bytes are then those of memory in use with so many.

    Raises:
        ArgumentError: it is no target, or cannot be one of a smaller model.
    """
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    found = _WORDS.fullmatch(text.strip()) if isinstance(text, str) else None
    if found is None or not _is_number(found[1]):
        raise refuse("target", value, WANTED)
    number, unit, rest = float(found[1]), found[2].lower(), " ".join(found[3].split())
    if unit == _FACTOR:
        target = _of_dense(text, number, rest)
    elif unit in _BYTES:
        target = _of_bytes(text, number * _BYTES[unit], rest)
    elif unit in _COUNTS and rest in ("", "params", "macs"):
        target = Target(text, rest or "params", number * _COUNTS[unit])
    elif unit in ("params", "macs", "kv") and not rest:
        target = Target(text, unit, number)
    else:
        raise refuse("target", value, WANTED)
    if number == 0:
        raise refuse("target", value, "a target above 0")
    if context is None:
        return target
    whole_number("context", context, least=1)
    name, _, file_format = target.budget.partition("@")
    if name != "bytes":
        what = f"$context={context} beside $target={target.text!r}, which is no amount of memory"
        remedy = "Leave $context out, or ask for memory, as in '6GB'"
        raise ArgumentError(what, where="context", remedy=remedy, argument="context", value=context)
    budget = f"memory@{context}" + (f":{file_format}" if file_format else "")
    return Target(f"{target.text} at {context:,} tokens", budget, target.amount, target.part)


def amount_below(value: str, target: Target, dense: float, word: str) -> float:
    """The amount that a target asks for, which must be below that of the dense model.

    Args:
        value: the target as the argument was given.
        word: names what is counted.

    Raises:
        RatioError: the dense model has no more.
    """
    if target.of(dense) >= dense:
        what = f"$target is {value!r}: the dense model is no larger: it has {dense:,.0f} {word}"
        raise RatioError(what, where="target", remedy="Ask for a smaller one", argument="target", value=value)
    return target.of(dense)


def check_target(name: str, value: Any) -> str:
    """Return ``value``, the argument ``name``, as text; empty for no target."""
    return "" if value == "" else parse_target(value).text


def _is_number(text: str) -> bool:
    try:
        return float(text) >= 0
    except ValueError:
        return False


def _of_dense(text: str, number: float, quantity: str) -> Target:
    name, at, place = quantity.partition("@")
    if name in PHASES and (place or not at):
        if number <= 1:
            raise _refuse(text, f"{number:g} times the speed is no gain", f"Ask for more than 1, as in '1.3x {name}'")
        return Target(text, quantity, part=1 / number)
    if quantity not in ("params", "macs", "kv", "bytes") and not (name == "bytes" and place):
        raise refuse("target", text, WANTED)
    if number >= 1:
        remedy = "Ask for less than 1, as in '0.8x params'; a speed is above 1, as in '1.3x decode'"
        raise _refuse(text, f"{number:g} times the dense model is nothing to remove", remedy)
    return Target(text, _bytes_in(place, text) if name == "bytes" else quantity, part=number)


def _of_bytes(text: str, amount: float, rest: str) -> Target:
    if rest == "kv":
        return Target(text, "kv", amount)
    if rest and not (rest.startswith("@") and rest[1:]):
        raise refuse("target", text, WANTED)
    return Target(text, _bytes_in(rest[1:], text), amount)


def _bytes_in(file_format: str, text: str) -> str:
    """The name of the budget of bytes, in a format if one is named."""
    if file_format and file_format.lower() not in FORMATS:
        raise _refuse(text, f"{file_format!r} is no format of GGUF files", f"Known: {', '.join(FORMATS)}")
    return f"bytes@{file_format.lower()}" if file_format else "bytes"


def _refuse(text: str, what: str, remedy: str) -> ArgumentError:
    return ArgumentError(f"$target is {text!r}: {what}", where="target", remedy=remedy, argument="target", value=text)
