"""Write the pages of results, latency and quality in docs/, and their pictures: `make results`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, linear_regression
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.common import RESULTS, ROOT
from benchmarks.latency.measure import HEADING, LatencyRow, read_rows
from benchmarks.quality.rows import over_dense
from benchmarks.quality.tables import Section, known_tasks, retained, sections, task_rows, type_error, whole_texts
from fxprune.cli.demo import demo_entry

DOCS = ROOT / "docs"
DEMO = ROOT / "fxprune" / "cli" / "demo.json"
RECIPES = ("llm-pruner", "FLAP", "fast", "balanced", "best", "fast, random units", "balanced, random units")
"""Entries to draw."""

_ENGLISH = ("c4_sample.jsonl, kept back", "wiki_sample.txt", "wikitext2/test.txt")

_FIT_POINTS = 3
"""Fewest models to fit a line through."""

_TICKS = (1, 1.5, 2, 3, 5, 10, 20)
_WORST = 20


def _render(name: str, **values: Any) -> str:
    """Render a template of benchmarks/templates/."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["spelled"] = format
    environment.globals |= {"known_tasks": known_tasks, "retained": retained}
    return environment.get_template(f"{name}.md.jinja").render(demo=demo_entry()["name"], **values)


def results_page(folder: Path = RESULTS) -> str:
    """The page of results as Markdown, without the sections whose file is not in the folder."""
    names = (
        "reference",
        "recovery",
        "discovery",
        "discovery_scaling",
        "discovery_passes",
        "score_memory",
        "equal_bytes",
        "drafts",
        "joined",
        "vision",
    )
    files = {name: folder / f"{name}.json" for name in names}
    data = {name: json.loads(path.read_text()) if path.exists() else None for name, path in files.items()}
    criteria = [json.loads(path.read_text()) for path in sorted(folder.glob("criteria*.json"))]
    return _render("results", criteria=criteria, **data)


def latency_page(files: Iterable[Mapping[str, Any]]) -> str:
    """The page of latency as Markdown, with a section for each device and a table for each engine."""
    devices = []
    for data in files:
        rows = read_rows(data)
        engines: dict[str, list[Sequence[str]]] = {}
        for row in rows:
            engines.setdefault(row.engine, []).append(row.cells)
        devices.append({**data, "engines": engines, "rest": list(_rest(rows)), "fixed": list(_fixed(rows))})
    return _render("latency", devices=devices, heading=HEADING)


def _rest(rows: Sequence[LatencyRow]) -> Iterator[Sequence[str]]:
    """Time of matrix products and of everything else, dense beside slim."""
    dense = {(row.engine, row.case): row for row in rows if row.candidate == "dense"}
    for row in (row for row in rows if row.candidate.startswith("slim")):
        whole = dense[row.engine, row.case]
        if row.products is None or whole.products is None:
            continue
        products = [each.seconds * (each.products or 0) for each in (whole, row)]
        rest = [each.seconds - part for each, part in zip((whole, row), products, strict=True)]
        cells = [f"{a * 1e3:.1f} to {b * 1e3:.1f} (x{a / max(b, 1e-9):.2f})" for a, b in (products, rest)]
        yield row.engine, str(row.case), row.candidate, f"x{row.ideal:.2f}", *cells


def _fixed(rows: Sequence[LatencyRow]) -> Iterator[Sequence[str]]:
    """Time without any work, by a line through the times of the dense model and of at least two slim ones."""
    for engine, case in dict.fromkeys((row.engine, row.case) for row in rows):
        own = [row for row in rows if (row.engine, row.case) == (engine, case)]
        used = [row for row in own if row.candidate == "dense" or row.candidate.startswith("slim")]
        if len(used) < _FIT_POINTS or used[0].candidate != "dense":
            continue
        line = linear_regression([1 / row.ideal for row in used], [row.seconds for row in used])
        whole, fixed = used[0].seconds, max(0.0, line.intercept)
        yield engine, str(case), f"{whole * 1e3:.1f}", f"{fixed * 1e3:.1f}", f"{fixed / whole:.0%}"


