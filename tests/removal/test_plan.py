"""The plan as data, and the difference of two plans."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

from fxprune.axes import Keep
from fxprune.errors import PlanError
from fxprune.graph.facts import Notes, facts_of
from fxprune.pipeline.registry import load_pass
from fxprune.removal.plan import Difference, Plan, differences, keep_of, plan_of
from tests.oracle import Net, axes_of, discover, groups_of

X = {"x": torch.randn(2, 3)}


@pytest.fixture(scope="module")
def dense() -> fx.GraphModule:
    """Two linear maps with four units between them, which a constant numbers."""
    return discover(Net(lambda net, x: net.b(net.a(x) * torch.arange(4)), a=nn.Linear(3, 4), b=nn.Linear(4, 2)), X)


def without(dense: fx.GraphModule, *gone: int) -> Keep:
    """All units of the one group but some."""
    (group,) = groups_of(dense)
    assert group.factor is not None
    return Keep({group.factor: ~np.isin(np.arange(group.size), gone)})


def test_a_plan_survives_json_and_gives_its_units_back(dense: fx.GraphModule) -> None:
    keep = without(dense, 0, 3)
    plan = Plan.from_json(plan_of(axes_of(dense), keep).to_json())
    assert plan == plan_of(axes_of(dense), keep)
    with_tokens = replace(plan, vocabulary=(0, 2, 7))
    assert Plan.from_json(with_tokens.to_json()) == with_tokens and with_tokens.digest != plan.digest
    (units,) = keep_of(axes_of(dense), groups_of(dense), plan).units.values()
    assert units.tolist() == [False, True, True, False]


@pytest.mark.parametrize("vocabulary", [[3, 3], "all"])
def test_tokens_out_of_order_are_refused(vocabulary: Any) -> None:
    with pytest.raises(PlanError, match="not ids of tokens in order"):
        Plan.from_json(json.dumps({**json.loads(Plan().to_json()), "vocabulary": vocabulary}))


def test_a_plan_of_a_model_of_other_widths_or_of_too_few_units_is_refused(dense: fx.GraphModule) -> None:
    """Its indices may fit a larger one all the same."""
    plan = plan_of(axes_of(dense), without(dense, 0, 3))
    again = Plan.from_json(plan.to_json())
    assert again.sizes == plan.sizes and "a.weight" in plan.sizes
    sizes = {name: {axis: size - 1 for axis, size in axes.items()} for name, axes in plan.sizes.items()}
    with pytest.raises(PlanError, match="the plan is for 3 here, the model has 4"):
        keep_of(axes_of(dense), groups_of(dense), replace(plan, sizes=sizes))
    with pytest.raises(PlanError, match="not whole units"):
        keep_of(axes_of(dense), groups_of(dense), Plan({"a.weight": {1: [0]}}))
    (group,) = groups_of(dense)
    with pytest.raises(PlanError, match="2 units of 4 stay, and at least 3 must"):
        keep_of(axes_of(dense), (replace(group, least=3),), plan_of(axes_of(dense), without(dense, 0, 3)))


def stack(depth: int) -> fx.GraphModule:
    """Pairs of linear maps with four units between each two."""
    pairs = nn.ModuleList(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)) for _ in range(depth))
    return discover(Net(lambda net, x: [x := x + pair(x) for pair in net.pairs][-1], pairs=pairs), X)


def test_a_plan_of_a_model_of_fewer_layers_is_carried_out_with_a_note() -> None:
    """Its names and sizes fit, and the other layers stayed whole without a word."""
    small, large = stack(1), stack(2)
    plan = plan_of(axes_of(small), without(small, 1))
    assert plan.parameters == 3 * 4 + 4 + 4 * 3 + 3 == Plan.from_json(plan.to_json()).parameters
    assert plan.digest == replace(plan, parameters=None).digest, "plans of earlier releases have no number"
    carried_out = load_pass("plan-from-json", text=plan.to_json())
    line = (
        "the plan was made for a model of 31 parameters, and this one has 62: what the plan does not name stays whole"
    )
    for graph_module, lines in ((small, ()), (large, (line,))):
        carried_out(graph_module)
        assert (facts_of(graph_module).get(Notes) or Notes()).lines == lines
    with pytest.raises(PlanError, match="'many', not a whole number"):
        Plan.from_json(json.dumps({**json.loads(plan.to_json()), "parameters": "many"}))


def plan(**kept: list[int]) -> Plan:
    """A plan for axes of 6, the first of each parameter; two underscores stand for a dot."""
    named = {name.replace("__", "."): indices for name, indices in kept.items()}
    return Plan({name: {0: value} for name, value in named.items()}, sizes={name: {0: 6} for name in named})


def test_axes_that_lose_the_same_are_one_also_in_all_blocks() -> None:
    one = plan(h__0__up=[0, 1], h__0__gate=[0, 1], h__1__up=[0, 1])
    other = plan(h__0__up=[1, 2, 3], h__0__gate=[1, 2, 3])
    assert differences(one, other) == (
        Difference("h.0", ("up[0]", "gate[0]"), 6, first=2, second=1, both=2),
        Difference("h.1", ("up[0]",), 6, first=4, second=0, both=0),
    )
    found = differences(plan(embed=[0], h__0__norm=[0], h__1__norm=[0], h__1__up=[1]), Plan())
    assert [one.axes for one in found] == [("embed[0]", "h.0.norm[0]", "h.1.norm[0]"), ("up[0]",)]
    assert [one.block for one in found] == ["", "h.1"]
    assert differences(plan(a=[0, 2]), plan(a=[0, 2])) == () == differences(Plan(), Plan())
    with pytest.raises(PlanError, match="does not record the size"):
        differences(Plan({"a": {0: [1]}}), Plan())
