"""Selections to a target or in a budget."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from fxprune.passes.select.base import Option, Slot
from fxprune.passes.select.solver import normalised
from torch import fx

import fxprune
from fxprune.errors import ArgumentError, FxpruneError, RatioError
from fxprune.evaluation.speed import times_file
from fxprune.graph.counting import count_macs, count_parameters
from fxprune.graph.facts import Notes, facts_of, fork
from fxprune.pipeline.registry import load_pass
from fxprune.removal.budget import Budget, make_budget
from fxprune.removal.formats import TOKENIZER
from fxprune.removal.removal import Removal, Scores
from fxprune.report.report import Report
from tests.export.small import tokenizer
from tests.models import VOCABULARY, tiny, token_ids
from tests.oracle import axes_of, decide, discover, groups_of, slim_graph
from tests.remembered import grouped, pruned, traced

OPTIONS: dict[str, Any] = {"importance": "l2", "recipe": "llm-pruner", "protect": ()}
WIDE = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 8, "num_key_value_heads": 4}


def reached(**options: Any) -> tuple[Report, float]:
    """The report of a prune to a target, and how far it is from it, as a fraction of it."""
    report = pruned("llama", **OPTIONS, **options).report
    assert report.reached is not None
    return report, report.reached.slim / report.reached.asked - 1


def test_parameters_and_work_are_reached_and_told() -> None:
    report, off = reached(target="60K")
    assert abs(off) < 0.01 and report.reached is not None and report.reached.slim == report.parameters[1]
    assert Report.from_dict(json.loads(report.to_json())) == report
    assert "Target 60K: 71,664 to" in report.to_html()
    report, off = reached(target="0.8x macs")
    assert abs(off) < 0.01 and report.macs[1] == pytest.approx(0.8 * report.macs[0], rel=0.01)


def test_a_smaller_cache_takes_heads_of_keys_and_nothing_of_the_mlp() -> None:
    report, off = reached(target="0.667x kv")
    assert report.cache is not None and abs(off) < 0.01 and report.cache[1] == report.cache[0] * 2 / 3
    assert {name.rpartition("/")[2] for name in report.widths} == {"head"}


def test_memory_goes_from_where_it_is() -> None:
    """With a long context from the cache, and the query heads of a key/value head are no way to make it smaller."""
    report, off = reached(target="2600KB", context=10_000)
    assert abs(off) < 0.01 and report.cache is not None and report.cache[1] < report.cache[0]
    report, off = reached(target="0.8x bytes")
    assert abs(off) < 0.01 and report.memory is not None and report.reached is not None
    assert report.memory[1] == report.reached.slim


def test_the_tensors_of_a_file_take_the_bytes_that_are_told(tmp_path: Path) -> None:
    result, path = pruned("llama", changes=WIDE, target="0.75x bytes@q8_0", **OPTIONS), tmp_path / "slim.gguf"
    told = result.report.reached
    assert abs(told.slim / told.asked - 1) < 0.03, "units of 32 channels are large here"
    result.export(path, tokenizer=tokenizer(), quantization="q8_0", verify=False)
    held = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)
    assert told.slim == held + TOKENIZER * VOCABULARY


def test_a_ratio_of_a_file_leaves_rows_that_its_format_stores(tmp_path: Path) -> None:
    """Only a target did: a model pruned by the bytes of a format could not be written in it."""
    result = pruned("llama", changes=WIDE, ratio=0.25, budget="bytes@q8_0", **OPTIONS)
    result.export(tmp_path / "slim.gguf", tokenizer=tokenizer(), quantization="q8_0", verify=False)
    assert any(after < before and after % 32 == 0 for before, after in result.report.widths.values())


def test_speed_is_by_the_times_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    graph = grouped("llama")
    with pytest.raises(ArgumentError, match="bench MODEL --sweep"):
        pruned("llama", **OPTIONS, target="1.1x decode")
    count = count_parameters(graph)
    sizes = {"dense": (count, 4.0), "slim": (count // 2, 2.5)}  # a quarter of the time is fixed
    table = {name: {"parameters": n, "prefill_ms": ms, "decode_ms": ms} for name, (n, ms) in sizes.items()}
    place = times_file(count, next(graph.parameters()).device)
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps(table))
    report, off = reached(target="1.1x decode")
    assert abs(off) < 0.01
    assert report.parameters[1] / count == pytest.approx(1 - (1 - 1 / 1.1) / 0.75, abs=0.01)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "100M"}, "the dense model is no larger: it has 71,664 parameters"),
        ({"target": "1MB"}, "the dense model is no larger: it has 286,656 bytes"),
        ({"target": "1K"}, "embedding and output, which kinds mlp,head,conv leave whole, are 12,576 parameters"),
        ({"target": "1KB@q4_k_m"}, "embedding and output"),
        ({"ratio": 0.99}, "embedding and output"),
    ],
)
def test_what_embedding_and_output_rule_out_is_told_before_the_trace(
    options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ratio of 0.99 was refused after the trace at the earliest."""
    monkeypatch.setattr("fxprune.api.trace", lambda *_: pytest.fail("it was traced"))
    with pytest.raises(RatioError, match=said):
        fxprune.prune(tiny("llama"), importance="l2", **options)


