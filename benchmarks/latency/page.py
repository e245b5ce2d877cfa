"""Write docs/latency.md and its picture from what `make bench` left: `make results`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import linear_regression
from typing import Any

from benchmarks.latency.measure import HEADING, Row, read_rows
from benchmarks.tables import markdown_table, ran_on

__all__ = ["latency_page", "write_picture"]

RESULTS = Path(__file__).parent.parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "latency.md"

_POINTS = 3
"""Models that a line goes through, at least."""

_EXPLAINED = (
    "Each model is in a process of its own, and they take turns: dense, slim, slim, dense, and so on. *Speed-up* is "
    "the median over rounds of dense over slim time, with a bootstrap interval: where that "
    "holds 1, no difference is shown. *Ideal* is what it would be if only "
    "multiply-accumulates (prefill) or bytes of weights and cache (decode) took time. GB is what the process held at "
    "most beyond what it held before it loaded the model. *Stock* is the uniform model of the same class as the dense "
    "one, *Torch-Pruning* the dense model cut by Torch-Pruning 1.6.1 to our widths, where no heads went. Which "
    "units went makes no difference here; the numbers of those that stay are as the default recipe has them.\n"
)

_EATEN = (
    "Matrix products and attention are all that the ideal of a prefill knows. The time of a call, in ms, as torch's "
    "profiler parts it: they, and everything else (norms, activations, rotary embeddings, the cache, Python):\n"
)
_FIXED = (
    "In every engine, the part of a call that does not shrink with the model: where a straight line through the times "
    "of the dense model and of our slim ones, over what the ideal counts, meets nothing left to count. It is what an "
    "engine does for each token and layer however narrow it is, and the copying of logits and cache:\n"
)
_FIXED_HEADING = ("engine", "", "dense, ms", "does not shrink, ms", "part")
_EATEN_HEADING = ("engine", "", "model", "ideal", "products, dense to slim", "the rest, dense to slim")


def latency_page(files: Iterable[Mapping[str, Any]]) -> str:
    """The page as Markdown, a section for each device and a table for each engine.

    Args:
        files: What `make bench` wrote, device by device.
    """
    parts = ["# Latency\n\nMade by `make results` from what `make bench` measured.\n", _EXPLAINED]
    for data in files:
        rows, settings = read_rows(data), data["settings"]
        device = settings["device"]
        parts.append(
            f"## On {'a GPU' if device == 'cuda' else 'a CPU'}\n\n{settings['model']}, widths of MLPs multiples of "
            f"{settings['round_to']}, {settings['rounds']} rounds. {ran_on(data)}\n\n"
            f"![Speed-up and what sizes promise](latency_{device}.svg)\n"
        )
        for engine in dict.fromkeys(row.engine for row in rows):
            cells = [row.cells for row in rows if row.engine == engine]
            parts.append(f"### {engine}\n\n{markdown_table(HEADING, cells)}")
        eaten = list(_eaten(rows))
        if eaten:
            parts.append(f"### What eats the rest\n\n{_EATEN}\n{markdown_table(_EATEN_HEADING, eaten)}")
        fixed = list(_fixed(rows))
        if fixed:
            parts.append(f"### What does not shrink\n\n{_FIXED}\n{markdown_table(_FIXED_HEADING, fixed)}")
    return "\n".join(parts)


def _eaten(rows: Sequence[Row]) -> Iterator[Sequence[str]]:
    """Products and the rest of a call, dense beside slim."""
    dense = {(row.engine, row.case): row for row in rows if row.candidate == "dense"}
    for row in (row for row in rows if row.candidate.startswith("slim")):
        whole = dense[row.engine, row.case]
        if row.products is None or whole.products is None:
            continue
        products = [each.seconds * (each.products or 0) for each in (whole, row)]
        rest = [each.seconds - part for each, part in zip((whole, row), products, strict=True)]
        cells = [f"{a * 1e3:.1f} to {b * 1e3:.1f} (x{a / max(b, 1e-9):.2f})" for a, b in (products, rest)]
        yield row.engine, str(row.case), row.candidate, f"x{row.ideal:.2f}", *cells


def _fixed(rows: Sequence[Row]) -> Iterator[Sequence[str]]:
    """Times at no work, by a straight line through those of the dense model and of at least two slim ones."""
    for engine, case in dict.fromkeys((row.engine, row.case) for row in rows):
        own = [row for row in rows if (row.engine, row.case) == (engine, case)]
        used = [row for row in own if row.candidate == "dense" or row.candidate.startswith("slim")]
        if len(used) < _POINTS or used[0].candidate != "dense":
            continue
        line = linear_regression([1 / row.ideal for row in used], [row.seconds for row in used])
        whole, left = used[0].seconds, max(0.0, line.intercept)
        yield engine, str(case), f"{whole * 1e3:.1f}", f"{left * 1e3:.1f}", f"{left / whole:.0%}"


def write_picture(data: Mapping[str, Any], path: Path) -> None:
    """A picture of the speed-up of our slim models, case by case and engine by engine, and of the ideal.

    Args:
        data: What `make bench` wrote.
        path: An `.svg` file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "fxprune"
    rows = [row for row in read_rows(data) if row.candidate.startswith("slim")]
    cases = list(dict.fromkeys(row.case for row in rows))
    names = list(dict.fromkeys(row.candidate for row in rows))
    figure, grid = pyplot.subplots(1, len(cases), figsize=(3.2 * len(cases), 4), sharey=True, squeeze=False)
    for axes, case in zip(grid[0], cases, strict=True):
        engines = list(dict.fromkeys(row.engine for row in rows if row.case == case))
        for number, name in enumerate(names):
            found = {row.engine: row for row in rows if (row.case, row.candidate) == (case, name)}
            places = [engines.index(engine) + 0.35 * (number - (len(names) - 1) / 2) for engine in found]
            heights = [row.speedup.median for row in found.values()]
            spans = [(r.speedup.median - r.speedup.low, r.speedup.high - r.speedup.median) for r in found.values()]
            axes.bar(places, heights, 0.33, yerr=list(zip(*spans, strict=True)), label=name, capsize=2)
            for place, row in zip(places, found.values(), strict=True):
                axes.hlines(row.ideal, place - 0.17, place + 0.17, colors="black", linewidth=2)
        axes.axhline(1, color="grey", linewidth=0.5)
        axes.set_xticks(range(len(engines)), engines, rotation=60, ha="right")
        axes.set_title(str(case))
    grid[0][0].set_ylabel("speed-up over dense; black: ideal")
    grid[0][0].legend()
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    files = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("latency_*.json"))]
    PAGE.write_text(latency_page(files), encoding="utf-8")
    for data in files:
        write_picture(data, PAGE.with_name(f"latency_{data['settings']['device']}.svg"))
