"""Dependencies, groups and their explanation."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune.axes import Factor, Freeze, new_factor
from fxprune.discovery.dependency import dependency_graph, find_bypasses, resolve_experts
from fxprune.discovery.explain import explain, find_axis, find_group
from fxprune.discovery.groups import (
    DEFAULT_KINDS,
    as_kinds,
    bare_kind,
    consumers_of,
    find_consumers,
    find_groups,
    read_weight,
    units_at,
)
from fxprune.errors import ArgumentError, FxpruneError, UnknownNameError
from fxprune.graph.facts import facts_of
from fxprune.pipeline.registry import load_pass
from fxprune.removal.removal import Scores
from fxprune.rules.statements import AtLeast, Competition, Role, Statements
from fxprune.trace import trace
from tests.oracle import Net, axes_of, check_removes_exactly, discover, groups_of
from tests.random_networks import check_every_removal


def test_kinds_are_checked_and_one_may_stand_alone() -> None:
    assert as_kinds("kinds", "mlp") == ("mlp",) and as_kinds("kinds", ["head", "layer"]) == ("head", "layer")
    assert as_kinds("kinds", DEFAULT_KINDS) == DEFAULT_KINDS
    assert as_kinds("kinds", ["exact-mlp", "exact-layer"]) == ("exact-mlp", "layer")
    for kinds, words in (("exact-mpl", "Did you mean 'mlp'"), (("heads",), "Did you mean 'head'"), ((), "is empty")):
        with pytest.raises(FxpruneError, match=words):
            as_kinds("kinds", kinds)
    assert bare_kind("exact-mlp") == bare_kind("mlp") == "mlp" and bare_kind(None) is None


def test_products_with_parameters_are_found() -> None:
    again = torch.nn.functional.linear
    net = Net(lambda m, x: again(m.b(m.a(x).relu()), m.a.weight.T), a=nn.Linear(3, 4), b=nn.Linear(4, 4))
    dense = discover(net, {"x": torch.randn(2, 3)})
    found = find_consumers(dense.graph, axes_of(dense))
    assert [(c.name, c.axis, c.source.name, c.dim) for c in found] == [
        ("a.weight", 1, "x", 1),
        ("b.weight", 1, "relu", 1),
        ("a.weight", 0, "linear_1", 1),
    ]
    assert [read_weight(node) for node in found[2].node.all_input_nodes] == [None, "a.weight"]
    net = Net(lambda m, x: m.c(m.b(m.a(x).relu())), a=nn.Linear(3, 4), b=nn.Linear(4, 5), c=nn.Linear(5, 2))
    dense = discover(net, {"x": torch.randn(2, 3)})
    found = find_consumers(dense.graph, axes_of(dense))
    names = {group.size: [c.name for c in consumers_of(group, found)] for group in groups_of(dense)}
    assert names == {4: ["b.weight"], 5: ["c.weight"]}, "consumers of a group contract its units"
    net = Net(lambda m, x: m.b(m.a(x)), a=nn.Conv1d(4, 6, 3), b=nn.Conv1d(6, 6, 3, groups=3))
    dense = discover(net, {"x": torch.randn(1, 4, 9)})
    assert [(c.name, c.axis, c.dim) for c in find_consumers(dense.graph, axes_of(dense))] == [("a.weight", 1, 1)]


def test_rows_that_tokens_look_up_are_what_a_product_reads() -> None:
    """They counted as a weight, so a layer that reads an embedding as it is had no inputs to be scored by."""

    def body(m: Net, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(m.a(m.table(x)).relu(), m.pair[0] @ m.pair[1])

    parts = {"table": nn.Embedding(9, 3), "a": nn.Linear(3, 4), "pair": nn.Parameter(torch.randn(2, 4, 4))}
    dense = discover(Net(body, **parts), {"x": torch.zeros(2, 5, dtype=torch.long)})
    found = find_consumers(dense.graph, axes_of(dense))
    assert [(c.name, c.axis, c.source.name, c.dim) for c in found] == [("a.weight", 1, "embedding", 2)]
    width = next(group for group in groups_of(dense) if group.size == 3)
    load_pass("calibrate", data=torch.tensor([[1, 2, 2, 5]]))(dense)
    load_pass("wanda", kinds=(width.kind,), readers_only=True)(dense)
    table, weight = parts["table"].weight.detach(), parts["a"].weight.detach()
    rms = table[[1, 2, 2, 5]].square().mean(0).sqrt()
    expected = (weight.abs().sum(0) * rms).double().numpy()
    np.testing.assert_allclose(facts_of(dense)[Scores].units[width.name], expected, rtol=1e-5)


def test_units_inside_outer_ones_count_through() -> None:
    def body(m: Net, x: torch.Tensor) -> torch.Tensor:
        q, k = m.q(x).view(5, 2, 3, 4), m.k(x).view(5, 2, 4)
        scores = torch.einsum("tghd,sgd->ghts", q, k).softmax(-1)
        return m.o(torch.einsum("ghts,sgd->tghd", scores, k).reshape(5, 24))  # type: ignore[no-any-return]

    net = Net(body, q=nn.Linear(6, 24), k=nn.Linear(6, 8), o=nn.Linear(24, 6))
    dense = discover(net, {"x": torch.randn(5, 6)})
    (inner,) = (g for g in groups_of(dense) if g.outer is not None and g.size == 3)
    found = find_consumers(dense.graph, axes_of(dense))
    (consumer,) = consumers_of(inner, found)
    assert consumer.name == "o.weight"
    assert units_at(inner, consumer, axes_of(dense)).tolist() == [unit for unit in range(6) for _ in range(4)]


Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
rand = torch.rand


def _picked(m: Net, x: torch.Tensor, *, other: bool = False, met: bool = False, between: Any = None) -> torch.Tensor:
    """Experts picked by a router; the second matrices perhaps by other numbers, or of rows that met in between."""
    chosen = m.router(x).topk(2, dim=-1).indices.reshape(-1)
    hidden = torch.bmm(m.up[chosen], x.repeat_interleave(2, dim=0)[..., None]).relu()
    hidden = hidden if between is None else between(hidden)
    if met:
        hidden = hidden.view(-1, 2, 12, 1).sum(1).repeat_interleave(2, dim=0)
    second = m.router(-x).topk(2, dim=-1).indices.reshape(-1) if other else chosen
    return torch.bmm(m.down[second], hidden).view(-1, 2, 6).sum(1)


def _by_token(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Experts picked by numbers of two axes, of tokens and of picks."""
    chosen = m.router(x).topk(2, dim=-1).indices
    hidden = torch.einsum("tkfh,th->tkf", m.up[chosen], x).relu()
    return torch.einsum("tkhf,tkf->tkh", m.down[chosen], hidden).sum(1)


