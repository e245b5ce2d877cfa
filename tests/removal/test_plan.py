"""Scores, removals and plans."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import fx, nn

from fxprune.axes import Keep
from fxprune.discovery.groups import Group
from fxprune.errors import PlanError, UnknownNameError
from fxprune.graph.facts import Notes, facts_of
from fxprune.pipeline.registry import load_pass
from fxprune.removal.plan import Difference, Plan, differences, keep_of, plan_of
from fxprune.removal.removal import (
    REDUCTIONS,
    Removal,
    RescaledNumber,
    Scaling,
    Scores,
    kept_norm_modules,
    scaled_numbers,
    score_groups,
    unit_scores,
    unkept_norm_reasons,
)
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
    rows, alike = ({"h.0.up": {1: kept}} for kept in ([[0, 1], [1, 2]], [0, 1]))
    one, other = (Plan(kept, sizes={"h.0.up": {1: 4}}) for kept in (rows, alike))
    assert differences(one, other) == (Difference("h.0", ("up[1]",), 8, first=1, second=1, both=3),)
    with pytest.raises(PlanError, match="the plans keep different experts"):
        differences(one, replace(one, kept={"h.0.up": {1: [[0, 1]] * 3}}))


def root_mean_square(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    return w * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.0, 1e-6, 0.1, 3.0]), st.sampled_from([0.0, 1.0]))
def test_the_norm_over_fewer_units_is_the_one_over_all_with_zeros(k: int, gone: int, eps: float, offset: float) -> None:
    """`w sqrt(n / k) x / sqrt(mean over k + e n / k)` is `w x / sqrt(mean over n + e)`, with `1 + w` as well."""
    n = k + gone
    x, w = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).unbind()
    x = x.where(torch.arange(n) < k, torch.zeros(1, dtype=torch.float64))
    masked = root_mean_square(x, w + offset, eps)[:k]
    slim = Scaling((n / k) ** 0.5, offset).of(w[:k]) + offset
    torch.testing.assert_close(root_mean_square(x[:k], slim, eps * n / k), masked)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_in_half_precision_the_weight_before_scaling_is_recovered(offset: float) -> None:
    w, scaling = torch.randn(50).to(torch.bfloat16), Scaling(1.25**0.5, offset)
    assert scaling.of(w).dtype == torch.bfloat16 and scaling.rounded(w).dtype == torch.float32
    again = (scaling.rounded(w) + offset) * scaling.factor - offset
    torch.testing.assert_close(again, scaling.of(w).float(), atol=1e-6, rtol=1e-6)
    assert float((scaling.rounded(w) - w.float()).abs().max()) < 0.02


def normed(norm: str) -> Any:
    """Two norms in a row, one of which has no weight."""

    def body(n: Any, x: torch.Tensor) -> Any:
        h = n.inner(x)
        return n.outer(root_mean_square(h, n.w, 0.5)), n.other(root_mean_square(n.more(x), 1.0, 0.5))  # type: ignore[arg-type]

    linears = {"inner": (6, 12), "more": (6, 8)}
    parts: dict[str, Any] = {name: nn.Linear(*sizes, bias=False) for name, sizes in linears.items()}
    parts |= {"outer": nn.Linear(12, 5), "other": nn.Linear(8, 5), "w": nn.Parameter(torch.rand(12))}
    return discover(Net(body, **parts), {"x": torch.randn(3, 6)}, norm=norm)


def test_numbers_and_weights_of_a_removal_and_the_reason_why_a_norm_is_not_rescaled() -> None:
    graph = normed("masked")
    axes, groups = axes_of(graph), {group.size: group for group in groups_of(graph)}
    for size in (12, 8):
        assert bool(groups[size].renormalised) is (size == 8)
    keep = Keep({groups[12].factor: np.arange(12) < 9, groups[8].factor: np.arange(8) < 4})  # type: ignore[dict-item]
    (change,) = scaled_numbers(axes, keep).values()
    assert change == RescaledNumber(0.5, 0.5 * 12 / 9)
    ((name, scaling),) = Removal(axes, groups_of(graph), keep).scaled.items()
    assert name == "w" and scaling.offset == 0 and abs(scaling.factor - (12 / 9) ** 0.5) < 1e-12
    assert scaled_numbers(axes, Keep()) == Removal(axes, groups_of(graph), Keep()).scaled == {}
    assert len(kept_norm_modules(axes, keep)) == 1 and kept_norm_modules(axes, Keep()) == ()
    (line,) = unkept_norm_reasons(axes, groups[8].renormalised)
    assert "is taken over the kept units" in line and "before a weight has been multiplied" in line
    sliced = normed("sliced")
    assert unkept_norm_reasons(axes_of(sliced), [node for g in groups_of(sliced) for node in g.renormalised]) == ()


def test_kept_units_that_are_no_masks_are_refused(dense: fx.GraphModule) -> None:
    """A selection of the user's own ended in an AttributeError of numpy, or could leave no unit of a group."""
    axes, groups = axes_of(dense), groups_of(dense)
    (group,) = groups
    whole = np.ones(4, dtype=bool)
    for mask in (whole.tolist(), torch.ones(4).bool(), np.arange(2), whole.astype(int), whole[:-1], whole[None], None):
        with pytest.raises(PlanError, match=f"{group.name}: its kept units are .* an array of bools for each factor"):
            Removal(axes, groups, Keep({group.factor: mask}))  # type: ignore[dict-item]
    with pytest.raises(PlanError, match=f"{group.name}: 0 of 4 units stay. Keep at least 1"):
        Removal(axes, groups, Keep({group.factor: ~whole}))  # type: ignore[dict-item]
    with pytest.raises(PlanError, match=f"{group.name}: its kept units are"):
        Removal(axes, groups, Keep({group.name: whole}))  # type: ignore[dict-item]
    with pytest.raises(PlanError, match=r"removal: keep is \{\}"):
        Removal(axes, groups, {})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def group() -> Group:
    """Three units of two positions each, in two members."""

    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        hidden = net.a(x).view(2, 3, 2).mean(dim=-1, keepdim=True).expand(2, 3, 2)
        return net.b(hidden.reshape(2, 6))

    dense = discover(Net(body, a=nn.Linear(5, 6, bias=False), b=nn.Linear(6, 4)), {"x": torch.randn(2, 5)})
    (found,) = (group for group in groups_of(dense) if group.size == 3)
    return found


