"""The pass contract: facts needed and given, changes declared and checked."""

import dataclasses
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Groups
from fxprune.errors import FxpruneError, PassError
from fxprune.graph.facts import Change, Fact, Facts, Source, facts_of, fork
from fxprune.graph.tensors import get_tensor, set_tensor, weights
from fxprune.pipeline.arguments import argument, declared
from fxprune.pipeline.contract import STAGES, Pass, PassResult
from fxprune.pipeline.pipeline import PassSequence, Pipeline
from fxprune.pipeline.registry import load_pass, parse_pass, pass_class, pass_names
from fxprune.removal.removal import Scores
from fxprune.trace import trace
from tests import remembered
from tests.models import tiny, token_ids
from tests.oracle import Net, discover

OWN = tuple(name for stage in STAGES for name in pass_names(stage))

WHOLE = """
calibrate, find-groups, l2, select-by-ratio{protect=()}, record-teacher, least-squares,
bypass-blocks, eliminate-dead-code, slice-parameters, rewrite-literals,
propagate-shapes, eliminate-dead-code, tune, emit-model, make-report, save-checkpoint
"""


def small() -> fx.GraphModule:
    """A graph with one group of twelve."""
    net = Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(10, 12), b=nn.Linear(12, 5))
    return discover(net, {"x": torch.randn(2, 10)})


def llama() -> fx.GraphModule:
    return remembered.traced("llama", num_hidden_layers=2)


LISTED = tuple(spelled.strip() for spelled in WHOLE.strip().split(","))
NAMES = tuple(spelled.split("{")[0] for spelled in LISTED)


@cache
def _after(count: int) -> fx.GraphModule:
    """The graph after the first passes of the list; worked out once, to be forked."""
    if count == 0:
        return llama()
    step = parse_pass(LISTED[count - 1], data=token_ids(4, 12))
    return step(fork(_after(count - 1))).graph_module


def ready_for(name: str, tmp_path: Any) -> tuple[fx.GraphModule, Pass]:
    """A graph on which the pass `name` can run, and the pass."""
    arguments: dict[str, Any] = {"calibrate": {"data": token_ids(4, 12)}, "save-checkpoint": {"folder": str(tmp_path)}}
    made = load_pass(name, **arguments.get(name, {}))
    if name == "plan-from-json":
        decided = facts_of(_after(NAMES.index("select-by-ratio") + 1))
        text = next(fact.plan.to_json() for fact in decided if hasattr(fact, "plan"))
        return fork(_after(NAMES.index("l2"))), dataclasses.replace(made, text=text)
    if name == "load-scores":
        made = dataclasses.replace(made, scores=facts_of(_after(NAMES.index("select-by-ratio")))[Scores])
    counts = range(len(NAMES)) if name not in NAMES else [NAMES.index(name)]
    count = next(n for n in counts if all(kind in facts_of(_after(n)) for kind in made.needs))
    return fork(_after(count)), made


@pytest.mark.parametrize("name", OWN)
def test_a_registered_pass_keeps_the_contract(name: str, tmp_path: Any) -> None:
    made = pass_class(name)
    assert made.name == name and made.stage in STAGES
    assert (
        made.__name__ == "".join(part.capitalize() for part in name.split("-")) + "Pass" or made.stage == "importance"
    )
    assert dataclasses.is_dataclass(made) and made.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert made.__doc__ and all(declared(field).doc for field in dataclasses.fields(made) if field.init)
    graph_module, step = ready_for(name, tmp_path)
    before = fork(graph_module)
    held = {name: (tensor, tensor.detach().clone()) for name, tensor in weights(graph_module)}
    result = step(graph_module)
    facts = facts_of(result.graph_module)
    assert all(kind in facts for kind in step.gives)
    assert not any(kind in facts for kind in step.drops if kind not in step.gives)
    assert str(graph_module.graph) == str(before.graph)
    assert all(get_tensor(graph_module, n) is t and torch.equal(t, value) for n, (t, value) in held.items())
    if step.changes == "nothing":
        assert result.graph_module is graph_module and not result.modified
    else:
        shared = {id(tensor) for _, tensor in weights(graph_module)} & {id(t) for _, t in weights(result.graph_module)}
        assert result.graph_module is not graph_module and not shared
    for kind in step.needs:
        work = fork(before)
        facts_of(work).drop(kind, by="forgetting")
        with pytest.raises(PassError, match=f"the fact {kind.__name__} is stale since pass forgetting"):
            step(work)


