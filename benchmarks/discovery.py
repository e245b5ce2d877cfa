"""Time and memory of discovery and of a whole prune with no weights: `python -m benchmarks.discovery`.

Ours is trace, dependency graph and groups of a model on `meta`. Theirs is `DependencyGraph().build_dependency` on fake
tensors, then a walk over `get_all_groups`, counted and dropped one by one as its pruner does. A whole prune of ours has
random scores and takes a quarter of each group. Every measurement has a process of its own, in which the same was done
to a model of two narrow layers before: imports at first use are not counted, nor is building the model.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment, write_results
from fxprune.cli.console import widened

__all__ = ["SHAPES", "TOOLS", "Measurement", "Shape", "Summary", "app", "compare", "measure_apart"]

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "discovery.json"
LAYERS = (2, 8, 20, 40, 80)
VOCABULARY = 32000
STAGES = ("trace", "graph", "groups", "removal")

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model: `hidden` is the width, `ffn` that of the MLP."""

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("125m", 768, 3072, 12, 12, 12),
        Shape("7b", 4096, 11008, 32, 32, 32),
        Shape("70b", 8192, 28672, 80, 64, 8),
        Shape("405b", 16384, 53248, 126, 128, 8),
    )
}


_FIRST = Shape("first", 64, 128, 2, 4, 4)
"""Has everything imported."""


@dataclass(frozen=True)
class Measurement:
    """One discovery in a process of its own.

    Attributes:
        seconds: Of each stage, in order.
        nodes: Nodes of the traced graph (of theirs: of its own graph).
        groups: How many groups were found.
        start_gb: Peak resident memory after imports and building the model, in 10^9 bytes.
        peak_gb: The same after discovery; nothing is subtracted.
    """

    seconds: dict[str, float]
    nodes: int
    groups: int
    start_gb: float
    peak_gb: float


@dataclass(frozen=True)
class Summary:
    """Repeats of one measurement: medians, the least total, and the counts, which are the same in every repeat."""

    tool: str
    shape: Shape
    repeats: int
    seconds: dict[str, float]
    total_s: float
    least_s: float
    nodes: int
    groups: int
    start_gb: float
    peak_gb: float


def measure_ours(shape: Shape) -> Measurement:
    """Trace, dependency graph and groups of `shape` on `meta`, timed here and now."""
    import fxprune

    with torch.device("meta"):
        model = _llama(shape)
    start_gb = _peak_gb()
    times = [time.perf_counter()]
    traced = fxprune.trace(model, dynamic=False)
    times.append(time.perf_counter())
    graph = fxprune.dependency_graph(traced)
    times.append(time.perf_counter())
    groups = fxprune.find_groups(graph)
    times.append(time.perf_counter())
    nodes = len(traced.graph_module.graph.nodes)
    return Measurement(_stages(("trace", "graph", "groups"), times), nodes, len(groups), start_gb, _peak_gb())


def measure_theirs(shape: Shape) -> Measurement:
    """Torch-Pruning's dependency graph and groups of `shape` on fake tensors, timed here and now.

    As in its script for language models, the output projection is no root.
    """
    import torch_pruning as tp
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = _llama(shape, attn_implementation="eager")
        inputs = {"input_ids": torch.zeros(1, 8, dtype=torch.long), "use_cache": False}
        start_gb = _peak_gb()
        times = [time.perf_counter()]
        graph = tp.DependencyGraph().build_dependency(
            model, example_inputs=inputs, output_transform=lambda output: output.logits, verbose=False
        )
        times.append(time.perf_counter())
        roots = (torch.nn.Linear, torch.nn.Embedding)
        groups = sum(1 for _ in graph.get_all_groups(ignored_layers=[model.lm_head], root_module_types=roots))
        times.append(time.perf_counter())
    return Measurement(_stages(("graph", "groups"), times), len(graph.module2node), groups, start_gb, _peak_gb())


