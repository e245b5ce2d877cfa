"""Numbers among options: what is in range, and what is told of the others."""

from __future__ import annotations

from typing import Any

import pytest

from fxprune.cli.numbers import check_numbers, check_samples
from fxprune.errors import ArgumentError, RatioError

NONE = {"ratio": None, "group_ratio": None, "seed": 0, "protect": None, "round_to": None}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"group_ratio": 1.0}, "group_ratio is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, r"below 2\*\*64"),
        ({"protect": (0, -1)}, "protect is 0 -1"),
        ({"round_to": "²"}, "round_to is"),
    ],
)
def test_what_is_out_of_range_is_refused(given: dict[str, Any], says: str) -> None:
    check_numbers({**NONE, "ratio": 0.0, "seed": 2**64 - 1, "protect": (0, 0), "round_to": "auto"})
    with pytest.raises((ArgumentError, RatioError), match=says):
        check_numbers({**NONE, **given})


def test_samples_are_of_a_text() -> None:
    check_samples({"samples": 1, "tokens": 2, "calibration": "text.txt"})
    check_samples({"samples": None, "tokens": None, "calibration": None})
    for given, says in (({"samples": 1}, "there is none"), ({"samples": 0, "calibration": "text.txt"}, "samples is 0")):
        with pytest.raises(ArgumentError, match=says):
            check_samples({"samples": None, "tokens": None, "calibration": None, **given})