@dataclass(frozen=True)
class Mark(Fact):
    """Something about a graph."""

    about: ClassVar[Change] = "graph"


@dataclass(frozen=True, eq=False)
class StrangePass(Pass):
    """Does what its arguments say, whatever it declares."""

    name: ClassVar[str] = "strange"
    gives: ClassVar[tuple[type[Fact], ...]] = (Mark,)
    does: str = "nothing"
    says: bool = True
    gives_mark: bool = True

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        if self.does == "weights":
            with torch.no_grad():
                get_tensor(graph_module, "a.weight").add_(1)
        if self.does == "new weights":
            set_tensor(graph_module, "a.weight", nn.Parameter(get_tensor(graph_module, "a.weight").detach() + 1))
        if self.does == "copies":
            set_tensor(graph_module, "a.weight", nn.Parameter(get_tensor(graph_module, "a.weight").detach().clone()))
        if self.does == "graph":
            next(n for n in graph_module.graph.nodes if "relu" in str(n.target)).target = torch.ops.aten.tanh.default
        if self.gives_mark:
            facts_of(graph_module).put(Mark())
        return PassResult(graph_module, self.says)


class LearningPass(StrangePass):
    changes: ClassVar[Change] = "nothing"


class FittingPass(StrangePass):
    changes: ClassVar[Change] = "weights"


class CarelessPass(StrangePass):
    writes: ClassVar[bool] = False


def test_what_a_pass_does_is_compared_with_what_it_declares() -> None:
    assert Mark in facts_of(StrangePass()(small()).graph_module)
    steps: list[tuple[Pass, str]] = [
        (StrangePass(gives_mark=False), "pass strange: did not give Mark. This is a defect of the pass"),
        (LearningPass("weights"), "changed the weights, and declares to change nothing"),
        (LearningPass("new weights"), "changed the weights, and declares to change nothing"),
        (LearningPass("graph"), "changed the graph, and declares to change nothing"),
        (FittingPass("graph"), "changed the graph, and declares to change weights"),
        (CarelessPass("weights"), r"wrote to a.weight of the graph that it was given a copy of"),
        (Pipeline([CarelessPass("weights")]), r"wrote to a.weight"),
        (PeekPass(), "pass peek: reads the fact Source, and declares it in neither needs nor wants"),
    ]
    for step, what in steps:
        with pytest.raises(PassError, match=what):
            step(small())
    for name in ("find-groups", "l2", "slice-parameters"):
        with pytest.raises(PassError, match="nothing is known about this Linear"):
            load_pass(name)(fx.symbolic_trace(nn.Linear(2, 2)))


@pytest.mark.parametrize("does", ["weights", "new weights", "graph", "copies", "nothing"])
def test_modified_is_exact(does: str) -> None:
    changes = does not in ("copies", "nothing")
    assert StrangePass(does)(small()).modified is changes
    if changes:
        with pytest.raises(PassError, match="and says that it did not"):
            StrangePass(does, says=False)(small())


def test_facts_about_what_changed_are_dropped_unless_the_pass_keeps_them() -> None:
    dense = small()
    load_pass("l2")(dense)
    fitted, rewritten = FittingPass("weights")(dense), StrangePass("graph")(dense)
    assert Groups in facts_of(fitted.graph_module) and Scores not in facts_of(fitted.graph_module)
    assert not {Groups, Dependencies, Scores} & {type(fact) for fact in facts_of(rewritten.graph_module)}
    assert Mark in facts_of(rewritten.graph_module), "it was given anew"
    with pytest.raises(PassError, match=r"the fact Groups is stale since pass strange. Run find-groups first"):
        load_pass("l2")(rewritten.graph_module)
    assert Scores in facts_of(dense)


@pytest.mark.parametrize("does", ["weights", "new weights", "graph", "nothing"])
def test_the_callers_graph_and_model_stay_unless_asked_for(does: str) -> None:
    dense = small()
    value, text = get_tensor(dense, "a.weight").detach().clone(), str(dense.graph)
    for result in (StrangePass(does)(dense), Pipeline([StrangePass(does)])(dense)):
        assert result.graph_module is not dense
        assert {id(t) for _, t in weights(result.graph_module)}.isdisjoint(id(t) for _, t in weights(dense))
        assert torch.equal(get_tensor(dense, "a.weight"), value) and str(dense.graph) == text
    assert StrangePass(does)(dense, inplace=True).graph_module is dense
    assert torch.equal(get_tensor(dense, "a.weight"), value) is (does in ("graph", "nothing"))


