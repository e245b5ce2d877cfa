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
from benchmarks import common
from benchmarks.common import load_demo_model, split_calibration_heldout, write_results
from fxprune.axes import unit_index
from fxprune.cli.console import widened
from fxprune.data.built_in import offline_text
from fxprune.data.text import read_text, token_windows
from fxprune.evaluation import perplexity
from fxprune.graph.tensors import get_tensor
from fxprune.removal.removal import PositionScores, unit_scores

RESULTS = common.RESULTS / "criteria.json"
CRITERIA: tuple[tuple[str, dict[str, Any]], ...] = (
    ("random", {"importance": "random"}),
    ("l1", {"importance": "l1"}),
    ("l2", {"importance": "l2"}),
    ("taylor vector", {"importance": "taylor{order=vector}"}),
    ("taylor first", {"importance": "taylor{order=first}"}),
    ("taylor second", {"importance": "taylor{order=second}"}),
    ("taylor second, least squares", {"importance": "taylor{order=second}", "compensate": "least-squares"}),
    ("taylor mix", {"importance": "taylor{order=mix}"}),
)
"""By name, changes of the recipe `llm-pruner`."""


@dataclass(frozen=True)
class CriterionRow:
    """Parameters left by one criterion, and perplexity on held-out text."""

    criterion: str
    parameters: int
    perplexity: float
    verification_error: float | None


def criterion_rows(
    model: Any, calibration: torch.Tensor, heldout: torch.Tensor, **options: Any
) -> Iterator[CriterionRow]:
    """Rows of the dense model, of each criterion, and of the default criterion without groups.

    Token ids to calibrate on are `(samples, tokens)`; those held out, `(windows, tokens)`, share no text with them.
    """
    dense = sum(parameter.numel() for parameter in model.parameters())
    yield CriterionRow("dense", dense, perplexity(model, heldout), None)
    for name, choice in CRITERIA:
        result = fxprune.prune(model, calibration, recipe="llm-pruner", **choice, **options)
        slim = result.model or result.graph_module
        parameters = result.report.parameters[1]
        yield CriterionRow(name, parameters, perplexity(slim, heldout), result.report.verification_error)
    ungrouped = prune_without_groups(model, calibration, result)
    yield CriterionRow("taylor mix, no groups", parameters, perplexity(ungrouped, heldout), None)


def prune_without_groups(model: Any, calibration: torch.Tensor, result: fxprune.Result) -> Any:
    """A copy of `model` with the lowest slices of each tensor zeroed, as many as `result` removed from it.

    The criterion and the number of slices of every parameter are those of `result`, but each tensor is ranked by its
    own scores alone, so that one tensor may keep a unit that another dropped.
    """
    removal = fxprune.facts_of(result.graph_module)[fxprune.Removed].removal
    keep = removal.keep
    groups = tuple(g for g in removal.groups if g.factor is not None and keep.touches(g.factor))
    dense = copy.deepcopy(model)
    graph_module = fxprune.trace(dense).graph_module
    fxprune.load_pass("calibrate", data=calibration)(graph_module)
    wanted = tuple(dict.fromkeys((m.name, m.axis) for group in groups for m in group.parameters))
    criterion: Any = fxprune.load_pass("taylor", order="mix")
    positions: PositionScores = criterion.positions(graph_module, wanted)
    with torch.no_grad():
        for group in groups:
            assert group.factor is not None
            removed = group.size - keep.count(group.factor)
            for member in group.parameters:
                scores = unit_scores(group, member, positions)
                rank = np.argsort(np.argsort(scores, axis=-1), axis=-1)
                _zero_units(get_tensor(dense, member.name), member, group, rank < removed)
    return dense


def _zero_units(tensor: torch.Tensor, member: fxprune.Member, group: fxprune.Group, removed: Any) -> None:
    """Zero the slices of one member whose units are removed, by a mask `(units,)` or `(outer units, units)`."""
    assert group.factor is not None
    unit = unit_index(member.expr, group.factor)
    outer = unit_index(member.expr, group.outer) if group.outer is not None else None
    zeroed = removed[unit] if outer is None else removed[outer, unit]
    index = torch.from_numpy(np.flatnonzero((unit >= 0) & zeroed))
    tensor.index_fill_(member.axis, index, 0.0)


def criterion_table(rows: list[CriterionRow], title: str) -> Table:
    """Table of the rows for the terminal."""
    table = Table("criterion", title=title)
    for heading in ("parameters", "perplexity", "verification error"):
        table.add_column(heading, justify="right")
    for row in rows:
        error = "" if row.verification_error is None else f"{row.verification_error:.1e}"
        table.add_row(row.criterion, f"{row.parameters:,}", f"{row.perplexity:.1f}", error)
    return table


def main(
    ratio: Annotated[float, typer.Option(help="Fraction of the parameters to remove.")] = 0.2,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 10,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a sample.")] = 128,
    windows: Annotated[int, typer.Option(min=1, help="Held-out windows of 256 tokens.")] = 60,
    calibration: Annotated[Path | None, typer.Option(help="Text to calibrate on (.txt, .jsonl, .json).")] = None,
    heldout: Annotated[Path | None, typer.Option(help="Text to measure on.")] = None,
    json_: Annotated[bool, typer.Option("--json", help=f"Also write results/{RESULTS.name}.")] = False,
) -> None:
    """Prune the demo model by every criterion and measure perplexity on held-out text."""
    console = widened(Console())
    model, tokenizer = load_demo_model()
    front, back = split_calibration_heldout(offline_text())
    front = front if calibration is None else read_text(calibration)
    back = back if heldout is None else read_text(heldout)
    texts = [path.name if path else "the standard library's own text" for path in (calibration, heldout)]
    title = (
        f"SmolLM2-135M-Instruct, {ratio:.0%} removed; calibrated on {samples} x {tokens} tokens of "
        f"{texts[0]}, measured on {windows} x 256 of {texts[1]}"
    )
    rows = []
    for row in criterion_rows(
        model,
        token_windows(tokenizer, front, tokens)[:samples],
        token_windows(tokenizer, back, 256)[:windows],
        ratio=ratio,
    ):
        console.print(f"{row.criterion}: perplexity {row.perplexity:.1f}")
        rows.append(row)
    console.print(criterion_table(rows, title))
    if json_:
        path = RESULTS if heldout is None else RESULTS.with_stem(f"{RESULTS.stem}-{heldout.stem}")
        write_results(path, {"title": title, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    typer.run(main)
