"""Time and memory of discovery, and of a whole prune, without weights: `python -m benchmarks.discovery`.

*Ours* is trace, dependency graph and groups of a model on `meta`. *Theirs* is Torch-Pruning's
`DependencyGraph().build_dependency` on fake tensors, then a walk over `get_all_groups`, counted and dropped one by one
as its pruner does. *Prune* is a whole prune of ours, with random scores and a quarter of each group removed. *Passes*
is a prune by ratio of a narrow model with weights, each pass alone, without garbage collection, which falls into any of
them. Seconds are those of the processor. Every measurement runs in its own process, after the same was done to a narrow
model of two layers, so that neither imports at first use nor building the model count.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaForCausalLM

import fxprune
from benchmarks import common
from benchmarks.common import SHAPES, Shape, environment, run_worker, write_results
from fxprune.cli.console import widened
from fxprune.graph.context import defer_gc
from fxprune.pipeline.contract import Pass

RESULTS = common.RESULTS / "discovery.json"
DEPTHS = (2, 8, 20, 40, 80)
DOUBLED = (4, 8, 16, 32, 64, 128)
STAGES = ("trace", "graph", "groups", "removal")
WARM_UP = Shape("warm-up", 64, 128, 2, 4, 4)
NARROW = Shape("narrow", 64, 128, 4, 8, 4)


@dataclass(frozen=True)
class Discovery:
    """One measured discovery.

    Attributes:
        seconds: Seconds of each stage, in order.
        nodes: Nodes of the traced graph; for Torch-Pruning, of its own graph.
        groups: Number of groups found.
        start_gb: Peak resident memory after imports and building the model, in 10^9 bytes.
        peak_gb: The same after discovery; nothing is subtracted.
    """

    seconds: dict[str, float]
    nodes: int
    groups: int
    start_gb: float
    peak_gb: float


@dataclass(frozen=True)
class DiscoverySummary:
    """Repeats of one measurement: medians, the least total, and the counts, which are equal in every repeat."""

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


def measure_ours(shape: Shape) -> Discovery:
    """Trace, dependency graph and groups of `shape` on `meta`, timed in this process."""
    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config())
    start_gb = _peak_gb()
    times = [time.process_time()]
    traced = fxprune.trace(model, dynamic=False)
    times.append(time.process_time())
    graph = fxprune.dependency_graph(traced)
    times.append(time.process_time())
    groups = fxprune.find_groups(graph)
    times.append(time.process_time())
    nodes = len(traced.graph_module.graph.nodes)
    return Discovery(_stages(("trace", "graph", "groups"), times), nodes, len(groups), start_gb, _peak_gb())


def measure_theirs(shape: Shape) -> Discovery:
    """Torch-Pruning's dependency graph and groups of `shape` on fake tensors, timed in this process.

    As in its own script for language models, the output projection is ignored as a root of groups.
    """
    import torch_pruning as tp

    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = LlamaForCausalLM(shape.config(attn_implementation="eager"))
        inputs = {"input_ids": torch.zeros(1, 8, dtype=torch.long), "use_cache": False}
        start_gb = _peak_gb()
        times = [time.process_time()]
        graph = tp.DependencyGraph().build_dependency(
            model, example_inputs=inputs, output_transform=lambda output: output.logits, verbose=False
        )
        times.append(time.process_time())
        roots = (torch.nn.Linear, torch.nn.Embedding)
        groups = sum(1 for _ in graph.get_all_groups(ignored_layers=[model.lm_head], root_module_types=roots))
        times.append(time.process_time())
    return Discovery(_stages(("graph", "groups"), times), len(graph.module2node), groups, start_gb, _peak_gb())


def measure_prune(shape: Shape) -> Discovery:
    """A whole prune of `shape` on `meta`, the trace and the rest timed apart, in this process."""
    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config())
    start_gb = _peak_gb()
    select = "select-by-group-ratio{group_ratio=0.25}"
    pipeline = fxprune.prune_pipeline(recipe="llm-pruner", importance="random", select=select)
    times = [time.process_time()]
    traced = fxprune.trace(model)
    times.append(time.process_time())
    nodes = len(traced.graph_module.graph.nodes)
    result = fxprune.Result.of(pipeline(traced.graph_module).graph_module)
    times.append(time.process_time())
    return Discovery(_stages(("trace", "removal"), times), nodes, len(result.report.widths), start_gb, _peak_gb())


def measure_passes(shape: Shape) -> Discovery:
    """A prune of `shape` by a quarter of its MLPs and heads, its trace and each pass timed apart, in this process."""
    model = LlamaForCausalLM(shape.config()).eval()
    start_gb = _peak_gb()
    pipeline = fxprune.prune_pipeline(recipe="llm-pruner", importance="l2", ratio={"mlp": 0.25, "head": 0.25})
    seconds, call = dict[str, float](), Pass.__call__

    def timed(step: Pass, graph_module: Any, *, inplace: bool = False) -> Any:
        start = time.process_time()
        result = call(step, graph_module, inplace=inplace)
        seconds[step.name] = seconds.get(step.name, 0.0) + time.process_time() - start
        return result

    times = [time.process_time()]
    traced = fxprune.trace(model)
    times.append(time.process_time())
    nodes = len(traced.graph_module.graph.nodes)
    with patch.object(Pass, "__call__", timed), defer_gc():
        result = fxprune.Result.of(pipeline(traced.graph_module).graph_module)
    rest = time.process_time() - times[1] - sum(seconds.values())
    seconds = {**_stages(("trace",), times), **seconds, "verification, copies": rest}
    return Discovery(seconds, nodes, len(result.report.widths), start_gb, _peak_gb())


TOOLS: dict[str, Callable[[Shape], Discovery]] = {
    "ours": measure_ours,
    "theirs": measure_theirs,
    "prune": measure_prune,
    "passes": measure_passes,
}


def measure_in_process(tool: str, shape: Shape, threads: int, timeout_s: float | None = None) -> Discovery:
    """Measure `tool` on `shape` in a new process.

    Raises:
        RuntimeError: The process failed; holds what it printed.
    """
    task = {"tool": tool, "shape": asdict(shape), "threads": threads}
    return Discovery(**run_worker("benchmarks.discovery", task, timeout_s))


def summarise(tool: str, shape: Shape, measurements: Sequence[Discovery]) -> DiscoverySummary:
    """Medians over repeated measurements.

    Raises:
        ValueError: The measurements found different graphs.
    """
    first = measurements[0]
    if any((m.nodes, m.groups) != (first.nodes, first.groups) for m in measurements):
        raise ValueError(f"{tool} found different graphs of {shape.name} in different repeats")
    totals = [sum(m.seconds.values()) for m in measurements]
    return DiscoverySummary(
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
    shapes: Iterable[Shape], tools: Sequence[str], repeats: int, measure: Callable[[str, Shape], Discovery]
) -> list[DiscoverySummary]:
    """Measure every tool on every shape; tools alternate, and every other repeat runs them in reverse order.

    Raises:
        ValueError: `repeats` is not positive.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: at least one is needed")
    rows: list[DiscoverySummary] = []
    for shape in shapes:
        found: dict[str, list[Discovery]] = {tool: [] for tool in tools}
        for repeat in range(repeats):
            for tool in tools if repeat % 2 == 0 else reversed(tools):
                found[tool].append(measure(tool, shape))
        rows.extend(summarise(tool, shape, measurements) for tool, measurements in found.items())
    return rows


