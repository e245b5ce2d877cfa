"""Whatever is discovered in a random network is removed exactly, and nothing crashes."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

import fxprune
from fxprune.discovery.groups import KINDS
from fxprune.errors import RatioError
from tests.oracle import groups_of
from tests.random_networks import RandomNet, Record, check_network, descriptions

ASKED = os.environ.get("FXPRUNE_RANDOM_NETWORKS")
CASES = int(ASKED or 160)
PART = max(min(CASES, 40), CASES // 50)
"""Cases in one test, so that several processes share them."""


def hunt(test: Any, part: int, cases: int) -> None:
    """Try ``test`` on ``cases`` networks: the same ones every day, new ones where a number of them is asked for.

    What fails then is kept, and tried first the next time.
    """
    slow = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)
    database = None if ASKED is None else DirectoryBasedExampleDatabase(".hypothesis/examples")
    test = settings(
        max_examples=cases, deadline=None, derandomize=False, database=database, suppress_health_check=slow
    )(test)
    (test if ASKED is not None else seed(part)(test))()


@pytest.mark.parametrize("part", range(-(-CASES // PART)))
def test_removals_from_random_networks_are_exact(part: int) -> None:
    seen: Counter[str] = Counter()

    @given(descriptions(), st.integers(0, 4))
    def check(description: tuple[list[Record], int], static: int) -> None:
        note(repr(RandomNet(*description)))
        dense = check_network(*description, dynamic=static == 4)
        for group in groups_of(dense):
            seen["renormalised" if group.renormalised else "exact"] += 1
        seen["networks"] += 1

    hunt(check, part, PART)
    assert seen["networks"] >= PART
    assert seen["exact"] > PART / 2, seen


@pytest.mark.parametrize("part", range(-(-CASES // PART)))
def test_random_networks_are_pruned_or_refused_with_a_reason(part: int) -> None:
    seen: Counter[str] = Counter()

    @given(descriptions(), st.sampled_from((0.1, 0.3, 0.5)))
    def check(description: tuple[list[Record], int], ratio: float) -> None:
        net = RandomNet(*description, torch.float64).eval()
        note(repr(net))
        common: dict[str, Any] = {"importance": "l2", "kinds": KINDS, "protect": (), "example_inputs": net.inputs}
        try:
            report = fxprune.prune(net, ratio=ratio, **common).report
        except RatioError as error:
            assert error.remedy
            return
        assert report.verification_error is not None and report.verification_error < 1e-4
        seen["pruned"] += 1

    hunt(check, part, max(PART // 10, 1))
    assert seen["pruned"] or PART < 40, seen
