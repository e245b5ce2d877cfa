"""Charts of a report, as SVG: bars of units, boxes of scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

_WIDTH, _HEIGHT = 760, 150
"""Of a chart, in its own units; the page scales it."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 4, 8, 20
"""Margins, for the numbers at the axes."""

Five = tuple[float, ...]
"""Minimum, quartiles and maximum; empty without values."""


@dataclass(frozen=True)
class ChartColumn:
    """One column of a chart: the label below it, and the tooltip shown under the pointer."""

    label: str
    tooltip: str


def bar_chart(columns: Sequence[ChartColumn], before: Sequence[int], after: Sequence[int]) -> Markup:
    """Chart of one bar per column, as high as the count before and filled up to the count after."""
    most = max(before, default=0) or 1

    def bar(place: int, left: float, step: float) -> Markup:
        x, width, floor = left + 0.12 * step, 0.76 * step, _height(0.0)
        high, low = (_height(value / most) for value in (before[place], after[place]))
        gone = _rect("gone" if after[place] else "gone whole", x, high, width, floor - high)
        return gone + _rect("left", x, low, width, floor - low)

    ticks = [(1.0, f"{most:,}"), (0.5, f"{most / 2:,g}"), (0.0, "0")]
    return _chart("units of each block before and after", columns, ticks, bar)


def box_chart(columns: Sequence[ChartColumn], kept: Sequence[Five], removed: Sequence[Five]) -> Markup:
    """Chart of two boxes per column, for kept and removed units: from quartile to quartile, with whiskers.

    Whiskers end half above the highest third quartile: single scores may be a hundred times as high.
    """
    spreads = [five for five in (*kept, *removed) if five]
    top = max((five[3] + 0.5 * abs(five[3]) for five in spreads), default=1.0)
    part, ticks = _scale([min(value, top) for five in spreads for value in five])

    def box(name: str, five: Five, left: float, width: float) -> Markup:
        if not five:
            return Markup()
        least, first, median, third, most = (_height(min(part(value), 1.0)) for value in five)
        middle = left + width / 2
        whisker, line = _line(name, middle, middle, most, least), _line("median", left, left + width, median, median)
        return whisker + _rect(name, left, third, width, max(first - third, 1.0)) + line

    def boxes(place: int, left: float, step: float) -> Markup:
        stays = box("kept", kept[place], left + 0.12 * step, 0.34 * step)
        return stays + box("removed", removed[place], left + 0.54 * step, 0.34 * step)

    return _chart("scores of kept and of removed units", columns, ticks, boxes)


def _scale(values: Sequence[float]) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """The map from scores to heights between 0 and 1, and the axis labels with their heights.

    The scale is linear up to a ratio of 30, and logarithmic above; scores below its eight decades lie at its foot.
    """
    top = max(values, default=1.0)
    positive = [value for value in values if value > 0]
    if positive and min(values) >= 0 and top > 30 * min(positive):
        low = max(math.floor(math.log10(min(positive))), math.ceil(math.log10(top)) - 8)
        high = max(math.ceil(math.log10(top)), low + 1)
        every = -(-(high - low) // 4)
        ticks = [((power - low) / (high - low), f"1e{power}") for power in range(low, high + 1, every)]
        return lambda value: (math.log10(max(value, 10.0**low)) - low) / (high - low), ticks
    foot = min((0.0, *values))
    span = (top - foot) or 1.0
    return lambda value: (value - foot) / span, [(part, f"{foot + part * span:.3g}") for part in (0.0, 0.5, 1.0)]


def _height(part: float) -> float:
    return _HEIGHT - _BOTTOM - part * (_HEIGHT - _BOTTOM - _TOP)


def _chart(
    title: str,
    columns: Sequence[ChartColumn],
    ticks: Sequence[tuple[float, str]],
    draw: Callable[[int, float, float], Markup],
) -> Markup:
    """A chart with labels at its axes; ``draw`` gets the place of a column, its left side and its width."""
    step = (_WIDTH - _LEFT - _RIGHT) / max(len(columns), 8)  # a few columns are not drawn as wide as a page
    axis = Markup()
    for part, label in ticks:
        y = _height(part)
        axis += _line("grid", _LEFT, _LEFT + len(columns) * step, y, y)
        axis += Markup('<text class="number" x="{}" y="{:.1f}">{}</text>').format(_LEFT - 6, y + 3.5, label)
    drawn = [axis]
    for place, column in enumerate(columns):
        left, text = _LEFT + place * step, Markup()
        if place % -(-len(columns) // 16) == 0:  # as many labels fit side by side
            text = Markup('<text class="place" x="{:.1f}" y="{}">{}</text>')
            text = text.format(left + 0.5 * step, _HEIGHT - 5, column.label)
        inner = draw(place, left, step)
        drawn.append(Markup("<g><title>{}</title>{}{}</g>").format(column.tooltip, inner, text))
    head = Markup('<svg class="chart" role="img" aria-label="{}" viewBox="0 0 {} {}">')
    return head.format(title, _WIDTH, _HEIGHT) + Markup("\n").join(drawn) + Markup("</svg>")


def _line(name: str, x1: float, x2: float, y1: float, y2: float) -> Markup:
    line = Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>')
    return line.format(name, x1, x2, y1, y2)


def _rect(name: str, x: float, y: float, width: float, height: float) -> Markup:
    rect = Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>')
    return rect.format(name, x, y, width, height)
