"""A report as one HTML page that needs no other file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from fxprune.graph.names import starred
from fxprune.removal.charts import Column, bars, boxes

if TYPE_CHECKING:
    from fxprune.removal.report import GroupSize, Report

__all__ = ["Headline", "Kind", "headlines", "kinds_of", "page"]

_UNITS = {
    "mlp": "MLP channels",
    "head": "attention heads",
    "channel": "channels of the residual stream",
    "head_dim": "channels of heads",
    "expert": "experts",
    "layer": "layers",
}
"""What the units of a kind are called."""

_DECISIVE = {"importance": "Scored by", "select": "chosen by", "compensate": "fitted by", "tune": "tuned by"}
"""Stages in which it is decided what goes and what becomes of the rest, in words."""

_NESTED = {"head": "query heads of each key/value head", "head_dim": "channels of each head"}
"""What they are called where they are counted inside a unit of another group."""


@dataclass(frozen=True)
class Headline:
    """A size of the model, dense and slim.

    Args:
        name: what is counted.
        dense: before.
        slim: after.
    """

    name: str
    dense: int
    slim: int

    @property
    def left(self) -> float:
        """The fraction that is left."""
        return self.slim / self.dense if self.dense else 1.0


@dataclass(frozen=True)
class Kind:
    """What became of the groups of a kind.

    Args:
        kind: what a unit is.
        name: the kind, with a number where a block has several such groups.
        units: what the units are called.
        groups: their number.
        shrunk: how many of them lost units.
        before: units of all.
        after: units of all that stayed.
        least: the least that is left of one, as a fraction.
        chart: the units of each block; empty where none lost any.
        runs: the same in words, equal blocks together.
        scores: how the scores are spread; empty where there are none.
    """

    kind: str
    name: str
    units: str
    groups: int
    shrunk: int
    before: int
    after: int
    least: float
    chart: Markup
    runs: tuple[str, ...]
    scores: Markup


def headlines(report: Report) -> tuple[Headline, ...]:
    """Return the sizes that a reader asks for first."""
    found = [Headline("parameters", *report.parameters), Headline(f"MACs at {report.tokens} tokens", *report.macs)]
    if report.memory is not None:
        found.append(Headline("bytes of weights", *report.memory))
    if report.cache is not None:
        found.append(Headline("KV-cache, bytes a token", *report.cache))
    return tuple(found)


def page(report: Report) -> str:
    """Return a report as a page."""
    kinds = list(kinds_of(report))
    return _template().render(
        report=report,
        headlines=headlines(report),
        kinds=[kind for kind in kinds if kind.shrunk],
        whole=[kind for kind in kinds if not kind.shrunk],
        frozen=_folded(report.frozen),
        renormalised=_folded({group: _nodes(nodes) for group, nodes in report.renormalised.items()}),
        kept_norms=Counter(map(starred, report.kept_norms)),
        decided=[(_DECISIVE[stage], spelling) for stage, spelling, _ in report.passes if stage in _DECISIVE],
        seconds=sum(seconds for *_, seconds in report.passes),
    )


@cache
def _template() -> Template:
    loader = PackageLoader("fxprune.removal", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html")


def kinds_of(report: Report) -> Iterator[Kind]:
    """Yield what became of the groups of each kind; of groups side by side in a block, one kind after the other."""
    series: dict[tuple[str, str], list[GroupSize]] = {}
    for group in sorted(report.groups, key=lambda group: list(_UNITS).index(group.kind)):
        series.setdefault((group.kind, group.place.rpartition("/")[2]), []).append(group)
    for (kind, name), groups in series.items():
        yield _kind(report, kind, name, groups)


def _kind(report: Report, kind: str, name: str, groups: Sequence[GroupSize]) -> Kind:
    places = {group.place: group.block for group in groups}
    before, after = (Counter[str](), Counter[str]())
    for group in groups:
        before[group.place] += group.before
        after[group.place] += group.after
    shrunk = sum(group.after < group.before for group in groups)
    labels = [block.rpartition(".")[2] if block else "all" for block in places.values()]  # a block goes by its number
    columns = [
        Column(label, f"{place}: {after[place]:,} of {before[place]:,} left ({after[place] / before[place]:.0%})")
        for label, place in zip(labels, places, strict=True)
    ]
    several = len(places) > 1  # a chart of one bar says less than the line of text does
    return Kind(
        kind=kind,
        name=name,
        units=_NESTED.get(kind, _UNITS[kind]) if groups[0].nested else _UNITS[kind],
        groups=len(groups),
        shrunk=shrunk,
        before=before.total(),
        after=after.total(),
        least=min(group.after / group.before for group in groups),
        chart=bars(columns, list(before.values()), list(after.values())) if shrunk and several else Markup(),
        runs=tuple(_runs(labels, [(before[place], after[place]) for place in places])),
        scores=_scores(report, list(places), labels) if shrunk else Markup(),
    )


def _scores(report: Report, places: Sequence[str], labels: Sequence[str]) -> Markup:
    """Draw how the scores of a kind are spread, where there are any and units differ."""
    held = [(place, label) for place, label in zip(places, labels, strict=True) if place in report.scores]
    spreads = [report.scores[place] for place, _ in held]
    if not any(spread.kept and spread.removed for spread in spreads):
        return Markup()
    columns = [
        Column(label, f"{place}: median kept {_median(spread.kept)}, removed {_median(spread.removed)}")
        for (place, label), spread in zip(held, spreads, strict=True)
    ]
    return boxes(columns, [spread.kept for spread in spreads], [spread.removed for spread in spreads])


def _median(five: Sequence[float]) -> str:
    return f"{five[2]:.3g}" if five else "none"


def _runs(labels: Sequence[str], sizes: Sequence[tuple[int, int]]) -> Iterator[str]:
    """Say how many units are left of each block, of equal neighbours once."""
    for (before, after), run in groupby(zip(labels, sizes, strict=True), key=lambda pair: pair[1]):
        names = [label for label, _ in run]
        place = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        yield f"{place}: {before:,}" if before == after else f"{place}: {before:,} \N{RIGHTWARDS ARROW} {after:,}"


def _folded(reasons: Mapping[str, str]) -> dict[str, list[tuple[str, int]]]:
    """Return names by reason, with ``*`` for numbers of blocks and the number of names that are alike."""
    counts: Counter[tuple[str, str]] = Counter()
    for name, reason in reasons.items():
        counts[re.sub(r" \(at \w+\)$", "", reason), starred(name)] += 1
    found: dict[str, list[tuple[str, int]]] = {}
    for (reason, name), count in counts.items():
        found.setdefault(reason, []).append((name, count))
    return found


def _nodes(nodes: Sequence[str]) -> str:
    """Nodes of a group in words, alike for groups that are alike."""
    kinds = dict.fromkeys(re.sub(r"_\d+$", "", node) for node in nodes)
    return f"a statistic runs over it: {', '.join(kinds)}"
