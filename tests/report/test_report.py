"""The report as data and as a table."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fxprune.axes import Factor, Keep
from fxprune.discovery.groups import Group
from fxprune.errors import ArgumentError
from fxprune.removal.removal import Scores
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
from tests.oracle import Net, discover, groups_of

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
