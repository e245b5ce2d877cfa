"""Write docs/results.md from the JSON files that the benchmarks left: `make results`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fxprune.cli.demo import demo_name

__all__ = ["about_demo", "markdown_table", "ran_on", "results_page"]

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "results.md"


def results_page(folder: Path = RESULTS) -> str:
    """The page as Markdown: quality and discovery, each with what it ran on."""
    parts = [
        "# Results\n\nMade by `make results` from `benchmarks/results/`, which the commands named here wrote. "
        f"{about_demo()}\n"
    ]
    for path in sorted(folder.glob("criteria*.json")):
        parts.append(_criteria(json.loads(path.read_text())))
    sections = (
        ("reference", _reference),
        ("recovery", _recovery),
        ("discovery", _discovery),
        ("discovery_scaling", _scaling),
        ("score_memory", _score_memory),
    )
    for name, section in sections:
        path = folder / f"{name}.json"
        if path.exists():
            parts.append(section(json.loads(path.read_text())))
    return "\n".join(parts)


def about_demo() -> str:
    """What the demo model is, for a page that shows figures of it."""
    return (
        f"{demo_name()} is the demo model: its weights were rounded to 4 bits (Q4_1) in the file that its package "
        "carries, and are used here in float32. Figures compare with each other, and not with published ones of the "
        "model before rounding."
    )


def _criteria(data: dict[str, Any]) -> str:
    rows = [(r["criterion"], f"{r['parameters']:,}", f"{r['perplexity']:.1f}") for r in data["rows"]]
    return (
        f"## Criteria: `make bench-criteria`\n\n{data['title']}. {ran_on(data)}\n\n"
        + markdown_table(("criterion", "parameters", "perplexity"), rows)
        + "\n*No groups*: the same criterion and as many slices of every tensor, but each tensor is ranked by its own "
        "scores alone, and the slices are zeroed.\n"
    )


def _reference(data: dict[str, Any]) -> str:
    rows = [
        (r["order"], f"{r['reference']:.1f}", f"{r['found']:.1f}", f"{r['found'] / r['reference'] - 1:+.1%}")
        for r in data["rows"]
    ]
    return (
        "## The paper's method: `make bench-reference`\n\nSmolLM2-135M-Instruct without a quarter of the MLP channels "
        "of all layers but the first four and the last two, scored on the first 64 tokens of the first ten texts of a "
        "C4 sample that have as many; perplexity on 60 x 128 tokens of WikiText-2's test text, where the dense "
        f"model has {data['dense']:.1f}. *Reference*: measured once with LLM-Pruner's own code, and kept in "
        f"`benchmarks/reference.py`. {ran_on(data)}\n\n"
        + markdown_table(("Taylor expansion", "reference", '`recipe="llm-pruner"`', "difference"), rows)
    )


def _recovery(data: dict[str, Any]) -> str:
    settings, columns = data["settings"], data["columns"]
    rows = [
        ("parameters", *(f"{column['parameters']:,}" for column in columns)),
        ("multiply-accumulates", *(f"{column['macs']:,}" for column in columns)),
    ]
    evaluations = [column["evaluation"] for column in columns]
    for key, label, digits in (("perplexities", "perplexity, ", 2), ("tasks", "", 3)):
        for name in evaluations[0][key]:
            found = [evaluation[key][name] for evaluation in evaluations]
            rows.append((label + name, *(f"{f['value']:.{digits}f} ± {f['standard_error']:.{digits}f}" for f in found)))
    kept = [(column["retained"], column["retained_standard_error"]) for column in columns]
    if kept[0][0] is not None:
        label = f"average accuracy retained on {', '.join(data['retained_of'])}"
        rows.append((label, *(f"{value:.1%} ± {error:.1%}" for value, error in kept)))
    before, after = settings["held_out_loss"]
    pruning = sum(seconds for _, _, seconds in settings["passes"]) / 60
    passes = ", ".join(spelling for _, spelling, _ in settings["passes"])
    files = ", ".join(settings["data"] or ["the built-in text"])
    resumed = next((f" after it was {note}" for note in settings["notes"] if "resumed" in note), "")
    told = (
        f"SmolLM2-135M-Instruct, {settings['achieved']:.1%} of the parameters removed in {pruning:.1f} minutes by the "
        f"recipe `{settings['recipe']}` as it was then (`{passes}`), on up to {settings['samples']:,} samples of 128 "
        f"tokens of {settings['calibration'] or 'the rows'}. {settings['steps']} steps of "
        f"{settings['batch']} samples on {settings['training_tokens']:,} tokens, {settings['training_minutes']:.1f} "
        f"minutes{resumed}: rank {settings['rank']}, learning rate {settings['learning_rate']:g}, teacher's weight "
        f"{settings['distil']:g}, rows of {files}. Held-out loss {before:.3f} before, {after:.3f} after. Perplexity: "
        f"{settings['windows']} windows of {settings['window']} tokens. Tasks: up to {settings['asked']} questions of "
        f"the {settings['half']} half of each file. Values after ± are one standard error; measured in "
        f"{settings['measured_in'].removeprefix('torch.')}."
    )
    heading = ("", *(column["name"] for column in columns))
    return f"## Recovery: `make bench-recover`\n\n{told} {ran_on(data)}\n\n" + markdown_table(heading, rows)


def _discovery(data: dict[str, Any]) -> str:
    rows = []
    for row in data["rows"]:
        traced = f"{row['seconds']['trace']:.1f}" if "trace" in row["seconds"] else ""
        numbers = (f"{row['total_s']:.1f}", f"{row['least_s']:.1f}", f"{row['peak_gb']:.2f}", str(row["groups"]))
        rows.append((row["shape"]["name"], row["tool"], traced, *numbers))
    return (
        f"## Discovery: `make bench-discovery`\n\nTrace, graph and groups with no weights in memory, against "
        f"Torch-Pruning 1.6.1 (*theirs*) on fake tensors; then a whole prune, with what its trace takes; "
        f"median and least of {data['settings']['repeats']} runs. {ran_on(data)}\n\n"
        + markdown_table(("Llama shape", "tool", "of it trace", "median s", "least s", "peak GB", "groups"), rows)
    )


def _scaling(data: dict[str, Any]) -> str:
    rows = []
    for row in data["rows"]:
        per_node = row["least_s"] / row["nodes"] * 1e6
        rows.append((str(row["shape"]["layers"]), str(row["nodes"]), f"{row['least_s']:.2f}", f"{per_node:.0f}"))
    return "### Depth\n\nThe 7B shape with more layers; least of the runs.\n\n" + markdown_table(
        ("layers", "graph nodes", "seconds", "microseconds per node"), rows
    )


def _score_memory(data: dict[str, Any]) -> str:
    settings, (plain, *_) = data["settings"], data["rows"]
    rows = []
    for row in data["rows"]:
        again = f"{row['seconds'] / plain['seconds']:.2f}"
        memory = (f"{row['peak_gb']:.2f}", f"{row['over_weights']:.2f}")
        rows.append((row["way"], f"{row['seconds']:.0f}", again, *memory))
    return (
        "## Exact scores: `python -m benchmarks.score_memory`\n\nTaylor scores of the order `mix` of a random Llama of "
        f"{settings['layers']} layers, {data['weights'] / 1e9:.2f} GB of weights, on {settings['samples']} x "
        f"{settings['tokens']} tokens, beside a forward and a backward run for each sample. Memory is what the process "
        f"has beyond the pages of files that it maps, Python and its packages with it. {ran_on(data)}\n\n"
        + markdown_table(("", "seconds", "of plain", "GB", "of the weights"), rows)
    )


def ran_on(data: Mapping[str, Any]) -> str:
    """What a file of results was measured on, in a sentence."""
    ran = data["environment"]
    versions = f"torch {ran['torch']}, transformers {ran['transformers']}, Python {ran['python']}"
    return f"{ran['cpu']}, {ran['threads']} threads, {versions}."


def markdown_table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * len(heading)]
    lines.extend("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(results_page(), encoding="utf-8")
