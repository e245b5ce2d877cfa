"""Scores in steps, products of scores, and work that processes share."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from fxprune.passes.importance import taylor
from fxprune.passes.importance.in_steps import _zeroed_and_fitted
from torch import fx, nn

import fxprune
from fxprune.axes import Keep
from fxprune.data.calibration import Calibration, Sample
from fxprune.errors import ArgumentError, CalibrationError, PassError
from fxprune.graph.facts import facts_of, fork
from fxprune.graph.tensors import get_tensor, set_tensor
from fxprune.offload import files
from fxprune.pipeline.pipeline import Pipeline
from fxprune.pipeline.registry import load_pass, parse_pass
from fxprune.removal.removal import Removal, Scores
from tests.forked import in_processes
from tests.models import tiny, token_ids
from tests.oracle import Net, axes_of, discover, groups_of, masked_outputs
from tests.passes.compensate.test_least_squares import deep
from tests.remembered import grouped

X = torch.randn(6, 5, 6, generator=torch.Generator().manual_seed(0))
SELECT = "select-by-group-ratio{group_ratio=0.5, protect=[], kinds=[mlp]}"


@pytest.fixture(scope="module")
def dense() -> fx.GraphModule:
    """Two products of twelve units each, with calibration data."""
    torch.manual_seed(1)
    net = Net(lambda m, x: m.c(m.b(m.a(x).relu()).relu()), a=nn.Linear(6, 12), b=nn.Linear(12, 12), c=nn.Linear(12, 6))
    graph = discover(net, {"x": X[0]})
    facts_of(graph).put(Calibration(tuple(Sample({"x": x}, torch.zeros(1, 5)) for x in X)))
    return graph


def scored(dense: fx.GraphModule, **arguments: Any) -> Scores:
    load_pass("score-in-steps", select=SELECT, **arguments)(dense)
    return facts_of(dense)[Scores]


@pytest.mark.parametrize("compensate", [None, "least-squares{damping=0.1}"])
def test_what_stays_is_scored_on_the_slim_graph(dense: fx.GraphModule, compensate: str | None) -> None:
    before = {name: p.clone() for name, p in dense.named_parameters()}
    found = scored(dense, importance="l2", compensate=compensate, steps=2)
    half = "select-by-group-ratio{group_ratio=0.25, protect=[], kinds=[mlp]}"
    steps = ["l2", half, *([compensate] if compensate else [])]
    once = Pipeline(steps)(fork(dense)).graph_module
    gone = facts_of(once)[Removal]
    slim = Pipeline(["shrink", "find-groups", "l2"])(once).graph_module
    names = [group.name for group in groups_of(dense)]
    assert [group.name for group in groups_of(slim)] == names and len(names) == 2
    for group in groups_of(dense):
        assert group.factor is not None
        kept = gone.keep.units[group.factor]
        np.testing.assert_allclose(found.units[group.name][kept], facts_of(slim)[Scores].units[group.name], rtol=1e-5)
        assert found.units[group.name][~kept].max() < min(row.min() for row in facts_of(slim)[Scores].units.values())
    load_pass("select-by-group-ratio", group_ratio=0.5, protect=(), kinds="mlp")(dense)
    final = facts_of(dense)[Removal]
    assert all(not final.keep.units[factor][~mask].any() for factor, mask in gone.keep.units.items())
    assert all(torch.equal(p, before[name]) for name, p in dense.named_parameters())
    assert found.source.startswith("score-in-steps{")


def test_one_step_scores_as_the_criterion_itself(dense: fx.GraphModule) -> None:
    once = scored(dense, importance="wanda", steps=1)
    load_pass("wanda", kinds="mlp")(dense)
    assert all((facts_of(dense)[Scores].units[name] == row).all() for name, row in once.units.items())


def test_what_the_steps_need_is_asked_for_before_any_work(dense: fx.GraphModule) -> None:
    work = fork(dense)
    facts_of(work).drop(Calibration, by="test")
    with pytest.raises(CalibrationError, match="Calibration is stale"):
        load_pass("score-in-steps", importance="wanda")(work)
    for arguments in ({"importance": "select-by-ratio"}, {"select": "l2"}, {"compensate": "shrink"}, {"steps": 0}):
        with pytest.raises(ArgumentError):
            load_pass("score-in-steps", **arguments)
    with pytest.raises(ArgumentError, match="no ratio to take in steps"):
        load_pass("score-in-steps", select="plan-from-json")


def test_a_target_is_taken_in_steps_as_a_ratio_is(dense: fx.GraphModule) -> None:
    """After the first scores it was refused, as given beside a ratio that nobody gave."""
    units = []
    for asked in ("ratio=0.3", "target='0.7x params'"):
        select = f"select-by-ratio{{{asked}, protect=[], kinds=[mlp]}}"
        load_pass("score-in-steps", select=select, steps=2)(dense)
        units.append(facts_of(dense)[Scores].units)
    by_ratio, by_target = units
    assert any(row.min() < 0 for row in by_ratio.values())
    for name, row in by_ratio.items():
        np.testing.assert_array_equal(by_target[name], row)


def test_layers_that_went_add_nothing_and_stay_gone() -> None:
    graph = discover(nn.Sequential(deep()[:3], nn.Linear(6, 6)).eval(), {"input": X[0]})
    layers = [group for group in groups_of(graph) if group.kind == "layer"]
    assert len(layers) == 3
    importance, select = "l2{kinds=[layer]}", "select-by-group-ratio{group_ratio=0.5, protect=[], kinds=[layer]}"
    load_pass("l2", kinds="layer")(graph)
    alone = {name: float(row[0]) for name, row in facts_of(graph)[Scores].units.items()}
    load_pass("score-in-steps", importance=importance, select=select, steps=2)(graph)
    found = {name: float(row[0]) for name, row in facts_of(graph)[Scores].units.items()}
    first = min(alone, key=lambda name: alone[name])
    assert min(found, key=lambda name: found[name]) == first and found[first] < 0
    removal = Removal(axes_of(graph), groups_of(graph), Keep(), (first.removesuffix("/layer"),))
    work = _zeroed_and_fitted(graph, removal, None)
    (masked,) = masked_outputs(graph, removal, {"input": X[0]})
    torch.testing.assert_close(work(X[0]), masked)


def test_scores_of_several_criteria_are_multiplied(dense: fx.GraphModule, tmp_path: Path) -> None:
    """Of the groups that all of them score: one that scores experts alone leaves the others out."""
    some, *others = (group.name for group in groups_of(dense))
    Scores({some: np.arange(12.0)}).save(tmp_path / "scores")
    loaded = load_pass("load-scores", file=str(tmp_path / "scores"))
    criteria = (parse_pass("random{seed=3}"), parse_pass("wanda{readers_only}"), loaded)
    found = []
    for criterion in criteria:
        alone = fork(dense)
        criterion(alone)
        found.append(facts_of(alone)[Scores].units[some])
    work = fork(dense)
    load_pass("multiply-scores", criteria=criteria)(work)
    scores = facts_of(work)[Scores]
    assert others and list(scores.units) == [some]
    np.testing.assert_allclose(scores.units[some], found[0] * found[1] * found[2])
    assert scores.source == str(load_pass("multiply-scores", criteria=criteria))
    with pytest.raises(ArgumentError, match="two or more"):
        load_pass("multiply-scores", criteria=("l1",))


def test_scores_below_zero_are_not_multiplied(dense: fx.GraphModule) -> None:
    """A unit that two criteria take for worse than useless would come out as good."""
    steps = f"score-in-steps{{importance=l1, steps=2, select={SELECT}}}"
    with pytest.raises(PassError, match="pass score-in-steps: some of its scores are below zero"):
        load_pass("multiply-scores", criteria=("l1", steps))(fork(dense))


def test_a_criterion_inside_another_takes_the_kinds_of_the_prune() -> None:
    """Passes inside a pass given as text kept their default kinds, and the selection had no scores."""
    for spelled in ("multiply-scores{criteria=[random, l1]}", "score-in-steps{importance=l1, steps=2}"):
        result = fxprune.prune(
            tiny("llama"), token_ids(3, 8), importance=spelled, kinds=["layer"], ratio=0.3, compensate="none"
        )
        assert len(result.report.removed_blocks) > 0


@pytest.fixture(scope="module")
def blocks() -> fx.GraphModule:
    """Three residual blocks, and an embedding that is read at both ends."""
    graph_module = grouped("llama", tie_word_embeddings=True)
    load_pass("calibrate", data=token_ids(5, 9))(graph_module)
    return graph_module


def scores_by_parts(graph_module: fx.GraphModule, **arguments: Any) -> dict[str, Any]:
    found = load_pass("taylor", **arguments)(fork(graph_module)).graph_module
    return {name: row.tolist() for name, row in facts_of(found)[Scores].units.items()}


def assert_close(found: dict[str, Any], want: dict[str, Any]) -> None:
    assert found.keys() == want.keys()
    for name, row in want.items():
        np.testing.assert_allclose(found[name], row, rtol=1e-3, atol=1e-7)


def test_free_memory_is_that_of_the_first_process(
    blocks: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process cut the graph by its own free memory, and sums of different weights were added."""
    want = scores_by_parts(blocks, order="mix", memory="fast")
    monkeypatch.setattr(taylor, "recordable_products", lambda _: {})  # sums for all weights, part by part

    def work(rank: int) -> dict[str, Any]:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=(1 << 40) * rank))
        return scores_by_parts(blocks, order="mix")

    for found in in_processes(work, 2, tmp_path):
        assert_close(found, want)


