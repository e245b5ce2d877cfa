"""Memory and time of exact Taylor scores beside plain training: `python -m benchmarks.score_memory`.

The model is a random Llama in a folder. Each way of scoring has a process of its own, and so has plain training: a
forward and a backward run for each sample, with gradients that add up. Memory is what a process has beyond the files
that it maps, whose pages the system takes back when it wants to; it is looked at every few milliseconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.environment import write_results
from benchmarks.low_memory import llama, write_random
from benchmarks.memory import anonymous_bytes

__all__ = ["RESULTS", "WAYS", "Measurement", "app", "measure"]

RESULTS = Path(__file__).parent / "results" / "score_memory.json"
ROOT = Path(__file__).parent.parent
_EVERY = 0.005
"""Seconds between two looks at memory."""

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Measurement:
    """One way of going over the samples.

    Attributes:
        way: Which one.
        seconds: It took: the processor's time with one thread, else wall clock.
        peak_gb: The most memory while it ran, in 10^9 bytes, Python and its packages with it.
        over_weights: That, over the bytes of the weights.
    """

    way: str
    seconds: float
    peak_gb: float
    over_weights: float


@contextmanager
def _watched() -> Iterator[list[float]]:
    """Yield a list that holds the most memory so far."""
    most, done = [anonymous_bytes()], threading.Event()

    def look() -> None:
        while not done.wait(_EVERY):
            most[0] = max(most[0], anonymous_bytes())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def _training(model: Any, ids: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        for sample in ids:
            model(input_ids=sample[None], labels=sample[None]).loss.backward()

    return run


def _scoring(model: Any, ids: torch.Tensor, memory: str) -> Callable[[], object]:
    import fxprune
    from fxprune.pipeline.registry import load_pass

    traced = fxprune.trace(model, check=False).graph_module
    ready = fxprune.Pipeline([load_pass("calibrate", data=ids), load_pass("find-groups")])(traced, inplace=True)
    return partial(load_pass("taylor", order="mix", memory=memory), ready.graph_module)


WAYS: dict[str, Callable[[Any, torch.Tensor], Callable[[], object]]] = {
    "plain training": _training,
    "mix, fast": partial(_scoring, memory="fast"),
    "mix, low": partial(_scoring, memory="low"),
    "mix, low, weights in files": partial(_scoring, memory="low"),
}
"""What is measured of each is the call of what it returns. Only the last one leaves the weights in their files."""


def measure(way: str, source: Path, samples: int, tokens: int) -> Measurement:
    """One way, here and now.

    Args:
        way: A key of `WAYS`.
        source: Folder of the model.
        samples: How many.
        tokens: Of one.
    """
    from fxprune.checkpoint.low_memory import load_mapped, on_disk

    model: Any = load_mapped(source, source)
    if way != list(WAYS)[-1]:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    ids = torch.randint(model.config.vocab_size, (samples, tokens), generator=torch.Generator().manual_seed(0))
    total = sum(parameter.nbytes for parameter in model.parameters())
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with tempfile.TemporaryDirectory() as place, on_disk(Path(place) / "slim"):
        run = WAYS[way](model, ids)
        with _watched() as most:
            begin = clock()
            run()
            seconds = clock() - begin
    return Measurement(way, seconds, most[0] / 1e9, most[0] / total)


@app.command()
def main(
    hidden: Annotated[int, typer.Option(help="Width.")] = 2048,
    ffn: Annotated[int, typer.Option(help="Channels of an MLP.")] = 5632,
    layers: Annotated[int, typer.Option(help="Layers.")] = 22,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 10,
    tokens: Annotated[int, typer.Option(help="Tokens of one.")] = 64,
    json_: Annotated[bool, typer.Option("--json", help=f"Write results/{RESULTS.name} as well.")] = False,
    worker: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Score by `mix` in every way, beside plain training."""
    if worker:
        task = json.loads(worker)
        print(json.dumps(asdict(measure(**{**task, "source": Path(task["source"])}))))
        return
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "dense"
        total = write_random(source, llama(hidden, ffn, layers))
        rows = [_apart(way, source, samples, tokens) for way in WAYS]
    table = Table("", "seconds", "of plain", "GB", "of the weights", title=f"weights: {total / 1e9:.2f} GB")
    for row in rows:
        again = row.seconds / rows[0].seconds
        table.add_row(row.way, f"{row.seconds:.0f}", f"{again:.2f}", f"{row.peak_gb:.2f}", f"{row.over_weights:.2f}")
    Console(width=100).print(table)
    if json_:
        settings = {"hidden": hidden, "ffn": ffn, "layers": layers, "samples": samples, "tokens": tokens}
        content = {"settings": settings, "weights": total, "rows": [asdict(row) for row in rows]}
        write_results(RESULTS, content)


def _apart(way: str, source: Path, samples: int, tokens: int) -> Measurement:
    task = json.dumps({"way": way, "source": str(source), "samples": samples, "tokens": tokens})
    command = [sys.executable, "-m", "benchmarks.score_memory", "--worker", task]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{way} failed: {done.stderr.strip()[-2000:]}")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    app()