def _side_by_side(m: Net, x: torch.Tensor) -> torch.Tensor:
    shares = m.router(x).softmax(-1)
    return torch.einsum("ehf,etf,te->th", m.down, torch.einsum("efh,th->etf", m.up, x).relu(), shares)


def _read_by_all(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Rows of a table, looked up and multiplied with all of its rows, as tied embeddings are."""
    chosen = m.router(x).topk(2, dim=-1).indices
    table = m.up[..., 0]
    return torch.nn.functional.linear(table[chosen].relu(), table) @ m.down.sum(1)[:, :6]  # type: ignore[no-any-return]


STACKS: dict[str, tuple[Callable[[Net, torch.Tensor], torch.Tensor], bool]] = {
    "picked": (_picked, True),
    "by-token": (_by_token, True),
    "side-by-side": (_side_by_side, False),  # a softmax freezes their axis
    "summed-over-rows": (partial(_picked, between=lambda h: h.cumsum(0)), False),
    "turned": (partial(_picked, between=lambda h: h.flip(0)), False),
    "compared": (partial(_picked, between=lambda h: ((h[..., 0] @ h[..., 0].mT).relu() @ h[..., 0])[..., None]), False),
    "moved": (partial(_picked, between=lambda h: h.mT.tanh().double().movedim(1, 0)[0][..., None].float()), True),
    "picked-otherwise": (partial(_picked, other=True), False),
    "that-meet": (partial(_picked, met=True), False),
    "that-read-all": (_read_by_all, False),
}


@pytest.mark.parametrize("name", STACKS)
def test_each_expert_of_a_stack_has_units_of_its_own_unless_they_meet_those_of_another(name: str) -> None:
    body, apart = STACKS[name]
    model = Net(body, router=nn.Linear(6, 4), up=nn.Parameter(rand(4, 12, 6)), down=nn.Parameter(rand(4, 6, 12)))
    dense = check_every_removal(model, {"x": torch.randn(5, 6)})
    (group,) = (group for group in groups_of(dense) if group.size == 12)
    assert (group.shape, group.is_stacked) == (((4, 12), True) if apart else ((12,), False))
    assert group.tied().shape == (12,) and not group.tied().is_stacked


# name: output of a block from its input and its branch, and whether it can be bypassed
STEPS: dict[str, tuple[Step, bool]] = {
    "sum": (lambda x, y: x + y, True),
    "sums-of-sums": (lambda x, y: (x + y) + y.cos(), True),
    "in-place": (lambda x, y: y.add_(x), True),
    "no-sum": (lambda x, y: y, False),
    "scaled": (lambda x, y: torch.add(y, x, alpha=2), False),
    "product": (lambda x, y: x * y, False),
    "twice-the-input": (lambda x, y: x + y + x, False),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_block_that_only_adds_can_be_bypassed(name: str) -> None:
    step, residual = STEPS[name]
    blocks = nn.Sequential(*(Net(lambda m, x: step(x, m.inner(x).relu()), inner=nn.Linear(6, 6)) for _ in range(2)))
    ends = {"first": nn.Linear(5, 6), "last": nn.Linear(6, 3)}
    model = Net(lambda m, x: m.last(m.blocks(m.first(x))), blocks=blocks, **ends).eval()
    graph = fxprune.trace(model, {"x": torch.randn(2, 5)}).graph_module.graph
    found = find_bypasses(graph, ("blocks.0", "blocks.1"))
    assert sorted(found) == (["blocks.0", "blocks.1"] if residual else [])
    if residual:
        assert found["blocks.0"].source == "linear"
        assert found["blocks.0"].target == found["blocks.1"].source


def stated_over(*roles: Role) -> tuple[Statements, Factor]:
    """A factor of six with roles, over which a softmax runs."""
    stated, factor = Statements(), new_factor(6)
    assert isinstance(factor, Factor)
    for role in roles:
        stated.solver.tag(factor, role)
    stated.competitions.append(Competition(factor, Freeze("a softmax runs over this axis", "softmax")))
    return stated, factor


def test_as_many_units_stay_as_are_picked() -> None:
    stated, factor = stated_over(Role.EXPERT)
    stated.at_least.append(AtLeast(factor, 4))
    assert resolve_experts(stated) == {factor: 4}
    stated, factor = stated_over(Role.EXPERT)
    stated.at_least.append(AtLeast(factor, 6))
    resolve_experts(stated)
    assert "all 6 units are needed" in stated.solver.frozen_factors()[factor].reason


def test_the_axes_of_data_that_no_parameter_produces_are_no_units() -> None:
    """Swin v2 lost one of two coordinates, exactly; a table that weights give units to loses its own with them."""
    coordinates = Net(lambda m, x: x * m.b(m.a(m.at).relu()).T, a=nn.Linear(2, 12), b=nn.Linear(12, 3), at=rand(5, 2))
    check_removes_exactly(coordinates, {"x": rand(3, 5)}, [12])
    scaled = Net(lambda m, x: m.b(m.a(x) * m.by), a=nn.Linear(5, 8), b=nn.Linear(8, 3), by=rand(8))
    check_removes_exactly(scaled, {"x": rand(2, 5)}, [8])


def test_a_parameter_whose_values_are_not_read_keeps_its_units() -> None:
    """That of a tower that sees no image lost the class token of each later image."""
    parts = {"kind": nn.Parameter(rand(7)), "first": nn.Linear(5, 6), "last": nn.Linear(6, 3)}
    typed = Net(lambda m, x: m.last(m.first(x).float().relu().to(m.kind.dtype)), **parts)
    dense = discover(typed, {"x": rand(2, 5)})
    found = {member.name for group in groups_of(dense) for member in group.members}
    assert found == {"first.weight", "first.bias", "last.weight"}


def test_standardised_weights_are_under_a_statistic() -> None:
    """BiT's convolutions normalise their weights by a batch norm of them: removal was taken for exact."""

    def body(m: Net, x: torch.Tensor) -> torch.Tensor:
        weight = m.b.weight
        flat = nn.functional.batch_norm(weight.reshape(1, 5, -1), None, None, training=True)
        return nn.functional.conv2d(m.a(x).relu(), flat.reshape_as(weight))

    net = Net(body, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 5, 2, bias=False))
    found = {group.size: bool(group.renormalised) for group in groups_of(discover(net, {"x": rand(2, 3, 4, 4)}))}
    assert found == {6: True}


