"""Times of several candidates measured side by side, so that a drifting machine favours none of them."""

from __future__ import annotations

import math
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.utils import benchmark

__all__ = ["Paired", "Speedup", "interleaved", "paired_latency", "speedup", "timed"]

_RESAMPLES = 4000


@dataclass(frozen=True)
class Speedup:
    """How much faster one is than another.

    Attributes:
        median: Over rounds, of the time of the first over that of the second.
        low: Lower end of the bootstrap 95% interval of it.
        high: Upper end.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """Latencies of two models, and how much faster the second one is.

    Attributes:
        dense_ms: Median time of one call of the dense model, in milliseconds.
        slim_ms: Median time of one call of the slim model, in milliseconds.
        speedup: Of the slim one.
    """

    dense_ms: float
    slim_ms: float
    speedup: Speedup


def interleaved(jobs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure jobs round by round, each time forwards and backwards: A B C C B A.

    A machine that slows down or speeds up steadily within a round changes all of them alike.

    Args:
        jobs: By name; each does its work and returns the seconds that it took. Each is called once before to warm up.
        rounds: How many; an interval from fewer than ten is rough.

    Returns:
        For each job its seconds, round by round.

    Raises:
        ValueError: `rounds` is not positive.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: at least one round is needed")
    for job in jobs.values():
        job()
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        there = {name: job() for name, job in jobs.items()}
        for name in reversed(list(jobs)):
            found[name].append((there[name] + jobs[name]()) / 2)
    return found


def speedup(first: Sequence[float], second: Sequence[float]) -> Speedup:
    """How much faster the second is than the first, from times of the same rounds; the same on every call.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    ratios = torch.tensor([a / b for a, b in zip(first, second, strict=True)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(ratios), (_RESAMPLES, len(ratios)), generator=generator)
    medians = ratios[drawn].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Speedup(ratios.quantile(0.5).item(), low, high)


def timed(call: Callable[[], Any], least_s: float = 0.05) -> Callable[[], float]:
    """A job that calls until that takes about `least_s`, after one call to warm up, and returns the seconds of one.

    It waits for a GPU where there is one. Finding out how many calls that are warms up, compiles what is compiled
    at the first call, and has more calls made than one before. A call that alone takes `least_s` is not made
    twice: what waking up costs is little of it. `torch.utils.benchmark.Timer` would make two calls or more before each
    measurement, which for calls of half a second is most of the time.
    """
    timer = timeit.Timer(call, timer=benchmark.timer)
    for _ in range(2):
        once = timer.timeit(1)
    number = max(1, math.ceil(least_s / once))

    def job() -> float:
        if number > 1:
            call()
        return timer.timeit(number) / number

    return job


def paired_latency(
    dense: Callable[..., Any], slim: Callable[..., Any], inputs: Mapping[str, Any], rounds: int = 10
) -> Paired:
    """Two models, timed on the same inputs in inference mode.

    Args:
        dense: The model to compare with.
        slim: The model in question.
        inputs: Keyword arguments of both.
        rounds: As in `interleaved`.
    """
    with torch.inference_mode():
        jobs = {"dense": timed(lambda: dense(**inputs)), "slim": timed(lambda: slim(**inputs))}
        found = interleaved(jobs, rounds)
    return Paired(
        dense_ms=median(found["dense"]) * 1e3,
        slim_ms=median(found["slim"]) * 1e3,
        speedup=speedup(found["dense"], found["slim"]),
    )
