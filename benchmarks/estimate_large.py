"""Hours and memory of a prune of models that are too large to try here: `python -m benchmarks.estimate_large`.

These are estimates and no measurements. Work is counted: multiply-accumulates of the traced graph, bytes of weights,
sums and activations. What a device does in a second is what its maker states, times a share that is assumed to be
sustained. Nothing overlaps: the times of computing, of passing over memory and of moving add up. The same formula, with
what this processor does, is set beside a measured run by `--check`.

On a GPU nothing is moved block by block yet: the figures say what it would take if it were.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.discovery import SHAPES, VOCABULARY, Shape, _llama
from benchmarks.environment import environment
from benchmarks.low_memory import llama, write_random
from benchmarks.score_memory import WAYS, measure

__all__ = ["Device", "Estimate", "Model", "app", "calibrated", "counted", "estimate", "score_seconds"]

app = typer.Typer(add_completion=False)

_SUMS = 8
"""Bytes of the two sums of `mix`, for each weight."""

_TRIES = 8
"""Dampings that a fit tries, in float64: a factorisation, a solution and an error each."""


@dataclass(frozen=True)
class Device:
    """What one card does in a second.

    Args:
        flops: Operations in the dtype of the weights, an addition and a multiplication counted as two, as sustained.
        single: The same in float32, in which the runs of a fit are.
        double: The same in float64, in which a fit is solved.
        memory: Bytes to and from its own memory.
        link: Bytes between it and the host.
        disk: Bytes read from and written to files; all cards share it.
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
class Model:
    """What is counted of a model.

    Args:
        macs: Multiply-accumulates of a forward run of one sample.
        weights: How many numbers.
        layer: How many of these are in one layer, which is one part.
        largest: The most weights of one matrix.
        hidden: Width of what goes from layer to layer, and inputs of the fitted matrix of attention.
        ffn: Inputs of the fitted matrix of an MLP.
        layers: Layers.
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
    """Hours of each step, and bytes.

    Args:
        taylor: Hours of `mix` in parts.
        fit: Of least squares.
        write: Of writing the slim model.
        scoring: Bytes on a card for `mix`, without its runtime.
        fitting: For least squares.
        boundary: Bytes of what is alive between layers, of all samples, on the host or on disk.
    """

    taylor: float
    fit: float
    write: float
    scoring: float
    fitting: float
    boundary: float


def counted(shape: Shape, tokens: int, each: int) -> Model:
    """What the graph of a Llama shape, traced on `meta`, comes to.

    Args:
        shape: Its sizes.
        tokens: Of a sample.
        each: Bytes of a weight.
    """
    import fxprune
    from fxprune.graph.counting import count_macs, count_parameters

    with torch.device("meta"):
        model = _llama(shape)
    graph_module = fxprune.trace(model).graph_module
    total = count_parameters(graph_module)
    head = VOCABULARY * shape.hidden
    layer = (total - 2 * head) / shape.layers
    largest = max(shape.hidden * shape.ffn, head)
    macs = count_macs(graph_module, tokens)
    return Model(macs, total, layer, largest, shape.hidden, shape.ffn, shape.layers, each)


def score_seconds(model: Model, device: Device, samples: int, tokens: int, cards: int = 1) -> float:
    """Seconds of `mix` in parts, of samples that several cards share.

    A forward run, a second one and a backward run are four times the work of the first. For each sample a weight is
    read three times, its gradient written and read for each of two sums, and these read and written. Weights come over
    the link and from the disk twice, sums go over the link twice where cards add them up, and what is alive between
    layers is moved there and back, and so are its gradients.
    """
    mine = samples / cards
    compute = 4 * 2 * model.macs * mine / device.flops
    passes = model.weights * (5 * model.each + 2 * _SUMS + 2 * 4) * mine / device.memory
    moved = 2 * model.weights * model.each + 4 * _boundary(model, mine, tokens)
    moved += 2 * _SUMS * model.weights if cards > 1 else 0
    return compute + passes + moved / device.link + 2 * model.weights * model.each / device.disk


def _fit_seconds(model: Model, device: Device, samples: int, tokens: int, cards: int) -> float:
    """Seconds of least squares with a damping for each weight, which every card works out.

    Dense and masked runs go side by side. From ``in`` inputs and ``out`` outputs of a fitted weight come two matrices,
    ``(in, in)`` and ``(in, out)``.
    """
    mine = samples / cards
    sizes = [(model.hidden, model.hidden), (model.ffn, model.hidden)]
    held = model.layers * sum(taken * (taken + given) for taken, given in sizes)
    solved = model.layers * sum(taken**3 / 3 + 2 * taken**2 * given for taken, given in sizes)
    compute = 2 * (2 * model.macs * mine + held * mine * tokens) / device.single
    moved = model.weights * model.each + 4 * _boundary(model, mine, tokens)
    moved += 2 * 8 * held if cards > 1 else 0
    loaded = moved / device.link + model.weights * model.each / device.disk
    return compute + 2 * _TRIES * solved / device.double + loaded


def _boundary(model: Model, samples: float, tokens: int) -> float:
    return model.hidden * tokens * samples * model.layers * model.each


def estimate(model: Model, device: Device, samples: int, tokens: int, cards: int = 1, removed: float = 0.2) -> Estimate:
    """Hours and bytes of a prune.

    Args:
        model: What is counted of it.
        device: One card.
        samples: Calibration samples.
        tokens: Of one.
        cards: They share the samples; each has one layer at a time.
        removed: Share of the weights that goes.
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


