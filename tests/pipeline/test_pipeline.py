"""Pipelines: what they note, show in notebooks, and tell of their progress."""

import copy
import gc
import inspect
import io
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch import fx, nn

import fxprune
from fxprune.errors import PassError
from fxprune.graph.facts import facts_of
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.pipeline.pipeline import Pipeline, Ran, html_table
from fxprune.pipeline.progress import RunBar, run_bar
from fxprune.pipeline.registry import load_pass
from fxprune.removal.removal import Removal
from fxprune.trace import trace
from tests.models import tiny
from tests.oracle import Net


def small(width: int = 12, device: str = "cpu") -> fx.GraphModule:
    net = Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(10, width), b=nn.Linear(width, 5)).to(device)
    return trace(net, {"x": torch.randn(2, 10)}).graph_module


def with_literals() -> fx.GraphModule:
    """A graph whose code names a width."""
    net = Net(lambda m, x: m.b(m.a(x).view(-1, 3, 4).relu().flatten(1)), a=nn.Linear(10, 12), b=nn.Linear(12, 5))
    return trace(net, {"x": torch.randn(2, 10)}).graph_module


CUT = "find-groups, l2, select-by-ratio{ratio=0.3, protect=()}, shrink"


def test_passes_are_noted_in_order_and_one_inside_another_once() -> None:
    dense = small()
    steps = "find-groups, (l2, select-by-ratio{ratio=0.25, protect=()}), shrink{verify}"
    slim = Pipeline(steps)(dense).graph_module
    ran = facts_of(slim)[Ran].passes
    spellings = ["find-groups", "l2", "select-by-ratio{protect=[], ratio=0.25}", "shrink{verify}"]
    assert [spelling for _, spelling, _ in ran] == spellings
    assert [stage for stage, *_ in ran] == ["discover", "importance", "select", "shrink"]
    assert all(seconds >= 0 for *_, seconds in ran) and Ran not in facts_of(dense)
    long = small(1200)
    found = Pipeline("find-groups, l2, select-by-ratio{protect=()}")(long).graph_module
    plan = facts_of(found)[Removal].plan
    Pipeline(["find-groups", load_pass("plan-from-json", text=plan.to_json())])(long)
    assert facts_of(long)[Ran].passes[-1][1] == "plan-from-json{...}", "a long spelling is cut"


def test_the_code_of_a_graph_is_written_when_it_is_read_and_is_that_of_the_slim_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = with_literals()
    before, written = dense.code, list[fx.GraphModule]()
    recompile = fx.GraphModule.recompile
    monkeypatch.setattr(fx.GraphModule, "recompile", lambda self: written.append(self) or recompile(self))
    slim = Pipeline(CUT)(dense).graph_module
    assert not written and dense.code == before and slim.code != before
    assert slim(torch.randn(2, 10)).shape == (2, 5) and written == [slim]
    inner = Pipeline(f"({CUT})")(dense).graph_module
    assert "def forward" in str(inner) and inner.code == slim.code and written == [slim, inner]
    assert copy.deepcopy(inner).code == inner.code and [*inspect.signature(inner.forward).parameters] == ["x"]


class Stop(Pass):
    name = "stop"
    stage = "shrink"
    changes = "nothing"

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        raise PassError("it stops", where="stop", remedy="Leave it out")


def test_where_a_step_raises_in_place_the_code_is_that_of_the_graph() -> None:
    dense = with_literals()
    before = dense.code
    with pytest.raises(PassError, match="it stops"):
        Pipeline([Pipeline(CUT), Stop()])(dense, inplace=True)
    left = dense.code
    dense.recompile()
    assert left == dense.code != before