def positions(group: Group) -> dict[tuple[str, int], torch.Tensor]:
    """Positions of each member scored 1, 2, ..; those of the second ten times as much."""
    return {(m.name, m.axis): torch.arange(1.0, 7) * 10**i for i, m in enumerate(group.parameters)}


def test_positions_of_a_unit_are_added_up_and_members_reduced(group: Group) -> None:
    first, second = group.parameters
    assert (first.name, second.name) == ("a.weight", "b.weight")
    assert unit_scores(group, first, positions(group)).tolist() == [3, 7, 11]
    assert unit_scores(group, second, positions(group)).tolist() == [30, 70, 110]
    wanted = {"sum": 33, "prod": 90, "max": 30, "mean": 16.5, "first": 3, "last": 30}
    assert list(REDUCTIONS) == list(wanted)
    for reduction, unit in wanted.items():
        scores = score_groups([group], positions(group), reduction).units[group.name]
        assert scores.shape == (3,) and scores[0] == unit
    with pytest.raises(UnknownNameError, match="'mean'"):
        score_groups([group], positions(group), "means")


def test_scores_are_kept_bit_by_bit(group: Group, tmp_path: Path) -> None:
    scores = Scores({group.name: np.array([0.1, 1e-300, 7.0]), "other": np.ones((2, 3))}, "l2{reduction=max}")
    scores.save(tmp_path / "scores.safetensors")
    again = Scores.load(tmp_path / "scores.safetensors")
    assert again.source == "l2{reduction=max}" and set(again.units) == set(scores.units)
    assert all((again.units[name] == row).all() and row.dtype == np.float64 for name, row in scores.units.items())
    assert again == scores and again != Scores(scores.units, "l1") and again != Scores({}, again.source)
    assert again != Scores({**scores.units, "other": np.zeros((2, 3))}, again.source) and again != 3


def test_a_file_that_holds_no_scores_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({"w": torch.ones(2)}, file)
    with pytest.raises(PlanError, match="no scores of version 1"):
        Scores.load(file)


@pytest.mark.parametrize("row", [np.ones(4), np.ones((1, 3)), np.array([1, np.nan, 2])])
def test_scores_of_another_model_are_refused(group: Group, row: np.ndarray) -> None:
    Scores({group.name: np.ones(3)}).check([group])
    with pytest.raises(PlanError, match=f"{group.name}: its (units|scores) .*Use scores of this model"):
        Scores({group.name: row}).check([group])
    with pytest.raises(PlanError, match="stranger: no such group"):
        Scores({"stranger": np.ones(3)}).check([group])
