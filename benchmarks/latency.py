"""Paired latency of the demo model, dense and slim: `make bench`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.demo_model import load_demo_model
from benchmarks.environment import environment
from benchmarks.paired import Paired, paired_latency

__all__ = ["RESULTS", "SHAPES", "LatencyRow", "app", "latency_rows", "latency_table", "write_json"]

SHAPES = [(1, 1), (1, 64), (1, 512), (4, 128)]
RESULTS = Path(__file__).parent / "results" / "latency.json"

app = typer.Typer(add_completion=False)


class Pruned(Protocol):
    """What pruning returns, as far as it is timed here."""

    @property
    def model(self) -> Callable[..., Any] | None:
        """The slim Hugging Face model, where one could be emitted."""

    @property
    def graph_module(self) -> Callable[..., Any]:
        """The slim graph."""


@dataclass(frozen=True)
class LatencyRow:
    """One measurement: which output of pruning, on how many tokens."""

    output: str
    batch: int
    tokens: int
    latency: Paired


def latency_rows(
    dense: Callable[..., Any],
    pruned: Pruned,
    vocabulary: int,
    shapes: Iterable[tuple[int, int]] = tuple(SHAPES),
    rounds: int = 10,
) -> list[LatencyRow]:
    """Each output of pruning is timed against the dense model on each shape.

    Both are compared with the dense Hugging Face model. The ratio of the graph thus also holds what tracing
    saves in Python; the ratio of the model is pruning alone.

    Args:
        dense: The model before pruning.
        pruned: Its outputs; an output that is `None` is left out.
        vocabulary: Token ids are drawn below this number, with a fixed seed.
        shapes: Pairs of batch and tokens.
        rounds: Rounds of `paired_latency`.
    """
    generator = torch.Generator().manual_seed(0)
    outputs = {"model": pruned.model, "graph_module": pruned.graph_module}
    rows = []
    for batch, tokens in shapes:
        inputs = {"input_ids": torch.randint(vocabulary, (batch, tokens), generator=generator)}
        for name, slim in outputs.items():
            if slim is not None:
                latency = paired_latency(dense, slim, inputs, rounds)
                rows.append(LatencyRow(name, batch, tokens, latency))
    return rows


def latency_table(rows: Iterable[LatencyRow], title: str) -> Table:
    """The rows as a table for the terminal."""
    table = Table(title=title)
    for heading in ("output", "batch", "tokens", "dense ms", "slim ms", "speed-up", "95% interval"):
        table.add_column(heading, justify="left" if heading == "output" else "right")
    for row in rows:
        paired = row.latency
        table.add_row(
            row.output,
            str(row.batch),
            str(row.tokens),
            f"{paired.dense_ms:.1f}",
            f"{paired.slim_ms:.1f}",
            f"{paired.speedup:.2f}x",
            f"{paired.low:.2f} to {paired.high:.2f}",
        )
    return table


def write_json(path: Path, rows: Iterable[LatencyRow], settings: dict[str, Any]) -> None:
    """The file at `path` holds the rows, the settings and the environment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(), "settings": settings, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@app.command()
def main(
    ratio: Annotated[float, typer.Option(help="Fraction of the parameters to remove.")] = 0.2,
    rounds: Annotated[int, typer.Option(help="Rounds of four measurements for each line.")] = 10,
    json_: Annotated[bool, typer.Option("--json", help=f"Write results/{RESULTS.name} as well.")] = False,
) -> None:
    """Prune the demo model and time it against the dense one."""
    import fxprune

    console = Console()
    console.print("  ".join(f"{name}: {value}" for name, value in environment().items()))
    dense, _ = load_demo_model()
    pruned = fxprune.prune(dense, None, ratio=ratio, importance="l2")
    rows = latency_rows(dense, pruned, dense.config.vocab_size, rounds=rounds)
    console.print(latency_table(rows, f"SmolLM2-135M, {ratio:.0%} of the parameters removed"))
    if json_:
        write_json(RESULTS, rows, {"model": "SmolLM2-135M-Instruct", "ratio": ratio, "rounds": rounds})


if __name__ == "__main__":
    app()
