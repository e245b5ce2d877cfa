"""Measure candidates in an engine, case by case, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.engines.base import Case, Engine
from benchmarks.latency.candidates import Candidate
from benchmarks.latency.workers import ENGINES, EngineFailed, Task, Worker
from fxprune.evaluation.speed import time_interleaved

HEADING = ("", "model", "ms", "tokens/s", "GB", "MB on disk", "speed-up", "95% interval", "ideal", "of the ideal")
"""Heading of a table of rows."""


_RESAMPLES = 4000


@dataclass(frozen=True)
class Speedup:
    """Speed-up of one candidate over another.

    Attributes:
        median: Median over rounds of the ratio of times.
        low: Lower end of its bootstrap 95% interval.
        high: Upper end of the interval.
    """

    median: float
    low: float
    high: float


def speedup(first: Sequence[float], second: Sequence[float]) -> Speedup:
    """Speed-up of the second over the first, from times of the same rounds; deterministic.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    ratios = torch.tensor([a / b for a, b in zip(first, second, strict=True)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(ratios), (_RESAMPLES, len(ratios)), generator=generator)
    medians = ratios[drawn].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Speedup(ratios.quantile(0.5).item(), low, high)


def interleaved(jobs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each job by round; a round measures all jobs forwards and backwards: A B C C B A.

    So a machine that steadily slows down or speeds up affects all of them alike.

    An interval from fewer than ten rounds is rough.

    Raises:
        ValueError: `rounds` is not positive.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: at least one round is needed")
    found = time_interleaved(jobs, 2 * rounds)
    return {
        name: [(there + back) / 2 for there, back in zip(times[::2], times[1::2], strict=True)]
        for name, times in found.items()
    }


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement.

    Attributes:
        device: `cpu` or `cuda`.
        threads: Threads of each engine.
        rounds: Rounds of `interleaved`.
        shapes: Numbers of sequences, and of tokens in each; each shape is measured as `prefill` and as `decode`.
    """

    device: str
    threads: int
    rounds: int
    shapes: Sequence[tuple[int, int]]

    def cases_of(self, engine: type[Engine]) -> list[Case]:
        """Cases that are timed in an engine."""
        shapes = self.shapes[:1] if engine.by_name_only else self.shapes
        return [Case(phase, *shape) for phase in engine.phases for shape in shapes]

    @property
    def largest(self) -> Case:
        """A case with the most sequences, and the most tokens in each, of all cases."""
        return Case("prefill", max(batch for batch, _ in self.shapes), max(tokens for _, tokens in self.shapes))


@dataclass(frozen=True)
class LatencyRow:
    """Measurement of a candidate in one case.

    Attributes:
        engine: Name of the engine.
        case: The timed call.
        candidate: Name of the candidate.
        ratio: Fraction of its parameters removed.
        seconds: Seconds of one call, median over rounds.
        tokens_per_second: Tokens read or generated per second.
        memory: Peak bytes of the process beyond those before the model was loaded; on a GPU, those held by torch.
        disk: Bytes of the file, or of the weights in the folder, that are loaded; 0 if nothing was written.
        speedup: Speed-up over the dense model in the same rounds; 1 for the dense model.
        ideal: Speed-up if only operations (`prefill`) or bytes read (`decode`) took time.
        products: Share of a call in matrix products and attention; None if unknown.
    """

    engine: str
    case: Case
    candidate: str
    ratio: float
    seconds: float
    tokens_per_second: float
    memory: float
    disk: int
    speedup: Speedup
    ideal: float
    products: float | None = None

    @property
    def over_ideal(self) -> float:
        """Speed-up as a fraction of the ideal."""
        return self.speedup.median / self.ideal

    @property
    def cells(self) -> tuple[str, ...]:
        """Cells under each heading."""
        return (
            str(self.case),
            self.candidate,
            f"{self.seconds * 1e3:.1f}",
            f"{self.tokens_per_second:.0f}",
            f"{self.memory / 1e9:.2f}",
            f"{self.disk / 1e6:.0f}" if self.disk else "",
            f"{self.speedup.median:.2f}",
            f"{self.speedup.low:.2f} to {self.speedup.high:.2f}",
            f"{self.ideal:.2f}",
            f"{self.over_ideal:.2f}",
        )


def read_rows(data: Mapping[str, Any]) -> list[LatencyRow]:
    """Rows of a file that `make bench` wrote."""
    return [
        LatencyRow(**{**row, "case": Case(**row["case"]), "speedup": Speedup(**row["speedup"])}) for row in data["rows"]
    ]


def measure(
    name: str, candidates: Sequence[Candidate], settings: Settings, report: Callable[[str], Any]
) -> Iterator[LatencyRow]:
    """Measure the candidates that run in an engine; report a line if it fails."""
    engine = ENGINES[name]
    running: dict[str, tuple[Candidate, Worker]] = {}
    try:
        for candidate in (c for c in candidates if c.runs_in(engine)):
            task = Task(name, candidate.source, settings.device, settings.threads, settings.largest)
            running[candidate.name] = candidate, Worker(task)
        for _, worker in running.values():
            worker.wait()
        for case in settings.cases_of(engine):
            jobs = {key: worker.job(case) for key, (_, worker) in running.items()}
            found = interleaved(jobs, settings.rounds)
            yield from _rows(name, case, running, found, settings.device)
    except EngineFailed as error:
        report(f"{name}: {error}")
    finally:
        for _, worker in running.values():
            worker.close()


def _rows(
    name: str, case: Case, running: dict[str, tuple[Candidate, Worker]], found: dict[str, list[float]], device: str
) -> Iterator[LatencyRow]:
    engine = ENGINES[name]
    weight, cache = engine.number_bytes(device)
    dense, _ = next(iter(running.values()))

    def least(candidate: Candidate) -> float:
        return candidate.work.least(case, last_only=engine.last_only, weight_bytes=weight, cache_bytes=cache)

    for key, (candidate, worker) in running.items():
        seconds = median(found[key])
        yield LatencyRow(
            engine=name,
            case=case,
            candidate=key,
            ratio=candidate.ratio,
            seconds=seconds,
            tokens_per_second=case.processed / seconds,
            memory=worker.peaks[case],
            disk=0 if candidate.source.widths_of else _size(engine.prepare(candidate.source)),
            speedup=speedup(found[dense.name], found[key]),
            ideal=least(dense) / least(candidate),
            products=worker.products(case) if candidate.everywhere else None,
        )


def _size(path: Path) -> int:
    """Bytes of a file and its external data, or of the weights in a folder."""
    files = path.glob("*.safetensors") if path.is_dir() else path.parent.glob(f"{path.name}*")
    return sum(file.stat().st_size for file in files)