@pytest.mark.parametrize(("device", "expected"), [("meta", False), ("cpu", True)])
def test_garbage_of_a_graph_without_weights_is_looked_for_when_all_is_done(device: str, expected: bool) -> None:
    """Full collections over all that was imported took a tenth of a whole prune, in whichever pass they came due."""
    dense = small(device=device)
    seen = list[bool]()
    scores = "random, select-by-ratio{ratio=0.3, protect=()}"
    before = gc.isenabled()
    try:
        gc.enable()
        Pipeline(["find-groups", Pipeline(scores, on_pass=lambda _: seen.append(gc.isenabled())), "shrink"])(dense)
        assert gc.isenabled() and seen == [expected] * 2
        with pytest.raises(PassError, match="it stops"):
            Pipeline(["find-groups", Pipeline([Stop()])])(dense)
        assert gc.isenabled()
        gc.disable()
        Pipeline("find-groups")(dense)
        assert not gc.isenabled(), "a collector switched off by the user stays off"
    finally:
        gc.enable() if before else gc.disable()


def test_texts_and_tables_of_objects_are_short() -> None:
    traced = fxprune.trace(tiny("llama"))
    groups = fxprune.find_groups(fxprune.dependency_graph(traced))
    pipeline = fxprune.prune_pipeline(importance="l2", kinds=["mlp", "layer"], ratio=0.3)
    result = fxprune.Result.of(pipeline(traced.graph_module).graph_module)
    wide = next(group for group in groups if group.kind == "channel")
    things: list[tuple[Any, tuple[str, ...]]] = [
        (traced, ("LlamaForCausalLM", "71,664", "input_ids")),
        (wide, ("model/channel", "48 units", "self_attn.q_proj.weight[1]", "3")),
        (pipeline, ("l2", "select-by-ratio", "ratio=0.3")),
        (result, ("LlamaForCausalLM", "71,664", "parameters")),
        (result.plan, ("tensors shrink", "norms masked")),
    ]
    for thing, words in things:
        assert "\n" not in repr(thing) and len(repr(thing)) < 400 and str(thing).count("\n") < 30
        assert words[0] in repr(thing) and all(word in str(thing) and word in thing._repr_html_() for word in words)
    assert str(Pipeline(str(pipeline))) == str(eval(repr(pipeline))) == str(pipeline)
    text = html_table("<title>", [("a & b", 1)], ("what", "<b>"))
    assert "&lt;title&gt;" in text and "a &amp; b" in text and "&lt;b&gt;" in text and text.count("<tr>") == 2


def test_a_plan_folds_alike_blocks() -> None:
    plan = fxprune.Plan({f"b.{i}.w": {0: list(range(i + 1))} for i in range(3)}, ("b.3",), {"b.0.w": {0: 9}})
    assert str(plan).splitlines() == [
        "3 tensors shrink, 1 block removed, norms sliced",
        "  b.3: 0 kept",
        "  b.*.w[0]: 1 to 3 of 9 kept",
    ]


def test_the_bar_goes_over_steps_by_their_work_and_never_back() -> None:
    progress = Progress(console=Console(file=io.StringIO(), force_terminal=True), auto_refresh=False)
    bar = RunBar(["calibrate", "find-groups", "l2"], [8.0, 1.0, 1.0], progress)
    (task,) = progress.tasks
    bar.begin("find-groups")
    bar.begin("calibrate")
    assert (task.total, task.completed, task.description) == (10, 1, "step 2 of 3: calibrate")
    seen = []
    for _ in bar.track(range(4), "writing samples", 4):
        seen.append(task.completed)
        assert list(bar.track("ab", "words", 2)) == ["a", "b"]
    assert seen == [1, 3, 5, 7] and task.description == "step 2 of 3: writing samples"
    for _ in bar.track(range(2), "checking them", 2):
        assert task.completed == 7
    bar.begin("unheard-of")
    bar.begin("l2")
    assert (task.completed, task.description) == (9, "step 3 of 3: l2")


def test_there_is_no_bar_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with run_bar([]) as bar:
        assert bar is None
    assert capsys.readouterr() == ("", "")


def test_a_prune_shows_its_bar_in_a_terminal_unless_told_not_to(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    options: dict[str, Any] = {"importance": "l2", "recipe": "llm-pruner", "verify": False}
    fxprune.prune(tiny("llama"), **options, progress=False)
    assert capsys.readouterr().err == ""
    fxprune.prune(tiny("llama"), **options)
    assert " of 7: " in capsys.readouterr().err  # quick steps may pass between two frames
