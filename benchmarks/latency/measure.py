"""Candidates measured in an engine, case by case, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.engines import ENGINES, Engine
from benchmarks.latency.candidates import Candidate
from benchmarks.latency.timing import Speedup, interleaved, speedup
from benchmarks.latency.work import Case
from benchmarks.latency.workers import EngineFailed, Task, Worker

__all__ = ["HEADING", "Row", "Settings", "measure", "read_rows"]

HEADING = ("", "model", "ms", "tokens/s", "GB", "MB on disk", "speed-up", "95% interval", "ideal", "of the ideal")
"""Of a table of rows."""


@dataclass(frozen=True)
class Settings:
    """How it is measured.

    Attributes:
        device: `cpu` or `cuda`.
        threads: Of each engine.
        rounds: Of `interleaved`.
        shapes: Sequences at once, and tokens in each; each is measured as `prefill` and as `decode`.
    """

    device: str
    threads: int
    rounds: int
    shapes: Sequence[tuple[int, int]]

    def cases_of(self, engine: type[Engine]) -> list[Case]:
        """What is timed in an engine."""
        shapes = self.shapes[:1] if engine.by_name_only else self.shapes
        return [Case(phase, *shape) for phase in engine.phases for shape in shapes]

    @property
    def largest(self) -> Case:
        """As many sequences, and as many tokens in each, as any case has."""
        return Case("prefill", max(batch for batch, _ in self.shapes), max(tokens for _, tokens in self.shapes))


@dataclass(frozen=True)
class Row:
    """What was measured of a candidate in one case.

    Attributes:
        engine: Name of the engine.
        case: What was timed.
        candidate: Name of the candidate.
        ratio: Fraction of its parameters that went.
        seconds: Of one call, median over rounds.
        tokens_per_second: Read or given.
        memory: The most that the process held more than before it loaded the model, in bytes; on a GPU what torch held.
        disk: Bytes of the file or the folder's weights that are loaded; 0 where nothing was written.
        speedup: Over the dense model, in the same rounds; of the dense model itself 1.
        ideal: How much faster it would be if only operations (`prefill`) or bytes read (`decode`) counted.
        products: The part of a call that went into matrix products and attention; None where that cannot be told.
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
        """The part of the ideal that was reached."""
        return self.speedup.median / self.ideal

    @property
    def cells(self) -> tuple[str, ...]:
        """What stands under each heading."""
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


def read_rows(data: Mapping[str, Any]) -> list[Row]:
    """The rows of a file that `make bench` wrote."""
    return [Row(**{**row, "case": Case(**row["case"]), "speedup": Speedup(**row["speedup"])}) for row in data["rows"]]


def measure(name: str, candidates: Sequence[Candidate], settings: Settings, say: Callable[[str], Any]) -> Iterator[Row]:
    """Yield what an engine makes of the candidates, the first of which is the dense one.

    Args:
        name: Of the engine.
        candidates: Those that the engine is not for are left out.
        settings: How.
        say: Told what goes wrong.
    """
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
        say(f"{name}: {error}")
    finally:
        for _, worker in running.values():
            worker.close()


def _rows(
    name: str, case: Case, running: dict[str, tuple[Candidate, Worker]], found: dict[str, list[float]], device: str
) -> Iterator[Row]:
    engine = ENGINES[name]
    weight, cache = engine.number_bytes(device)
    dense, _ = next(iter(running.values()))

    def least(candidate: Candidate) -> float:
        return candidate.work.least(case, last_only=engine.last_only, weight_bytes=weight, cache_bytes=cache)

    for key, (candidate, worker) in running.items():
        seconds = median(found[key])
        yield Row(
            engine=name,
            case=case,
            candidate=key,
            ratio=candidate.ratio,
            seconds=seconds,
            tokens_per_second=case.made / seconds,
            memory=worker.peaks[case],
            disk=0 if candidate.source.widths_of else _size(engine.prepare(candidate.source)),
            speedup=speedup(found[dense.name], found[key]),
            ideal=least(dense) / least(candidate),
            products=worker.products(case) if candidate.everywhere else None,
        )


def _size(path: Path) -> int:
    """Bytes of a file and of the data beside it, or of the weights in a folder."""
    files = path.glob("*.safetensors") if path.is_dir() else path.parent.glob(f"{path.name}*")
    return sum(file.stat().st_size for file in files)
