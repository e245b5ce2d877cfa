"""Each public function refuses at its door what it cannot work with: plans, scores, graphs, pictures, rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import PlanError
from fxprune.removal.scores import Scores
from tests.bad_input.refusals import IDS, INPUTS, Net, check_clear, said

NONSENSE: tuple[Any, ...] = (None, 3, "x", b"x", [], {}, object(), float("nan"), Net, torch.ones(2), True, len)


@pytest.fixture(scope="module")
def result() -> fxprune.Result:
    """A small prune."""
    return fxprune.prune(Net(), importance="l1", protect=(), example_inputs=INPUTS)


@pytest.fixture(scope="module")
def traced() -> fxprune.Traced:
    """A traced model."""
    return fxprune.trace(Net(), INPUTS, check=False)


@pytest.fixture(scope="module")
def graph(traced: fxprune.Traced) -> Any:
    """Its dependency graph."""
    return fxprune.dependency_graph(traced)


def document(kept: str, blocks: str = "[]", version: str = "1") -> str:
    """The text of a plan."""
    return f'{{"version": {version}, "kept": {kept}, "removed_blocks": {blocks}}}'


TEXTS: list[tuple[Any, str]] = [
    *[(value, "^plan: ") for value in (None, 3, [], {}, object(), "", "{", "x", "3", "null", "[]", "\ud800", b"\xff")],
    ("[" * 100_000, "^plan: RecursionError"),
    (document('{"a":' * 100_000), "^plan: RecursionError"),
    (document("{}", version="9"), "version 9, this release reads 1"),
    (document("{}", version='"1"'), "version '1'"),
    (document("{}", version="true"), "version True"),
    ('{"version": 1}', "kept: it is None, not a mapping"),
    (document("3"), "kept: it is 3"),
    (document('{"a": 3}'), r"kept\['a'\]: it is 3"),
    (document('{"a": {"x": [1]}}'), "'x' is no number of an axis"),
    (document('{"a": {"-1": [1]}}'), "'-1' is no number of an axis"),
    (document('{"a": {"0": ["q"]}}'), r"kept\['a'\]\[0\]: .*not whole numbers"),
    (document('{"a": {"0": [1.5]}}'), "not whole numbers"),
    (document('{"a": {"0": [NaN]}}'), "not whole numbers"),
    (document('{"a": {"0": [Infinity]}}'), "not whole numbers"),
    (document('{"a": {"0": [1e400]}}'), "not whole numbers"),
    (document('{"a": {"0": [true]}}'), "not whole numbers"),
    (document('{"a": {"0": "12"}}'), "not whole numbers"),
    (document('{"a": {"0": null}}'), "not whole numbers"),
    (document('{"a": {"0": ' + "9" * 5000 + "}}"), "^plan: "),
    (document("{}", "3"), "removed_blocks: they are 3"),
    (document("{}", '"abc"'), "removed_blocks: they are 'abc'"),
    (document("{}", "[3]"), "removed_blocks"),
    (document("{}", "null"), "removed_blocks: they are None"),
]


@pytest.mark.parametrize(("text", "says"), TEXTS, ids=range(len(TEXTS)))
def test_texts_of_plans(text: Any, says: str, capfd: pytest.CaptureFixture[str]) -> None:
    check_clear(lambda: fxprune.Plan.from_json(text), says, capfd, error=PlanError)


KEPT: list[tuple[Any, Any, str]] = [
    ({"nope": {0: [1]}}, (), r"nope\[0\]: the model has no such axis"),
    ({"up.weight": {7: [1]}}, (), r"up.weight\[7\]: the model has no such axis"),
    ({"up.weight": {-1: [1]}}, (), r"axis|number"),
    ({"up.weight": {"0": [1]}}, (), "by number of an axis"),
    ({3: {0: [1]}}, (), "by name"),
    ({"up.weight": {0: ["a"]}}, (), "not whole numbers"),
    ({"up.weight": {0: [0.5]}}, (), "not whole numbers"),
    ({"up.weight": {0: [True]}}, (), "not whole numbers"),
    ({"up.weight": {0: [[1]]}}, (), "not whole numbers"),
    ({"up.weight": {0: None}}, (), "not whole numbers"),
    ({"up.weight": {0: 3}}, (), "not whole numbers"),
    ({"up.weight": {0: torch.tensor([1])}}, (), "not whole numbers"),
    ({"up.weight": {0: []}}, (), "do not fit an axis of 12"),
    ({"up.weight": {0: [1, 1]}}, (), "do not fit"),
    ({"up.weight": {0: [10**30]}}, (), "do not fit"),
    ({"up.weight": {0: [1, 2]}}, (), r"up.bias\[0\]: shrinks with others but is not in the plan"),
    (None, (), "kept: it is None"),
    ([1], (), r"kept: it is \[1\]"),
    ({"up.weight": None}, (), "it is None"),
    ({}, None, "removed_blocks: they are None"),
    ({}, "abc", "removed_blocks: they are 'abc'"),
    ({}, (3,), "removed_blocks"),
    ({}, ("layers.9",), "layers.9: the model has no removable block"),
]


@pytest.mark.parametrize(("kept", "blocks", "says"), KEPT, ids=range(len(KEPT)))
def test_plans_of_other_models(kept: Any, blocks: Any, says: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = Net()
    check_clear(
        lambda: fxprune.apply(model, fxprune.Plan(kept, blocks), example_inputs=INPUTS), says, capfd, model=model
    )


def test_a_plan_of_a_narrower_model(result: fxprune.Result, capfd: pytest.CaptureFixture[str]) -> None:
    model = Net(width=20)
    plan = fxprune.Plan(
        result.plan.kept, sizes={name: {axis: 5 for axis in by} for name, by in result.plan.kept.items()}
    )
    check_clear(lambda: fxprune.apply(model, plan, example_inputs=INPUTS), "the plan is for 5", capfd, model=model)


@pytest.mark.parametrize("where", [None, 3, [], "", "no/such/folder/x", "/", b"x"], ids=said)
def test_scores_that_cannot_be_written_or_read(
    where: Any, result: fxprune.Result, capfd: pytest.CaptureFixture[str]
) -> None:
    assert result.scores is not None
    scores = result.scores
    check_clear(lambda: scores.save(where), ".", capfd, error=PlanError)
    check_clear(lambda: Scores.load(where), ".", capfd, error=PlanError)


@pytest.mark.parametrize("content", [b"", b"\xff" * 50, b"x" * 5000, b"\x02\0\0\0\0\0\0\0{}"], ids=range(4))
def test_files_that_hold_no_scores(content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "scores"
    file.write_bytes(content)
    check_clear(lambda: Scores.load(file), "cannot be read.*Scores.save", capfd, error=PlanError)


@pytest.mark.parametrize(
    "scores",
    [
        Scores({}),
        Scores({"a": np.ones(3)}),
        Scores({"model/mlp": np.ones(3)}),
        Scores({"model/mlp": "x"}),  # type: ignore[dict-item]
        Scores(None),  # type: ignore[arg-type]
        Scores,
        3,
        "",
        "nope.safetensors",
    ],
    ids=range(9),
)
def test_scores_of_other_models(scores: Any, capfd: pytest.CaptureFixture[str]) -> None:
    model = Net()
    call = lambda: fxprune.prune(model, scores=scores, protect=(), example_inputs=INPUTS)  # noqa: E731
    check_clear(call, ".", capfd, model=model)


GRAPHS: dict[str, Callable[[Any, Path], Any]] = {
    "dependency_graph": lambda value, _: fxprune.dependency_graph(value),
    "find_groups": lambda value, _: fxprune.find_groups(value),
    "explain": lambda value, _: fxprune.explain(value, ("up.weight", 0)),
    "write_dot": lambda value, folder: fxprune.write_dot(value, folder / "x.dot"),
    "facts_of": lambda value, _: fxprune.facts_of(value),
    "a pass": lambda value, _: fxprune.load_pass("find-groups")(value),
    "a pipeline": lambda value, _: fxprune.Pipeline("find-groups, l1")(value),
    "export_graph": lambda value, folder: fxprune.export_graph(value, folder / "x.pt2"),
    "Result.of": lambda value, _: fxprune.Result.of(value),
}


@pytest.mark.parametrize("value", [*NONSENSE, torch.fx.symbolic_trace(nn.ReLU()), Net()], ids=said)
@pytest.mark.parametrize("name", GRAPHS)
def test_what_is_no_graph(name: str, value: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check_clear(lambda: GRAPHS[name](value, tmp_path), "graph|traced", capfd)
    assert not list(tmp_path.iterdir())


MEMBERS = (*NONSENSE, "up.weight", ("up.weight",), ("up.weight", 9), ("up.weight", -1), ("up.weight", "0"), ("nope", 0))
MORE_MEMBERS = ((None, None), ("up.weight", 0, 1), (0, "up.weight"), ("head.bias", 0), ("input_ids", 0), ([], 0))


@pytest.mark.parametrize("member", [*MEMBERS, *MORE_MEMBERS], ids=said)
def test_axes_to_explain(member: Any, graph: Any, capfd: pytest.CaptureFixture[str]) -> None:
    check_clear(
        lambda: fxprune.explain(graph, member), "member is|unknown parameter|no axis|is in no such group", capfd
    )


@pytest.mark.parametrize("group", NONSENSE[1:], ids=said)
def test_groups_to_explain(group: Any, graph: Any, capfd: pytest.CaptureFixture[str]) -> None:
    check_clear(lambda: fxprune.explain(graph, ("up.weight", 0), group), "group is", capfd)


PICTURES: list[tuple[dict[str, Any], str]] = [
    *[({"path": path}, "path is") for path in (None, 3, "", "a\0b", [], b"x", Path)],
    *[({"path": path}, "cannot be written.*Choose a file") for path in ("no/such/folder/x.dot", "/proc/x.dot")],
    *[({"path": path}, "no picture is written as.*\\.html") for path in ("/", "/proc/x", "x.jpg")],
    *[
        ({"layer": layer}, "layer")
        for layer in (99, -99, "nope", 0.5, [], True, b"x", object(), "--3", "²", "9" * 5000)
    ],
    *[({"group": group}, "group") for group in ("nope", 3, [], True, object(), fxprune.Group)],
    *[({"everything": value}, "everything is") for value in ("yes", None, 3)],
    *[({"fold": value}, "fold is") for value in ("yes", None, 3)],
    *[({"plan": plan}, "plan is") for plan in ("plan.json", 3, [], {}, True)],
]


@pytest.mark.parametrize(("options", "says"), PICTURES, ids=[said(options) for options, _ in PICTURES])
def test_pictures(
    options: dict[str, Any], says: str, graph: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    check_clear(lambda: fxprune.write_dot(graph, **{"path": tmp_path / "x.dot", **options}), says, capfd)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("names", "options", "says"),
    [
        ((), {"notation": "x[a] -> out[a]"}, "names is"),
        ((3,), {"notation": "x[a] -> out[a]"}, "names is 3"),
        ((None,), {"notation": "x[a] -> out[a]"}, "names is None"),
        (("",), {"notation": "x[a] -> out[a]"}, "names is ''"),
        ((torch.ops.aten.relu.default,), {"notation": "x[a] -> out[a]"}, "names is an OpOverload"),
        (("bad::q",), {"notation": "x[a -> out"}, "bad::q"),
        (("bad::q",), {"notation": ""}, "bad::q"),
        (("bad::q",), {"notation": "x[a] -> out[b]"}, "bad::q"),
        (("bad::q",), {"notation": 3}, "notation is 3"),
        (("bad::q",), {"values": "nope"}, "unknown values 'nope'"),
        (("bad::q",), {"values": 3}, "unknown values"),
    ],
)
def test_rules(names: Any, options: Mapping[str, Any], says: str, capfd: pytest.CaptureFixture[str]) -> None:
    check_clear(lambda: fxprune.rule(*names, **options), says, capfd)


def test_a_rule_is_a_function(capfd: pytest.CaptureFixture[str]) -> None:
    check_clear(lambda: fxprune.rule("bad::q")(3), "rule is 3", capfd)  # type: ignore[type-var]


@pytest.mark.parametrize("stage", [3, "nope", [], b"x", True, ""], ids=said)
def test_stages(stage: Any, capfd: pytest.CaptureFixture[str]) -> None:
    check_clear(lambda: fxprune.pass_names(stage), "stage", capfd)


@pytest.mark.parametrize("passes", ["l1, find-groups", "shrink", "verify-removal", "make-report", "emit-model"])
def test_passes_out_of_order(passes: str, traced: fxprune.Traced, capfd: pytest.CaptureFixture[str]) -> None:
    check_clear(lambda: fxprune.Pipeline(passes)(traced.graph_module), "the fact .* is not known. Run", capfd)


@pytest.mark.parametrize("inplace", ["yes", None, 3])
def test_inplace_of_a_pass(inplace: Any, traced: fxprune.Traced, capfd: pytest.CaptureFixture[str]) -> None:
    step = fxprune.load_pass("find-groups")
    check_clear(lambda: step(traced.graph_module, inplace=inplace), "inplace is", capfd)


EXPORTS: list[tuple[dict[str, Any], str]] = [
    *[({"path": path}, "path is") for path in (None, 3, "", b"x.pt2", [], "a\0.pt2")],
    *[({"path": path}, "unknown suffix") for path in ("x", "x.bin", "/")],
    ({"path": "/proc/x.pt2"}, "export|/proc"),
    *[({"example_inputs": given}, "example_inputs is") for given in (3, [], {}, IDS)],
    ({"example_inputs": {"foo": IDS}}, "unknown input of the graph 'foo'"),
    ({"example_inputs": {"input_ids": "x"}}, "."),
    ({"example_inputs": {"input_ids": None}}, "."),
    ({"example_inputs": {"input_ids": IDS + 100}}, "IndexError|out of range"),
    ({"example_inputs": {"input_ids": IDS.to("meta")}}, "on meta"),
    ({"verify": "yes"}, "verify is"),
    ({"verify": None}, "verify is"),
]


@pytest.mark.parametrize(("options", "says"), EXPORTS, ids=range(len(EXPORTS)))
def test_exports(
    options: dict[str, Any], says: str, result: fxprune.Result, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    call = lambda: fxprune.export_graph(result.graph_module, **{"path": tmp_path / "x.pt2", **options})  # noqa: E731
    check_clear(call, says, capfd)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given", [{}, {"input_ids": IDS.float()}, {"input_ids": IDS + 100}, {"foo": IDS}], ids=range(4)
)
def test_calls_of_a_result(given: dict[str, Any], result: fxprune.Result, capfd: pytest.CaptureFixture[str]) -> None:
    check_clear(lambda: result(**given), "^inputs: ", capfd)


@pytest.mark.parametrize("folder", [None, 3, "x"])
def test_a_result_without_a_model_cannot_be_saved(
    folder: Any, result: fxprune.Result, capfd: pytest.CaptureFixture[str]
) -> None:
    check_clear(lambda: result.save_pretrained(folder), "model", capfd)
