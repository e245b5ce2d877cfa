"""Times are measured side by side, and an interval says how sure a ratio is."""

from __future__ import annotations

import pytest
import torch

from benchmarks.latency.timing import Speedup, interleaved, paired_latency, speedup, timed


def test_jobs_take_turns_forwards_and_backwards() -> None:
    order: list[str] = []

    def job(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = interleaved({name: lambda name=name: job(name) for name in "abc"}, rounds=2)
    assert "".join(order) == "abc" + "abccba" * 2
    assert found == {name: [6.5, 12.5] for name in "abc"}, "a machine that gets slower steadily favours none"


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds"):
        interleaved({}, rounds=0)


def test_a_speedup_is_the_median_of_ratios_with_an_interval_that_is_the_same_each_time() -> None:
    assert speedup([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == speedup([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert speedup([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == Speedup(2.0, 2.0, 3.0)
    assert speedup([3.0] * 4, [2.0] * 4) == Speedup(1.5, 1.5, 1.5)


def test_a_timed_call_is_made_until_it_takes_long_enough() -> None:
    calls: list[int] = []
    job = timed(lambda: calls.append(1), least_s=0.0)
    before = len(calls)
    assert job() > 0 and len(calls) - before >= 1
    many = timed(lambda: calls.append(1), least_s=1e-3)
    before = len(calls)
    many()
    assert len(calls) - before > 1


def test_two_models_run_on_the_same_inputs_in_inference_mode() -> None:
    calls: list[tuple[str, bool]] = []

    def model(name: str, **_: torch.Tensor) -> None:
        calls.append((name, torch.is_inference_mode_enabled()))

    paired = paired_latency(
        lambda **given: model("dense", **given), lambda **given: model("slim", **given), {"x": torch.zeros(1)}, rounds=1
    )
    assert {name for name, _ in calls} == {"dense", "slim"} and all(inside for _, inside in calls)
    assert paired.dense_ms > 0 and paired.slim_ms > 0 and paired.speedup.low <= paired.speedup.high
    assert not torch.is_inference_mode_enabled()