def test_each_step_has_the_rule_of_its_op_also_in_pictures(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    graph = dependency_graph(trace(net, {"input": torch.randn(2, 7, 5)}))
    linear = "linear  input[b, s, i], weight[o, i], bias[o] -> out[b, s, o]  sums i"
    steps = [("linear", linear), ("relu", "relu  self[a, b, c] -> out[a, b, c]"), ("linear_1", linear)]
    assert [(step.node, step.rule) for step in explain(graph, ("2.weight", 1))] == steps
    assert graph.graph["axes"].rules == dict(steps)
    fxprune.write_dot(graph, tmp_path / "net.dot", everything=True)
    assert "relu  self[a, b, c] → out[a, b, c]" in (tmp_path / "net.dot").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def lookup() -> nx.Graph:
    layers = (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6)) for _ in range(2))
    net = nn.ModuleDict({"layers": nn.Sequential(*layers), "end": nn.Linear(6, 3, bias=False)})
    model = nn.Sequential()
    model.add_module("model", nn.Sequential(net["layers"]))
    model.add_module("end", net["end"])
    return dependency_graph(trace(model.eval(), {"input": torch.randn(2, 6)}))


@pytest.mark.parametrize(
    ("name", "dim", "found"),
    [
        ("model.0.1.2.weight", 1, ("model.0.1.2.weight", 1)),
        ("1.2.weight", 0, ("model.0.1.2.weight", 0)),
        ("1.2", 1, ("model.0.1.2.weight", 1)),
        ("1.2.bias", None, ("model.0.1.2.bias", 0)),
        ("1.2.weight[1]", None, ("model.0.1.2.weight", 1)),
        ("end[0]", 0, ("end.weight", 0)),
        ("relu", 1, ("relu", 1)),
    ],
)
def test_short_names_are_found(lookup: nx.Graph, name: str, dim: int | None, found: tuple[str, int]) -> None:
    assert find_axis(lookup, name, dim) == found