def quality_page(
    data: Mapping[str, Any], tasks: Mapping[str, Any] | None = None, others: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The page of quality as Markdown, with tables for each ratio, one of questions, and those of other models."""
    models = [(each, sections(each)) for each in (data, *others)]
    counts = Counter(row.cpu for _, found in models for section in found for row in section.rows)
    processors = [cpu for cpu, _ in counts.most_common()]
    first = models[0][1][0]
    return _render(
        "quality",
        environment=data["environment"],
        processor=processors[0],
        other_processors=first.places(lambda row: row.cpu, processors[0]),
        models=[found for _, found in models],
        whole=[section for each, _ in models for section in whole_texts(each)],
        type_error=type_error(data, first.protocol),
        tasks=tasks,
        task_rows=task_rows(tasks, first.rows) if tasks else (),
        metrics=_metrics(tasks) if tasks else {},
    )


def _metrics(tasks: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of tasks by the metric that they count by."""
    found: dict[str, list[str]] = {}
    for name, score in tasks["columns"][0]["evaluation"]["tasks"].items():
        found.setdefault(score["metric"], []).append(name)
    return found


def vocabulary_page(files: Sequence[Mapping[str, Any]]) -> str:
    """The page of vocabularies as Markdown, with a table for each model."""
    return _render("vocabulary", files=files)


def uniform_price(data: Mapping[str, Any]) -> str:
    """The perplexity that uniform layers cost beside layers of their own widths, in words."""
    section = sections(data)[0]
    length, ratio = section.protocol.lengths[0], section.ratios[0]
    rows = {(row.entry, row.draw): row.at(length) for row in section.rows if row.ratio == ratio}
    pairs = [(row, rows["fast", draw]) for (entry, draw), row in rows.items() if entry == "fast, uniform"]
    more = []
    for text in _ENGLISH:
        uniform, own = (fmean(row[text].value for row in found) for found in zip(*pairs, strict=True))
        more.append(100 * (uniform / own - 1))
    price = f"{min(more):.0f} to {max(more):.0f}% more perplexity on English text"
    return f"{price}, at {ratio:.0%} of the demo model by fast"


def _pyplot() -> Any:
    """Import pyplot, set to draw without a display and to write the same file each time."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fxprune"
    from matplotlib import pyplot

    return pyplot


def draw_latency(data: Mapping[str, Any], path: Path) -> None:
    """Draw the speed-up of our slim models and its ideal, a panel for each case and a bar for each engine."""
    pyplot = _pyplot()
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


def draw_quality(data: Mapping[str, Any], path: Path) -> None:
    """Draw perplexity over that of the dense model against the parameters left, a panel for each text.

    Recipes are drawn, or all entries if no recipe was measured; bars are the range over draws, and dashed lines join
    what was measured by another protocol. Points above twenty times the dense model fall outside.
    """
    pyplot = _pyplot()
    found = sections(data)
    rows = [row for section in found for row in section.rows]
    names = [name for name in RECIPES if any(row.entry == name for row in rows)]
    names = names or list(dict.fromkeys(row.entry for row in rows))
    texts = [name for name in found[-1].dense.texts if name in found[0].dense.texts] or list(found[0].dense.texts)
    figure, panels = pyplot.subplots(1, len(texts), figsize=(4.5 * len(texts), 4), sharey=True, squeeze=False)
    for axes, text in zip(panels[0], texts, strict=True):
        for number, name in enumerate(names):
            for section, style in zip(found, ("-", *["--"] * (len(found) - 1)), strict=True):
                points = [*_points(section, text, name)]
                if points:
                    shares, values, low, high = zip((100, 1, 0, 0), *points, strict=True)
                    label = name if name not in axes.get_legend_handles_labels()[1] else None
                    axes.errorbar(shares, values, (low, high), marker="o", ls=style, color=f"C{number}", label=label)
        axes.set(title=text, xlabel="% of the parameters left", yscale="log", ylim=(0.95, _WORST))
        axes.set_yticks(_TICKS, [f"x{tick:g}" for tick in _TICKS])
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("perplexity over dense")
    panels[0][0].legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)


def _points(section: Section, text: str, name: str) -> Iterator[tuple[float, float, float, float]]:
    """Per cent of the parameters left, mean perplexity over dense at the shortest windows, and its range over draws."""
    length = section.protocol.lengths[0]
    dense = section.dense.at(length)[text]
    own = [row for row in section.rows if row.entry == name and text in row.at(length)]
    for count in sorted({row.parameters for row in own}, reverse=True):
        found = [over_dense(row.at(length)[text], dense) for row in own if row.parameters == count]
        over = [each[0] for each in found if each is not None]
        if over:
            mean = fmean(over)
            yield 100 * count / section.dense.parameters, mean, mean - min(over), max(over) - mean


def main() -> None:
    """Write all pages and pictures whose results exist."""
    (DOCS / "results.md").write_text(results_page(), encoding="utf-8")
    devices = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("latency_*.json"))]
    (DOCS / "latency.md").write_text(latency_page(devices), encoding="utf-8")
    for device in devices:
        draw_latency(device, DOCS / f"latency_{device['settings']['device']}.svg")
    words = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("vocabulary-*.json"))]
    (DOCS / "vocabulary.md").write_text(vocabulary_page(words), encoding="utf-8")
    quality, tasks = RESULTS / "quality.json", RESULTS / "quality_tasks.json"
    if quality.exists():
        data = json.loads(quality.read_text())
        asked = json.loads(tasks.read_text()) if tasks.exists() else None
        found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("quality-*.json"))]
        (DOCS / "quality.md").write_text(quality_page(data, asked, found), encoding="utf-8")
        draw_quality(data, DOCS / "quality.svg")
        entry = json.loads(DEMO.read_text(encoding="utf-8")) | {"uniform": uniform_price(data)}
        DEMO.write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
