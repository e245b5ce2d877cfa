"""A report says in numbers what went, and why the rest had to stay."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from fxprune.axes import Keep
from fxprune.errors import ArgumentError
from fxprune.removal.report import Report, frozen_reasons, widths_of
from tests.oracle import Net, axes_of, discover, groups_of

REPORT = Report(parameters=(200, 150), macs=(1000, 800), tokens=64, widths={"g": (4, 3)}, notes=("a note",))


def test_the_report_is_plain_data() -> None:
    assert REPORT.achieved == 0.25
    data = json.loads(REPORT.to_json())
    assert data["achieved"] == 0.25 and data["parameters"] == [200, 150] and data["notes"] == ["a note"]
    assert REPORT.to_dict()["widths"] == {"g": (4, 3)}


def test_the_table_shows_dense_slim_and_change() -> None:
    columns = [list(column.cells) for column in REPORT.table().columns]
    assert columns == [
        ["parameters", "MACs at 64 tokens"],
        ["200", "1,000"],
        ["150", "800"],
        ["-25.0%", "-20.0%"],
    ]


def test_widths_are_of_groups_that_shrank_and_frozen_axes_have_their_reason() -> None:
    dense = discover(
        Net(lambda net, x: net.b(net.a(x)), a=nn.Linear(3, 4), b=nn.Linear(4, 2)), {"x": torch.randn(2, 3)}
    )
    (group,) = groups_of(dense)
    assert group.factor is not None
    assert widths_of((group,), Keep()) == {}
    units = np.array([True, False, True, True])
    assert widths_of((group,), Keep({group.factor: units})) == {group.name: (4, 3)}
    reasons = frozen_reasons(axes_of(dense))
    assert "input" in reasons["a.weight[1]"] and "output" in reasons["b.weight[0]"]
    assert "a.weight[0]" not in reasons


def test_a_report_is_read_back_from_its_data() -> None:
    again = Report.from_dict(json.loads(REPORT.to_json()))
    assert again == REPORT and again.to_json() == REPORT.to_json()
    with pytest.raises(ArgumentError, match=r"Report\.to_dict"):
        Report.from_dict({"parameters": [1, 2]})