def measure_prune(shape: Shape) -> Measurement:
    """A whole prune of `shape` on `meta`, its trace and the rest, timed here and now."""
    import fxprune

    with torch.device("meta"):
        model = _llama(shape)
    start_gb = _peak_gb()
    pipeline = fxprune.prune_pipeline(importance="random", group_ratio=0.25)
    times = [time.perf_counter()]
    traced = fxprune.trace(model)
    times.append(time.perf_counter())
    nodes = len(traced.graph_module.graph.nodes)
    result = fxprune.Result.of(pipeline(traced.graph_module).graph_module)
    times.append(time.perf_counter())
    return Measurement(_stages(("trace", "removal"), times), nodes, len(result.report.widths), start_gb, _peak_gb())


TOOLS: dict[str, Callable[[Shape], Measurement]] = {
    "ours": measure_ours,
    "theirs": measure_theirs,
    "prune": measure_prune,
}


def measure_apart(tool: str, shape: Shape, threads: int, timeout_s: float | None = None) -> Measurement:
    """`tool` measured on `shape` in a fresh process.

    Linux lets a process start from the peak of the one that started it, so that one should be small.

    Raises:
        RuntimeError: The process failed; holds what it said.
    """
    task = json.dumps({"tool": tool, "shape": asdict(shape), "threads": threads})
    command = [sys.executable, "-m", "benchmarks.discovery", "--worker", task]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} failed on {shape.name}: {done.stderr.strip()[-2000:]}")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def summarise(tool: str, shape: Shape, measurements: Sequence[Measurement]) -> Summary:
    """Medians over `measurements`.

    Raises:
        ValueError: The measurements differ in what they found.
    """
    first = measurements[0]
    if any((m.nodes, m.groups) != (first.nodes, first.groups) for m in measurements):
        raise ValueError(f"{tool} found different graphs of {shape.name} in different repeats")
    totals = [sum(m.seconds.values()) for m in measurements]
    return Summary(
        tool=tool,
        shape=shape,
        repeats=len(measurements),
        seconds={stage: median(m.seconds[stage] for m in measurements) for stage in first.seconds},
        total_s=median(totals),
        least_s=min(totals),
        nodes=first.nodes,
        groups=first.groups,
        start_gb=median(m.start_gb for m in measurements),
        peak_gb=median(m.peak_gb for m in measurements),
    )


