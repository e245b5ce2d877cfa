"""Selection by gates trained end to end on the masked graph."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from fxprune.passes.select import SelectByRatioPass
from fxprune.passes.select.gates import Gates, project
from torch import fx

from fxprune.errors import ArgumentError, PassError
from fxprune.graph.facts import Notes, facts_of
from fxprune.masking.masked_run import GatedRun
from fxprune.masking.teacher import DivergenceJudge
from fxprune.pipeline.registry import load_pass
from fxprune.removal.removal import Removal, Scores
from tests.models import tiny, token_ids
from tests.oracle import discover

BOTH = ("mlp", "head")
FFN = 88


@pytest.fixture(scope="module")
def dense() -> fx.GraphModule:
    """A model half of whose channels do nothing, with scores that do not know which, and calibration data."""
    model = tiny("llama", num_hidden_layers=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::2] = 0
    graph = discover(model)
    load_pass("calibrate", data=token_ids(12, 11))(graph)
    load_pass("random", kinds=BOTH)(graph)
    return graph


def learned(dense: fx.GraphModule, **arguments: Any) -> tuple[Removal, list[str]]:
    facts_of(dense).put(Notes())
    load_pass("select-by-gates", protect=(), **arguments)(dense)
    return facts_of(dense)[Removal], list(facts_of(dense)[Notes].lines)


def test_the_mask_keeps_the_largest_that_the_budget_allows() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        numbers, costs = rng.normal(size=7), rng.choice([1.0, 3.0], size=7)
        forced = np.arange(7) == numbers.argmax()
        target = rng.uniform(0, costs.sum() * 0.6)
        kept = project(numbers, costs, target, forced)
        gone = np.flatnonzero(kept == 0)
        free = np.flatnonzero(~forced)
        prefixes = [free[np.argsort(numbers[free])][:n] for n in range(len(free) + 1)]
        best = min(abs(costs[prefix].sum() - target) for prefix in prefixes)
        assert kept[forced].all() and set(gone) in [set(prefix) for prefix in prefixes]
        assert abs(costs[gone].sum() - target) == pytest.approx(best)


def test_what_does_nothing_is_learned_to_go(dense: fx.GraphModule) -> None:
    load_pass("select-by-ratio", kinds="mlp", ratio=0.2, protect=())(dense)
    begun = facts_of(dense)[Removal]
    found, notes = learned(dense, kinds="mlp", ratio=0.2, epochs=30, rate=0.1, samples=4)
    assert idle_among(found) > 0.8 > 0.6 > idle_among(begun), "most of what goes are units that do nothing"
    assert "nats per token" in notes[0] and "; the initial selection was taken" not in notes[0]
    assert found.scores is not None and found.scores.source == "select-by-gates"
    assert facts_of(dense)[Scores] is begun.scores
    assert sum(gone_from(found).values()) == pytest.approx(sum(gone_from(begun).values()), abs=2)


def gone_from(removal: Removal) -> dict[str, int]:
    groups = [g for g in removal.groups if g.factor is not None and g.factor in removal.keep.units]
    return {g.name: int((~removal.keep.units[g.factor]).sum()) for g in groups if g.factor is not None}


def idle_among(removal: Removal) -> float:
    """Of the channels that go, the fraction that does nothing."""
    groups = [g for g in removal.groups if g.kind == "mlp" and g.factor in removal.keep.units]
    gone = np.concatenate([np.flatnonzero(~removal.keep.units[g.factor]) for g in groups if g.factor is not None])
    return float((gone % 2 == 0).mean())


def test_each_gate_gets_the_gradient_of_the_masked_loss(dense: fx.GraphModule) -> None:
    """One step of descent by hand, from gates on inputs of the last product in plain PyTorch."""
    selection = selection_of(dense, "mlp")
    begun = [slot.choose(0.5) for slot in selection.slots]
    gates = Gates(selection, begun, scales=True)
    mask = gates.mask()
    assert [int((1 - part).sum()) for part in mask.split(FFN)] == [44, 44]
    assert gates.choices() == begun
    spread = gates.by_consumer()
    assert [gate.detach().tolist() for gate in spread.values()] == [part.tolist() for part in mask.split(FFN)]
    weights = torch.randn(2 * FFN)
    (torch.cat(list(spread.values())) * weights).sum().backward()
    p = torch.sigmoid(gates.z.detach() / 1.5)
    torch.testing.assert_close(gates.z.grad, weights * p * (1 - p) / 1.5)
    torch.testing.assert_close(gates.scales.grad, weights * mask * 0.5)


def selection_of(dense: fx.GraphModule, *kinds: str) -> Any:
    """What a selection pass works on."""
    caught: list[Any] = []

    class Spy(SelectByRatioPass):
        def decide(self, selection: Any) -> Removal:
            caught.append(selection)
            return super().decide(selection)

    Spy(kinds=kinds, protect=())(dense)
    return caught[0]


def test_whole_heads_have_gates_rounding_holds_and_a_seed_gives_one_plan(dense: fx.GraphModule) -> None:
    arguments: dict[str, Any] = {"kinds": BOTH, "ratio": 0.3, "epochs": 2, "samples": 4, "round_to": {"mlp": 4}}
    found, again = (learned(dense, **arguments, seed=3)[0] for _ in range(2))
    kept = [found.keep.count(g.factor) for g in found.groups if g.kind == "mlp" and g.factor is not None]
    assert all(count % 4 == 0 and count for count in kept)
    assert found.plan == again.plan and all(p.grad is None for p in dense.parameters())


def test_where_learning_made_it_worse_the_beginning_is_taken(
    dense: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_pass("select-by-ratio", kinds="mlp", ratio=0.2, protect=())(dense)
    begun = facts_of(dense)[Removal]
    counter = itertools.count()
    monkeypatch.setattr(DivergenceJudge, "divergence", lambda self, removal: float(next(counter)))
    found, told = learned(dense, kinds="mlp", ratio=0.2, epochs=0.5, samples=4)
    assert found.plan == begun.plan and told[0].endswith("; the initial selection was taken")


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_products_of_a_step_are_in_the_precision_that_was_asked_for(
    dense: fx.GraphModule, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[torch.dtype] = set()
    run_node = GatedRun.run_node

    def watched(run: GatedRun, n: fx.Node) -> Any:
        found = run_node(run, n)
        if n in run.gates:
            seen.add(found.dtype)
            assert all(gate.dtype == torch.float32 for _, gate in run.gates[n])
        return found

    monkeypatch.setattr(GatedRun, "run_node", watched)
    found, _ = learned(dense, kinds="mlp", ratio=0.2, epochs=30, rate=0.1, samples=4, precision=precision)
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float32} and idle_among(found) > 0.8


def test_what_gates_cannot_do_is_refused(dense: fx.GraphModule) -> None:
    for arguments in ({"uniform": True}, {"kinds": "layer"}, {"ratio": {"mlp": 0.1}}):
        with pytest.raises(ArgumentError):
            load_pass("select-by-gates", **{"protect": (), **arguments})
    load_pass("random", kinds="head_dim")(dense)
    with pytest.raises(PassError, match="has no place for gates"):
        load_pass("select-by-gates", kinds="head_dim", ratio=0.05, protect=())(dense)
    load_pass("random", kinds=BOTH)(dense)
