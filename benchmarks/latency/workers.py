"""Engines by name, and processes that run them: one for each model, to measure its memory apart."""

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

from benchmarks.common import memory_bytes, reset_peak_memory
from benchmarks.engines.base import Case, Engine, Source
from benchmarks.engines.in_torch import CompiledEngine, GraphEngine, TransformersEngine
from benchmarks.engines.llama_cpp import LlamaCppEngine, LlamaCppQuantisedEngine
from benchmarks.engines.onnx import OnnxEngine
from benchmarks.engines.vllm import VllmEngine

ENGINES: dict[str, type[Engine]] = {
    engine.name: engine
    for engine in (
        TransformersEngine,
        CompiledEngine,
        GraphEngine,
        OnnxEngine,
        LlamaCppEngine,
        LlamaCppQuantisedEngine,
        VllmEngine,
    )
}
"""Engines by name, in the order in which they are measured."""

_JOIN_SECONDS = 10


class EngineFailed(RuntimeError):
    """An engine could not load or run a model; holds its error."""


@dataclass(frozen=True)
class Task:
    """Engine and model that a process loads; `largest` bounds the sequences, and the tokens in each, of all cases."""

    engine: str
    source: Source
    device: str
    threads: int
    largest: Case


class Worker:
    """A process that loads a model and measures on request.

    Args:
        task: Engine and model to load. Several workers load at the same time; `wait` for each before any measures.
    """

    def __init__(self, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(task, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.peaks: dict[Case, float] = {}

    def wait(self) -> None:
        """Wait until the model is loaded.

        Raises:
            EngineFailed: The model cannot be loaded.
        """
        self._receive()

    def job(self, case: Case) -> Callable[[], float]:
        """Return a job that returns the seconds of one call of `case`, and records peak memory in `peaks`, in bytes."""

        def measured() -> float:
            self._pipe.send(("job", case))
            seconds, peak = self._receive()
            self.peaks[case] = max(peak, self.peaks.get(case, 0.0))
            return float(seconds)

        return measured

    def products(self, case: Case) -> float | None:
        """Share of a call in matrix products and attention; None if unknown.

        Raises:
            EngineFailed: It could not be measured.
        """
        self._pipe.send(("products", case))
        found: float | None = self._receive()
        return found

    @property
    def exitcode(self) -> int | None:
        """Exit code of the process; None while it runs."""
        return self._process.exitcode

    def close(self) -> None:
        """End the process: it stops by itself if idle, else it is terminated."""
        self._pipe.close()
        self._process.join(_JOIN_SECONDS)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _receive(self) -> Any:
        try:
            failed, reply = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise EngineFailed(f"the process ended with {self.exitcode}") from None
        if failed:
            self.close()
            raise EngineFailed(reply)
        return reply


class Writers:
    """Processes, of one thread each, that write the files of engines while further models are made."""

    def __init__(self, threads: int) -> None:
        self._pool = ProcessPoolExecutor(threads, multiprocessing.get_context("spawn"), initializer=_start_writer)
        self._written: dict[str, list[Future[Any]]] = {}

    def write(self, name: str, source: Source) -> None:
        """Start to write a model for an engine."""
        self._written.setdefault(name, []).append(self._pool.submit(ENGINES[name].prepare, source))

    def wait(self) -> dict[str, str]:
        """Wait until everything is written; return errors by name of the engine."""
        failed: dict[str, str] = {}
        for name, files in self._written.items():
            for error in (file.exception() for file in files):
                if error is not None:
                    failed.setdefault(name, f"{type(error).__name__}: {error}")
        self._pool.shutdown()
        return failed


def _start_writer() -> None:
    silence_packages()
    torch.set_num_threads(1)


def silence_packages() -> None:
    """Suppress warnings and progress of packages, between the tables printed here."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _serve(task: Task, pipe: Connection) -> None:
    silence_packages()
    torch.set_num_threads(task.threads)
    jobs: dict[Case, Callable[[], float]] = {}
    before = memory_bytes("VmRSS")
    try:
        engine = ENGINES[task.engine](task.source, task.device, task.largest)
        pipe.send((False, None))
        while True:
            request, case = pipe.recv()
            if request == "products":
                pipe.send((False, engine.products(case)))
                continue
            if case not in jobs:
                jobs[case] = engine.job(case)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            reset_peak_memory()
            seconds = jobs[case]()
            pipe.send((False, (seconds, _peak() - (0 if task.device == "cuda" else before))))
    except EOFError:  # the parent closed the pipe
        return
    except Exception as error:  # an error of an engine is reported to the parent, whatever its type
        pipe.send((True, f"{type(error).__name__}: {error}"))


def _peak() -> float:
    """Peak bytes since the reset: those of torch if a GPU was used, else resident memory."""
    if torch.cuda.is_available() and (found := torch.cuda.max_memory_allocated()):
        return float(found)
    return memory_bytes("VmHWM")
