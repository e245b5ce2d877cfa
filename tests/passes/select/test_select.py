"""Selection: the ratio asked for is the ratio that goes, from where it should, and in the order of the scores."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fxprune.passes.select.base import Option, Rounding, make_slots, protected_blocks
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from torch.fx import Interpreter

import fxprune
from fxprune.axes import Factor, product
from fxprune.data.calibration import Calibration, Sample
from fxprune.discovery.groups import Group, Member
from fxprune.errors import (
    ArgumentError,
    CalibrationError,
    PassError,
    PlanError,
    RatioError,
    UnknownNameError,
)
from fxprune.graph.counting import count_parameters
from fxprune.graph.facts import Notes, facts_of, fork
from fxprune.graph.tensors import weights
from fxprune.masking.masked_run import MaskedRun
from fxprune.masking.teacher import divergence_by_removal
from fxprune.offload.files import offload_to
from fxprune.pipeline.arguments import read_steps
from fxprune.pipeline.pipeline import Pipeline
from fxprune.pipeline.registry import load_pass, parse_pass
from fxprune.removal.budget import make_budget
from fxprune.removal.plan import Plan
from fxprune.removal.removal import Removal, Scores
from tests.models import tiny, token_ids
from tests.oracle import axes_of, decide, discover, slim_graph
from tests.remembered import traced
from tests.tiers import tiers
from tests.tokens import character_tokenizer

LAYERS, FFN, KV = 8, 346, 4
BOTH = ("mlp", "head")
ALL = ("mlp", "head", "head_dim", "channel")


@pytest.fixture(scope="module")
def dense() -> fx.GraphModule:
    """A model of 1.5 million parameters whose layers differ in the size of their weights."""
    sizes = {"hidden_size": 128, "intermediate_size": FFN, "num_hidden_layers": LAYERS}
    model = tiny("llama", num_attention_heads=8, num_key_value_heads=KV, **sizes)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            for parameter in layer.parameters():
                parameter.mul_(1 + 0.1 * ((5 * i) % LAYERS))
    return discover(model)


def select(dense: fx.GraphModule, name: str = "ratio", importance: str = "l2", **arguments: Any) -> Removal:
    """What is decided after scoring."""
    load_pass(importance, kinds=arguments.get("kinds", BOTH))(dense)
    load_pass(f"select-by-{name}", **arguments)(dense)
    return facts_of(dense)[Removal]


def parameters_left(dense: fx.GraphModule, plan: Plan) -> int:
    """Parameters that a plan leaves, counted from its indices."""
    left = 0
    for name, parameter in dense.named_parameters():
        if not name.startswith(tuple(f"{block}." for block in plan.removed_blocks)):
            kept = plan.kept.get(name, {})
            left += int(np.prod([len(kept.get(i, range(size))) for i, size in enumerate(parameter.shape)]))
    return left


def removed_part(dense: fx.GraphModule, state: Removal) -> float:
    """The fraction of the parameters that a removal takes."""
    return 1 - parameters_left(dense, state.plan) / count_parameters(dense)


def widths(state: Removal, kind: str, size: int | None = None) -> list[int]:
    """Units left in the groups of a kind, block by block."""
    groups = [g for g in state.groups if g.kind == kind and g.factor is not None and size in (None, g.size)]
    return [state.keep.count(group.factor) for group in groups if group.factor is not None]


@pytest.fixture
def calibrated(dense: fx.GraphModule) -> fx.GraphModule:
    """A copy with calibration samples, and scores of all kinds."""
    return calibrate(fork(dense))


def calibrate(graph: fx.GraphModule) -> fx.GraphModule:
    load_pass("calibrate", data=token_ids(4, 12))(graph)
    load_pass("l2", kinds=(*BOTH, "channel"))(graph)
    return graph


def choose_width(graph: fx.GraphModule, **arguments: Any) -> Removal:
    """What is decided with some parts of the residual width to try."""
    made = {
        "kinds": (*BOTH, "channel"),
        "ratio": 0.2,
        "width": (0.25, 0.5, 0.75),
        "protect": (),
        "round_to": {"channel": 1},
    }
    load_pass("select-by-ratio", **made | arguments)(graph)
    return facts_of(graph)[Removal]


@pytest.mark.parametrize(
    ("measured", "part"), [([3, 4], 0), ([3, 2, 2], 0.25), ([3, 2, 1, 5], 0.5), ([4, 3, 2, 1], 0.75)]
)
def test_residual_width_goes_as_far_as_the_divergence_falls(
    calibrated: fx.GraphModule, monkeypatch: pytest.MonkeyPatch, measured: list[int], part: float
) -> None:
    left = list(measured)

    def measure(*_: Any) -> Any:
        return lambda _: left.pop(0)

    monkeypatch.setattr("fxprune.passes.select.ratio.divergence_by_removal", measure)
    state = choose_width(calibrated, first=("mlp",))
    assert widths(state, "channel") == [round(128 * (1 - 0.2 * part))] and widths(state, "head", KV) == [KV] * LAYERS
    assert removed_part(calibrated, state) == pytest.approx(0.2, abs=0.004)
    notes = [line for line in facts_of(calibrated)[Notes].lines if "residual width is" in line]
    assert len(notes) == (part > 0) and not left, "none is measured once one is no better"
    assert all(f"is {part:.0%} of what is removed: divergence of the masked model" in line for line in notes)


def test_a_width_that_rounding_makes_the_same_is_measured_once(
    calibrated: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def measure(*_: Any) -> Any:
        def of(removal: Removal) -> float:
            measured.extend(widths(removal, "channel"))
            return -len(measured)

        return of

    monkeypatch.setattr("fxprune.passes.select.ratio.divergence_by_removal", measure)
    state = choose_width(calibrated, width=(0.01, 0.25, 0.3, 0.9), round_to={"channel": 16})
    assert measured == [128, 112]
    assert widths(state, "channel") == measured[-1:]
    for round_to, narrower in ((1, 96), ({"mlp": 2}, 96), (3, 105), ({"channel": 3}, 105)):
        measured.clear()
        choose_width(calibrated, width=(0.9,), round_to=round_to)
        assert measured == [128, narrower], "a multiple of 32 stays one, unless another is asked for"
    wide = calibrate(discover(tiny("llama", hidden_size=768, num_hidden_layers=1)))
    measured.clear()
    choose_width(wide, ratio=0.4, width=(0.1, 0.9), round_to=1)
    assert measured == [768, 512], "in blocks of 256"


@pytest.mark.parametrize(
    ("masked", "start", "fitted", "part"),
    [
        ([3, 4], 0, [], 0),
        ([3, 2, 2], 0.25, [2, 1, 0], 0.75),
        ([3, 2, 2], 0.25, [2, 1, 3], 0.5),
        ([3, 2, 2], 0.25, [1, 1, 1], 0.25),
        ([3, 2, 2], 0.25, [2, 2, 1], 0),
        ([4, 3, 2, 1], 0.75, [1, 1], 0.75),
        ([4, 3, 2, 1], 0.75, [4, 3, 2, 2], 0.25),
        ([4, 3, 2, 1], 0.75, [4, 3, 2, 1], 0),
    ],
)
def test_width_goes_further_or_back_as_far_as_the_divergence_of_the_fitted_model_falls(
    calibrated: fx.GraphModule,
    monkeypatch: pytest.MonkeyPatch,
    masked: list[int],
    start: float,
    fitted: list[int],
    part: float,
) -> None:
    """Masked alone, a narrower stream looked worse than emptied layers, of which a fit makes up for less."""
    left = list(masked), list(fitted)

    def measure(*_: Any) -> Any:
        return lambda _, *fitted: left[len(fitted)].pop(0)

    monkeypatch.setattr("fxprune.passes.select.ratio.divergence_by_removal", measure)
    state = choose_width(calibrated, compensate=load_pass("least-squares", damping=1.0))
    assert widths(state, "channel") == [round(128 * (1 - 0.2 * part))] and left == ([], []), "no more are measured"
    notes = [line for line in facts_of(calibrated)[Notes].lines if "residual width is" in line]
    assert len(notes) == bool(fitted)
    assert all(("of the fitted model" in line) == (part != start) for line in notes)
    beginning = f"residual width is {part:.0%} of what is removed: divergence of the masked model "
    assert all(line.startswith(f"{beginning}{min(masked):.2f} at {start:.0%}, ") for line in notes), notes


def test_candidates_are_fitted_on_other_samples_and_on_copies(
    calibrated: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = facts_of(calibrated)[Calibration].samples
    before = {name: tensor.clone() for name, tensor in weights(calibrated)}
    fit = load_pass("least-squares", damping=1.0)
    masked: list[tuple[Removal, float]] = []
    fitted: list[tuple[Removal, float]] = []

    def measure(graph_module: fx.GraphModule, measured: Sequence[Sample], where: str) -> Any:
        own = divergence_by_removal(graph_module, measured, where)

        def of(removal: Removal, *other: fx.GraphModule) -> float:
            (fitted if other else masked).append((removal, own(removal, *other)))
            return (3, 2, 2)[len(masked) - 1] if not other else -len(fitted)

        return of

    monkeypatch.setattr("fxprune.passes.select.ratio.divergence_by_removal", measure)
    choose_width(calibrated, compensate=fit)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(calibrated)), "on copies"
    assert (len(masked), len(fitted)) == (3, 3)
    alone = divergence_by_removal(calibrated, [samples[0], samples[2]], "here")
    for removal, divergence in fitted:
        work = fork(calibrated)
        facts_of(work).put(removal)
        facts_of(work).put(replace(facts_of(work)[Calibration], samples=(samples[1], samples[3])))
        assert divergence == alone(removal, fit(work).graph_module) != alone(removal)
    assert all(divergence == alone(removal) for removal, divergence in masked)
    masked.clear()
    facts_of(calibrated).put(replace(facts_of(calibrated)[Calibration], samples=samples[:1]))
    choose_width(calibrated, compensate=fit)
    assert (len(masked), len(fitted)) == (3, 3), "one sample is for runs alone"


def test_divergences_of_fitted_candidates_resume_and_their_weights_do_not_stay(
    calibrated: fx.GraphModule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Candidates of a second round, with other units, took the fits of the first one's, by their number."""
    plans: list[str] = []

    def measure(graph_module: fx.GraphModule, measured: Sequence[Sample], where: str) -> Any:
        own, masked = divergence_by_removal(graph_module, measured, where), iter((3, 2, 2))

        def of(removal: Removal, *other: fx.GraphModule) -> float:
            plans.extend(removal.plan.digest for _ in other)
            return own(removal, *other) if other else next(masked)

        return of

    monkeypatch.setattr("fxprune.passes.select.ratio.divergence_by_removal", measure)
    alone = choose_width(calibrated, compensate=load_pass("least-squares"))
    notes, wanted = facts_of(calibrated)[Notes].lines, {f"candidate-{plan}.json" for plan in plans}
    scores, calls = facts_of(calibrated)[Scores], len(plans)
    assert calls == len(wanted) > 1
    for fits in (calls, calls):
        with offload_to(tmp_path, tmp_path):
            assert choose_width(calibrated, compensate=load_pass("least-squares")).plan == alone.plan
        assert len(plans) == calls + fits and {path.name for path in tmp_path.iterdir()} == wanted
        assert set(facts_of(calibrated)[Notes].lines) == set(notes), "the divergences are the same"
    facts_of(calibrated).put(replace(scores, units={name: -row for name, row in scores.units.items()}))
    with offload_to(tmp_path, tmp_path):
        choose_width(calibrated, compensate=load_pass("least-squares"))
    assert len(set(plans)) > calls, "of other units"


