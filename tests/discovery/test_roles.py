"""Which units are experts, and how many of a kind have to stay."""

from __future__ import annotations

from fxprune.axes import Factor, Freeze, new_factor
from fxprune.discovery.dependency import settle_experts
from fxprune.rules.statements import AtLeast, Competition, Role, Statements


def stated_over(*roles: Role) -> tuple[Statements, Factor]:
    """A factor of six with roles, over which a softmax runs."""
    stated, factor = Statements(), new_factor(6)
    assert isinstance(factor, Factor)
    for role in roles:
        stated.solver.tag(factor, role)
    stated.competitions.append(Competition(factor, Freeze("a softmax runs over this axis", "softmax")))
    return stated, factor


def test_a_softmax_over_experts_is_a_statistic() -> None:
    for roles in ((Role.EXPERT,), (Role.SHARED_OUT, Role.SIDE_BY_SIDE)):
        stated, factor = stated_over(*roles)
        settle_experts(stated)
        assert [found.expr for found in stated.statistics] == [factor]
        assert factor not in stated.solver.frozen_factors()
        assert Role.EXPERT in stated.solver.tagged_factors()[factor]


def test_a_softmax_over_anything_else_keeps_its_axis() -> None:
    for roles in ((), (Role.SHARED_OUT,), (Role.SHARED_OUT, Role.SIDE_BY_SIDE, Role.HEAD)):
        stated, factor = stated_over(*roles)
        settle_experts(stated)
        assert stated.statistics == [] and stated.solver.frozen_factors()[factor].reason.startswith("a softmax")


def test_as_many_units_stay_as_are_picked() -> None:
    stated, factor = stated_over(Role.EXPERT)
    stated.at_least.append(AtLeast(factor, 4))
    assert settle_experts(stated) == {factor: 4}
    stated, factor = stated_over(Role.EXPERT)
    stated.at_least.append(AtLeast(factor, 6))
    settle_experts(stated)
    assert "all 6 units are needed" in stated.solver.frozen_factors()[factor].reason
