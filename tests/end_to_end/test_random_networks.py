"""Whatever is discovered in a random network is removed exactly, and nothing crashes."""

import os
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

import fxprune
from fxprune.errors import RatioError
from fxprune.pipeline.arguments import KINDS
from tests import random_mixes
from tests.oracle import groups_of
from tests.random_networks import OPS, RandomNet, Record, check_network, descriptions, steady
from tests.random_ops import CHOICES
from tests.tiers import tiers

ASKED = os.environ.get("FXPRUNE_RANDOM_NETWORKS")
CASES = int(ASKED or 160)
PART = max(min(CASES, 10), CASES // 50)
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


@pytest.mark.slow
def test_every_line_that_mixes_units_is_part_of_some_network() -> None:
    """What torch refuses is left out of a network, so a line with a mistake in it would be in none."""
    numbers = random.Random(0)
    for name in (name for name, op in OPS.items() if op.__module__ == random_mixes.__name__):
        for drawn in range(200):
            if drawn > 60 and all(random_mixes.LINES.values()):
                break
            RandomNet([Record(name, tuple(numbers.choices(range(CHOICES), k=8))) for _ in range(2)])
    assert [line for line, taken in random_mixes.LINES.items() if not taken] == []


def test_lines_that_turn_on_the_last_digit_are_not_steady() -> None:
    is_steady = {
        **{"y = x.argmax(0)": True, "y = same.argmax(0)": False, "y = same.argsort(0)": False, "y = x.exp()": True},
        **{"y = same.topk(2, 0)[0] * 2": True, "y = same.floor()": False, "y = x - same": False},
        **{"x[same.argmax(0)] = 9": False, "y = zeros.argmax(0)": True},
    }
    same = torch.full((3,), 2.0)
    for line, wanted in is_steady.items():
        x = same.clone() if "x - same" in line else torch.tensor([1.0, 3, 2])
        scope: dict[str, Any] = {"x": x, "same": same, "zeros": torch.zeros(3)}
        before = x.tolist()
        assert steady(line, scope) == wanted and "y" not in scope and x.tolist() == before, line


@pytest.mark.parametrize("part", tiers(range(-(-CASES // PART)), 0))
def test_removals_from_random_networks_are_exact(part: int) -> None:
    seen: Counter[str] = Counter()

    @given(descriptions(), st.integers(0, 4))
    def check(description: tuple[list[Record], int], form: int) -> None:
        note(repr(RandomNet(*description)))
        dense, sizes = check_network(*description, form)
        for group in groups_of(dense):
            seen["renormalised" if group.renormalised else "exact"] += 1
        seen.update({"networks": 1, "at two sizes": sizes > 1})

    hunt(check, part, PART)
    assert seen["networks"] >= PART
    assert seen["exact"] > PART / 2, seen
    assert seen["at two sizes"] > PART / 2, seen


@pytest.mark.parametrize("part", tiers(range(-(-CASES // PART)), 0))
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

    hunt(check, part, max(PART // 5, 1))
    assert seen["pruned"] or PART < 20, seen
