"""The report as data and as a page."""

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune.axes import Factor, Keep
from fxprune.discovery.groups import Group
from fxprune.errors import ArgumentError
from fxprune.removal.removal import Scores
from fxprune.report.charts import ChartColumn, bar_chart, box_chart
from fxprune.report.report import (
    GroupSize,
    Report,
    SamplesUsed,
    Spread,
    group_sizes,
    group_widths,
    package_versions,
    score_spreads,
)
from tests.models import tiny, token_ids
from tests.oracle import Net, discover, groups_of

COLUMNS = [ChartColumn(str(i), f"block <{i}>") for i in range(40)]


def marks(chart: str, tag: str, name: str) -> list[dict[str, str]]:
    """The elements of a chart of one class, by their attributes."""
    return [dict(found.attrib) for found in ElementTree.fromstring(chart).iter(tag) if found.get("class") == name]


def test_a_bar_is_filled_as_far_as_units_are_left() -> None:
    chart = bar_chart(COLUMNS[:3], [80, 40, 40], [80, 20, 0])
    before, after = marks(chart, "rect", "gone"), marks(chart, "rect", "left")
    assert [float(bar["height"]) for bar in before] == pytest.approx([122, 61])
    assert [float(bar["height"]) for bar in after] == pytest.approx([122, 30.5, 0])
    assert len(marks(chart, "rect", "gone whole")) == 1, "what went as a whole looks otherwise"
    feet = {float(bar["y"]) + float(bar["height"]) for bar in (*before, *after)}
    assert max(feet) - min(feet) < 0.11
    numbers = [found.text for found in ElementTree.fromstring(chart).iter("text")]
    assert numbers == ["80", "40", "0", "0", "1", "2"]
    assert "block &lt;1&gt;" in chart
    assert len(marks(bar_chart(COLUMNS, [8] * 40, [4] * 40), "text", "place")) == 14, "labels must not overlap"


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
    chart = box_chart(COLUMNS[:2], [values, values], [(), values])
    assert [found["class"] for found in marks(chart, "text", "number")] == ["number"] * len(ticks)
    assert [f.text for f in ElementTree.fromstring(chart).iter("text") if f.get("class") == "number"] == ticks
    assert len(marks(chart, "rect", "kept")) == 2 and len(marks(chart, "rect", "removed")) == 1
    for line in marks(chart, "line", "kept"):
        assert 7.9 <= float(line["y1"]) <= float(line["y2"]) <= 130.1


def test_an_outlier_does_not_flatten_the_boxes() -> None:
    chart = box_chart(COLUMNS[:1], [(1.0, 2.0, 3.0, 4.0, 1e6)], [()])
    (box,), (whisker,) = marks(chart, "rect", "kept"), marks(chart, "line", "kept")
    assert float(box["height"]) > 30 and float(whisker["y1"]) == 8


_VOID = {"meta", "link", "br", "img", "rect", "line"}


