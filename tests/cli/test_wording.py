"""Messages of the package in the words of the command line."""

from __future__ import annotations

import pytest

from fxprune.cli.wording import in_options, option

NAMES = ("ratio", "group_ratio", "kinds", "protect", "round_to", "taylor", "importance", "uniform")


@pytest.mark.parametrize(
    ("text", "where", "told"),
    [
        ("ratio is 1.5. Pass a number", "ratio", "--ratio is 1.5. Pass a number"),
        ("ratio is 1.5", "", "ratio is 1.5"),
        ("ratio: no", "ratio", "--ratio: no"),
        ("leave group_ratio out", "", "leave --group-ratio out"),
        ("with kinds=('mlp', 'head') and protect=(1, 2)", "", "with --kinds mlp,head and --protect 1 2"),
        ("with protect=None, round_to=4.", "", "with no --protect, --round-to 4."),
        ("uniform=True, importance='l1'", "", "--uniform, --importance l1"),
        ("taylor{order=second, ratio=0.3} fails", "", "taylor{order=second, ratio=0.3} fails"),
        ("tensor_parallel=2 is kept", "", "tensor_parallel=2 is kept"),
        ("inplace is 3", "inplace", "--in-place is 3"),
    ],
)
def test_arguments_become_options(text: str, where: str, told: str) -> None:
    assert in_options(text, where, NAMES) == told


def test_an_option_is_spelled_with_dashes() -> None:
    assert option("group_ratio") == "--group-ratio" and option("inplace") == "--in-place"
