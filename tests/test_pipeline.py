"""What every pass is held to, and passes one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn

from fxprune.axes import Keep
from fxprune.errors import FxpruneError, PassError, UnknownNameError
from fxprune.fork import fork
from fxprune.literals import read_literal, set_literal
from fxprune.passbase import Pass, PassResult
from fxprune.pipeline import Pipeline, parse_pass
from fxprune.plan import Plan
from fxprune.registry import load_pass, pass_names
from fxprune.state import State, attach, state_of
from tests.removal import SHRINK, Net, discover


def small() -> fx.GraphModule:
    """A graph with one group of twelve."""
    net = Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(10, 12), b=nn.Linear(12, 5))
    return discover(net, {"x": torch.randn(2, 10)})


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("l1", ["graph"]),
        ("select-by-ratio", ["graph", "scores"]),
        ("select-by-group-ratio", ["graph", "scores"]),
        ("bypass-blocks", ["graph", "plan"]),
        ("slice-parameters", ["plan"]),
        ("rewrite-literals", ["graph", "keep"]),
        ("record-expected", ["graph", "keep", "plan", "probe"]),
        ("verify-removal", ["expected", "probe"]),
    ],
)
def test_a_pass_refuses_a_state_that_lacks_what_it_needs(name: str, needed: list[str]) -> None:
    dense = small()
    load_pass("l1")(dense)
    full = state_of(dense)
    full.keep, full.plan, full.probe, full.expected = Keep(), Plan(), {"x": torch.zeros(2, 10)}, (torch.zeros(1),)
    for field in needed:
        work = fork(dense)
        setattr(state_of(work), field, () if field == "expected" else None)
        with pytest.raises(PassError, match=f"pass {name}: needs '{field}'"):
            load_pass(name)(work)


def test_a_graph_of_unknown_origin_is_refused() -> None:
    graph_module = fx.symbolic_trace(nn.Linear(2, 2))
    for name in ("find-groups", "l2", "slice-parameters"):
        with pytest.raises(PassError, match="no fxprune state"):
            load_pass(name)(graph_module)


@dataclass(eq=False)
class PromisePass(Pass):
    """Promises scores; where honest, delivers them on a new module."""

    honest: bool = False
    name: ClassVar[str] = "promise"
    gives: ClassVar[tuple[str, ...]] = ("probe",)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Fill the state of the result alone."""
        result = fork(graph_module)
        if self.honest:
            state_of(result).probe = {}
        return PassResult(result, True)


def test_a_promise_is_checked_on_the_result() -> None:
    dense = small()
    assert PromisePass(honest=True)(dense).graph_module is not dense
    assert state_of(dense).probe is None
    with pytest.raises(PassError, match="pass promise: did not provide 'probe'"):
        PromisePass()(dense)


# -------------------------------------------------------------------------------------------------- pipeline


def test_a_pipeline_runs_passes_in_turn_and_says_whether_one_changed_anything() -> None:
    dense = small()
    seen: list[str] = []
    steps = ["find-groups", "l2", "select-by-ratio{ratio=0.3 protect=()}"]
    result = Pipeline(steps, on_pass=lambda step: seen.append(step.name))(dense)
    assert seen == ["find-groups", "l2", "select-by-ratio"] and not result.modified
    result = Pipeline([PromisePass(honest=True), "find-groups"])(dense)
    assert result.modified and result.graph_module is not dense


def test_what_goes_wrong_in_a_pipeline_names_the_pass() -> None:
    dense = small()
    attach(dense, State())
    with pytest.raises(FxpruneError) as caught:
        Pipeline(["find-groups", "select-by-ratio"])(dense)
    assert caught.value.__notes__ == ["in pass select-by-ratio"]


@pytest.mark.parametrize(
    ("spelled", "fields"),
    [
        ("taylor{order=first reduction=prod}", {"order": "first", "reduction": "prod", "memory": 0.6}),
        (" taylor ", {"order": "mix", "reduction": "sum"}),
        ("select-by-ratio{ratio=0.35 round-to=8 protect=(1,2)}", {"ratio": 0.35, "round_to": 8, "protect": (1, 2)}),
        ("l1{kinds=('channel',)}", {"kinds": ("channel",)}),
        ("slice-parameters{copy=True}", {"copy": True, "mirror": None}),
    ],
)
def test_passes_are_spelled_with_their_arguments(spelled: str, fields: dict[str, Any]) -> None:
    step = parse_pass(spelled)
    assert step.name == spelled.split("{")[0].strip()
    assert {name: getattr(step, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("spelled", "error", "text"),
    [
        ("taylor{order=mix", PassError, "no closing brace"),
        ("taylor{mix}", PassError, "'mix' is not key=value"),
        ("tailor", UnknownNameError, "unknown pass 'tailor'.*Did you mean 'taylor'"),
        ("taylor{ordre=mix}", UnknownNameError, "argument of pass taylor 'ordre'.*Did you mean 'order'"),
        ("slice-parameter", UnknownNameError, "Did you mean 'slice-parameters'"),
    ],
)
def test_misspelled_passes_are_refused(spelled: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        parse_pass(spelled)


def test_every_pass_is_found_by_the_name_it_goes_by() -> None:
    for name in pass_names():
        step = load_pass(name)
        assert step.name == name and step.stage in (
            "discover",
            "importance",
            "select",
            "shrink",
            "verify",
            "compensate",
            "recover",
        )
    assert set(pass_names("importance")) >= {"random", "l1", "l2", "taylor"}
    assert set(pass_names("shrink")) >= {step.split("{")[0] for step in SHRINK}


def test_literals_are_read_and_written_where_they_stand() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.add, (x, [1, (2, 3)]), {"sizes": [4, 5]})
    assert read_literal(node, ("args", 1, 1, 0)) == 2
    assert read_literal(node, ("kwargs", "absent")) is None
    set_literal(node, ("args", 1, 1, 0), 7)
    set_literal(node, ("kwargs", "sizes", 1), 8)
    set_literal(node, ("kwargs", "end"), 9)
    assert node.args == (x, [1, (7, 3)])
    assert node.kwargs == {"sizes": [4, 8], "end": 9}
