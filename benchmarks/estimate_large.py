"""Estimated hours and memory of pruning models too large to try here: `python -m benchmarks.estimate_large`.

These are estimates, not measurements. Work is counted: multiply-accumulates of the traced graph, bytes of weights,
sums and activations. The speed of a device is the figure of its maker times a share that is assumed to be sustained.
Nothing overlaps: the times of computing, of reading memory and of transfers add up. `--check` puts the same formula,
with the measured speed of this processor, beside a run.

On a GPU nothing is transferred block by block yet: the figures are those of an implementation that does.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM

import fxprune
from benchmarks.common import SHAPES, Shape, environment, write_random
from benchmarks.score_memory import WAYS, measure
from fxprune.graph.counting import count_macs, count_parameters

app = typer.Typer(add_completion=False)

_SUMS = 8
"""Bytes per weight of the two sums of `mix`."""

_TRIES = 8
"""Dampings that a fit tries in float64, with a factorisation, a solution and an error each."""


@dataclass(frozen=True)
class Device:
    """Sustained speed of one card, per second, and its memory.

    Args:
        flops: Operations in the dtype of the weights; an addition and a multiplication count as two.
        single: Operations in float32, the dtype of the runs of a fit.
        double: Operations in float64, the dtype in which a fit is solved.
        memory: Bytes read from and written to its memory.
        link: Bytes transferred between it and the host.
        disk: Bytes read from and written to files; all cards share the disk.
        capacity: Bytes of its memory.
    """

    flops: float
    single: float
    double: float
    memory: float
    link: float
    disk: float
    capacity: float


@dataclass(frozen=True)
class ModelCounts:
    """Sizes of a model that determine time and memory.

    Args:
        macs: Multiply-accumulates of a forward run of one sample.
        weights: Number of weights.
        layer: Weights of one layer, which is processed as one part.
        largest: Weights of the largest matrix.
        hidden: Width of the stream between layers, and inputs of the fitted matrix of attention.
        ffn: Inputs of the fitted matrix of an MLP.
        layers: Number of layers.
        each: Bytes of a weight.
    """

    macs: float
    weights: float
    layer: float
    largest: float
    hidden: int
    ffn: int
    layers: int
    each: int


@dataclass(frozen=True)
class Estimate:
    """Hours of each step, and bytes of memory.

    Args:
        taylor: Hours of `mix` scores, part by part.
        fit: Hours of least squares.
        write: Hours of writing the slim model.
        scoring: Bytes on a card for `mix`, without the runtime of the card.
        fitting: Bytes on a card for least squares.
        boundary: Bytes of the activations between layers, of all samples, on the host or on disk.
    """

    taylor: float
    fit: float
    write: float
    scoring: float
    fitting: float
    boundary: float


def count_model(shape: Shape, tokens: int, each: int) -> ModelCounts:
    """Counts from the graph of a Llama shape, traced on `meta`.

    Args:
        shape: Sizes of the model.
        tokens: Tokens of a sample.
        each: Bytes of a weight.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config())
    graph_module = fxprune.trace(model).graph_module
    total = count_parameters(graph_module)
    head = model.config.vocab_size * shape.hidden
    layer = (total - 2 * head) / shape.layers
    largest = max(shape.hidden * shape.ffn, head)
    macs = count_macs(graph_module, tokens)
    return ModelCounts(macs, total, layer, largest, shape.hidden, shape.ffn, shape.layers, each)


