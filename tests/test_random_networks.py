"""Whatever is discovered in a random network is removed exactly, and nothing crashes."""

from __future__ import annotations

import os
from collections import Counter

import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import fxprune
from fxprune.errors import RatioError
from fxprune.groups import KINDS
from fxprune.state import state_of
from tests.random_networks import RandomNet, Record, check_network, descriptions

CASES = int(os.environ.get("FXPRUNE_RANDOM_NETWORKS", "120"))

SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)


def test_removals_from_random_networks_are_exact() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=CASES, suppress_health_check=SLOW)
    @given(descriptions(), st.integers(0, 4))
    def check(description: tuple[list[Record], int], static: int) -> None:
        note(repr(RandomNet(*description)))
        dense = check_network(*description, dynamic=static == 4)
        groups = state_of(dense).groups
        seen.update(
            exact=sum(not g.renormalised for g in groups), renormalised=sum(bool(g.renormalised) for g in groups)
        )
        seen.update(networks=1, nested=sum(group.outer is not None for group in groups))

    check()
    assert seen["networks"] >= CASES
    assert seen["exact"] > CASES and seen["renormalised"] and seen["nested"], seen


@settings(max_examples=max(CASES // 8, 1), suppress_health_check=SLOW)
@given(descriptions(), st.sampled_from((0.1, 0.3, 0.5)))
def test_random_networks_are_pruned_or_refused_with_a_reason(
    description: tuple[list[Record], int], ratio: float
) -> None:
    net = RandomNet(*description, torch.float64).eval()
    note(repr(net))
    try:
        result = fxprune.prune(net, importance="l2", ratio=ratio, kinds=KINDS, protect=(), example_inputs=net.inputs)
    except RatioError as error:
        assert error.remedy
        return
    assert result.report.verification_error is not None and result.report.verification_error < 1e-4
