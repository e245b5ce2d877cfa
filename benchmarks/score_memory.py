"""Memory and time of exact Taylor scores beside plain training: `python -m benchmarks.score_memory`.

The model is a random Llama in a folder. Each way of scoring runs in its own process, and so does plain training: a
forward and a backward run for each sample, with gradients accumulated. Memory is the anonymous memory of the process,
without the pages of mapped files, which the system can reclaim.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import fxprune
from benchmarks import common
from benchmarks.common import Shape, run_worker, watch_memory, write_random, write_results
from fxprune.checkpoint.low_memory import load_mapped, resumable_folder

RESULTS = common.RESULTS / "score_memory.json"


@dataclass(frozen=True)
class ScoreCost:
    """Time and memory of one way of scoring.

    Attributes:
        way: A key of `WAYS`.
        seconds: Processor time with one thread, else wall clock.
        peak_gb: Peak anonymous memory, in 10^9 bytes, Python and its packages included.
        over_weights: Peak memory over the bytes of the weights.
    """

    way: str
    seconds: float
    peak_gb: float
    over_weights: float


def _training(model: Any, ids: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        for sample in ids:
            model(input_ids=sample[None], labels=sample[None]).loss.backward()

    return run


def _scoring(model: Any, ids: torch.Tensor, memory: str) -> Callable[[], object]:
    traced = fxprune.trace(model, check=False).graph_module
    ready = fxprune.Pipeline([fxprune.load_pass("calibrate", data=ids), fxprune.load_pass("find-groups")])(
        traced, inplace=True
    )
    return partial(fxprune.load_pass("taylor", order="mix", memory=memory), ready.graph_module)


WAYS: dict[str, Callable[[Any, torch.Tensor], Callable[[], object]]] = {
    "plain training": _training,
    "mix, fast": partial(_scoring, memory="fast"),
    "mix, low": partial(_scoring, memory="low"),
    "mix, low, weights in files": partial(_scoring, memory="low"),
}
"""Functions of model and token ids that return the call to measure. Only the last leaves the weights in their files."""


def measure(way: str, source: Path, samples: int, tokens: int) -> ScoreCost:
    """Measure one way of scoring in this process."""
    model: Any = load_mapped(source, source)
    if way != list(WAYS)[-1]:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    ids = torch.randint(model.config.vocab_size, (samples, tokens), generator=torch.Generator().manual_seed(0))
    total = sum(parameter.nbytes for parameter in model.parameters())
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with tempfile.TemporaryDirectory() as place, resumable_folder(Path(place) / "slim"):
        run = WAYS[way](model, ids)
        with watch_memory() as highest:
            begin = clock()
            run()
            seconds = clock() - begin
    return ScoreCost(way, seconds, highest[0] / 1e9, highest[0] / total)


def main(
    hidden: Annotated[int, typer.Option(help="Width.")] = 2048,
    ffn: Annotated[int, typer.Option(help="Channels of an MLP.")] = 5632,
    layers: Annotated[int, typer.Option(help="Layers.")] = 22,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 10,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a sample.")] = 64,
    json_: Annotated[bool, typer.Option("--json", help=f"Also write results/{RESULTS.name}.")] = False,
    worker: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure scores of order `mix` in every way, and plain training."""
    if worker:
        task = json.loads(worker)
        print(json.dumps(asdict(measure(**{**task, "source": Path(task["source"])}))))
        return
    sizes = {"samples": samples, "tokens": tokens}
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "dense"
        total = write_random(source, Shape.of_width(hidden, ffn, layers).config())
        tasks = ({"way": way, "source": str(source), **sizes} for way in WAYS)
        rows = [ScoreCost(**run_worker("benchmarks.score_memory", task)) for task in tasks]
    table = Table("", "seconds", "of plain", "GB", "of the weights", title=f"weights: {total / 1e9:.2f} GB")
    for row in rows:
        ratio = row.seconds / rows[0].seconds
        table.add_row(row.way, f"{row.seconds:.0f}", f"{ratio:.2f}", f"{row.peak_gb:.2f}", f"{row.over_weights:.2f}")
    Console(width=100).print(table)
    if json_:
        settings = {"hidden": hidden, "ffn": ffn, "layers": layers, **sizes}
        write_results(RESULTS, {"settings": settings, "weights": total, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    typer.run(main)