def test_a_sequence_declares_what_its_steps_do() -> None:
    pipeline = Pipeline("find-groups, l2, select-by-ratio")
    assert pipeline.changes == "nothing" and isinstance(pipeline, PassSequence) and isinstance(pipeline, Pass)
    assert {kind.__name__ for kind in pipeline.needs} == {"Runnable", "Shaped"}
    assert {kind.__name__ for kind in pipeline.gives} == {"Dependencies", "Groups", "Scores", "Removal"}
    assert load_pass("shrink").changes == "graph"
    assert {kind.__name__ for kind in load_pass("shrink").needs} == {"Dependencies", "Removal"}
    assert {"Removed", "Shaped"} <= {kind.__name__ for kind in load_pass("shrink").gives}


def test_what_goes_wrong_in_a_pipeline_names_the_pass() -> None:
    for pipeline in (Pipeline("find-groups, select-by-ratio"), Pipeline("find-groups, (select-by-ratio)")):
        with pytest.raises(PassError, match=r"Scores is not known. Run .*l1, l2, .* or .* first") as caught:
            pipeline(llama())
        assert caught.value.__notes__ == ["in pass select-by-ratio"]


def test_passes_run_under_torchs_own_pass_manager() -> None:
    model = tiny("llama", num_hidden_layers=2)
    dense = trace(model).graph_module
    steps = ["find-groups", "l2", "select-by-ratio{protect=()}"]
    manager = PassManager([parse_pass(step) for step in (*steps, "shrink{verify}")])
    result = manager(dense)
    ours = Pipeline([*steps, "shrink{verify}"])(dense)
    assert result.modified and str(result.graph_module.graph) == str(ours.graph_module.graph)
    assert all(torch.equal(t, get_tensor(ours.graph_module, n)) for n, t in weights(result.graph_module))
    own = {id(parameter) for parameter in model.parameters()}
    assert own.isdisjoint(id(tensor) for _, tensor in weights(result.graph_module))


def follow(steps: list[str], graph_module: fx.GraphModule) -> fx.GraphModule:
    """Run passes; wherever one is refused, run first what the error says, until all have run."""
    pending = list(steps)
    for _ in range(60):
        if not pending:
            return graph_module
        try:
            graph_module = parse_pass(pending[0])(graph_module).graph_module
            pending.pop(0)
        except PassError as error:
            found = re.search(r"Run ([a-z0-9-]+(?:(?:, | or )[a-z0-9-]+)*) first", str(error))
            assert found, error
            pending.insert(0, min(re.split(", | or ", found[1]), key=lambda name: name not in NAMES))
    raise AssertionError(f"never done: {pending}")


@pytest.mark.parametrize(
    "steps",
    [
        ["make-report"],
        ["shrink", "shrink"],
        ["slice-parameters", "propagate-shapes"],
        ["slice-parameters", "emit-model"],
        ["slice-parameters", "slice-parameters"],
        ["rewrite-literals"],
        ["shrink", "select-by-ratio{ratio=0.1, protect=()}"],
    ],
)
def test_the_remedy_for_a_wrong_order_works(steps: list[str]) -> None:
    slim = follow(steps, llama())
    ids = token_ids()
    if "shrink" in steps:
        assert slim(ids).logits.shape == (*ids.shape, slim(ids).logits.shape[-1])


def test_an_order_that_cannot_work_is_told_before_any_work_is_done() -> None:
    dense, seen = llama(), list[str]()
    for text, what in (
        ("find-groups, l2, select-by-ratio, shrink, l2", "Groups is stale since pass bypass-blocks. Run find-groups"),
        ("find-groups, l2, select-by-ratio, shrink, shrink", "Dependencies is stale since pass bypass-blocks"),
        ("find-groups, l2, calibrate", "pass calibrate: no data"),
        ("find-groups, (l2, save-checkpoint)", "pass save-checkpoint: no folder"),
    ):
        with pytest.raises(FxpruneError, match=what):
            Pipeline(text, on_pass=lambda step: seen.append(step.name))(dense)
    assert seen == [] and Groups not in facts_of(dense)


