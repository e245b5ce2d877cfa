"""Other budgets than parameters, and the ranking of the recipes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from fxprune.passes.select.base import Option, Slot
from fxprune.passes.select.ratio import normalised
from torch import fx

from fxprune.graph.counting import count_macs, count_parameters
from fxprune.graph.facts import Notes, facts_of, fork
from fxprune.pipeline.registry import load_pass
from fxprune.removal.budget import Budget, make_budget
from fxprune.removal.removal import Removal, Scores
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


def test_auto_is_the_global_ranking_of_scores_over_what_is_left(dense: fx.GraphModule) -> None:
    groups = [group for group in groups_of(dense) if group.kind == "mlp"]
    generator = np.random.default_rng(0)
    scores = {group.name: generator.exponential(3.0**-n, group.size) for n, group in enumerate(groups)}
    left = {name: 1 - row.argsort().argsort() / len(row) for name, row in scores.items()}

    def kept(ranking: str, units: Mapping[str, np.ndarray]) -> np.ndarray:
        work = fork(dense)
        facts_of(work).put(Scores(units, "given"))
        load_pass("select-by-ratio", ratio=0.1, kinds="mlp", ranking=ranking, protect=())(work)
        keep = facts_of(work)[Removal].keep
        return np.array([keep.count(group.factor) for group in groups if group.factor is not None])

    auto, anywhere = kept("auto", scores), kept("global", scores)
    np.testing.assert_allclose(auto, kept("global", {name: row / left[name] for name, row in scores.items()}), atol=1)
    assert abs(auto.sum() - anywhere.sum()) <= 1 and auto.min() > anywhere.min()
