"""A pipeline notes which passes ran and how long they took."""

from __future__ import annotations

import copy
import gc
import inspect

import pytest
import torch
from torch import fx, nn

from fxprune.errors import PassError
from fxprune.graph.facts import facts_of
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.pipeline.pipeline import Pipeline, Ran
from fxprune.pipeline.registry import load_pass
from fxprune.removal.removal import Removal
from fxprune.trace import trace
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
    """A pass that raises."""

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
