"""Other budgets than parameters, and what lies between rankings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fxprune.passes.select.base import Option, Slot
from fxprune.passes.select.ratio import normalised
from torch import fx

from fxprune.axes import Keep
from fxprune.data.calibration import Calibration
from fxprune.graph.counting import count_macs, count_parameters
from fxprune.graph.facts import Notes, facts_of
from fxprune.masking.compare import masked_outputs
from fxprune.masking.teacher import DivergenceJudge
from fxprune.pipeline.registry import load_pass
from fxprune.removal.budget import Budget, make_budget
from fxprune.removal.removal import Removal
from fxprune.removal.target import TOKENIZER
from tests.models import VOCABULARY, tiny, token_ids
from tests.oracle import axes_of, decide, discover, groups_of, slim_graph

BOTH = ("mlp", "head")
WIDTH, KV, LAYERS = 8, 3, 4


@pytest.fixture(scope="module")
def dense() -> fx.GraphModule:
    """A model of four layers, of which the second does next to nothing, with scores and calibration data."""
    model = tiny("llama", num_hidden_layers=LAYERS)
    with torch.no_grad():
        for name, parameter in model.model.layers[1].named_parameters():
            if "down" in name or "o_proj" in name:
                parameter.mul_(0.01)
    graph = discover(model)
    load_pass("calibrate", data=token_ids(9, 11))(graph)
    load_pass("random", kinds=BOTH)(graph)
    return graph


def left(dense: fx.GraphModule, budget: Budget, removal: Removal) -> float:
    """What is left after a removal."""
    counts = {factor: float(removal.keep.count(factor)) for factor in removal.keep.units}
    return budget.total - budget.removed(counts, dict.fromkeys(removal.removed_blocks, 1.0))


def test_budgets_count_what_the_slim_graph_has(dense: fx.GraphModule) -> None:
    load_pass("select-by-ratio", ratio=0.3, kinds=BOTH, protect=())(dense)
    removal = facts_of(dense)[Removal]
    removal = decide(dense, removal.keep, ("model.layers.3",))
    slim = slim_graph(dense, removal.keep, removal.removed_blocks)
    shapes = {name: tuple(p.shape) for name, p in slim.named_parameters()}
    work = make_budget("macs", dense, axes_of(dense))
    assert work.total == pytest.approx(count_macs(dense), rel=1e-6)
    assert left(dense, work, removal) == pytest.approx(count_macs(slim), rel=1e-6)
    assert left(dense, make_budget("params", dense, axes_of(dense)), removal) == count_parameters(slim)
    cache = make_budget("kv", dense, axes_of(dense))
    assert cache.total == LAYERS * KV * WIDTH * 2 * 2
    kept = [shape[0] for name, shape in shapes.items() if "k_proj" in name or "v_proj" in name]
    assert left(dense, cache, removal) == 2 * sum(kept)
    quantised = make_budget("bytes@q8_0", dense, axes_of(dense))
    sizes = {name: np.prod(shape) * (34 / 32 if len(shape) > 1 else 4) for name, shape in shapes.items()}
    tokenizer = TOKENIZER * VOCABULARY
    assert left(dense, quantised, removal) == pytest.approx(sum(sizes.values()) + tokenizer, abs=1)


def test_a_ratio_is_of_what_is_counted(dense: fx.GraphModule) -> None:
    for name, kinds in (("macs", BOTH), ("bytes@q4_0", BOTH), ("kv", ("head", "head_dim"))):
        load_pass("random", kinds=kinds)(dense)
        load_pass("select-by-ratio", ratio=0.3, kinds=kinds, protect=(), budget=name)(dense)
        budget = make_budget(name, dense, axes_of(dense))
        assert f"of {budget.total:,} {budget.word}" in " ".join(facts_of(dense)[Notes].lines)
        assert not facts_of(dense)[Removal].asked
        gone = 1 - left(dense, budget, facts_of(dense)[Removal]) / budget.total
        assert gone == pytest.approx(0.3, abs=0.03 if name == "kv" else 0.01)
    load_pass("random", kinds=BOTH)(dense)


def test_standardised_scores_are_compared_by_their_magnitude() -> None:
    slots = [Slot("mlp", (Option(2, 1, row),)) for row in (np.array([-1.0, 1.0]), np.array([-3.0, 3.0]))]
    np.testing.assert_allclose(normalised(slots), [[-0.5, 0.5], [-1.5, 1.5]])


def test_the_judge_measures_the_divergence_of_masked_runs(dense: fx.GraphModule) -> None:
    samples = facts_of(dense)[Calibration].samples
    removal = half_of(dense, "model.layers.0/mlp")
    found = DivergenceJudge(dense, samples, 4).divergence(removal)
    total = 0.0
    for sample in samples:
        with torch.no_grad():
            whole = dense(**sample.inputs).logits.log_softmax(-1)
        masked = masked_outputs(dense, removal, sample.inputs)[0].log_softmax(-1)
        total += float((whole.exp() * (whole - masked)).sum()) / whole.shape[1]
    assert 0 < found <= total / len(samples) * 1.001
    assert found == pytest.approx(total / len(samples), rel=0.35), "all but the likeliest classes are taken as one"
    assert DivergenceJudge(dense, samples, 4).divergence(decide(dense)) == pytest.approx(0, abs=1e-4)


def half_of(dense: fx.GraphModule, name: str) -> Removal:
    """A removal of half of the units of a group."""
    group = next(group for group in groups_of(dense) if group.name == name)
    assert group.factor is not None
    return decide(dense, Keep({group.factor: np.arange(group.size) % 2 == 0}))


def test_auto_is_half_way_between_the_rankings(dense: fx.GraphModule) -> None:
    def lost(ranking: str) -> np.ndarray:
        load_pass("select-by-ratio", ratio=0.3, kinds=BOTH, ranking=ranking, protect=())(dense)
        keep = facts_of(dense)[Removal].keep
        groups = [group for group in groups_of(dense) if group.factor is not None and group.kind in BOTH]
        return np.array([group.size - keep.count(group.factor) for group in groups])

    local, anywhere, between = lost("local"), lost("global"), lost("auto")
    assert (local != anywhere).any()
    np.testing.assert_allclose(between, (local + anywhere) / 2, atol=2)
    assert abs(int(between.sum()) - int(local.sum())) <= 2
