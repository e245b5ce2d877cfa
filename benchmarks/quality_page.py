"""Write docs/quality.md and its picture from what `make bench-quality` left: `make results`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.quality import Protocol, Row
from benchmarks.tables import markdown_table

__all__ = ["quality_page", "write_picture"]

RESULTS = Path(__file__).parent / "results" / "quality.json"
PAGE = Path(__file__).parent.parent / "docs" / "quality.md"
PICTURE = PAGE.with_suffix(".svg")
RECIPES = ("llm-pruner", "FLAP", "fast", "balanced", "best")


def quality_page(data: dict[str, Any]) -> str:
    """The page as Markdown: a table for each ratio, the protocol above it.

    Args:
        data: What `benchmarks.quality` writes.
    """
    protocol, (dense, *rows) = Protocol(**data["protocol"]), [Row(**row) for row in data["rows"]]
    ran = data["environment"]
    parts = [
        "# Quality\n\nMade by `make results` from what `make bench-quality` measured.\n",
        f"{protocol}. {ran['cpu']}, torch {ran['torch']}, transformers {ran['transformers']}. Times are of the prune "
        "alone: wall clock, or with one thread the processor's time, since other work ran beside it; memory is the "
        "largest resident size while it ran. What follows *x* is perplexity over that of the dense model. One draw of "
        "samples and one small model: differences under 5% mean nothing.\n",
        "![Perplexity over dense against time](quality.svg)\n",
        "Dense: " + ", ".join(f"{name} {value:.1f}" for name, value in dense.perplexities.items()) + ".\n",
    ]
    for ratio in sorted({row.ratio for row in rows}):
        parts.append(
            f"## {ratio:.0%} of the parameters\n\n{_table(dense, [row for row in rows if row.ratio == ratio])}"
        )
    return "\n".join(parts)


def _table(dense: Row, rows: Sequence[Row]) -> str:
    heading = ("", "parameters", *dense.perplexities, *dense.tasks, "seconds", "threads", "GB", "draws")
    lines = []
    for name in dict.fromkeys(row.entry for row in rows):
        drawn = [row for row in rows if row.entry == name]
        cells = [name, f"{fmean(row.parameters for row in drawn):,.0f}"]
        cells += [f"x{_over(dense, drawn, text):.2f}{_spread(dense, drawn, text)}" for text in dense.perplexities]
        cells += [f"{fmean(row.tasks[task] for row in drawn):.3f}" for task in dense.tasks]
        cells += [f"{fmean(row.seconds for row in drawn):.0f}", _threads(drawn)]
        cells += [f"{max(row.peak_gb for row in drawn):.1f}"]
        lines.append((*cells, str(len(drawn))))
    return markdown_table(heading, lines)


def _threads(rows: Iterable[Row]) -> str:
    return ", ".join(str(n) for n in sorted({row.threads for row in rows}))


def _over(dense: Row, rows: Iterable[Row], text: str) -> float:
    """Mean perplexity over that of the dense model."""
    return fmean(row.perplexities[text] / dense.perplexities[text] for row in rows)


def _spread(dense: Row, rows: Sequence[Row], text: str) -> str:
    found = [row.perplexities[text] / dense.perplexities[text] for row in rows]
    return f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""


def write_picture(data: dict[str, Any], path: Path = PICTURE) -> None:
    """A picture of perplexity over dense, against seconds, of the recipes at each ratio; the first text is shown.

    Where no recipe was measured as it is, everything is drawn.

    Args:
        data: What `benchmarks.quality` writes.
        path: An `.svg` file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "fxprune"
    dense, *rows = [Row(**row) for row in data["rows"]]
    text = next(iter(dense.perplexities))
    measured = dict.fromkeys(row.entry for row in rows)
    names = [name for name in RECIPES if name in measured] or list(measured)
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for ratio in sorted({row.ratio for row in rows}):
        drawn = [[row for row in rows if (row.entry, row.ratio) == (name, ratio)] for name in names]
        points = [(fmean(r.seconds for r in d), _over(dense, d, text), d[0].entry) for d in drawn if d]
        axes.scatter([x for x, _, _ in points], [y for _, y, _ in points], label=f"{ratio:.0%} removed")
        for x, y, name in points:
            axes.annotate(name, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(xlabel="seconds", ylabel=f"perplexity over dense, {text}", xscale="log", yscale="log")
    axes.legend()
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    if RESULTS.exists():
        found = json.loads(RESULTS.read_text())
        PAGE.write_text(quality_page(found), encoding="utf-8")
        write_picture(found)
