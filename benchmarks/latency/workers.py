"""Each model in a process of its own, so that its memory can be told from that of others."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.engines import ENGINES, Source
from benchmarks.latency.work import Case
from benchmarks.memory import forget_peak, peak_bytes, resident_bytes

__all__ = ["EngineFailed", "Task", "Worker", "Writers", "quiet"]

_PATIENCE = 10
"""Seconds for a process to end."""


class EngineFailed(RuntimeError):
    """An engine could not load or run a model; holds what it said."""


@dataclass(frozen=True)
class Task:
    """What a process loads.

    Attributes:
        engine: Name of the engine.
        source: The model.
        device: `cpu` or `cuda`.
        threads: Of the engine.
        largest: No case has more sequences or more tokens in each.
    """

    engine: str
    source: Source
    device: str
    threads: int
    largest: Case


class Worker:
    """A process that loads a model and measures when it is asked.

    Args:
        task: What it loads. Several load at the same time; `wait` for each before any measures.
    """

    def __init__(self, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(task, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.peaks: dict[Case, float] = {}

    def wait(self) -> None:
        """Until the model is loaded.

        Raises:
            EngineFailed: It cannot be loaded.
        """
        self._receive()

    def job(self, case: Case) -> Callable[[], float]:
        """A job that has the seconds of one call of `case` measured, and puts down the peak of memory, in bytes."""

        def measured() -> float:
            self._pipe.send(("job", case))
            seconds, peak = self._receive()
            self.peaks[case] = max(peak, self.peaks.get(case, 0.0))
            return float(seconds)

        return measured

    def products(self, case: Case) -> float | None:
        """The part of a call that goes into matrix products; None where that cannot be told.

        Raises:
            EngineFailed: It could not be measured.
        """
        self._pipe.send(("products", case))
        found: float | None = self._receive()
        return found

    @property
    def exitcode(self) -> int | None:
        """How the process ended; None while it has not."""
        return self._process.exitcode

    def close(self) -> None:
        """End the process, which stops by itself where it is not at work."""
        self._pipe.close()
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _receive(self) -> Any:
        try:
            failed, said = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise EngineFailed(f"the process ended with {self.exitcode}") from None
        if failed:
            self.close()
            raise EngineFailed(said)
        return said


class Writers:
    """Processes that write what engines load, while other models are still being made.

    Args:
        threads: As many write at the same time, each with one thread.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ProcessPoolExecutor(threads, multiprocessing.get_context("spawn"), initializer=_alone)
        self._written: dict[str, list[Future[Any]]] = {}

    def write(self, name: str, source: Source) -> None:
        """Begin to write a model for an engine."""
        self._written.setdefault(name, []).append(self._pool.submit(ENGINES[name].prepare, source))

    def wait(self) -> dict[str, str]:
        """Until everything is written; returns by name of an engine what went wrong."""
        failed: dict[str, str] = {}
        for name, files in self._written.items():
            for error in (file.exception() for file in files):
                if error is not None:
                    failed.setdefault(name, f"{type(error).__name__}: {error}")
        self._pool.shutdown()
        return failed


def _alone() -> None:
    quiet()
    torch.set_num_threads(1)


def quiet() -> None:
    """Leave out what packages have to say; tables are printed here."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _serve(task: Task, pipe: Connection) -> None:
    quiet()
    torch.set_num_threads(task.threads)
    jobs: dict[Case, Callable[[], float]] = {}
    before = resident_bytes()
    try:
        engine = ENGINES[task.engine](task.source, task.device, task.largest)
        pipe.send((False, None))
        while True:
            asked, case = pipe.recv()
            if asked == "products":
                pipe.send((False, engine.products(case)))
                continue
            if case not in jobs:
                jobs[case] = engine.job(case)
            _forget_peak()
            seconds = jobs[case]()
            pipe.send((False, (seconds, _peak() - (0 if task.device == "cuda" else before))))
    except EOFError:  # nobody asks any more
        return
    except Exception as error:  # whatever an engine raises is told where it was asked for
        pipe.send((True, f"{type(error).__name__}: {error}"))


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    forget_peak()


def _peak() -> float:
    """The most memory since the peak was forgotten: of torch on a GPU where one was used, else resident."""
    if torch.cuda.is_available() and (found := torch.cuda.max_memory_allocated()):
        return float(found)
    return peak_bytes()