def discovery_table(rows: Iterable[DiscoverySummary]) -> Table:
    """A row for each shape and tool: median seconds, least total, memory, groups, and ratios to ours and to a trace."""
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


def scaling_table(rows: Sequence[DiscoverySummary]) -> Table:
    """A row for each depth: time per graph node, and per node added since the row above."""
    table = Table(title=f"Discovery over depth, {rows[0].shape.name} shape, seconds", box=SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("layers", "nodes", "total", "least", "us/node", "us/added node", "GB", "found"):
        table.add_column(heading, justify="right")
    before: DiscoverySummary | None = None
    for row in rows:
        per_node = f"{1e6 * row.total_s / row.nodes:.0f}"
        added = f"{1e6 * (row.total_s - before.total_s) / (row.nodes - before.nodes):.0f}" if before else ""
        totals = (f"{row.total_s:.2f}", f"{row.least_s:.2f}", per_node, added, f"{row.peak_gb:.2f}")
        table.add_row(str(row.shape.layers), str(row.nodes), *totals, str(row.groups))
        before = row
    return table


def passes_table(rows: Sequence[DiscoverySummary]) -> Table:
    """A row for each pass: seconds at each depth, and the last over those before it, 2 where time is linear."""
    table = Table(title=f"Passes over depth, {rows[0].shape.name} shape, seconds", box=SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("pass", *(f"{row.shape.layers} layers" for row in rows), "last over one before"):
        table.add_column(heading, justify="left" if heading == "pass" else "right")
    for name in rows[-1].seconds:
        seconds = [row.seconds[name] for row in rows]
        table.add_row(name, *(f"{s:.3f}" for s in seconds), f"{seconds[-1] / seconds[-2]:.2f}")
    return table


def main(
    shapes: Annotated[str, typer.Option(help=f"Which of {','.join(SHAPES)}, separated by commas.")] = ",".join(SHAPES),
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each tool on each shape.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads of torch in each process.")] = 1,
    scaling: Annotated[bool, typer.Option("--scaling", help="Measure the 7B shape at growing depth instead.")] = False,
    passes: Annotated[bool, typer.Option("--passes", help="Measure each pass at growing depth instead.")] = False,
    json_: Annotated[bool, typer.Option("--json", help=f"Also write results/{RESULTS.name}.")] = False,
    worker: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Time discovery of Llama shapes without weights, beside Torch-Pruning."""
    if worker:
        task = json.loads(worker)
        torch.set_num_threads(task["threads"])
        measure = TOOLS[task["tool"]]
        measure(WARM_UP)
        print(json.dumps(asdict(measure(Shape(**task["shape"])))))
        return
    unknown = set(shapes.split(",")) - set(SHAPES)
    if unknown:
        raise typer.BadParameter(f"no such shape: {', '.join(sorted(unknown))}", param_hint="--shapes")
    torch.set_num_threads(threads)
    console = widened(Console())
    console.print("  ".join(f"{name}: {value}" for name, value in environment().items()))
    theirs = find_spec("torch_pruning") is not None
    tools: tuple[str, ...] = ("ours", "theirs", "prune") if theirs else ("ours", "prune")
    tools = ("passes",) if passes else ("ours",) if scaling else tools
    chosen = [replace(SHAPES["7b"], layers=n) for n in DEPTHS] if scaling else [SHAPES[s] for s in shapes.split(",")]
    chosen = [replace(NARROW, layers=n) for n in DOUBLED] if passes else chosen
    with console.status("measuring"):
        rows = compare(chosen, tools, repeats, lambda tool, shape: measure_in_process(tool, shape, threads))
    table = passes_table if passes else scaling_table if scaling else discovery_table
    console.print(table(rows))
    if tools == ("ours", "prune"):
        console.print("torch_pruning is not installed: theirs is left out.")
    if json_:
        what = "_passes" if passes else "_scaling" if scaling else ""
        path = RESULTS.with_name(f"discovery{what}.json")
        packages = {"networkx": "networkx", "torch-pruning": "torch_pruning"}
        versions = {name: version(name) for name, module in packages.items() if find_spec(module)}
        settings = {"repeats": repeats, "threads": threads, "scaling": scaling, "passes": passes}
        write_results(path, {"settings": settings, "rows": [asdict(row) for row in rows]}, versions)


def _peak_gb() -> float:
    """Peak resident memory of this process; macOS reports bytes, Linux units of 1024 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def _stages(names: Sequence[str], times: Sequence[float]) -> dict[str, float]:
    """Seconds of each stage, from the times between stages."""
    return {name: after - before for name, before, after in zip(names, times, times[1:], strict=False)}


if __name__ == "__main__":
    typer.run(main)
