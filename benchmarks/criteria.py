"""Perplexity of the demo model by criterion, and without grouping: `python -m benchmarks.criteria`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

import fxprune
from benchmarks.demo_model import load_demo_model
from benchmarks.environment import write_results
from benchmarks.perplexity import perplexity
from fxprune.axes import unit_index
from fxprune.cli.console import widened
from fxprune.data.built_in import offline_text
from fxprune.data.text import read_text, split_calibration_heldout, token_windows
from fxprune.graph.tensors import get_tensor
from fxprune.removal.scores import PositionScores, unit_scores

__all__ = ["CRITERIA", "QualityRow", "app", "prune_without_groups", "quality_rows"]

RESULTS = Path(__file__).parent / "results" / "criteria.json"
CRITERIA: tuple[tuple[str, dict[str, Any]], ...] = (
    ("random", {"importance": "random"}),
    ("l1", {"importance": "l1"}),
    ("l2", {"importance": "l2"}),
    ("taylor vector", {"taylor": "vector"}),
    ("taylor first", {"taylor": "first"}),
    ("taylor second", {"taylor": "second"}),
    ("taylor second, least squares", {"taylor": "second", "compensate": "least-squares"}),
    ("taylor mix", {"taylor": "mix"}),
)

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class QualityRow:
    """One criterion: what is left, and how well it predicts held-out text."""

    criterion: str
    parameters: int
    perplexity: float
    verification_error: float | None


def quality_rows(model: Any, calibration: torch.Tensor, heldout: torch.Tensor, **options: Any) -> Iterator[QualityRow]:
    """The dense model, each criterion, and the default one without grouping, in turn.

    Args:
        model: The dense model.
        calibration: Token ids `(samples, tokens)`.
        heldout: Token ids `(windows, tokens)` that share no text with `calibration`.
        options: Passed on to `fxprune.prune`.
    """
    dense = sum(parameter.numel() for parameter in model.parameters())
    yield QualityRow("dense", dense, perplexity(model, heldout), None)
    for name, choice in CRITERIA:
        result = fxprune.prune(model, calibration, **choice, **options)
        slim = result.model or result.graph_module
        parameters = result.report.parameters[1]
        yield QualityRow(name, parameters, perplexity(slim, heldout), result.report.verification_error)
    ungrouped = prune_without_groups(model, calibration, result)
    yield QualityRow("taylor mix, no groups", parameters, perplexity(ungrouped, heldout), None)


def prune_without_groups(model: Any, calibration: torch.Tensor, result: fxprune.Result) -> Any:
    """A copy of `model` in which each tensor lost its own lowest slices, as many as `result` removed from it.

    The same criterion and the same number of slices of every parameter as in `result`, but each tensor is ranked by
    its own scores alone, so that what one tensor keeps another may have dropped. Slices are zeroed, not removed.
    """
    removal = fxprune.facts_of(result.graph_module)[fxprune.Removed].removal
    keep = removal.keep
    groups = tuple(g for g in removal.groups if g.factor is not None and keep.touches(g.factor))
    dense = copy.deepcopy(model)
    positions = _position_scores(dense, calibration, groups)
    with torch.no_grad():
        for group in groups:
            assert group.factor is not None
            gone = group.size - keep.count(group.factor)
            for member in group.parameters:
                scores = unit_scores(group, member, positions)
                rank = np.argsort(np.argsort(scores, axis=-1), axis=-1)
                _zero(get_tensor(dense, member.name), member, group, rank < gone)
    return dense


def _position_scores(model: Any, calibration: torch.Tensor, groups: tuple[fxprune.Group, ...]) -> PositionScores:
    traced = fxprune.trace(model)
    fxprune.load_pass("calibrate", data=calibration)(traced.graph_module)
    wanted = tuple(dict.fromkeys((m.name, m.axis) for group in groups for m in group.parameters))
    criterion: Any = fxprune.load_pass("taylor", order="mix")
    positions: PositionScores = criterion.positions(traced.graph_module, wanted)
    return positions


def _zero(tensor: torch.Tensor, member: fxprune.Member, group: fxprune.Group, gone: Any) -> None:
    """Zero the slices of one member whose units are `gone`, a mask `(units,)` or `(outer units, units)`."""
    assert group.factor is not None
    unit = unit_index(member.expr, group.factor)
    outer = unit_index(member.expr, group.outer) if group.outer is not None else None
    lost = gone[unit] if outer is None else gone[outer, unit]
    index = torch.from_numpy(np.flatnonzero((unit >= 0) & lost))
    tensor.index_fill_(member.axis, index, 0.0)


def quality_table(rows: list[QualityRow], title: str) -> Table:
    """The rows as a table for the terminal."""
    table = Table("criterion", title=title)
    for heading in ("parameters", "perplexity", "verification error"):
        table.add_column(heading, justify="right")
    for row in rows:
        error = "" if row.verification_error is None else f"{row.verification_error:.1e}"
        table.add_row(row.criterion, f"{row.parameters:,}", f"{row.perplexity:.1f}", error)
    return table


@app.command()
def main(
    ratio: Annotated[float, typer.Option(help="Fraction of the parameters to remove.")] = 0.2,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 10,
    tokens: Annotated[int, typer.Option(help="Tokens of a calibration sample.")] = 128,
    windows: Annotated[int, typer.Option(help="Held-out windows of 256 tokens.")] = 60,
    calibration: Annotated[Path | None, typer.Option(help="Text to calibrate on (.txt, .jsonl, .json).")] = None,
    heldout: Annotated[Path | None, typer.Option(help="Text to measure on.")] = None,
    json_: Annotated[bool, typer.Option("--json", help=f"Write results/{RESULTS.name} as well.")] = False,
) -> None:
    """Prune the demo model by every criterion and measure perplexity on held-out text."""
    console = widened(Console())
    model, tokenizer = load_demo_model()
    front, back = split_calibration_heldout(offline_text())
    front = front if calibration is None else read_text(calibration)
    back = back if heldout is None else read_text(heldout)
    title = (
        f"SmolLM2-135M-Instruct, {ratio:.0%} removed; calibrated on {samples} x {tokens} tokens of "
        f"{_named(calibration)}, measured on {windows} x 256 of {_named(heldout)}"
    )
    rows = []
    for row in quality_rows(
        model,
        token_windows(tokenizer, front, tokens, limit=samples),
        token_windows(tokenizer, back, 256, limit=windows),
        ratio=ratio,
    ):
        console.print(f"{row.criterion}: perplexity {row.perplexity:.1f}")
        rows.append(row)
    console.print(quality_table(rows, title))
    if json_:
        suffix = "" if heldout is None else f"-{heldout.stem}"
        path = RESULTS.with_stem(RESULTS.stem + suffix)
        write_results(path, {"title": title, "rows": [asdict(row) for row in rows]})


def _named(path: Path | None) -> str:
    return "the standard library's own text" if path is None else path.name


if __name__ == "__main__":
    app()
