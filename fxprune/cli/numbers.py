"""Numbers among the options of a prune, each against what it may be. It needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fxprune.cli.wording import option
from fxprune.errors import ArgumentError, RatioError

__all__ = ["check_numbers", "check_samples"]

_LARGEST_SEED = 2**64 - 1

Values = Mapping[str, Any]


def check_samples(values: Values) -> None:
    """Refuse numbers of samples and of their tokens that make none, and such numbers without a text.

    Args:
        values: of the options of a command; None where not given.

    Raises:
        ArgumentError: says which option, and what would do.
    """
    for name, least in (("samples", 1), ("tokens", 2)):
        if values[name] is not None and values["calibration"] is None:
            raise ArgumentError(
                f"{option(name)} is of a calibration text, and there is none",
                where=option(name),
                remedy=f"Give --calibration, or leave {option(name)} out",
            )
        _check_least(values, name, least)


def check_numbers(values: Values) -> None:
    """Refuse numbers of a prune that are out of range.

    Args:
        values: of the options of a prune; None where not given.

    Raises:
        FxpruneError: says which option, and what would do.
    """
    for name in ("ratio", "group_ratio"):
        _check_ratio(name, values[name])
    _check_least(values, "seed", 0)
    if values["seed"] > _LARGEST_SEED:
        raise ArgumentError(f"seed is {values['seed']}", where="seed", remedy="Give a number below 2**64")
    if values["protect"] is not None and min(values["protect"]) < 0:
        first, last = values["protect"]
        raise ArgumentError(f"protect is {first} {last}", where="protect", remedy="Give two numbers of 0 or more")
    rounding = values["round_to"]
    if (
        rounding is not None
        and rounding != "auto"
        and not (rounding.isascii() and rounding.isdigit() and int(rounding))
    ):
        raise ArgumentError(f"round_to is {rounding!r}", where="round_to", remedy="Give a number of 1 or more, or auto")


def _check_least(values: Values, name: str, least: int) -> None:
    value = values[name]
    if value is not None and value < least:
        raise ArgumentError(f"{name} is {value}", where=name, remedy=f"Give a number of {least} or more")


def _check_ratio(name: str, value: float | None) -> None:
    if value is None or 0 <= value < 1:
        return
    meant = f". Did you mean {value / 100:g}? {value:g}% is {value / 100:g}" if 1 < value < 100 else ""
    shown = value if math.isfinite(value) else str(value)
    raise RatioError(f"{name} is {shown}", where=name, remedy=f"Give a fraction, 0 or more and below 1{meant}")