@pytest.mark.parametrize(
    ("name", "dim", "error", "says"),
    [
        ("end", None, ArgumentError, r"end\.weight: has 2 axes, 0 and 1\. Name one, as in end\[0\]"),
        ("end.weight", 2, ArgumentError, r"end\.weight: there is no axis 2: it has 2 axes, 0 and 1"),
        ("end.weight[-1]", None, ArgumentError, "there is no axis -1"),
        ("1.2.bias", 3, ArgumentError, "it has 1 axis, 0"),
        ("end[0]", 1, ArgumentError, "axis 0 and axis 1 are requested"),
        ("2.weight", 0, ArgumentError, r"ambiguous: it may be model\.0\.0\.2\.weight, model\.0\.1\.2\.weight"),
        ("0.*.2", 0, ArgumentError, "the name is ambiguous"),
        ("ned.weight", 0, UnknownNameError, r"Did you mean 'end\.weight'"),
        ("ed", 0, UnknownNameError, "Did you mean 'end'"),
        ("", 0, UnknownNameError, "unknown parameter or buffer"),
    ],
)
def test_a_wrong_axis_or_name_is_refused(
    lookup: nx.Graph, name: str, dim: int | None, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        find_axis(lookup, name, dim)


def test_explain_takes_short_names_and_groups_are_found_by_the_end_of_theirs(lookup: nx.Graph) -> None:
    assert explain(lookup, ("1.2", 1)) == explain(lookup, ("model.0.1.2.weight", 1)) != []
    groups = find_groups(lookup)
    names = [group.name for group in groups]
    assert find_group(groups, names[0]).name == names[0]
    with pytest.raises(UnknownNameError, match="Did you mean"):
        find_group(groups, names[0][:-1] + "x")


def test_the_kind_of_tokens_leads_to_what_removes_them() -> None:
    """It was an unknown kind, and missing among those listed."""
    for kinds in ("vocab", ["mlp", "vocab"], "exact-vocab"):
        with pytest.raises(ArgumentError, match=r"vocab has no groups.*fxprune.prune\(model, kinds='vocab', token"):
            fxprune.load_pass("l2", kinds=kinds)
    with pytest.raises(UnknownNameError, match=r"unknown kind 'vokab'. Did you mean 'vocab'\? Known: channel.*, vocab"):
        fxprune.load_pass("l2", kinds="vokab")
