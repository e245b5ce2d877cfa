"""The page about every model type, made from what the runs over them left."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from tests.zoo import NO_ATTENTION

Row = Mapping[str, Any]
TEMPLATE = Path(__file__).with_name("coverage.md.jinja")

KINDS = ("mlp", "head", "channel", "head_dim", "expert", "layer")
_EXPECTED = ("rows are looked up by number", "an output of the model", "looked up by number")
"""Reasons that hold for every model: vocabularies and positions."""

_TYPES = ("type", "nodes", "exact", "masked", "renormalised", "frozen, most common reasons", "emitted")
_CLASSES = ("class", "tried", "run", "traced", "MLP", "heads", "both", "whole", "one", "loaded", "own inputs")

_FINE = ("exact", "inert", "nothing can go")
_ENDED = ("build", "run", "export")


def page(data: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    """The page as Markdown: counts, one line a type, and the types that did not come so far; then the ``others``.

    How many types a class has is taken from the run as well: another release of transformers has others.
    """
    rows: list[Row] = data["rows"]
    traced, failing = ([row for row in rows if (row["stage"] in _ENDED) is ended] for ended in (False, True))
    failures = [(f"`{row['type']}`", row["stage"], _cell(row["error"], 240)) for row in failing]
    wrong = [(row, group) for row in traced for group in row["groups"] if group["removal"] not in _FINE]
    short = [line for row in traced if not is_complete(row) for line in _why(row)]
    by_class: dict[str, list[Row]] = {}
    for row in others["rows"]:
        by_class.setdefault(row["type"].partition("/")[0], []).append(row)
    known: Mapping[str, int] = others["registered"]
    lines = [_counts(f"`{name}`", found, known.get(name, 0)) for name, found in by_class.items()]
    total = _counts("**all**", others["rows"], sum(known.values()))
    lacking = [(f"`{row['type'].removeprefix('AutoModelFor')}`", _shortage(row)) for row in others["rows"]]
    environment = Environment(trim_blocks=True, undefined=StrictUndefined)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        ran=data["environment"],
        summary=_summary(rows),
        types=_rows(_TYPES, [_line(row) for row in traced]),
        failing=_rows(("type", "stage", "raised"), failures) if failing else "",
        wrong=[f"`{row['type']}`, {group['name']}: {_cell(group['removal'])}" for row, group in wrong],
        short=_rows(("type", "kind", "why it does not go exactly"), short),
        gaps=_gaps(traced),
        classes=_rows(_CLASSES, [*lines, total]),
        aims=_rows(("all classes", "types", "share", "aim"), list(_aims(len(others["rows"]), total))),
        missing=_rows(("type", "what is missing"), [(name, _cell(text, 240)) for name, text in lacking if text]),
    )


def _counts(name: str, rows: Sequence[Row], of: int) -> tuple[str, ...]:
    reached = [row for row in rows if row["stage"] not in _ENDED]
    kinds = {kind: [row for row in reached if any(g["kind"] == kind for g in row["groups"])] for kind in KINDS[:2]}
    both = [row for row in reached if _verdict(row, "emitted") == "yes"]
    one = [row for row in reached if "yes" in row["emitted"].values()]
    numbers = [
        f"{len(rows)} of {of}",
        sum(row["stage"] not in _ENDED[:2] for row in rows),
        len(reached),
        *(f"{sum(has_exact(row, kind) for row in held)}/{len(held)}" for kind, held in kinds.items()),
        len(both),
        sum(bool(row["whole"]) for row in both),
        len(one),
        sum(_verdict(row, "reloaded") == "yes" for row in one),
        sum("made" in row["inputs"] for row in reached),
    ]
    return (name, *map(str, numbers))


def _aims(tried: int, total: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """One line for each aim: what is counted, how many types it is, their share, and the share aimed at."""
    run, traced, *exact, both, _, one, loaded, _ = total[2:]
    yield ("tried", f"{tried}", "", "240 types")
    held = [(f"{kind} exact", *counts.split("/"), 97) for kind, counts in zip(("MLP", "heads"), exact, strict=True)]
    rest = [
        ("both emitted", both, traced, 85),
        ("one emitted", one, traced, 95),
        ("loaded, of these", loaded, one, 100),
    ]
    for name, found, of, aim in [("traced, of those that run", traced, run, 95), *held, *rest]:
        yield (name, f"{found} of {of}", f"{100 * int(found) / max(int(of), 1):.0f}%", f"{aim}%")


def _shortage(row: Row) -> str:
    """What a type is short of, with the first reason; empty if nothing is missing."""
    if row["error"]:
        return f"{row['stage']}: {row['error']}"
    wrong = [f"{g['name']} {g['removal']}" for g in row["groups"] if g["removal"] not in _FINE]
    if wrong:
        return wrong[0]
    troubles = [f"{plan}: {text}" for plan, text in row["emitted"].items() if text != "yes"]
    troubles += [f"not loaded: {text}" for text in row["reloaded"].values() if text != "yes"]
    if troubles:
        return troubles[0]
    name = next(iter(row["whole"]), "")
    return f"{len(row['whole'])} groups whole, such as {name}: {row['whole'][name]}" if name else ""


def has_exact(row: Row, kind: str) -> bool:
    """Whether units of ``kind`` go exactly, and none of the kind goes wrong."""
    found = [g["removal"] for g in row["groups"] if g["kind"] == kind and not g["renormalised"]]
    return "exact" in found and not set(found) - set(_FINE)


def has_any(row: Row, kind: str) -> bool:
    """As :func:`has_exact`, renormalised groups counted in."""
    found = [g["removal"] for g in row["groups"] if g["kind"] == kind]
    return "exact" in found and not set(found) - set(_FINE)


def is_complete(row: Row, test: Callable[[Row, str], bool] = has_exact) -> bool:
    """Whether MLP channels go exactly, and heads too where the family has attention."""
    return test(row, "mlp") and (row["type"] in NO_ATTENTION or test(row, "head"))


def _summary(rows: Sequence[Row]) -> str:
    reached = [row for row in rows if row["stage"] not in _ENDED]
    attending = [row for row in reached if row["type"] not in NO_ATTENTION]
    yes = [
        ("emitted", "with a slim model of their own class, all kinds that go exactly pruned at once"),
        ("reloaded", "that, or one with one of the kinds pruned, comes back from disk computing the same"),
        ("generated", "and generates the same with its cache as without"),
    ]
    lines = [
        ("types", len(rows)),
        ("built", sum(row["stage"] != "build" for row in rows)),
        ("run on token ids", sum(row["stage"] not in _ENDED[:2] for row in rows)),
        ("exported", len(reached)),
        ("`mlp` exact", sum(has_exact(row, "mlp") for row in reached)),
        (f"`head` exact, of {len(attending)} with attention", sum(has_exact(row, "head") for row in attending)),
        ("**`mlp` and, where there is attention, `head` exact**", sum(map(is_complete, reached))),
        ("the same, renormalised ones counted in", sum(is_complete(row, has_any) for row in reached)),
        ("with a removal that fails", sum(any(g["removal"] not in _FINE for g in row["groups"]) for row in reached)),
        *((text, sum(_verdict(row, name) == "yes" for row in reached)) for name, text in yes),
    ]
    return _rows(("", "types"), [(text, f"{count}") for text, count in lines])


def _verdict(row: Row, step: str) -> str:
    """What became of the first plan, the one with all kinds; after emission, of the first that could be emitted."""
    return next(iter(row[step].values()), "")


def _line(row: Row) -> tuple[str, ...]:
    removals = (_kinds(row, how) for how in ("exact", "masked", "renormalised"))
    reasons = Counter({reason: count for reason, count in row["frozen"].items() if reason not in _EXPECTED})
    frozen = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(2))
    return (f"`{row['type']}`", f"{row['nodes']}", *removals, _cell(frozen), _emitted(row))


def _kinds(row: Row, how: str) -> str:
    """The kinds whose units go so, with the number of groups."""
    groups = [g for g in row["groups"] if _how(g) == how]
    counts = Counter(group["kind"] for group in groups if group["removal"] == "exact")
    failing = Counter(group["kind"] for group in groups if group["removal"] not in _FINE)
    text = [f"{kind} {counts[kind]}" for kind in KINDS if counts[kind]]
    return ", ".join(text + [f"*{kind} {failing[kind]} fail*" for kind in KINDS if failing[kind]])


def _how(group: Row) -> str:
    """How units of a group go: ``exact``, ``masked`` or ``renormalised``."""
    return "renormalised" if group["renormalised"] else "masked" if group.get("masked") else "exact"


def _emitted(row: Row) -> str:
    """Whether there is a slim model, and what works with it."""
    verdict = _verdict(row, "emitted")
    if not verdict:
        return "no plan" if row["stage"] == "done" else _cell(row["error"])
    if verdict != "yes":
        others = [plan for plan, text in row["emitted"].items() if text == "yes"]
        return f"{', '.join(others)} only: {_cell(verdict)}" if others else f"no: {_cell(verdict)}"
    troubles = [(step, _verdict(row, step)) for step in ("reloaded", "generated")]
    return next((f"yes; not {step}: {_cell(text)}" for step, text in troubles if text != "yes"), "yes")


def _why(row: Row) -> Iterator[tuple[str, str, str]]:
    """For each kind that is short, the reason."""
    for kind in ("mlp",) if row["type"] in NO_ATTENTION else ("mlp", "head"):
        if not has_exact(row, kind):
            yield f"`{row['type']}`", kind, _cell(_reason(row, kind), 200)


def _reason(row: Row, kind: str) -> str:
    wrong = [g["removal"] for g in row["groups"] if g["kind"] == kind and g["removal"] not in _FINE]
    if wrong:
        return str(wrong[0])
    if row["stage"] != "done":
        return str(row["error"])
    if has_any(row, kind):
        return "renormalised: a statistic is taken over all of them"
    if any(g["kind"] == kind for g in row["groups"]):
        return "there is a single one at these sizes, or its removal changes no output"
    frozen = [f"{reason} ({count})" for reason, count in row["frozen"].items() if reason not in _EXPECTED]
    return f"none found; frozen: {'; '.join(frozen) or 'nothing'}"


def _gaps(rows: Sequence[Row]) -> str:
    reasons = Counter(reason for row in rows for reason in row["frozen"] if reason not in _EXPECTED)
    examples = {reason: [row["type"] for row in rows if reason in row["frozen"]] for reason in reasons}
    lines = [(_cell(why), f"{n}", ", ".join(f"`{t}`" for t in examples[why][:4])) for why, n in reasons.most_common(25)]
    return _rows(("reason", "types", "such as"), lines)


def _rows(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    text = ["| " + " | ".join(heading) + " |", "|" + "---|" * len(heading)]
    return "\n".join([*text, *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def _cell(text: str, most: int = 110) -> str:
    """Text fit for a cell of a table."""
    flat = " ".join(text.split()).replace("|", "/").replace("<", "(").replace(">", ")")
    return flat if len(flat) <= most else f"{flat[:most]}.."
