"""Estimates come from counts by hand, and the formula can be set beside a run."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from benchmarks.discovery import VOCABULARY, Shape
from benchmarks.estimate_large import Device, app, counted, estimate, score_seconds

SLOW = Device(flops=1.0, single=1.0, double=1.0, memory=1e30, link=1e30, disk=1e30, capacity=1e9)
SMALL = Shape("small", 16, 24, 2, 2, 2)


def test_counts_are_those_of_the_shape() -> None:
    model = counted(SMALL, 8, 2)
    layer = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16
    assert model.weights == 2 * layer + 2 * VOCABULARY * 16 + 16
    products = 8 * (2 * (4 * 16 * 16 + 3 * 16 * 24) + VOCABULARY * 16)
    assert products <= model.macs < 1.01 * products, "attention is the rest"
    assert model.largest == VOCABULARY * 16


def test_computing_is_four_forward_runs_and_cards_share_it() -> None:
    model = counted(SMALL, 8, 2)
    assert score_seconds(model, SLOW, 6, 8) == pytest.approx(8 * model.macs * 6)
    assert score_seconds(model, SLOW, 6, 8, cards=3) == pytest.approx(8 * model.macs * 2)


def test_weights_come_twice_and_sums_go_over_the_link_of_many_cards() -> None:
    model = counted(SMALL, 8, 2)
    link = Device(flops=1e30, single=1e30, double=1e30, memory=1e30, link=1.0, disk=1e30, capacity=1e9)
    between = 4 * 16 * 8 * 6 * 2 * 2
    assert score_seconds(model, link, 6, 8) == pytest.approx(2 * 2 * model.weights + between)
    assert score_seconds(model, link, 6, 8, cards=2) == pytest.approx(
        2 * 2 * model.weights + between / 2 + 16 * model.weights
    )


def test_a_fit_is_more_where_inputs_are_more() -> None:
    device = Device(flops=1e12, single=1e12, double=1e12, memory=1e12, link=1e12, disk=1e12, capacity=1e9)
    narrow, wide = (estimate(counted(Shape("s", 16, ffn, 2, 2, 2), 8, 2), device, 6, 8) for ffn in (24, 240))
    assert wide.fit > narrow.fit and wide.fitting > 20 * narrow.fitting and wide.boundary == narrow.boundary


def test_the_command_says_that_they_are_estimates() -> None:
    done = CliRunner().invoke(app, ["--shapes", "125m", "--cards", "1,8"], catch_exceptions=False)
    assert done.exit_code == 0 and "Estimates, not measured" in done.output and done.output.count("125m") == 2
    assert CliRunner().invoke(app, ["--shapes", "8t"]).exit_code == 2


def test_the_formula_is_set_beside_a_run() -> None:
    sizes = ["--check", "--hidden", "64", "--ffn", "96", "--layers", "2", "--samples", "2", "--tokens", "8"]
    done = CliRunner().invoke(app, sizes, catch_exceptions=False)
    assert done.exit_code == 0 and "times as long" in done.output
