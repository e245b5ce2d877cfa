"""Mixtures of experts: whole experts are removed with their rows of the router, and channels inside all experts.

A removed expert is one that is never chosen: by hand, the bias of the router for it is practically minus infinity.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fxprune.passes.select.base import Rounding, make_slots
from torch import fx, nn
from transformers import AutoModelForCausalLM

from fxprune import prune
from fxprune.axes import Keep
from fxprune.discovery.explain import frozen_axes
from fxprune.discovery.groups import Group
from fxprune.errors import PlanError, RatioError
from fxprune.graph.facts import facts_of
from fxprune.masking.compare import TOLERANCE, compare, slim_outputs
from fxprune.pipeline.pipeline import Pipeline
from fxprune.pipeline.registry import load_pass
from fxprune.removal.plan import Plan, keep_of, plan_of
from fxprune.removal.removal import Scores
from fxprune.trace import trace
from tests.models import tiny, token_ids
from tests.oracle import (
    axes_of,
    check_removes_exactly,
    discover,
    graph_of,
    groups_of,
    masked_outputs,
    plain_outputs,
    removal_of,
    slim_graph,
    zeroed,
)
from tests.zoo import tiny_model
from tests.zoo import token_ids as zoo_ids

EXPERTS, WIDTH, HIDDEN, TOP = 6, 10, 7, 2
NEVER = -1e9

Route = Callable[["Mixture", torch.Tensor], torch.Tensor]


class Mixture(nn.Module):
    """A projection, a mixture of experts on a residual stream, and a projection."""

    def __init__(self, route: Route) -> None:
        super().__init__()
        self.route = route
        self.first, self.last = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 4)
        self.router = nn.Linear(WIDTH, EXPERTS)
        nn.init.normal_(self.router.weight)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) * 0.4)
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) * 0.4)
        self.register_buffer("correction", torch.rand(EXPERTS) * 0.3)

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.first(x)
        out = self.route(self, hidden)
        return (self.last(hidden + out[0]), *out[1:]) if isinstance(out, tuple) else self.last(hidden + out)


def run_experts(m: Mixture, x: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Each token through its chosen experts: weights are looked up, then multiplied in a batch."""
    each = chosen.reshape(-1)
    rows = x.repeat_interleave(chosen.shape[-1], 0)
    hidden = torch.bmm(m.up[each], rows.unsqueeze(-1)).squeeze(-1) + m.up_bias[each]
    out = torch.bmm(F.silu(hidden).unsqueeze(1), m.down[each].mT).squeeze(1)
    return (out * gates.reshape(-1, 1)).view(x.shape[0], chosen.shape[-1], -1).sum(1)


def looked_up(m: Mixture, x: torch.Tensor) -> torch.Tensor:
    gates, chosen = m.router(x).softmax(-1).topk(TOP, -1)
    return run_experts(m, x, chosen, gates / gates.sum(-1, keepdim=True))


def corrected(m: Mixture, x: torch.Tensor) -> torch.Tensor:
    scores = m.router(x).sigmoid()
    chosen = (scores + m.correction).topk(TOP, -1, sorted=False)[1]
    gates = scores.gather(1, chosen)
    return run_experts(m, x, chosen, gates / (gates.sum(-1, keepdim=True) + 1e-20))


