"""Two plans side by side, axis by axis."""

from __future__ import annotations

import pytest

from fxprune.errors import PlanError
from fxprune.removal.plan import Difference, Plan, differences


def plan(**kept: list[int]) -> Plan:
    """A plan for axes of 6, the first of each parameter; two underscores stand for a dot."""
    named = {name.replace("__", "."): indices for name, indices in kept.items()}
    return Plan({name: {0: value} for name, value in named.items()}, sizes={name: {0: 6} for name in named})


def test_axes_that_lose_the_same_are_one() -> None:
    one = plan(h__0__up=[0, 1], h__0__gate=[0, 1], h__1__up=[0, 1])
    other = plan(h__0__up=[1, 2, 3], h__0__gate=[1, 2, 3])
    assert differences(one, other) == (
        Difference("h.0", ("up[0]", "gate[0]"), 6, first=2, second=1, both=2),
        Difference("h.1", ("up[0]",), 6, first=4, second=0, both=0),
    )


def test_what_reaches_out_of_the_blocks_is_one_in_all_of_them() -> None:
    found = differences(plan(embed=[0], h__0__norm=[0], h__1__norm=[0], h__1__up=[1]), Plan())
    assert [one.axes for one in found] == [("embed[0]", "h.0.norm[0]", "h.1.norm[0]"), ("up[0]",)]
    assert [one.block for one in found] == ["", "h.1"]


def test_equal_plans_have_none() -> None:
    assert differences(plan(a=[0, 2]), plan(a=[0, 2])) == () == differences(Plan(), Plan())


def test_a_plan_that_knows_no_sizes_is_refused() -> None:
    with pytest.raises(PlanError, match="does not say how long"):
        differences(Plan({"a": {0: [1]}}), Plan())
