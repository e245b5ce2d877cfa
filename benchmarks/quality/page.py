"""Write docs/quality.md and its picture from what `make bench-quality` left: `make results`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.quality.entries import order_of
from benchmarks.quality.measure import Protocol, Row
from benchmarks.tables import about_demo, markdown_table, ran_on
from fxprune.cli.demo import demo_name

__all__ = ["quality_page", "write_picture"]

RESULTS = Path(__file__).parent.parent / "results" / "quality.json"
TASKS = RESULTS.with_name("quality_tasks.json")
PAGE = Path(__file__).parent.parent.parent / "docs" / "quality.md"
PICTURE = PAGE.with_suffix(".svg")
RECIPES = ("llm-pruner", "FLAP", "fast", "balanced", "best")
_NEARLY = {"balanced": ("balanced, MLPs of multiples of 32",)}
"""Entries that are drawn as a recipe, since they are one but for widths that engines like."""

_TICKS = (1, 1.5, 2, 3, 5, 10, 20)
_WORST = 20


def quality_page(data: dict[str, Any], tasks: dict[str, Any] | None = None) -> str:
    """The page as Markdown: a table for each ratio, the protocol above it, and one of questions.

    Args:
        data: What `benchmarks.quality` writes of perplexity.
        tasks: What it writes of questions.
    """
    protocol, (dense, *rows) = Protocol(**data["protocol"]), [Row(**row) for row in data["rows"]]
    ran = data["environment"]
    parts = [
        "# Quality\n\nMade by `make results` from what `make bench-quality` measured.\n",
        f"{protocol}. {_processors(rows)}; torch {ran['torch']}, transformers {ran['transformers']}. Times are of the "
        "prune alone: wall clock, or with one thread the processor's time, since other work ran beside it, so that "
        "they compare within a processor and a number of threads; memory is the largest resident size while it ran. "
        "What follows *x* is perplexity over that of the dense model, the mean where samples were drawn several "
        "times, with the least and the most. One small model: differences under 5% mean nothing.\n",
        *([f"{about_demo()}\n"] if protocol.model == demo_name() else []),
        "![Perplexity over dense against what is left](quality.svg)\n",
        "Dense: " + ", ".join(f"{name} {value:.1f}" for name, value in dense.perplexities.items()) + ".\n",
    ]
    for ratio in sorted({row.ratio for row in rows}):
        parts.append(
            f"## {ratio:.0%} of the parameters\n\n{_table(dense, [row for row in rows if row.ratio == ratio])}"
        )
    return "\n".join([*parts, *([_asked(tasks)] if tasks else [])])


def _asked(data: dict[str, Any]) -> str:
    """Accuracy on questions, a line for each model."""
    settings, columns = data["settings"], data["columns"]
    names = list(columns[0]["evaluation"]["tasks"])
    lines = []
    for column in columns:
        found = [column["evaluation"]["tasks"][name]["value"] for name in names]
        kept = f"{column['retained']:.1%} ± {column['retained_standard_error']:.1%}" if data["retained_of"] else ""
        lines.append((column["name"], *(f"{value:.3f}" for value in found), kept))
    return (
        f"## Questions\n\nAccuracy on up to {settings['questions']} questions of the {settings['half']} half of each "
        f"file, without examples, in {settings['measured_in'].removeprefix('torch.')}. *Retained*: the average over "
        f"that of the dense model on {', '.join(data['retained_of'])}, where that does better than guessing, with one "
        f"standard error of it, over the same questions. {ran_on(data)}\n\n"
        + markdown_table(("", *names, "retained"), lines)
    )


def _table(dense: Row, rows: Sequence[Row]) -> str:
    heading = ("", "parameters", *dense.perplexities, "seconds", "threads", "GB", "draws")
    lines = []
    for name in sorted(dict.fromkeys(row.entry for row in rows), key=order_of):
        drawn = [row for row in rows if row.entry == name]
        cells = [name, f"{fmean(row.parameters for row in drawn):,.0f}"]
        cells += [f"x{_over(dense, drawn, text):.2f}{_spread(dense, drawn, text)}" for text in dense.perplexities]
        threads = max(row.threads for row in drawn)  # times by other numbers of them do not compare
        cells += [f"{fmean(row.seconds for row in drawn if row.threads == threads):.0f}", str(threads)]
        cells += [f"{max(row.peak_gb for row in drawn):.1f}"]
        lines.append((*cells, str(len(drawn))))
    return markdown_table(heading, lines)


def _processors(rows: Sequence[Row]) -> str:
    """What the rows ran on: the processor of most, then which ones another."""
    counted = Counter(row.cpu for row in rows).most_common()
    others = (
        f"{cpu}: {', '.join(dict.fromkeys(f'{row.entry} at {row.ratio:.0%}' for row in rows if row.cpu == cpu))}"
        for cpu, _ in counted[1:]
    )
    return "; but these ran on ".join((f"Ran on {counted[0][0]}", *others))


def _over(dense: Row, rows: Iterable[Row], text: str) -> float:
    """Mean perplexity over that of the dense model."""
    return fmean(row.perplexities[text] / dense.perplexities[text] for row in rows)


def _spread(dense: Row, rows: Sequence[Row], text: str) -> str:
    found = [row.perplexities[text] / dense.perplexities[text] for row in rows]
    return f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""


def write_picture(data: dict[str, Any], path: Path = PICTURE) -> None:
    """A picture of perplexity over dense against what is left of the parameters, a panel for each text.

    The recipes are drawn; where none was measured as it is, everything. What does worse than twenty times the dense
    model leaves the picture.

    Args:
        data: What `benchmarks.quality` writes.
        path: An `.svg` file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "fxprune"
    dense, *rows = [Row(**row) for row in data["rows"]]
    names = [name for name in RECIPES if any(row.entry == name for row in rows)]
    texts = list(dense.perplexities)
    figure, panels = pyplot.subplots(1, len(texts), figsize=(4.5 * len(texts), 4), sharey=True, squeeze=False)
    for axes, text in zip(panels[0], texts, strict=True):
        for name in names or dict.fromkeys(row.entry for row in rows):
            drawn = [row for row in rows if row.entry in (name, *_NEARLY.get(name, ()))]
            left = sorted({row.parameters for row in drawn}, reverse=True)
            over = [_over(dense, [row for row in drawn if row.parameters == count], text) for count in left]
            shares = [100 * count / dense.parameters for count in left]
            axes.plot([100, *shares], [1, *over], marker="o", label=name)
        axes.set(title=text, xlabel="% of the parameters left", yscale="log", ylim=(0.95, _WORST))
        axes.set_yticks(_TICKS, [f"x{tick:g}" for tick in _TICKS])
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("perplexity over dense")
    panels[0][0].legend()
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    if RESULTS.exists():
        found = json.loads(RESULTS.read_text())
        asked = json.loads(TASKS.read_text()) if TASKS.exists() else None
        PAGE.write_text(quality_page(found, asked), encoding="utf-8")
        write_picture(found)