def calibrated(hidden: int, ffn: int, tokens: int) -> Device:
    """What this processor does in a second of its time, in products and sums of the sizes given.

    Args:
        hidden: Width.
        ffn: Channels of an MLP.
        tokens: Of a sample.
    """
    x, weight = torch.randn(tokens, hidden), torch.randn(ffn, hidden)
    total, more = torch.zeros(ffn, hidden), torch.randn(ffn, hidden)
    product = _fastest(lambda: torch.nn.functional.linear(x, weight))
    added = _fastest(lambda: total.add_(more))
    memory = 3 * total.nbytes / added
    flops = 2 * x.numel() * ffn / product
    return Device(flops, flops, flops / 2, memory, memory, memory, 0.0)


def _fastest(call: Callable[[], object], repeats: int = 9) -> float:
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return sorted(times)[repeats // 2]


def _check(hidden: int, ffn: int, layers: int, samples: int, tokens: int) -> None:
    """Print what the formula says of a run on this processor, and what the run took."""
    torch.set_num_threads(1)
    config = llama(hidden, ffn, layers)
    heads, shared = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    shape = Shape("check", hidden, ffn, layers, heads, shared)
    model = counted(shape, tokens, 4)
    expected = score_seconds(model, calibrated(hidden, ffn, tokens), samples, tokens)
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "dense"
        write_random(source, config)
        found = measure(list(WAYS)[-1], source, samples, tokens)
    print(f"{model.weights:,.0f} weights, {samples} x {tokens} tokens, one thread, seconds of the processor")
    print(f"estimated {expected:.1f} s, measured {found.seconds:.1f} s: {found.seconds / expected:.2f} times as long")


@app.command()
def main(
    shapes: Annotated[str, typer.Option(help=f"Which of {','.join(SHAPES)}, separated by commas.")] = "7b,70b",
    cards: Annotated[str, typer.Option(help="Numbers of cards, separated by commas.")] = "1,8",
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens of one.")] = 2048,
    each: Annotated[int, typer.Option(help="Bytes of a weight.")] = 2,
    tflops: Annotated[float, typer.Option(help="Of a card in the dtype of the weights, as its maker states.")] = 165.0,
    single: Annotated[float, typer.Option(help="TFLOPS in float32.")] = 82.6,
    double: Annotated[float, typer.Option(help="TFLOPS in float64.")] = 1.29,
    sustained: Annotated[float, typer.Option(help="Share of these that is sustained.")] = 0.4,
    memory: Annotated[float, typer.Option(help="GB/s to and from the memory of a card.")] = 1008.0,
    capacity: Annotated[float, typer.Option(help="GB of a card.")] = 24.0,
    pcie: Annotated[float, typer.Option(help="GB/s between a card and the host.")] = 25.0,
    disk: Annotated[float, typer.Option(help="GB/s of the disk.")] = 3.0,
    check: Annotated[bool, typer.Option("--check", help="Set the formula beside a run on this processor.")] = False,
    hidden: Annotated[int, typer.Option(help="Width, of --check.")] = 1024,
    ffn: Annotated[int, typer.Option(help="Channels of an MLP, of --check.")] = 2816,
    layers: Annotated[int, typer.Option(help="Layers, of --check.")] = 16,
) -> None:
    """Estimate hours and memory for large Llama shapes; defaults are those of an RTX 4090."""
    console = Console(width=110)
    if check:
        console.print("  ".join(f"{name}: {value}" for name, value in environment().items()))
        _check(hidden, ffn, layers, min(samples, 6), min(tokens, 64))
        return
    unknown = set(shapes.split(",")) - set(SHAPES)
    if unknown:
        raise typer.BadParameter(f"no such shape: {', '.join(sorted(unknown))}", param_hint="--shapes")
    most, one, two = (speed * sustained * 1e12 for speed in (tflops, single, double))
    device = Device(most, one, two, memory * 1e9, pcie * 1e9, disk * 1e9, capacity * 1e9)
    title = f"Estimates, not measured: {samples} x {tokens} tokens, {each} bytes a weight"
    table = Table(title=title, box=SIMPLE)
    for heading in (
        "shape",
        "cards",
        "taylor h",
        "fit h",
        "write h",
        "all h",
        "GB scoring",
        "GB fitting",
        "GB between",
    ):
        table.add_column(heading, justify="left" if heading == "shape" else "right")
    for name in shapes.split(","):
        model = counted(SHAPES[name], tokens, each)
        for number in map(int, cards.split(",")):
            found = estimate(model, device, samples, tokens, number)
            hours = (found.taylor, found.fit, found.write, found.taylor + found.fit + found.write)
            sizes = [_told(size, device.capacity) for size in (found.scoring, found.fitting)]
            told = (*(f"{hour:.2f}" for hour in hours), *sizes, f"{found.boundary / 1e9:.0f}")
            table.add_row(name, str(number), *told)
    console.print(table)
    console.print(f"(!) more than a card of {capacity:g} GB holds: that step runs on the host, and takes longer")


def _told(size: float, capacity: float) -> str:
    return f"{size / 1e9:.1f}{'' if size < 0.9 * capacity else ' (!)'}"


if __name__ == "__main__":
    app()