def score_seconds(model: ModelCounts, device: Device, samples: int, tokens: int, cards: int = 1) -> float:
    """Seconds of `mix` scores, part by part, with samples divided among cards.

    A forward run, a second one and a backward run are four times the work of the first. For each sample a weight is
    read three times, its gradient is written and read for each of two sums, and these are read and written. Weights
    cross the link and the disk twice, sums cross the link twice if several cards reduce them, and the activations
    between layers and their gradients are moved there and back.
    """
    mine = samples / cards
    compute = 4 * 2 * model.macs * mine / device.flops
    passes = model.weights * (5 * model.each + 2 * _SUMS + 2 * 4) * mine / device.memory
    moved = 2 * model.weights * model.each + 4 * _boundary(model, mine, tokens)
    moved += 2 * _SUMS * model.weights if cards > 1 else 0
    return compute + passes + moved / device.link + 2 * model.weights * model.each / device.disk


def _fit_seconds(model: ModelCounts, device: Device, samples: int, tokens: int, cards: int) -> float:
    """Seconds of least squares with a damping for each weight, solved on every card.

    Dense and masked runs go side by side. A fitted weight with ``in`` inputs and ``out`` outputs needs two matrices,
    ``(in, in)`` and ``(in, out)``.
    """
    mine = samples / cards
    sizes = [(model.hidden, model.hidden), (model.ffn, model.hidden)]
    held = model.layers * sum(inputs * (inputs + outputs) for inputs, outputs in sizes)
    solved = model.layers * sum(inputs**3 / 3 + 2 * inputs**2 * outputs for inputs, outputs in sizes)
    compute = 2 * (2 * model.macs * mine + held * mine * tokens) / device.single
    moved = model.weights * model.each + 4 * _boundary(model, mine, tokens)
    moved += 2 * 8 * held if cards > 1 else 0
    loaded = moved / device.link + model.weights * model.each / device.disk
    return compute + 2 * _TRIES * solved / device.double + loaded


def _boundary(model: ModelCounts, samples: float, tokens: int) -> float:
    """Bytes of the activations between layers."""
    return model.hidden * tokens * samples * model.layers * model.each


def estimate(
    model: ModelCounts, device: Device, samples: int, tokens: int, cards: int = 1, removed: float = 0.2
) -> Estimate:
    """Estimated hours and bytes of a prune.

    Args:
        model: Sizes of the model.
        device: One card.
        samples: Calibration samples.
        tokens: Tokens of a sample.
        cards: Number of cards; they divide the samples, and each holds one layer at a time.
        removed: Fraction of the weights removed.
    """
    alive = 16 * tokens * max(model.hidden, model.ffn)
    matrices = 4 * 8 * model.ffn**2 + 3 * 8 * model.ffn * model.hidden
    return Estimate(
        taylor=score_seconds(model, device, samples, tokens, cards) / 3600,
        fit=_fit_seconds(model, device, samples, tokens, cards) / 3600,
        write=(2 - removed) * model.weights * model.each / device.disk / 3600,
        scoring=model.layer * (model.each + _SUMS) + model.largest * (model.each + 4) + alive * model.each,
        fitting=model.layer * model.each + matrices + alive * 4,
        boundary=_boundary(model, samples, tokens),
    )


def measure_device(hidden: int, ffn: int, tokens: int) -> Device:
    """Measure this processor, by the processor time of products and sums of the sizes given.

    Args:
        hidden: Width.
        ffn: Channels of an MLP.
        tokens: Tokens of a sample.
    """
    x, weight = torch.randn(tokens, hidden), torch.randn(ffn, hidden)
    total, more = torch.zeros(ffn, hidden), torch.randn(ffn, hidden)
    flops = 2 * x.numel() * ffn / _median_seconds(lambda: torch.nn.functional.linear(x, weight))
    memory = 3 * total.nbytes / _median_seconds(lambda: total.add_(more))
    return Device(flops, flops, flops / 2, memory, memory, memory, 0.0)


def _median_seconds(call: Callable[[], object], repeats: int = 9) -> float:
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return median(times)


