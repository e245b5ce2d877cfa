"""The report as one self-contained HTML page."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from fxprune.graph.tensors import starred

if TYPE_CHECKING:
    from fxprune.report.report import GroupSize, Report

__all__ = ["ChartColumn", "Headline", "Kind", "bars", "boxes", "headlines", "kinds_of", "page"]

_WIDTH, _HEIGHT = 760, 150
"""Of a chart, in its own units; the page scales it."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 4, 8, 20
"""Margins, for the numbers at the axes."""

_MOST_LABELS = 16
"""Columns with a label that fit side by side."""

_LOGARITHMIC = 30
"""Scores of which the largest is more times the smallest are drawn on a logarithmic scale."""

_DECADES = 8
"""What a logarithmic scale reaches down from the largest score; smaller ones lie at its foot."""

_OUTLIERS = 0.5
"""How far a chart goes on above the highest third quartile; single scores may be a hundred times as high."""

Five = tuple[float, ...]


@dataclass(frozen=True)
class ChartColumn:
    """What stands at one place of a chart.

    Args:
        label: below it.
        tooltip: what is shown where the pointer rests.
    """

    label: str
    tooltip: str


def bars(columns: Sequence[ChartColumn], before: Sequence[int], after: Sequence[int]) -> Markup:
    """Return a bar for each column: as high as what was there before, and filled as far as what is there after."""
    most = max(before, default=0) or 1
    step, floor = _step(columns), _HEIGHT - _BOTTOM
    drawn = [_axis([(1.0, f"{most:,}"), (0.5, f"{most / 2:,g}"), (0.0, "0")], _LEFT + len(columns) * step)]
    for place, (column, dense, slim) in enumerate(zip(columns, before, after, strict=True)):
        left, width = _LEFT + (place + 0.12) * step, 0.76 * step
        high, low = (value / most * (floor - _TOP) for value in (dense, slim))
        gone = _rect("gone" if slim else "gone whole", left, floor - high, width, high)
        drawn.append(_column(column, place, step, gone + _rect("left", left, floor - low, width, low), len(columns)))
    return _svg("units of each block before and after", drawn)


def boxes(columns: Sequence[ChartColumn], kept: Sequence[Five], removed: Sequence[Five]) -> Markup:
    """Return a box for what was kept and one for what went, side by side: from quartile to quartile, with whiskers.

    Whiskers far above all boxes are cut, so that boxes can be told apart.
    """
    spreads = [five for five in (*kept, *removed) if five]
    top = max((five[3] + _OUTLIERS * abs(five[3]) for five in spreads), default=1.0)
    height, ticks = _scale([min(value, top) for five in spreads for value in five])
    step = _step(columns)
    drawn = [_axis(ticks, _LEFT + len(columns) * step)]
    for place, (column, stays, went) in enumerate(zip(columns, kept, removed, strict=True)):
        left = _LEFT + place * step
        inner = _box("kept", stays, left + 0.12 * step, 0.34 * step, height)
        inner += _box("removed", went, left + 0.54 * step, 0.34 * step, height)
        drawn.append(_column(column, place, step, inner, len(columns)))
    return _svg("scores of what was kept and of what went", drawn)


def _scale(values: Sequence[float]) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """Return where a score lies, from 0 to 1, and the numbers at the axis with their places."""
    top = max(values, default=1.0)
    positive = [value for value in values if value > 0]
    if positive and min(values) >= 0 and top > _LOGARITHMIC * min(positive):
        low = max(math.floor(math.log10(min(positive))), math.ceil(math.log10(top)) - _DECADES)
        high = max(math.ceil(math.log10(top)), low + 1)
        every = -(-(high - low) // 4)
        ticks = [((power - low) / (high - low), f"1e{power}") for power in range(low, high + 1, every)]
        return lambda value: (math.log10(max(value, 10.0**low)) - low) / (high - low), ticks
    foot = min((0.0, *values))
    span = (top - foot) or 1.0
    return lambda value: (value - foot) / span, [(part, f"{foot + part * span:.3g}") for part in (0.0, 0.5, 1.0)]


def _box(name: str, five: Five, left: float, width: float, height: Callable[[float], float]) -> Markup:
    if not five:
        return Markup()
    least, first, median, third, most = (_place(min(height(value), 1.0)) for value in five)
    middle = left + width / 2
    whisker = Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
        name, middle, middle, most, least
    )
    line = Markup('<line class="median" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
        left, left + width, median, median
    )
    return whisker + _rect(name, left, third, width, max(first - third, 1.0)) + line


def _place(part: float) -> float:
    return _HEIGHT - _BOTTOM - part * (_HEIGHT - _BOTTOM - _TOP)


def _step(columns: Sequence[ChartColumn]) -> float:
    return (_WIDTH - _LEFT - _RIGHT) / max(len(columns), 8)  # a few columns are not drawn as wide as a page


def _column(column: ChartColumn, place: int, step: float, inner: Markup, columns: int) -> Markup:
    every = -(-columns // _MOST_LABELS)
    label = Markup()
    if place % every == 0:
        label = Markup('<text class="place" x="{:.1f}" y="{}">{}</text>').format(
            _LEFT + (place + 0.5) * step, _HEIGHT - 5, column.label
        )
    return Markup("<g><title>{}</title>{}{}</g>").format(column.tooltip, inner, label)


def _axis(ticks: Sequence[tuple[float, str]], end: float) -> Markup:
    found = Markup()
    for part, label in ticks:
        y = _place(part)
        line = Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>')
        found += line.format(_LEFT, end, y, y)
        found += Markup('<text class="number" x="{}" y="{:.1f}">{}</text>').format(_LEFT - 6, y + 3.5, label)
    return found


def _rect(name: str, x: float, y: float, width: float, height: float) -> Markup:
    return Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
        name, x, y, width, height
    )


def _svg(title: str, parts: Sequence[Markup]) -> Markup:
    head = Markup('<svg class="chart" role="img" aria-label="{}" viewBox="0 0 {} {}">')
    return head.format(escape(title), _WIDTH, _HEIGHT) + Markup("\n").join(parts) + Markup("</svg>")


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
    loader = PackageLoader("fxprune.report", "")
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
        ChartColumn(label, f"{place}: {after[place]:,} of {before[place]:,} left ({after[place] / before[place]:.0%})")
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
        ChartColumn(label, f"{place}: median kept {_median(spread.kept)}, removed {_median(spread.removed)}")
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