def test_a_decision_about_another_graph_is_refused() -> None:
    first, second = llama(), llama()
    for dense in (first, second):
        Pipeline("find-groups, l2, select-by-ratio")(dense)
    decided = next(fact for fact in facts_of(first) if type(fact).__name__ == "Removal")
    facts_of(second).put(decided)
    with pytest.raises(PassError, match=r"decided on another graph.*plan-from-json"):
        load_pass("shrink")(second)
    carried = load_pass("plan-from-json", text=decided.plan.to_json())  # type: ignore[attr-defined]
    Pipeline([carried, "shrink"])(second)
    with pytest.raises(PassError, match=r"Use the plan's own model|Make the plan again"):
        carried(remembered.grouped("gpt2"))
    with pytest.raises(PassError, match=r"the fact Dependencies is not known. Run find-groups first"):
        carried(llama())
    with pytest.raises(PassError, match=r"the fact Mark is not known. Start from fxprune.trace\(model\).graph_module"):
        Facts()[Mark]


@dataclass(frozen=True, eq=False)
class PeekPass(Pass):
    """Reads a fact that it does not declare."""

    name: ClassVar[str] = "peek"
    changes: ClassVar[Change] = "nothing"

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        facts_of(graph_module).get(Source)
        return PassResult(graph_module, False)


@dataclass(frozen=True, eq=False)
class WantingPass(PeekPass):
    """Declares that it reads the fact if it is known."""

    name: ClassVar[str] = "wanting"
    wants: ClassVar[tuple[type[Fact], ...]] = (Source, Scores)


def test_a_pass_that_wants_a_fact_may_not_run_before_its_giver() -> None:
    assert not WantingPass()(llama()).modified
    with pytest.raises(PassError, match=r"pass wanting: reads the fact Scores, which l2 gives after it\. Run l2 first"):
        Pipeline(["find-groups", WantingPass(), "l2"])(llama())
    Pipeline(["find-groups", "l2", WantingPass()])(llama())
    with pytest.raises(PassError, match="pass make-report: reads the fact Emitted, which emit-model gives after it"):
        Pipeline("find-groups, l2, select-by-ratio{protect=()}, shrink, make-report, emit-model")(llama())


class PlainPass(Pass):
    """A pass whose author forgot to make it a dataclass."""

    name: ClassVar[str] = "wrong"
    limit: float = argument(4.0, "A limit.")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        return PassResult(graph_module, False)


def declaring(**words: Any) -> type[Pass]:
    """A class of passes that do nothing, with declarations."""
    body = {"name": "wrong", "call": lambda _, graph_module: PassResult(graph_module, False), **words}
    return dataclass(frozen=True, eq=False)(type("WrongPass", (Pass,), body))


def test_declarations_that_are_none_are_refused_as_the_pass_is_made() -> None:
    """A stage could be any word; other mistakes came out as a KeyError or a TypeError when the pass ran, or never."""
    for made, says in (
        (declaring(stage="importence"), "`stage` is 'importence'. Write one of prepare,"),
        (declaring(stage=None), "`stage` is None"),
        (declaring(changes="everything"), "`changes` is 'everything'. Write one of graph, weights, nothing"),
        (declaring(needs=Groups), "`needs` is the class Groups. Write classes of facts in a tuple"),
        (declaring(wants=("Groups",)), r"`wants` is \('Groups',\)"),
        (declaring(gives=(Pass,)), "`gives` is "),
        (PlainPass, "its class is no dataclass. Decorate it with @dataclass"),
    ):
        with pytest.raises(PassError, match=f"pass wrong: {says}"):
            made()
    with pytest.raises(PassError, match="WrongPass: it has no name"):
        declaring(name=None)()
    for words, says in (({"changes": "all"}, "`changes` is 'all'"), ({"needs": Groups}, "`needs` is the class Groups")):
        undecorated = type("WrongPass", (Pass,), {"name": "wrong", "call": lambda _, graph_module: None, **words})
        with pytest.raises(PassError, match=f"pass wrong: {says}"):
            undecorated()
    assert declaring(needs=[Groups])()


def test_what_a_pass_must_return_is_named() -> None:
    """One that forgot to return was reported as a defect of this package."""
    for returned in (None, fx.GraphModule(nn.Module(), fx.Graph()), PassResult(None, False)):
        made: Any = declaring(changes="nothing", call=lambda *_, returned=returned: returned)
        with pytest.raises(PassError, match=r"pass wrong: `call` returned .*Return fxprune.PassResult\(graph_module"):
            made()(small())