def _check(shape: Shape, samples: int, tokens: int) -> None:
    """Print the estimate of a run on this processor, and its measured time."""
    torch.set_num_threads(1)
    model = count_model(shape, tokens, 4)
    expected = score_seconds(model, measure_device(shape.hidden, shape.ffn, tokens), samples, tokens)
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "dense"
        write_random(source, shape.config())
        seconds = measure(list(WAYS)[-1], source, samples, tokens).seconds
    print(f"{model.weights:,.0f} weights, {samples} x {tokens} tokens, one thread, seconds of processor time")
    print(f"estimated {expected:.1f} s, measured {seconds:.1f} s: {seconds / expected:.2f} times as long")


@app.command()
def main(
    shapes: Annotated[str, typer.Option(help=f"Which of {','.join(SHAPES)}, separated by commas.")] = "7b,70b",
    cards: Annotated[str, typer.Option(help="Numbers of cards, separated by commas.")] = "1,8",
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens of a sample.")] = 2048,
    each: Annotated[int, typer.Option(help="Bytes of a weight.")] = 2,
    tflops: Annotated[float, typer.Option(help="TFLOPS in the dtype of the weights, by its maker.")] = 165.0,
    single: Annotated[float, typer.Option(help="TFLOPS in float32.")] = 82.6,
    double: Annotated[float, typer.Option(help="TFLOPS in float64.")] = 1.29,
    sustained: Annotated[float, typer.Option(help="Fraction of these that is sustained.")] = 0.4,
    memory: Annotated[float, typer.Option(help="GB/s to and from the memory of a card.")] = 1008.0,
    capacity: Annotated[float, typer.Option(help="GB of a card.")] = 24.0,
    pcie: Annotated[float, typer.Option(help="GB/s between a card and the host.")] = 25.0,
    disk: Annotated[float, typer.Option(help="GB/s of the disk.")] = 3.0,
    check: Annotated[bool, typer.Option("--check", help="Compare the formula with a run on this processor.")] = False,
    hidden: Annotated[int, typer.Option(help="Width, of --check.")] = 1024,
    ffn: Annotated[int, typer.Option(help="Channels of an MLP, of --check.")] = 2816,
    layers: Annotated[int, typer.Option(help="Layers, of --check.")] = 16,
) -> None:
    """Estimate hours and memory for large Llama shapes; defaults are those of an RTX 4090."""
    console = Console(width=110)
    if check:
        console.print("  ".join(f"{name}: {value}" for name, value in environment().items()))
        _check(Shape.of_width(hidden, ffn, layers), min(samples, 6), min(tokens, 64))
        return
    unknown = set(shapes.split(",")) - set(SHAPES)
    if unknown:
        raise typer.BadParameter(f"no such shape: {', '.join(sorted(unknown))}", param_hint="--shapes")
    fast, float32, float64 = (speed * sustained * 1e12 for speed in (tflops, single, double))
    device = Device(fast, float32, float64, memory * 1e9, pcie * 1e9, disk * 1e9, capacity * 1e9)
    title = f"Estimates, not measured: {samples} x {tokens} tokens, {each} bytes a weight"
    table = Table("shape", title=title, box=SIMPLE)
    steps = ("taylor h", "fit h", "write h", "all h")
    for heading in ("cards", *steps, "GB scoring", "GB fitting", "GB between"):
        table.add_column(heading, justify="right")
    for name in shapes.split(","):
        model = count_model(SHAPES[name], tokens, each)
        for number in map(int, cards.split(",")):
            found = estimate(model, device, samples, tokens, number)
            hours = (found.taylor, found.fit, found.write, found.taylor + found.fit + found.write)
            sizes = (
                f"{size / 1e9:.1f}{'' if size < 0.9 * device.capacity else ' (!)'}"
                for size in (found.scoring, found.fitting)
            )
            table.add_row(name, str(number), *(f"{h:.2f}" for h in hours), *sizes, f"{found.boundary / 1e9:.0f}")
    console.print(table)
    console.print(f"(!) exceeds a card of {capacity:g} GB: that step runs on the host, and takes longer")


if __name__ == "__main__":
    app()