class Page(HTMLParser):
    """The text, the attributes and the unclosed elements of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.open, self.attributes, self.tags = "", list[str](), list[tuple[str, str]](), list[str]()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:  # elements inside that need no end tag end with it
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        self.text += data


def numbers_in(data: Any) -> Iterator[int | float]:
    if isinstance(data, dict | list):
        for value in data.values() if isinstance(data, dict) else data:
            yield from numbers_in(value)
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield data


@pytest.fixture(scope="module")
def result() -> fxprune.Result:
    """A model that loses channels, heads and a layer."""
    kinds = ("mlp", "head", "layer")
    return fxprune.prune(tiny("llama"), token_ids(2, 8), ratio={"mlp": 0.3, "head": 0.3, "layer": 0.4}, kinds=kinds,
                         importance="l2", protect=())  # fmt: skip


def test_a_page_holds_every_number_and_asks_for_nothing(result: fxprune.Result) -> None:
    text = result.to_html()
    found = Page(text)
    assert found.open == [] and "svg" in found.tags and "script" not in found.tags
    assert not [value for name, value in found.attributes if name in ("src", "href", "xlink:href", "action")]
    assert not re.search(r"https?:|url\(|@import", text)
    data = json.loads(result.report.to_json())
    words = set(re.findall(r"[-+.\w]+", found.text.replace(",", "")))
    missing = {number for number in numbers_in(data) if json.dumps(number) not in words}
    assert not missing
    assert len(text) < 300_000


def test_the_main_numbers_are_on_the_page(result: fxprune.Result) -> None:
    report = result.report
    text = re.sub(r"\s+", " ", Page(report.to_html()).text)
    for size in report.headlines():
        assert f"{size.name}{100 * (size.left - 1):+.1f}%{size.dense:,} → {size.slim:,}" in text
    for wanted in ("MLP channels by block", "Layers removed as a whole", "an output of the model", "Passes"):
        assert wanted in text
    assert "Scored by l2{" in text and "chosen by select-by-ratio{" in text
    assert f"at most {report.verification_error:.1e}" in text
    assert report.removed_blocks[0] in text


def test_kinds_list_the_kept_units_of_each_block(result: fxprune.Result) -> None:
    found = {kind.name: kind for kind in result.report.kinds()}
    mlp = found["mlp"]
    assert (mlp.groups, mlp.before, mlp.units) == (3, 3 * 88, "MLP channels")
    assert mlp.after == sum(group.after for group in result.report.groups if group.kind == "mlp")
    assert mlp.chart.count("<title>") == mlp.scores.count("<title>") == 3
    assert found["layer"].after == 3 - len(result.report.removed_blocks)
    assert found["head.2"].units == "query heads of each key/value head"
    assert found["channel"].shrunk == 0 and not found["channel"].chart


def test_equal_neighbours_are_listed_once_and_names_are_folded() -> None:
    groups = tuple(GroupSize(f"b.{i}/mlp", "mlp", f"b.{i}", f"b.{i}/mlp", 8, 8 if i == 0 else 5) for i in range(4))
    report = Report(
        parameters=(10, 5),
        macs=(10, 5),
        tokens=1,
        groups=groups,
        frozen={f"b.{i}.w[0]": f"no rule (at add_{i})" for i in range(4)},
        renormalised={f"b.{i}/mlp": (f"mean_{i}",) for i in range(1, 4)},
        kept_norms=("b.1.norm", "b.2.norm"),
        notes=("<script>alert(1)</script>",),
    )
    text = Page(report.to_html()).text
    assert "0: 8; 1 to 3: 8 → 5" in text
    assert "no rule: b.*.w[0] (4)" in text and "a statistic runs over it: mean: b.*/mlp (3)" in text
    assert "b.*.norm (2)" in text and "<script>" not in report.to_html()
    assert "was not compared with the masked dense one" in text and "<h2>Scores" not in report.to_html()


def test_a_plain_module_has_a_page_too() -> None:
    net = Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(10, 12), b=nn.Linear(12, 5))
    result = fxprune.prune(net, importance="l2", example_inputs={"x": torch.randn(2, 10)}, protect=())
    text = Page(result.to_html()).text
    assert "Net" in text and "the model passed is not a Hugging Face model" in text and "KV-cache" not in text


def test_quality_and_a_picture_are_shown_if_given() -> None:
    plain = Report(parameters=(10, 5), macs=(10, 5), tokens=1, scores={"a": Spread((1.0,) * 5)})
    assert "Quality and speed" not in plain.to_html() and "A layer of the slim model" not in plain.to_html()
    rows = (("", "dense", "slim"), ("perplexity, text", "10.00", "11.00"))
    full = Report(parameters=(10, 5), macs=(10, 5), tokens=1, measured=rows, picture="<svg><g/></svg>")
    assert "perplexity, text" in full.to_html() and "<svg><g/></svg>" in full.to_html()
    assert "picture" not in full.to_dict()


@pytest.mark.browser
def test_a_browser_draws_the_page(result: fxprune.Result, tmp_path: Path, browser: str) -> None:
    """A screenshot with the colours of the charts, in light and in dark."""
    from PIL import Image

    result.write_report(tmp_path / "report.html")
    grounds = []
    for scheme in (1, 0):
        picture = tmp_path / f"{scheme}.png"
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        options += ["--window-size=1100,1800", f"--blink-settings=preferredColorScheme={scheme}"]
        command = [browser, *options, f"--screenshot={picture}", (tmp_path / "report.html").as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        image = Image.open(picture).convert("RGB")
        colours = {colour for _, colour in image.getcolors(1 << 24) or ()}
        assert {(0x2A, 0x6F, 0xDB), (0x6A, 0xA5, 0xFF)} & colours, "no bar of the MLP was drawn"
        grounds.append(image.getpixel((2, 2)))
    assert grounds == [(255, 255, 255), (0x14, 0x18, 0x1D)]


REPORT = Report(parameters=(200, 150), macs=(1000, 800), tokens=64, widths={"g": (4, 3)}, notes=("a note",))


def test_the_report_is_plain_data_and_a_table_of_dense_slim_and_change() -> None:
    assert REPORT.achieved == 0.25
    data = json.loads(REPORT.to_json())
    assert data["achieved"] == 0.25 and data["parameters"] == [200, 150] and data["notes"] == ["a note"]
    assert REPORT.to_dict()["widths"] == {"g": (4, 3)}
    names, *rows = (list(column.cells) for column in REPORT.table().columns)
    assert names == ["parameters", "MACs at 64 tokens"]
    assert rows == [["200", "1,000"], ["150", "800"], ["-25.0%", "-20.0%"]]


def test_a_report_is_read_back_from_its_data() -> None:
    again = Report.from_dict(json.loads(REPORT.to_json()))
    assert again == REPORT and again.to_json() == REPORT.to_json()
    groups, scores = (GroupSize("g", "mlp", None, "g", 4, 3),), {"g": Spread((1.0, 2.0), ())}
    used = SamplesUsed("text.txt", 48, 5, 960, (10, 30))
    full = replace(REPORT, groups=groups, scores=scores, passes=(("l2", "importance", 0.1),), calibration=used)
    again = Report.from_dict(json.loads(full.to_json()))
    assert str(used) == "text.txt: 48 samples, 5 of them written by the model, 960 tokens, 10 to 30 each"
    assert f"Calibrated on {used}." in full.to_html() and "Calibrated on" not in REPORT.to_html()
    assert again == full and again.passes == full.passes and again.to_html() == full.to_html()
    with pytest.raises(ArgumentError, match=r"Report\.to_dict"):
        Report.from_dict({"parameters": [1, 2]})


def test_every_group_has_its_size_and_scored_ones_how_scores_are_spread() -> None:
    net = Net(lambda net, x: net.b(net.a(x)), a=nn.Linear(3, 5), b=nn.Linear(5, 2))
    dense = discover(net, {"x": torch.randn(2, 3)})
    (group,) = groups_of(dense)
    assert group.factor is not None
    keep = Keep({group.factor: np.array([True, False, True, True, False])})
    (size,) = group_sizes((group,), keep, ())
    assert (size.name, size.kind, size.before, size.after, size.nested) == (group.name, "mlp", 5, 3, False)
    scores = Scores({group.name: np.array([3.0, 0.5, 1.0, 2.0, 0.25])}, "l2")
    found = score_spreads((group,), (size,), keep, scores)
    assert found == {size.place: Spread((1.0, 1.5, 2.0, 2.5, 3.0), (0.25, 0.3125, 0.375, 0.4375, 0.5))}
    assert score_spreads((group,), (size,), Keep(), scores)[size.place].removed == ()
    assert score_spreads((group,), (size,), keep, None) == {}
    assert "torch" in package_versions()
    assert group_widths((group,), Keep()) == {} and group_widths((group,), keep) == {group.name: (5, 3)}


def test_of_a_block_that_goes_no_unit_stays_and_many_alike_groups_share_a_place() -> None:
    groups = tuple(Group(f"b.0/mlp.{i}", "mlp", (), Factor(4, i), "b.0") for i in range(5))
    groups += (Group("b.0/layer", "layer", (), None, "b.0"), Group("m/channel", "channel", (), Factor(6, 9)))
    sizes = group_sizes(groups, Keep(), ("b.0",))
    assert [size.after for size in sizes] == [0] * 6 + [6]
    assert [size.place for size in sizes] == ["b.0/mlp"] * 5 + ["b.0/layer", "m/channel"]
    scores = Scores({group.name: np.ones(group.size) for group in groups})
    spreads = score_spreads(groups, sizes, Keep(), scores)
    assert spreads["b.0/mlp"] == Spread((), (1.0,) * 5) and spreads["m/channel"] == Spread((1.0,) * 5)
