"""Charts of a report: where bars and boxes stand."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from fxprune.report.page import Column, bars, boxes

COLUMNS = [Column(str(i), f"block <{i}>") for i in range(40)]


def marks(chart: str, tag: str, name: str) -> list[dict[str, str]]:
    """The elements of a chart of one class, by their attributes."""
    return [dict(found.attrib) for found in ElementTree.fromstring(chart).iter(tag) if found.get("class") == name]


def test_a_bar_is_filled_as_far_as_units_are_left() -> None:
    chart = bars(COLUMNS[:3], [80, 40, 40], [80, 20, 0])
    before, after = marks(chart, "rect", "gone"), marks(chart, "rect", "left")
    assert [float(bar["height"]) for bar in before] == pytest.approx([122, 61])
    assert [float(bar["height"]) for bar in after] == pytest.approx([122, 30.5, 0])
    assert len(marks(chart, "rect", "gone whole")) == 1, "what went as a whole looks otherwise"
    feet = {float(bar["y"]) + float(bar["height"]) for bar in (*before, *after)}
    assert max(feet) - min(feet) < 0.11
    numbers = [found.text for found in ElementTree.fromstring(chart).iter("text")]
    assert numbers == ["80", "40", "0", "0", "1", "2"]
    assert "block &lt;1&gt;" in chart


def test_labels_of_many_blocks_do_not_run_into_each_other() -> None:
    assert len(marks(bars(COLUMNS, [8] * 40, [4] * 40), "text", "place")) == 14


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((1e-4, 1e-3, 1e-2, 1e-1, 1.0), ["1e-4", "1e-3", "1e-2", "1e-1", "1e0"]),
        ((0.0, 1e-30, 1e-2, 1e-1, 1.0), ["1e-8", "1e-6", "1e-4", "1e-2", "1e0"]),
        ((1.0, 2.0, 3.0, 4.0, 5.0), ["0", "2.5", "5"]),
        ((-1.0, -0.5, 0.0, 0.5, 0.6), ["-1", "-0.2", "0.6"]),
        ((0.0,) * 5, ["0", "0.5", "1"]),
    ],
)
def test_scores_lie_between_the_numbers_at_the_axis(values: tuple[float, ...], ticks: list[str]) -> None:
    chart = boxes(COLUMNS[:2], [values, values], [(), values])
    assert [found["class"] for found in marks(chart, "text", "number")] == ["number"] * len(ticks)
    assert [f.text for f in ElementTree.fromstring(chart).iter("text") if f.get("class") == "number"] == ticks
    assert len(marks(chart, "rect", "kept")) == 2 and len(marks(chart, "rect", "removed")) == 1
    for line in marks(chart, "line", "kept"):
        assert 7.9 <= float(line["y1"]) <= float(line["y2"]) <= 130.1


def test_a_score_far_above_all_boxes_does_not_press_them_together() -> None:
    chart = boxes(COLUMNS[:1], [(1.0, 2.0, 3.0, 4.0, 1e6)], [()])
    (box,), (whisker,) = marks(chart, "rect", "kept"), marks(chart, "line", "kept")
    assert float(box["height"]) > 30 and float(whisker["y1"]) == 8
