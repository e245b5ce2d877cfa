"""Latency of two models measured side by side, so that a drifting machine does not favour either."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.utils.benchmark import Timer

__all__ = ["Paired", "paired_latency"]

_RESAMPLES = 4000


@dataclass(frozen=True)
class Paired:
    """Latencies of two models, and how much faster the second one is.

    Attributes:
        dense_ms: Median time of one call of the dense model, in milliseconds.
        slim_ms: Median time of one call of the slim model, in milliseconds.
        speedup: Median over rounds of dense time over slim time.
        low: Lower end of the bootstrap 95% interval of `speedup`.
        high: Upper end of it.
    """

    dense_ms: float
    slim_ms: float
    speedup: float
    low: float
    high: float


def paired_latency(
    dense: Callable[..., Any],
    slim: Callable[..., Any],
    inputs: Mapping[str, Any],
    rounds: int = 10,
    *,
    min_run_s: float = 0.05,
) -> Paired:
    """Two models are timed on the same inputs in interleaved order.

    Each round measures dense, slim, slim, dense: a machine that slows down or speeds up steadily within a
    round changes both sums alike. The ratio is taken within each round, and its interval by resampling
    rounds. Calls run in inference mode, with as many threads as torch is set to.

    Args:
        dense: The model to compare with.
        slim: The model in question.
        inputs: Keyword arguments of both.
        rounds: Rounds of four measurements; an interval from fewer than ten is rough.
        min_run_s: Calls are repeated within one measurement until it takes about this many seconds.

    Raises:
        ValueError: `rounds` is not positive.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: at least one round is needed")
    with torch.inference_mode():
        timers = [_timer(model, inputs) for model in (dense, slim)]
        numbers = [_calls_per_measurement(timer, min_run_s) for timer in timers]
        times = [[timers[i].timeit(numbers[i]).mean * 1e3 for i in (0, 1, 1, 0)] for _ in range(rounds)]
    ratios = torch.tensor([(a + d) / (b + c) for a, b, c, d in times], dtype=torch.float64)
    low, high = _bootstrap_interval(ratios)
    return Paired(
        dense_ms=median(time for a, _, _, d in times for time in (a, d)),
        slim_ms=median(time for _, b, c, _ in times for time in (b, c)),
        speedup=ratios.quantile(0.5).item(),
        low=low,
        high=high,
    )


def _timer(model: Callable[..., Any], inputs: Mapping[str, Any]) -> Timer:
    """A timer of one call of the model; it waits for a GPU where there is one."""
    return Timer(
        "model(**inputs)",
        globals={"model": model, "inputs": dict(inputs)},
        num_threads=torch.get_num_threads(),
    )


def _calls_per_measurement(timer: Timer, min_run_s: float) -> int:
    """How many calls take about `min_run_s` seconds; finding it warms the model up."""
    return max(1, math.ceil(min_run_s / timer.timeit(1).mean))


def _bootstrap_interval(ratios: torch.Tensor) -> tuple[float, float]:
    """The 95% percentile interval of the median of `ratios`, the same on every call with the same ratios.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(ratios), (_RESAMPLES, len(ratios)), generator=generator)
    medians = ratios[drawn].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
