"""Test that estimates follow from counts by hand, and that the formula is put beside a run."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from benchmarks.common import Shape
from benchmarks.estimate_large import Device, ModelCounts, app, count_model, estimate, score_seconds

SLOW = Device(flops=1.0, single=1.0, double=1.0, memory=1e30, link=1e30, disk=1e30, capacity=1e9)
SMALL = Shape("small", 16, 24, 2, 2, 2)
VOCABULARY = 32000


@pytest.fixture(scope="module")
def model() -> ModelCounts:
    return count_model(SMALL, 8, 2)


def test_counts_are_those_of_the_shape(model: ModelCounts) -> None:
    layer = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16
    assert model.weights == 2 * layer + 2 * VOCABULARY * 16 + 16
    products = 8 * (2 * (4 * 16 * 16 + 3 * 16 * 24) + VOCABULARY * 16)
    assert products <= model.macs < 1.01 * products, "attention is the rest"
    assert model.largest == VOCABULARY * 16


def test_computing_is_four_forward_runs_divided_among_cards(model: ModelCounts) -> None:
    assert score_seconds(model, SLOW, 6, 8) == pytest.approx(8 * model.macs * 6)
    assert score_seconds(model, SLOW, 6, 8, cards=3) == pytest.approx(8 * model.macs * 2)


def test_weights_cross_the_link_twice_and_so_do_sums_of_many_cards(model: ModelCounts) -> None:
    link = Device(flops=1e30, single=1e30, double=1e30, memory=1e30, link=1.0, disk=1e30, capacity=1e9)
    weights, between = 2 * 2 * model.weights, 4 * 16 * 8 * 6 * 2 * 2
    assert score_seconds(model, link, 6, 8) == pytest.approx(weights + between)
    assert score_seconds(model, link, 6, 8, cards=2) == pytest.approx(weights + between / 2 + 16 * model.weights)


def test_a_fit_costs_more_with_more_inputs(model: ModelCounts) -> None:
    device = Device(flops=1e12, single=1e12, double=1e12, memory=1e12, link=1e12, disk=1e12, capacity=1e9)
    narrow, wide = (estimate(m, device, 6, 8) for m in (model, count_model(Shape("s", 16, 240, 2, 2, 2), 8, 2)))
    assert wide.fit > narrow.fit and wide.fitting > 20 * narrow.fitting and wide.boundary == narrow.boundary


@pytest.mark.slow
def test_the_command_prints_estimates_and_a_check() -> None:
    done = CliRunner().invoke(app, ["--shapes", "125m", "--cards", "1,8"], catch_exceptions=False)
    assert done.exit_code == 0 and "Estimates, not measured" in done.output and done.output.count("125m") == 2
    assert CliRunner().invoke(app, ["--shapes", "8t"]).exit_code == 2
    sizes = ["--check", "--hidden", "64", "--ffn", "96", "--layers", "2", "--samples", "2", "--tokens", "8"]
    done = CliRunner().invoke(app, sizes, catch_exceptions=False)
    assert done.exit_code == 0 and "times as long" in done.output