def test_a_part_of_a_file_is_not_refused_before_its_size_is_known() -> None:
    """Any part of a file in a format was refused, as no smaller than the dense model."""
    for target in ("0.75x bytes@q8_0", "0.75x bytes", "0.75x params", "50KB@q4_k_m"):
        load_pass("select-by-ratio", target=target).foresee_model(tiny("llama"))
    with pytest.raises(RatioError, match="the dense model is no larger"):
        load_pass("select-by-ratio", target="900M").foresee_model(tiny("llama"))


def test_what_no_scores_can_change_is_told_before_any() -> None:
    for target, said in (
        ("18K", "at least .* parameters stay"),
        ("0.2x kv", "at least .* bytes of the key-value cache stay"),
        ("900KB@q8_0", "the dense model is no larger"),
    ):
        with pytest.raises(RatioError, match=said):
            fxprune.prune_pipeline(importance="l2", target=target)(traced("llama"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "60K", "ratio": 0.2}, "beside ratio"),
        ({"target": "60K", "budget": "macs"}, "beside budget"),
        ({"target": "60K", "context": 5}, "no amount of memory"),
        ({"context": 5}, "context is for a target of memory"),
        ({"target": "6GB", "context": 0}, "1 or more"),
        ({"target": "1.3x decode@nowhere.json"}, "no such file"),
    ],
)
def test_contradictions_are_refused_when_the_pipeline_is_made(options: dict[str, Any], said: str) -> None:
    with pytest.raises(FxpruneError, match=said):
        fxprune.prune_pipeline(importance="l2", **options)
    with pytest.raises(ArgumentError, match="a target states both"):
        load_pass("select-by-ratio", target="60K", ratio=0.3)


def test_options_and_recipes_take_the_place_of_each_other() -> None:
    recipe = "find-groups, l2, select-by-ratio{ratio=0.4, budget=macs}, shrink"
    assert "select-by-ratio{target='60K'}" in str(fxprune.prune_pipeline(recipe=recipe, target="60K"))
    recipe = "find-groups, l2, select-by-ratio{target='60K'}, shrink"
    assert "select-by-ratio{ratio=0.3}" in str(fxprune.prune_pipeline(recipe=recipe, ratio=0.3))
    other = fxprune.prune_pipeline(recipe=recipe, select="select-by-ratio{kinds=[head]}")
    assert "select-by-ratio{kinds=[head], target='60K'}" in str(other), "a selection in text inherits the target"


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


def test_budgets_count_what_the_slim_graph_has(dense: fx.GraphModule) -> None:
    load_pass("select-by-ratio", ratio=0.3, kinds=BOTH, protect=())(dense)
    removal = facts_of(dense)[Removal]
    removal = decide(dense, removal.keep, ("model.layers.3",))
    slim = slim_graph(dense, removal.keep, removal.removed_blocks)
    shapes = {name: tuple(p.shape) for name, p in slim.named_parameters()}
    work = make_budget("macs", dense, axes_of(dense))
    assert work.total == pytest.approx(count_macs(dense), rel=1e-6)
    assert work.left(removal) == pytest.approx(count_macs(slim), rel=1e-6)
    assert make_budget("params", dense, axes_of(dense)).left(removal) == count_parameters(slim)
    cache = make_budget("kv", dense, axes_of(dense))
    assert cache.total == LAYERS * KV * WIDTH * 2 * 2
    kept = [shape[0] for name, shape in shapes.items() if "k_proj" in name or "v_proj" in name]
    assert cache.left(removal) == 2 * sum(kept)
    quantised = make_budget("bytes@q8_0", dense, axes_of(dense))
    sizes = {name: np.prod(shape) * (34 / 32 if len(shape) > 1 else 4) for name, shape in shapes.items()}
    tokenizer = TOKENIZER * VOCABULARY
    assert Budget.left(quantised, removal) == pytest.approx(sum(sizes.values()) + tokenizer, abs=1)


def test_a_ratio_is_of_what_is_counted(dense: fx.GraphModule) -> None:
    for name, kinds in (("macs", BOTH), ("bytes@q4_0", BOTH), ("kv", ("head", "head_dim"))):
        load_pass("random", kinds=kinds)(dense)
        load_pass("select-by-ratio", ratio=0.3, kinds=kinds, protect=(), budget=name)(dense)
        budget = make_budget(name, dense, axes_of(dense))
        assert f"of {budget.total:,} {budget.word}" in " ".join(facts_of(dense)[Notes].lines)
        assert not facts_of(dense)[Removal].asked
        gone = 1 - Budget.left(budget, facts_of(dense)[Removal]) / budget.total
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