def in_groups(m: Mixture, x: torch.Tensor) -> torch.Tensor:
    scores = m.router(x).softmax(-1)
    best = scores.view(-1, 2, EXPERTS // 2).topk(2, -1)[0].sum(-1).topk(1, -1)[1]
    allowed = torch.zeros(x.shape[0], 2).scatter(1, best, 1.0).unsqueeze(-1).expand(-1, 2, EXPERTS // 2)
    chosen = scores.masked_fill(~allowed.reshape(-1, EXPERTS).bool(), -torch.inf).topk(TOP, -1)[1]
    return run_experts(m, x, chosen, scores.gather(1, chosen))


def selected(m: Mixture, x: torch.Tensor) -> torch.Tensor:
    chosen = m.router(x).argmax(-1)
    up, down = m.up.index_select(0, chosen), m.down.index_select(0, chosen)
    return torch.einsum("nwh,nh->nw", down, torch.einsum("nhw,nw->nh", up, x).relu())


def all_experts(m: Mixture, x: torch.Tensor) -> torch.Tensor:
    hidden = F.silu(torch.einsum("nw,ehw->enh", x, m.up))
    return torch.einsum("enh,ewh->enw", hidden, m.down)


def scattered(m: Mixture, x: torch.Tensor) -> torch.Tensor:
    gates, chosen = m.router(x).softmax(-1).topk(TOP, -1)
    mixed = torch.zeros(x.shape[0], EXPERTS).scatter(1, chosen, gates)
    return torch.einsum("ne,enw->nw", mixed, all_experts(m, x))


def one_hot(m: Mixture, x: torch.Tensor) -> torch.Tensor:
    gates, chosen = m.router(x).softmax(-1).max(-1)
    mask = F.one_hot(chosen, EXPERTS)
    place = mask.cumsum(0) * mask - 1
    slots = F.one_hot(place.clamp(0, 3), 4) * ((place >= 0) & (place < 4)).unsqueeze(-1)
    inside = torch.einsum("nes,nw->esw", slots.float(), x)
    out = torch.bmm(F.silu(torch.bmm(inside, m.up.mT)), m.down.mT)
    return torch.einsum("nes,esw->nw", slots * gates[:, None, None], out)


def sorted_slots(m: Mixture, x: torch.Tensor) -> torch.Tensor:
    gates, chosen = m.router(x).softmax(-1).topk(TOP, -1)
    each, order = chosen.reshape(-1).sort()
    counts = torch.histc(each.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
    slot = torch.arange(each.shape[0]) - (counts.cumsum(0) - counts).long()[each]
    inside = torch.zeros(EXPERTS, x.shape[0], x.shape[1]).index_put((each, slot), x[order // TOP])
    out = torch.bmm(F.silu(torch.bmm(inside, m.up.mT)), m.down.mT)[each, slot]
    return torch.zeros_like(x).index_add(0, order // TOP, out * gates.reshape(-1)[order].unsqueeze(-1))


def soft(m: Mixture, x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ne,enw->nw", m.router(x).softmax(-1), all_experts(m, x))


def counted(m: Mixture, x: torch.Tensor) -> torch.Tensor:
    gates, chosen = m.router(x).softmax(-1).topk(TOP, -1)
    same = (chosen.unsqueeze(-1) == chosen.t().flatten()).sum(-1)  # how often each expert was chosen, by any token
    return run_experts(m, x, chosen, gates / same)


ROUTES: dict[str, Route] = {
    route.__name__: route for route in (looked_up, corrected, selected, scattered, one_hot, sorted_slots, soft, counted)
}


def experts_of(dense: fx.GraphModule, size: int = EXPERTS) -> Group:
    (group,) = [group for group in groups_of(dense) if group.kind == "expert" and group.size == size]
    assert group.renormalised
    return group


def check_removes_experts(
    module: nn.Module, inputs: dict[str, torch.Tensor], *removals: list[int], size: int = EXPERTS
) -> fx.GraphModule:
    """Check that slim graph, masked dense graph, and the module that never chooses the removed experts agree."""
    dense = discover(module, inputs)
    before, group = plain_outputs(module, inputs), experts_of(dense, size)
    assert compare(before, slim_outputs(dense, inputs)) <= TOLERANCE, "the graph is not the module"
    assert group.factor is not None
    changes = []
    for gone in removals:
        keep = Keep({group.factor: np.isin(np.arange(size), gone, invert=True)})
        plan = plan_of(axes_of(dense), keep)
        assert plan_of(axes_of(dense), keep_of(axes_of(dense), groups_of(dense), plan)) == plan
        got = slim_outputs(slim_graph(dense, keep), inputs)
        assert compare(masked_outputs(dense, removal_of(dense, keep), inputs), got) <= TOLERANCE
        twin = zeroed(module, plan)
        twin.get_parameter("router.bias").data[sorted(set(range(EXPERTS)) - set(plan.kept["router.bias"][0]))] = NEVER
        assert compare(plain_outputs(twin, inputs), got) <= TOLERANCE
        changes.append(compare(before, got))
    assert max(changes) > TOLERANCE, "the removals changed nothing, so the comparison says nothing"
    return dense


def tokens() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(16, 5)}


@pytest.mark.parametrize("name", ROUTES)
def test_experts_go_as_if_they_were_never_chosen(name: str) -> None:
    torch.manual_seed(1)
    dense = check_removes_experts(Mixture(ROUTES[name]), tokens(), [4], [0, 2, 5])
    if name == "corrected":  # an expert takes its row of the router and its weights
        names = {"router.weight", "router.bias", "correction", "up", "up_bias", "down"}
        assert {(m.name, m.axis) for m in experts_of(dense).members} == {(name, 0) for name in names}


@pytest.mark.parametrize("name", ["looked_up", "scattered"])
def test_channels_inside_experts_and_of_the_residual_go(name: str) -> None:
    torch.manual_seed(1)
    dense = check_removes_exactly(Mixture(ROUTES[name]), tokens(), [WIDTH, HIDDEN])
    kinds = {group.size: group.kind for group in groups_of(dense)}
    assert kinds == {EXPERTS: "expert", HIDDEN: "mlp", WIDTH: "mlp"}  # without blocks, nothing lies in several


def test_experts_in_groups_go_from_every_group_at_once_or_with_their_group_but_not_both() -> None:
    torch.manual_seed(0)
    dense = check_removes_experts(Mixture(in_groups), tokens(), [1], size=3)
    check_removes_experts(Mixture(in_groups), tokens(), [0], size=2)
    assert (experts_of(dense, 3).least, experts_of(dense, 2).least) == (2, 1)
    Pipeline([load_pass("l2", kinds=("expert",))])(dense)
    (slot,) = make_slots(groups_of(dense), facts_of(dense)[Scores], ("expert",), frozenset(), Rounding(8))
    assert [(option.size, option.most) for option in slot.options] == [(3, 1), (2, 1)]


def test_as_many_experts_stay_as_are_chosen() -> None:
    assert experts_of(discover(Mixture(top_of(1)), tokens())).least == 1
    dense = discover(Mixture(top_of(3)), tokens())
    assert experts_of(dense).least == 3
    with pytest.raises(PlanError, match="2 units of 6 stay, and at least 3 must"):
        keep_of(axes_of(dense), groups_of(dense), Plan({"router.weight": {0: [0, 1]}}))
    assert frozen_reason(Mixture(top_of(EXPERTS))) == "all 6 units are needed"


def top_of(count: int) -> Route:
    def route(m: Mixture, x: torch.Tensor) -> torch.Tensor:
        gates, chosen = m.router(x).softmax(-1).topk(count, -1)
        return run_experts(m, x, chosen, gates)

    return route


def test_experts_picked_one_at_a_time_stay_all_the_same() -> None:
    """The second is the best of the others, so two must stay."""

    def route(m: Mixture, x: torch.Tensor) -> torch.Tensor:
        scores = m.router(x)
        first = scores.argmax(-1, keepdim=True)
        second = scores.scatter(-1, first, -torch.inf).max(-1, keepdim=True)[1]
        chosen = torch.cat((first, second), -1)
        return run_experts(m, x, chosen, scores.gather(-1, chosen).sigmoid())

    torch.manual_seed(0)
    dense = check_removes_experts(Mixture(route), tokens(), [4], [0, 2, 3, 5])
    assert experts_of(dense).least == 2


def frozen_reason(module: nn.Module, name: str = "up[0]") -> str:
    """Why an axis of a mixture is frozen."""
    dense = discover(module, tokens())
    sizes = {group.size for group in groups_of(dense)}
    assert sizes == {WIDTH, HIDDEN}, "experts stay, widths go"
    return frozen_axes(graph_of(dense))[name].reason


def arithmetic(change: Callable[[torch.Tensor], torch.Tensor]) -> Route:
    """A route that changes the numbers of the chosen experts before they are looked up."""

    def route(m: Mixture, x: torch.Tensor) -> torch.Tensor:
        gates, chosen = m.router(x).softmax(-1).topk(TOP, -1)
        return run_experts(m, x, change(chosen), gates)

    return route


@pytest.mark.parametrize(
    ("change", "op"),
    [
        (lambda chosen: (chosen + 1) % EXPERTS, "aten.add.Tensor"),
        (lambda chosen: torch.where(chosen == 0, 1, chosen), "aten."),
        (lambda chosen: torch.stack((chosen[:, 0], torch.zeros_like(chosen[:, 1])), 1), "aten.stack.default"),
        (lambda chosen: (chosen.float() * 0.5).long(), "aten.mul.Tensor"),
    ],
)
def test_arithmetic_on_positions_keeps_all_experts(change: Callable[[torch.Tensor], torch.Tensor], op: str) -> None:
    reason = frozen_reason(Mixture(arithmetic(change)), "router.weight[0]")
    assert reason.startswith(op) and reason.endswith("computes with positions along this axis")


@pytest.mark.parametrize(
    "change",
    [
        lambda chosen: chosen.flip(-1),
        lambda chosen: chosen.t().contiguous().t().to(torch.int32).long().clone(),
        lambda chosen: torch.cat((chosen[:, 1:], chosen[:, :1]), -1),
        lambda chosen: torch.stack(chosen.unbind(-1), -1),
        lambda chosen: chosen.sort(-1)[0],
        lambda chosen: chosen.gather(-1, (chosen > chosen.flip(-1)).long()),
        lambda chosen: chosen[torch.arange(15, -1, -1)],
        lambda chosen: chosen.unsqueeze(0).expand(3, -1, -1)[2],
    ],
)
def test_moving_and_comparing_positions_does_not(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(2)
    check_removes_experts(Mixture(arithmetic(change)), tokens(), [1, 2])


def test_positions_that_are_returned_and_an_encoding_with_a_class_too_many_keep_all_experts() -> None:
    def returned(m: Mixture, x: torch.Tensor) -> Any:
        gates, chosen = m.router(x).softmax(-1).topk(TOP, -1)
        return run_experts(m, x, chosen, gates), chosen

    def route(m: Mixture, x: torch.Tensor) -> torch.Tensor:
        gates, chosen = m.router(x).softmax(-1).max(-1)
        mask = F.one_hot(chosen, EXPERTS + 1)[:, :EXPERTS] * gates.unsqueeze(-1)
        return torch.einsum("ne,enw->nw", mask, all_experts(m, x))

    assert frozen_reason(Mixture(returned)) == "positions along it are an output of the model"
    assert "units cannot be the same" in frozen_reason(Mixture(route))


def test_a_softmax_over_anything_else_keeps_its_units() -> None:
    module = nn.Sequential(nn.Linear(5, 12), nn.Softmax(-1), nn.Linear(12, 4))
    dense = discover(module, {"input": torch.randn(3, 5)})
    assert not [group for group in groups_of(dense) if group.size == 12]
    assert "runs over this axis" in frozen_axes(graph_of(dense))["0.weight[0]"].reason  # type: ignore[arg-type]


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss", "ernie4_5_moe"])
def test_each_expert_and_each_channel_of_a_released_architecture(model_type: str) -> None:
    """Routers with a correction and groups, with biases, and with a softmax beside a correction."""
    inputs = {"input_ids": zoo_ids()}
    dense = trace(tiny_model(model_type), dynamic=False, check=False).graph_module
    Pipeline(["find-groups"])(dense)
    chosen = [g for g in groups_of(dense) if g.factor is not None and g.kind in ("expert", "mlp")]
    assert {"expert", "mlp"} == {group.kind for group in chosen}
    assert {group.least for group in chosen if group.kind == "expert"} == {2}
    units = {g.factor: np.arange(g.size) != i % g.size for i, g in enumerate(chosen) if g.factor is not None}
    got = slim_outputs(slim_graph(dense, Keep(units)), inputs)
    assert compare(masked_outputs(dense, removal_of(dense, Keep(units)), inputs), got) <= TOLERANCE
    assert compare(slim_outputs(dense, inputs), got) > TOLERANCE


def test_experts_that_a_top_k_needs_are_out_of_reach_of_a_ratio() -> None:
    model = tiny("mixtral", num_hidden_layers=1)
    with pytest.raises(RatioError, match="the largest reachable ratio"):
        prune(model, ratio=0.7, kinds=("expert",), importance="l2", protect=())


def test_experts_of_odd_widths_run_and_load_without_grouped_kernels(tmp_path: Path) -> None:
    """Grouped kernels take rows of a multiple of 16 bytes; the checkpoint must disable them for others."""
    model = tiny("mixtral", num_hidden_layers=1)
    result = prune(model, select="select-by-group-ratio{group_ratio=0.3}", kinds=("mlp",), importance="l2", protect=())
    assert {kept % 4 for _, kept in result.report.widths.values()} == {2}
    assert result.model is not None, result.report.model_reasons
    result.save_pretrained(tmp_path / "slim")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    with torch.no_grad():
        assert torch.allclose(loaded(token_ids()).logits, result(input_ids=token_ids()).logits, atol=1e-4)