def test_no_candidates_are_fitted_on_fewer_samples_than_there_are_processes(
    calibrated: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the samples are held out; the rest was then refused as too few, after all scores."""
    left = [3, 2, 2]
    monkeypatch.setattr("fxprune.passes.select.ratio.divergence_by_removal", lambda *_: lambda _: left.pop(0))
    monkeypatch.setattr("fxprune.passes.select.ratio.world_size", lambda: 3)
    choose_width(calibrated, compensate=load_pass("least-squares"))
    assert not left


def test_the_divergence_of_a_removal_is_that_of_the_masked_model(calibrated: fx.GraphModule) -> None:
    samples = facts_of(calibrated)[Calibration].samples
    measure = divergence_by_removal(calibrated, samples, "here")
    found = {}
    for part in (0.0, 0.5):
        state = choose_width(calibrated, width=(), ratio={"channel": 0.2 * part, "mlp": 0.2})
        divergences = []
        with torch.no_grad():
            for sample in samples:
                ids = sample.inputs["input_ids"]
                p, q = (
                    run.run(ids)[0].log_softmax(-1) for run in (MaskedRun(calibrated, state), Interpreter(calibrated))
                )
                divergences.append(float((q.exp() * (q - p)).sum(-1).mean()))
        found[part] = measure(state)
        assert found[part] == pytest.approx(float(np.mean(divergences)), rel=0.05), (
            "bfloat16, and the likeliest classes"
        )
    assert measure(state) == found[0.5] != found[0.0] > 0


def test_width_stays_whole_without_samples_and_is_not_measured_alone(
    dense: fx.GraphModule, calibrated: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxprune.passes.select.ratio.divergence_by_removal", None)
    alone = choose_width(calibrated, kinds=("channel",))
    assert widths(alone, "channel") == [pytest.approx(128 * 0.8, abs=1)]
    by_kind = choose_width(calibrated, ratio={"channel": 0.1, "mlp": 0.1})
    assert widths(by_kind, "channel") == [pytest.approx(128 * 0.9, abs=1)]
    without = choose_width(calibrated, kinds=BOTH)
    assert widths(without, "channel") == [128]
    load_pass("l2", kinds=(*BOTH, "channel"))(dense)
    whole = choose_width(dense)
    assert widths(whole, "channel") == [128] and whole.plan.kept == without.plan.kept, "no samples"
    assert load_pass("select-by-ratio", kinds=("mlp", "exact-channel"), width=(0.3, 0.5)).cost(99).runs == 4 * 16
    assert load_pass("select-by-ratio", width=(0.3, 0.5)).cost(99).runs == 0
    for wrong in ((0.5, 0.25), (0.0,), (1.5,), 0.5, (0.5, 0.5), "half"):
        with pytest.raises(ArgumentError, match="width"):
            load_pass("select-by-ratio", width=wrong)


def test_a_width_that_nothing_scored_stays_whole_and_so_does_one_that_the_class_cannot_express(
    calibrated: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A criterion of one's own scored no width, and was refused beside a recipe that may remove some."""
    load_pass("l2", kinds=BOTH)(calibrated)
    assert widths(choose_width(calibrated), "channel") == [128]
    missing = r"there are no scores for model/channel, of the kind 'channel' .*kinds=\[mlp, head, channel\]"
    with pytest.raises(PassError, match=missing):
        choose_width(calibrated, width=())
    load_pass("l2", kinds=(*BOTH, "channel"))(calibrated)
    monkeypatch.setattr(
        "fxprune.passes.select.ratio.divergence_by_removal", lambda *_: lambda one: widths(one, "channel")[0]
    )
    monkeypatch.setattr(
        "fxprune.passes.select.base.inexpressible",
        lambda _, removal, kinds: (
            {"model/channel": "no"} if "channel" in kinds and min(widths(removal, "channel")) < 128 else {}
        ),
    )
    assert widths(choose_width(calibrated), "channel") == [128]
    assert any("model/channel" in line and "left whole" in line for line in facts_of(calibrated)[Notes].lines)


def test_a_ratio_beyond_all_other_kinds_takes_width_and_one_beyond_all_is_refused(calibrated: fx.GraphModule) -> None:
    state = choose_width(calibrated, kinds=("head", "channel"), ratio=0.3)
    assert widths(state, "channel")[0] < 128
    assert removed_part(calibrated, state) == pytest.approx(0.3, abs=0.007)
    with pytest.raises(
        RatioError, match=r"90\.0% of the parameters cannot be removed: .*the largest reachable"
    ) as told:
        choose_width(calibrated, kinds=("head", "channel"), ratio=0.9, width=(0.1,))
    largest = told.value.reachable
    assert largest is not None and 0 < largest < 0.9
    choose_width(calibrated, kinds=("head", "channel"), ratio=largest - 0.01, width=(0.1,))
    with pytest.raises(RatioError, match=f"{largest + 0.02:.1%} of the parameters cannot be removed"):
        choose_width(calibrated, kinds=("head", "channel"), ratio=largest + 0.02, width=(0.1,))


def test_a_part_alone_loses_units_and_the_whole_counts_in_the_ratio(dense: fx.GraphModule) -> None:
    plan = select(dense, ratio=0.03, part="layers.3", protect=()).plan
    assert plan.kept and all(name.startswith("model.layers.3.") for name in plan.kept)
    assert parameters_left(dense, plan) == pytest.approx(0.97 * count_parameters(dense), rel=0.002)
    with pytest.raises(PassError, match=r"no group of kinds mlp,head.* lies in 'layers.30'"):
        select(dense, ratio=0.03, part="layers.30")


def test_the_budget_counts_what_is_really_left_and_tied_parameters_once(dense: fx.GraphModule) -> None:
    tied, gone = discover(tiny("llama", tie_word_embeddings=True, num_hidden_layers=1)), ("model.layers.2",)
    for graph, kinds, removed in ((dense, ALL, ()), (dense, ALL, gone), (tied, ("channel",), ())):
        state = select(graph, kinds=kinds, ratio=0.3, protect=())
        budget = make_budget("params", graph, axes_of(graph))
        counts = {factor: float(state.keep.count(factor)) for factor in state.keep.units}
        left = count_parameters(slim_graph(graph, state.keep, removed))
        assert budget.total == count_parameters(graph)
        assert budget.total - budget.removed(counts, dict.fromkeys(removed, 1.0)) == left


@pytest.mark.parametrize("importance", tiers(["l2", "random"], "l2"))
@pytest.mark.parametrize("ranking", ["local", "global"])
@pytest.mark.parametrize(
    ("kinds", "ratios"),
    [
        (("mlp",), (0, 0.01, 0.05, 0.2, 0.333, 0.55)),
        (("head",), (0, 0.02, 0.05, 0.1, 0.15)),
        (("head_dim",), (0.03, 0.1, 0.2)),
        (("channel",), (0.05, 0.2, 0.5, 0.9)),
        (BOTH, (0, 0.01, 0.1, 0.25, 0.5, 0.65)),
        (ALL, (0.05, 0.3, 0.7, 0.9)),
    ],
    ids=["mlp", "head", "head_dim", "channel", "both", "all"],
)
def test_the_ratio_is_reached(
    dense: fx.GraphModule, kinds: tuple[str, ...], ratios: Sequence[float], ranking: str, importance: str
) -> None:
    for ratio in ratios:
        state = select(dense, importance=importance, kinds=kinds, ranking=ranking, ratio=ratio)
        assert removed_part(dense, state) == pytest.approx(ratio, abs=0.005)
        assert ratio or not state.plan.kept
        assert {group.kind for group in state.groups if group.factor in state.keep.units} <= set(kinds)  # type: ignore[union-attr]


def test_what_goes_is_what_is_worth_least(dense: fx.GraphModule) -> None:
    state = select(dense, ratio=0.3)
    for group in state.groups:
        if group.factor in state.keep.units:
            score, stays = facts_of(dense)[Scores].units[group.name], state.keep.units[group.factor]
            for row, kept in zip(np.atleast_2d(score), np.atleast_2d(stays), strict=True):
                assert row[~kept].max() <= row[kept].min()


def test_units_inside_a_key_head_may_differ_but_their_number_does_not(dense: fx.GraphModule) -> None:
    state = select(dense, importance="random", kinds=("head_dim",), ratio=0.1, protect=())
    nested = [mask for mask in state.keep.units.values() if mask.ndim == 2]
    assert nested and all(len(set(mask.sum(axis=1))) == 1 for mask in nested)
    assert any((mask != mask[0]).any() for mask in nested)
    assert count_parameters(slim_graph(dense, state.keep)) == parameters_left(dense, state.plan)


@pytest.mark.parametrize("kinds", [("mlp",), BOTH])
def test_local_takes_the_same_from_each_block_and_global_does_not(
    dense: fx.GraphModule, kinds: tuple[str, ...]
) -> None:
    local = select(dense, kinds=kinds, ratio=0.3, protect=())
    assert max(widths(local, "mlp")) - min(widths(local, "mlp")) <= 1
    everywhere = select(dense, kinds=kinds, ratio=0.3, protect=(), ranking="global")
    assert max(widths(everywhere, "mlp")) - min(widths(everywhere, "mlp")) > FFN // 10


@pytest.mark.parametrize("group_ratio", [0, 0.1, 0.25, 0.5, 0.99])
def test_group_ratio_is_a_fraction_of_units(dense: fx.GraphModule, group_ratio: float) -> None:
    state = select(dense, "group-ratio", group_ratio=group_ratio, protect=())
    assert widths(state, "mlp") == [max(round(FFN * (1 - group_ratio)), 1)] * LAYERS
    assert widths(state, "head", KV) == [max(round(KV * (1 - group_ratio)), 1)] * LAYERS
    spread = select(dense, "group-ratio", kinds=("mlp",), group_ratio=group_ratio, protect=(), ranking="global")
    total = LAYERS * FFN
    assert abs(total - sum(widths(spread, "mlp")) - group_ratio * total) <= LAYERS


@pytest.mark.parametrize("round_to", [2, 8, 16, 64])
def test_widths_that_shrink_are_multiples(dense: fx.GraphModule, round_to: int) -> None:
    for name, arguments in (("ratio", {"ratio": 0.3}), ("group-ratio", {"group_ratio": 0.4})):
        state = select(dense, name, round_to=round_to, **arguments)
        assert state.plan.kept
        trained = dict(dense.named_parameters())
        left = [len(index) for n, axes in state.plan.kept.items() if n in trained for index in axes.values()]
        assert all(count % round_to == 0 for count in left)


def test_every_width_of_a_unit_stays_a_multiple() -> None:
    """The narrowest parameter alone decided: heads of 16 for values and 24 for queries gave odd widths of queries."""
    heads = Factor(4, 0)
    narrow, wide = (Member(f"of_{width}", 0, product(heads, Factor(width, width))) for width in (16, 24))
    for members, step in (((narrow, wide), 2), ((wide, narrow), 2), ((narrow,), 1)):
        assert Rounding(16).step(Group("layer/head", "head", members, heads)) == step


def test_a_ratio_by_kind_counts_the_parameters_of_each_kind(dense: fx.GraphModule) -> None:
    state = select(dense, ratio={"mlp": 0.3, "head": 0.125}, protect=(1, 0))
    for place, ratio in ((".mlp.", 0.3), (".self_attn.", 0.125)):
        inside = sum(p.numel() for n, p in dense.named_parameters() if place in n)
        kept = {name: axes for name, axes in state.plan.kept.items() if place in name}
        gone = count_parameters(dense) - parameters_left(dense, Plan(kept))
        assert gone / inside == pytest.approx(ratio, abs=0.005)
    assert not state.asked
    state = select(dense, ratio=[["head", 0.2]], ranking="global")
    assert {group.kind for group in state.groups if group.factor in state.keep.units} == {"head"}
    with pytest.raises(RatioError, match=r"99.0% .* the largest reachable"):
        select(dense, ratio={"mlp": 0.1, "head": 0.99})


def test_a_group_ratio_by_kind_is_a_fraction_of_the_units_of_each(dense: fx.GraphModule) -> None:
    for uniform in (False, True):
        state = select(dense, "group-ratio", group_ratio={"mlp": 0.3, "head": 0.5}, protect=(), uniform=uniform)
        assert set(widths(state, "mlp")) == {round(FFN * 0.7)}
        assert set(widths(state, "head", KV)) == {KV // 2}


def test_numbers_by_kind_have_a_spelling_and_count_units(dense: fx.GraphModule) -> None:
    made = load_pass("select-by-ratio", ratio={"mlp": 0.3, "head": 0.1}, round_to={"mlp": 64, "head": 2})
    spelled = "ratio=[[mlp, 0.3], [head, 0.1]]"
    assert spelled in str(made) and "round_to=[[mlp, 64], [head, 2]]" in str(made)
    assert str(parse_pass(str(made))) == str(made) and made.kinds == ("mlp", "head")  # type: ignore[attr-defined]
    assert load_pass("select-by-ratio", ratio={"mlp": 0.3}).kinds == ("mlp",)  # type: ignore[attr-defined]

    state = select(dense, ratio={"mlp": 0.3, "head": 0.2}, round_to={"mlp": 64, "head": 2})
    assert {count for count in widths(state, "mlp") if count < FFN} <= {64 * i for i in range(1, 6)}
    assert {count for count in widths(state, "head", KV) if count < KV} == {2}
    state = select(dense, ratio=0.2, round_to={"head": 2})
    assert any(count % 64 for count in widths(state, "mlp") if count < FFN)


@pytest.mark.parametrize("ranking", ["local", "global"])
def test_other_kinds_lose_only_what_the_first_leave_to_them(dense: fx.GraphModule, ranking: str) -> None:
    """As soon as heads had to go too, they went in the same proportion as channels: two thirds of them at once."""
    total, mlp = count_parameters(dense), LAYERS * 3 * 128 * FFN
    found = {}
    for ratio in (0.5, 0.84 * mlp / total, 0.86 * mlp / total, 0.92 * mlp / total, 0.97 * mlp / total):
        state = select(dense, ratio=ratio, ranking=ranking, protect=(), first=("mlp",))
        assert removed_part(dense, state) == pytest.approx(ratio, abs=0.005)
        found[ratio] = 1 - sum(widths(state, "head", KV)) / (LAYERS * KV)
        assert 1 - sum(widths(state, "mlp")) / (LAYERS * FFN) <= 0.9
    lost = list(found.values())
    assert lost[:2] == [0, 0] and lost == sorted(lost) and 0 < lost[-1] <= 0.6
    state = select(dense, ratio=0.8, ranking=ranking, protect=(), first=("mlp",))
    assert removed_part(dense, state) == pytest.approx(0.8, abs=0.005), "all shrink where the first do not suffice"
    with pytest.raises(RatioError, match="largest"):
        select(dense, ratio=0.99, ranking=ranking, protect=(), first=("mlp",))


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_each_device_gets_as_many_heads_and_channels(dense: fx.GraphModule, devices: int) -> None:
    state = select(dense, ratio={"mlp": 0.3, "head": 0.2} if devices == 2 else 0.2, tensor_parallel=devices)
    assert all(count % devices == 0 for count in widths(state, "mlp") if count < FFN)
    keys = widths(state, "head", KV)
    queries = [k * q for k, q in zip(keys, widths(state, "head", 2), strict=True)]
    assert all(count % devices == 0 for count in queries) and all(max(k, devices) % min(k, devices) == 0 for k in keys)
    assert (set(keys) == {KV}) is (devices > 2), "four key heads have nothing to spare where four or eight share them"


def test_protected_blocks_follow_the_paper_scaled_to_the_depth() -> None:
    for depth, (front, back) in ((32, (4, 2)), (30, (4, 2)), (2, (0, 0))):
        numbers = [str(i) for i in range(depth)]
        assert protected_blocks(numbers, None) == {*numbers[:front], *numbers[depth - back :]}
    blocks = tuple("abcdefgh")
    assert protected_blocks(blocks, None) == {"a"}
    assert protected_blocks(blocks, ()) == frozenset()
    assert protected_blocks(blocks, (2, 1)) == {"a", "b", "h"}
    assert protected_blocks(blocks, (0, 3)) == {"f", "g", "h"}
    assert protected_blocks(blocks, (0, 10)) == protected_blocks(blocks, (10, 0)) == set(blocks)


def test_protected_blocks_stay_whole(dense: fx.GraphModule) -> None:
    for protect, whole in ((None, {0}), ((2, 3), {0, 1, 5, 6, 7}), ((), set())):
        state = select(dense, ratio=0.2, protect=protect)
        touched = {int(name.split(".")[2]) for name in state.plan.kept}
        assert touched == set(range(LAYERS)) - whole


@pytest.mark.parametrize(("protect", "expected"), [((), {0, 5}), ((2, 2), {2, 5})])
def test_whole_layers_go_cheapest_first(
    dense: fx.GraphModule, protect: tuple[int, int] | tuple[()], expected: set[int]
) -> None:
    state = select(dense, "group-ratio", kinds=("layer",), group_ratio=0.25 if not protect else 0.5, protect=protect)
    assert set(state.removed_blocks) == {f"model.layers.{i}" for i in expected}
    slim = slim_graph(dense, state.keep, state.removed_blocks)
    assert count_parameters(slim) == parameters_left(dense, state.plan)


def test_a_ratio_between_two_layers_is_reached_as_near_as_can_be_and_noted(dense: fx.GraphModule) -> None:
    facts_of(dense).put(Notes())
    state = select(dense, kinds=("layer",), ratio=0.2, protect=())
    assert len(state.removed_blocks) == 2
    assert [note for note in facts_of(dense)[Notes].lines if "instead of 20.00%" in note and "too large" in note]


@pytest.mark.parametrize("ranking", ["local", "global", "auto"])
def test_a_ratio_of_large_units_is_met_by_the_nearest_combination(ranking: str) -> None:
    """Whole key/value heads of some layers beside query heads of others: any multiple of what a query head costs."""
    graph = discover(tiny("llama", num_hidden_layers=4))
    one = removed_part(graph, select(graph, kinds=("head",), ratio=0.2, protect=())) / 8
    for ratio in np.arange(0.02, 0.2, 0.005):
        state = select(graph, kinds=("head",), ratio=float(ratio), ranking=ranking, protect=())
        assert abs(removed_part(graph, state) - ratio) <= one / 2 + 0.0025, ratio


@pytest.mark.parametrize(
    ("ratio", "achieved"), [(0.1, 0.1848), (0.2, 0.1848), (0.3, 0.2663), (0.35, 0.3696), (0.4, 0.4022), (0.5, 0.4946)]
)
@pytest.mark.parametrize("ranking", ["local", "global", "auto"])
def test_a_ratio_of_groups_of_channels_that_share_weights_is_met_by_the_nearest_combination(
    ranking: str, ratio: float, achieved: float
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 20, 3, groups=4), nn.GroupNorm(2, 20), nn.ReLU())
    model.append(nn.Conv2d(20, 8, 1, groups=2))
    result = fxprune.prune(
        model.eval(),
        example_inputs={"input": torch.randn(2, 3, 8, 8)},
        recipe="llm-pruner",
        importance="l2",
        ratio=ratio,
        ranking=ranking,
        protect=(),
    )
    assert result.report.achieved == pytest.approx(achieved, abs=0.0001)


def test_a_note_on_a_missed_ratio_names_the_whole_one(calibrated: fx.GraphModule) -> None:
    facts_of(calibrated).put(Notes())
    choose_width(calibrated, kinds=("head", "channel"), ratio=0.12, width=(0.5,), round_to={"channel": 64, "head": 4})
    notes = [line for line in facts_of(calibrated)[Notes].lines if "instead of" in line]
    assert notes and all("instead of 12.00%" in line for line in notes)


@pytest.mark.parametrize("kinds", [("head",), BOTH])
def test_an_unreachable_ratio_says_what_can_be_reached(dense: fx.GraphModule, kinds: tuple[str, ...]) -> None:
    with pytest.raises(RatioError) as caught:
        select(dense, kinds=kinds, ratio=0.9)
    found = re.search(r"largest reachable ratio is ([\d.]+)%", str(caught.value))
    assert found is not None
    largest = float(found[1]) / 100
    assert removed_part(dense, select(dense, kinds=kinds, ratio=largest)) == pytest.approx(largest, abs=0.005)
    said = f"with kinds {','.join(kinds)}, round_to {kinds[-1]}=2 the largest"  # as an option takes them
    with pytest.raises(RatioError, match=said):
        select(dense, kinds=kinds, ratio=largest + 0.01, round_to={kinds[-1]: 2})


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("ratio", {"ratio": {"mlp": 1.2}}, RatioError),
        ("ratio", {"ratio": {}}, ArgumentError),
        ("ratio", {"ratio": [["mlp", 0.1], ["mlp", 0.2]]}, ArgumentError),
        ("ratio", {"ratio": ["mlp", 0.1]}, ArgumentError),
        ("ratio", {"round_to": {"mpl": 64}}, UnknownNameError),
        *(("ratio", {"budget": name}, UnknownNameError) for name in ("parameters", "memory", "bytes@q9_9")),
        ("group-ratio", {"group_ratio": {"head": 1}}, RatioError),
    ],
)
def test_nonsense_is_refused_before_any_work(name: str, arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        load_pass(f"select-by-{name}", **arguments)


@given(st.integers(1, 30), st.integers(1, 12), st.floats(0, 30))
def test_options_move_between_allowed_counts(size: int, step: int, removed: float) -> None:
    option = Option(size, min(step, size), np.arange(size, dtype=float))
    allowed = [0, *(size - kept for kept in range(option.step, size, option.step))]
    removed = min(removed, size)
    assert option.most == max(allowed)
    assert option.nearest(removed) in allowed
    assert abs(option.nearest(removed) - removed) == pytest.approx(min(abs(a - removed) for a in allowed))
    assert option.below(removed) == max(a for a in allowed if a <= removed)
    for count in allowed:
        assert option.more(count) == min((a for a in allowed if a > count), default=None)
        assert option.less(count) == max((a for a in allowed if a < count), default=0)


def test_groups_that_share_a_place_are_options_of_one_slot(dense: fx.GraphModule) -> None:
    state = decide(dense)
    whole, inside = (g for g in state.groups if g.block == "model.layers.0" and g.kind == "head")
    scores = Scores({whole.name: np.ones(4), inside.name: np.ones((4, 2))})
    slots = make_slots(state.groups, scores, ("head",), frozenset(), Rounding())
    assert [option.group for slot in slots for option in slot.options] == [whole, inside]
    assert slots[0].choose(0.5)[0] == 0
    shielded = make_slots([replace(whole, block="b")], scores, ("head",), frozenset({"b"}), Rounding())
    assert shielded == []


SELECT, BY_KIND = (f"select-by-ratio{{ratio={ratio}, protect=[1, 1]}}" for ratio in (0.95, "[[mlp, 0.9]]"))


@pytest.mark.parametrize(
    ("steps", "error", "ran"),
    [
        (f"calibrate, find-groups, wanda, {SELECT}", RatioError, ["calibrate", "find-groups"]),
        (f"calibrate{{written=9}}, find-groups, wanda, {SELECT}", RatioError, ["find-groups"]),
        (f"calibrate{{written=9}}, find-groups, l2, {SELECT}, least-squares", RatioError, ["find-groups"]),
        (f"calibrate, find-groups, wanda, {BY_KIND}", RatioError, ["calibrate", "find-groups"]),
        ("calibrate{written=9}, find-groups, PLAN, least-squares", PlanError, ["find-groups"]),
        ("calibrate{samples=1}, find-groups, wanda, select-by-ratio, record-teacher", CalibrationError, ["calibrate"]),
    ],
)
def test_what_cannot_work_is_told_before_samples_are_written_and_units_scored(
    steps: str, error: type[Exception], ran: list[str]
) -> None:
    """A ratio out of reach was told once the model had written its samples, and every unit had a score."""
    graph_module, seen = traced("llama"), list[str]()
    plan = load_pass("plan-from-json", text=Plan({"nope": {0: (1,)}}, ()).to_json())
    passes = [plan if name == "PLAN" else parse_pass(name) for name in read_steps(steps)]
    data: dict[str, Any] = {"tokenizer": character_tokenizer()} if "written" in steps else {"data": token_ids(4, 8)}
    passes[0] = replace(passes[0], **data)
    with pytest.raises(error) as caught:
        Pipeline(passes, on_pass=lambda step: seen.append(step.name))(graph_module)
    assert seen == ran and caught.value.__notes__
    reachable = getattr(caught.value, "reachable", None)
    assert error is not RatioError or (reachable is not None and 0.1 < reachable < 0.99)