def compare(
    shapes: Iterable[Shape], tools: Sequence[str], repeats: int, measure: Callable[[str, Shape], Measurement]
) -> list[Summary]:
    """Every tool on every shape; the tools take turns, and so does which one begins.

    Raises:
        ValueError: `repeats` is not positive.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: at least one is needed")
    rows: list[Summary] = []
    for shape in shapes:
        found: dict[str, list[Measurement]] = {tool: [] for tool in tools}
        for repeat in range(repeats):
            for tool in tools if repeat % 2 == 0 else reversed(tools):
                found[tool].append(measure(tool, shape))
        rows.extend(summarise(tool, shape, measurements) for tool, measurements in found.items())
    return rows


def discovery_table(rows: Iterable[Summary]) -> Table:
    """A line a shape and tool: medians in seconds, then the least total, memory, and how often ours fits into it."""
    table = Table(title="With no weights in memory, seconds", box=SIMPLE, padding=(0, 1, 0, 0))
    more = ("total", "least", "GB", "found", "x ours", "x trace")
    for heading in ("shape", "tool", *STAGES, *more):
        table.add_column(heading, justify="left" if heading in ("shape", "tool") else "right")
    ours_s: dict[str, float] = {}
    for row in rows:
        base = ours_s.setdefault(row.shape.name, row.total_s)
        stages = [f"{row.seconds[s]:.2f}" if s in row.seconds else "" for s in STAGES]
        totals = (f"{row.total_s:.2f}", f"{row.least_s:.2f}", f"{row.peak_gb:.2f}")
        again = f"{row.total_s / base:.1f}" if row.tool == "theirs" else ""
        whole = f"{row.total_s / row.seconds['trace']:.2f}" if row.tool == "prune" else ""
        table.add_row(row.shape.name, row.tool, *stages, *totals, str(row.groups), again, whole)
    return table


def scaling_table(rows: Sequence[Summary]) -> Table:
    """One line a depth: time for each graph node, and for each node more than in the line above."""
    table = Table(title=f"Discovery over depth, {rows[0].shape.name} shape, seconds", box=SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("layers", "nodes", "total", "least", "us/node", "us/added node", "GB", "found"):
        table.add_column(heading, justify="right")
    before: Summary | None = None
    for row in rows:
        per_node = f"{1e6 * row.total_s / row.nodes:.0f}"
        added = f"{1e6 * (row.total_s - before.total_s) / (row.nodes - before.nodes):.0f}" if before else ""
        totals = (f"{row.total_s:.2f}", f"{row.least_s:.2f}", per_node, added, f"{row.peak_gb:.2f}")
        table.add_row(str(row.shape.layers), str(row.nodes), *totals, str(row.groups))
        before = row
    return table


def write_json(path: Path, rows: Iterable[Summary], settings: dict[str, Any]) -> None:
    """The file at `path` holds the rows, the settings and the environment."""
    versions = {name: version(name) for name in ("networkx", "torch-pruning") if find_spec(name.replace("-", "_"))}
    write_results(path, {"settings": settings, "rows": [asdict(row) for row in rows]}, versions)


@app.command()
def main(
    shapes: Annotated[str, typer.Option(help=f"Which of {','.join(SHAPES)}, separated by commas.")] = ",".join(SHAPES),
    repeats: Annotated[int, typer.Option(help="Measurements of each tool on each shape.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads of torch in each process.")] = 2,
    scaling: Annotated[bool, typer.Option("--scaling", help="Time over depth of the 7B shape instead.")] = False,
    json_: Annotated[bool, typer.Option("--json", help=f"Write results/{RESULTS.name} as well.")] = False,
    worker: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Time discovery for Llama shapes, without weights, beside Torch-Pruning."""
    if worker:
        _work(json.loads(worker))
        return
    unknown = set(shapes.split(",")) - set(SHAPES)
    if unknown:
        raise typer.BadParameter(f"no such shape: {', '.join(sorted(unknown))}", param_hint="--shapes")
    torch.set_num_threads(threads)
    console = widened(Console())
    console.print("  ".join(f"{name}: {value}" for name, value in environment().items()))
    theirs = find_spec("torch_pruning") is not None
    tools = ("ours",) if scaling else ("ours", "theirs", "prune") if theirs else ("ours", "prune")
    chosen = [replace(SHAPES["7b"], layers=n) for n in LAYERS] if scaling else [SHAPES[s] for s in shapes.split(",")]
    with console.status("measuring"):
        rows = compare(chosen, tools, repeats, lambda tool, shape: measure_apart(tool, shape, threads))
    console.print(scaling_table(rows) if scaling else discovery_table(rows))
    if not scaling and not theirs:
        console.print("torch_pruning is not installed, so theirs is left out.")
    if json_:
        path = RESULTS.with_name("discovery_scaling.json") if scaling else RESULTS
        write_json(path, rows, {"repeats": repeats, "threads": threads, "scaling": scaling})


def _work(task: dict[str, Any]) -> None:
    """Measure and print what was measured: the whole life of a process started by `measure_apart`."""
    torch.set_num_threads(task["threads"])
    TOOLS[task["tool"]](_FIRST)
    print(json.dumps(asdict(TOOLS[task["tool"]](Shape(**task["shape"])))))


def _llama(shape: Shape, **options: Any) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        **options,
    )
    return LlamaForCausalLM(config)


def _peak_gb() -> float:
    """Most resident memory this process ever had; macOS counts it in bytes, Linux in units of 1024."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def _stages(names: Sequence[str], times: Sequence[float]) -> dict[str, float]:
    """Seconds of each stage from the times at its ends."""
    return {name: after - before for name, before, after in zip(names, times, times[1:], strict=False)}


if __name__ == "__main__":
    app()
