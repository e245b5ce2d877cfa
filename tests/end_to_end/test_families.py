"""Every kind of unit of every family: removing it is masking it, checked against plain PyTorch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import fxprune
from fxprune.axes import Keep
from fxprune.discovery.dependency import axis_map
from fxprune.removal.plan import Plan, plan_of
from tests.models import FAMILIES, tiny, token_ids

KINDS_OF_ALL = {"mlp", "head", "head_dim", "channel", "layer"}
REMOVAL = [
    *("make-verification-inputs", "record-expected", "bypass-blocks", "slice-parameters", "rewrite-literals"),
    *("eliminate-dead-code", "verify-removal"),
]


def random_keep(group: fxprune.Group, seed: int) -> Keep:
    """Drop between one and half of the units of ``group``, separately in each outer unit where it may."""
    generator = np.random.default_rng(seed)
    gone = max(1, group.size // 3)
    rows = 1 if group.outer is None else group.outer.size
    table = np.ones((rows, group.size), dtype=bool)
    for row in table:
        row[generator.choice(group.size, gone, replace=False)] = False
    assert group.factor is not None
    if group.outer is None:
        return Keep({group.factor: table[0]})
    return Keep({group.factor: table}, {group.factor: group.outer})


def zeroed(model: torch.nn.Module, plan: Plan) -> torch.nn.Module:
    """A copy of ``model`` with every slice that the plan drops set to zero: masking, in plain PyTorch."""
    masked = copy.deepcopy(model)
    tensors = dict(masked.named_parameters(remove_duplicate=False)) | dict(masked.named_buffers())
    with torch.no_grad():
        for name, axes in plan.kept.items():
            for axis, kept in axes.items():
                gone = sorted(set(range(tensors[name].shape[axis])) - set(kept))
                tensors[name].index_fill_(axis, torch.tensor(gone), 0.0)
    return masked


def removed(dense: torch.fx.GraphModule, plan: Plan) -> torch.fx.GraphModule:
    """A graph without what a plan takes out of it, which is verified; the dense one stays as it is."""
    steps = [fxprune.load_pass("plan-from-json", text=plan.to_json()), *REMOVAL]
    return fxprune.Pipeline(steps)(dense).graph_module


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_groups_remove_exactly(family: str) -> None:
    """The first group goes as a user takes it out, the others by the passes that this runs."""
    model = tiny(family)
    traced = fxprune.trace(model)
    graph = fxprune.dependency_graph(traced)
    dense, ids = fxprune.Pipeline("find-groups")(traced.graph_module).graph_module, token_ids()
    exact = [g for g in fxprune.find_groups(graph) if g.factor is not None and not g.renormalised]
    # one block stands for the others, which are the same code
    first = [g for g in exact if g.block is None or ".0" in g.block]
    assert {"mlp", "head_dim"} <= {g.kind for g in first}
    for seed, group in enumerate(first):
        plan = plan_of(axis_map(graph), random_keep(group, seed))
        slim = removed(dense, plan) if seed else fxprune.apply(model, plan).graph_module
        with torch.no_grad():
            want, got = zeroed(model, plan)(ids).logits, slim(input_ids=ids).logits
        assert (want - got).abs().max() < 1e-4, group.name
        assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_kinds_found(family: str) -> None:
    graph = fxprune.dependency_graph(fxprune.trace(tiny(family), dynamic=False))
    kinds = {group.kind for group in fxprune.find_groups(graph)}
    assert kinds == KINDS_OF_ALL


def test_slopes_built_from_positions_stay_with_their_heads() -> None:
    """A model with fewer heads would make other slopes; those that stay are those of the heads that stay."""
    model, ids = tiny("bloom"), token_ids()
    graph = fxprune.dependency_graph(fxprune.trace(model))
    (heads,) = [group for group in fxprune.find_groups(graph) if group.kind == "head"]
    assert {member.name for member in heads.members if not member.trained} == {"constant_0"}
    assert heads.factor is not None
    plan = plan_of(axis_map(graph), Keep({heads.factor: np.array([False, True, True, False])}))
    assert "constant_0" not in plan.kept  # a name in this graph alone
    result = fxprune.apply(model, Plan.from_json(plan.to_json()))
    before = fxprune.trace(model).graph_module.get_buffer("constant_0").flatten()
    assert torch.equal(result.graph_module.get_buffer("constant_0").flatten(), before[1:3])
    with torch.no_grad():
        assert torch.allclose(result(input_ids=ids).logits, zeroed(model, plan)(ids).logits, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_emitted_model_agrees_and_generates(family: str) -> None:
    model = tiny(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = fxprune.prune(model, token_ids(4, 12), recipe="llm-pruner", protect=())
    assert type(result.model) is type(model), result.report.model_reasons
    assert result.report.verification_error is not None and result.report.verification_error < 1e-5
    ids = token_ids(2, 11, seed=5)
    with torch.no_grad():
        assert torch.allclose(result.model(ids).logits, result(input_ids=ids).logits, atol=1e-4)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = result.model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, result.model.generate(ids, use_cache=False, **options))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["channel", "layer"])
def test_width_and_depth(family: str, kind: str) -> None:
    model = tiny(family)
    result = fxprune.prune(model, None, importance="l2", group_ratio=0.34, kinds=(kind,), protect=())
    dense, slim = result.report.parameters
    assert slim < dense
    assert result.report.verification_error is not None and result.report.verification_error < 1e-5
    assert result(input_ids=token_ids(3, 5)).logits.shape == (3, 5, 131)
    assert result.model is not None, result.report.model_reasons