def test_processes_that_run_other_passes_are_refused(blocks: fx.GraphModule, tmp_path: Path) -> None:
    """They waited for each other, or added what did not belong together."""

    other = fork(blocks)
    name = "model.layers.0.mlp.up_proj.weight"
    set_tensor(other, name, nn.Parameter(get_tensor(other, name).detach().double()))

    def work(rank: int) -> list[str]:
        said = []
        for graph_module, order in ((blocks, ("first", "mix")[rank]), ((blocks, other)[rank], "first")):
            with pytest.raises(PassError) as caught:
                scores_by_parts(graph_module, order=order, memory="fast")
            said.append(caught.value.what)
        return said

    first, second = in_processes(work, 2, tmp_path)
    differ = "process 1 and the first process differ in"
    assert first == second == [f"{differ} the pass", f"{differ} the weights"]


class Stopped(BaseException):
    """As when a process is killed."""


@pytest.mark.parametrize("again", [1, 3])
def test_another_number_of_processes_resumes(
    blocks: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: int
) -> None:
    """Gradients at a cut were kept by the place of a sample in its process, in a folder of each process."""
    want = scores_by_parts(blocks, order="mix", memory="fast")
    cache = tmp_path / "cache"
    save, parts = taylor._GradientSweep._save, list[int]()

    def work(stop: int) -> tuple[dict[str, Any], int]:

        def save_or_stop(sweep: taylor._GradientSweep, number: int, found: Any) -> None:
            save(sweep, number, found)
            parts.append(number)
            if len(parts) == stop:
                raise Stopped

        monkeypatch.setattr(taylor._GradientSweep, "_save", save_or_stop)
        try:
            with files.offload_to(tmp_path, cache):
                return scores_by_parts(blocks, order="mix", memory=1e-9), len(parts)
        except Stopped:
            return {}, stop

    assert in_processes(lambda _: work(3), 2, tmp_path / "begun") == [({}, 3)] * 2
    left = sorted(path.name for path in cache.iterdir())
    assert len(left) == 4 and left[0].startswith("gradients-"), "three parts, and gradients at the last cut alone"
    assert len(list((cache / left[0]).iterdir())) == 5, "of each sample"
    (_, rest), *_ = resumed = in_processes(lambda _: work(-1), again, tmp_path / "again")
    assert rest > 0 and cache.joinpath("scores.safetensors").exists()
    for found, _ in resumed:
        assert_close(found, want)
    assert not {path.name for path in cache.iterdir()}.isdisjoint(left), "parts done before were not done again"
    assert rest + 3 == sum(path.name.startswith("part-") for path in cache.iterdir())
