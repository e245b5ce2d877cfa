"""What becomes of one model type: traced, grouped, each kind removed and compared with masking, emitted, reloaded."""

import re
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import fx, nn

import fxprune
from fxprune.data.calibration import make_inputs
from fxprune.discovery.explain import exactness, frozen_axes
from fxprune.discovery.groups import Group
from fxprune.emit.emitted import inexpressible
from fxprune.graph.facts import Source, facts_of, fork
from fxprune.graph.tensors import map_tensors
from fxprune.masking.compare import TOLERANCE, compare, slim_outputs
from fxprune.masking.masked_run import output_tensors
from fxprune.pipeline.pipeline import Pipeline
from fxprune.result import Result
from fxprune.trace import Traced, trace
from fxprune.trace.inputs import default_inputs
from tests.oracle import axes_of, decide, graph_of, groups_of, masked_outputs, one_gone, zeroed
from tests.zoo import forward, tiny_model, token_ids
from tests.zoo_classes import inputs_of, tiny_model_of

SHRINK = "bypass-blocks, eliminate-dead-code, slice-parameters, rewrite-literals, eliminate-dead-code"
FINISH = "shrink, emit-model, make-report"
EMITTED_KINDS = ("mlp", "head")
EXACT, INERT, ALONE = "exact", "inert", "nothing can go"

Inputs = dict[str, torch.Tensor]


@dataclass
class Coverage:
    """How far a type came, and what was found.

    Args:
        type: the model type, behind the Auto class and a slash for a class other than causal language models.
        stage: what was begun last: ``build``, ``run``, ``export``, ``graph``, ``remove`` or ``emit``; else ``done``.
        error: why it ended there.
        parameters: number of parameters of the tiny model.
        nodes: number of nodes of its graph.
        groups: name, kind, size, ``renormalised`` and ``masked`` (under a norm that is kept as masking has it) of each
            group, and what its removal gave: ``exact``, ``inert``
            (exact, but no output changed), ``nothing can go``, or what went wrong.
        frozen: number of parameter axes by reason.
        unruled: number of nodes by op without a rule.
        emitted: by plan, ``yes`` or why there is no slim model of the class.
        reloaded: by plan, ``yes`` or what went wrong on the way to disk and back: by ``fxprune.from_pretrained``, or
            by the Auto class.
        generated: by plan, ``yes`` or what went wrong when the reloaded model generated.
        whole: groups that the class cannot express with fewer units, with the reason.
        inputs: the inputs that it was traced with, and ``made`` if those that are made without any given do as well.
        notes: what tracing had to give up.
    """

    type: str
    stage: str = "build"
    error: str = ""
    parameters: int = 0
    nodes: int = 0
    groups: list[dict[str, Any]] = field(default_factory=list)
    frozen: dict[str, int] = field(default_factory=dict)
    unruled: dict[str, int] = field(default_factory=dict)
    emitted: dict[str, str] = field(default_factory=dict)
    reloaded: dict[str, str] = field(default_factory=dict)
    generated: dict[str, str] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def examine(model_type: str, keep: Callable[[Coverage], None] = lambda _: None, *, emit: bool = True) -> Coverage:
    """Everything the table says about a type; never raises.

    Args:
        model_type: one of :func:`tests.zoo.types`, or one of another Auto class, as in ``AutoModelForMaskedLM/bert``.
        keep: is given what was found so far before what may take long.
        emit: also make, store and run slim models of the type's own class.
    """
    found = Coverage(model_type)
    try:
        traced = _discover(found, keep)
        if emit:
            found.stage = "emit"
            keep(found)
            _emit(found, traced)
        found.stage = "done"
    except Exception as error:
        found.error = told(error)
    return found


def told(error: Exception) -> str:
    """The type and first line of an error, and where it arose, without the path of the installation."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {(lines or ['no message'])[0]} ({frame.filename}:{frame.lineno})"
    text = re.sub(r"/\S*/(?=[\w.]+\.json)", "", text)  # of a temporary folder
    return re.sub(r"/\S*/(site-packages|fxprune|passes|tests)/", _shortened, text)[:300]


def _shortened(match: re.Match[str]) -> str:
    return "" if match[1] == "site-packages" else f"{match[1]}/"


def _discover(found: Coverage, keep: Callable[[Coverage], None]) -> Traced:
    """Trace, find groups, remove some of each kind."""
    auto_class, _, model_type = found.type.rpartition("/")
    model = tiny_model_of(auto_class, model_type) if auto_class else tiny_model(model_type)
    found.parameters = sum(parameter.numel() for parameter in model.parameters())
    found.stage = "run"
    keep(found)
    inputs = inputs_of(model) if auto_class else {"input_ids": token_ids()}
    expected = judged(found, output_tensors(forward(model, **inputs)))
    found.inputs = [*inputs, *(["made"] if _makes_inputs(model) else [])] if auto_class else []
    found.stage = "export"
    keep(found)
    traced = trace(model, inputs if auto_class else None)
    dense = traced.graph_module
    inputs = make_inputs(dense, inputs, seed=0) if auto_class else inputs  # in the order of the graph
    found.notes, found.nodes = list(traced.notes), len(dense.graph.nodes)
    found.stage = "graph"
    keep(found)
    Pipeline("find-groups{norm=masked}")(dense)
    found.unruled = dict(Counter(axes_of(dense).unruled.values()))
    found.frozen = dict(Counter(re.sub(r"\d+", "n", f.reason) for f in frozen_axes(graph_of(dense)).values()))
    found.groups = [
        {"name": g.name, "kind": g.kind, "size": g.size, "removal": ALONE}
        | {how: exactness(axes_of(dense), g) == how for how in ("renormalised", "masked")}
        for g in groups_of(dense)
    ]
    found.stage = "remove"
    keep(found)
    if (error := compare(expected, judged(found, slim_outputs(dense, inputs)))) > TOLERANCE:
        raise ArithmeticError(f"the graph is not the model: they differ by {error:.1e}")
    _remove(found, model, dense, inputs)
    return traced


def judged(found: Coverage, outputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The outputs that are compared with the model's: logits of a causal language model, all of another."""
    return outputs if "/" in found.type else outputs[:1]


def _makes_inputs(model: Any) -> bool:
    """Whether ``model`` runs on the inputs that a trace makes for it."""
    try:
        forward(model, **default_inputs(model, None))
    except Exception:
        return False
    return True


def can_lose(group: Group) -> bool:
    """Whether a unit of ``group`` may go at all."""
    return group.factor is None or group.size > max(group.least, 1)


def _remove(found: Coverage, model: nn.Module, dense: fx.GraphModule, inputs: Inputs) -> None:
    """All groups of a kind lose a unit at once, and each by itself where that goes wrong; one layer stands for all."""
    groups = groups_of(dense)
    kinds: dict[tuple[str, bool], list[int]] = {}
    for i, group in enumerate(groups):
        if can_lose(group):
            kinds.setdefault((group.kind, bool(group.renormalised)), []).append(i)
    for (kind, _), members in kinds.items():
        chosen = members[:1] if kind == "layer" else members
        verdict = removal(found, model, dense, [groups[i] for i in chosen], inputs)
        apart = verdict != EXACT and len(chosen) > 1
        for i in members:
            found.groups[i]["removal"] = removal(found, model, dense, [groups[i]], inputs) if apart else verdict
        if apart and not {found.groups[i]["removal"] for i in members} - {EXACT, INERT} and verdict != INERT:
            found.groups[members[0]]["removal"] = f"with the others: {verdict}"


def removal(found: Coverage, model: nn.Module, dense: fx.GraphModule, groups: Sequence[Group], inputs: Inputs) -> str:
    """``exact``, ``inert``, or what goes wrong when each of ``groups`` loses a unit.

    What differs in float32 is judged in float64: some networks of random weights make rounding errors large.
    """
    verdict = _removal(found, model, dense, groups, inputs)
    if verdict.startswith("differs"):
        wide = map_tensors(dict(inputs), lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        again = _removal(found, model.double(), dense.double(), groups, wide)  # they share their parameters
        model.float()
        dense.float()
        verdict = again if again in (EXACT, INERT) else verdict
    return verdict


def _removal(found: Coverage, model: nn.Module, dense: fx.GraphModule, groups: Sequence[Group], inputs: Inputs) -> str:
    """The verdict at one precision.

    The slim graph is compared with the masked one, and with the model itself, its weights zeroed by hand, where that
    means the same: not under a statistic, not for what a top-k chooses from, not for layers.
    """
    blocks = tuple(group.block for group in groups if group.factor is None and group.block is not None)
    work = fork(dense)
    try:
        decided = decide(work, one_gone(groups), blocks)
        slim = slim_outputs(Pipeline(SHRINK)(work, inplace=True).graph_module, inputs)
        masked = masked_outputs(dense, decided, inputs)
        error = compare(masked, slim)
        if not any(group.renormalised or group.kind in ("expert", "layer") for group in groups):
            by_hand = output_tensors(forward(zeroed(model, decided.plan), **inputs))
            error = max(error, compare(judged(found, by_hand), judged(found, slim)))
        change = compare(slim_outputs(dense, inputs), masked)
    except Exception as failure:
        return told(failure)
    if error > TOLERANCE:
        return f"differs by {error:.1e}"
    return EXACT if change > TOLERANCE else INERT


def _emit(found: Coverage, traced: Traced) -> None:
    """A slim model of the class without a neuron of each MLP and a head of each attention; one kind where not both."""
    good = {row["name"] for row in found.groups if row["removal"] == EXACT and not row["renormalised"]}
    groups = [group for group in groups_of(traced.graph_module) if group.name in good]
    auto_class = found.type.rpartition("/")[0]
    kinds = [kind for kind in EMITTED_KINDS if any(group.kind == kind for group in groups)]
    plans = [tuple(kinds)] if kinds else []
    for plan in plans:
        label = "+".join(plan)
        chosen = [group for group in groups if group.kind in plan]
        if auto_class:
            removal = decide(traced.graph_module, one_gone(chosen))
            whole = inexpressible(traced.graph_module, removal, plan)
            found.whole |= {name: reason[:200] for name, reason in whole.items()}
            chosen = [group for group in chosen if group.name not in whole]
        if {group.kind for group in chosen} != set(plan):
            found.emitted[label] = "all of a kind are left whole"
            plans.extend((kind,) for kind in plan if len(plan) > 1)
            continue
        result, found.emitted[label] = emission(traced, chosen)
        if result is not None:
            loader = getattr(transformers, auto_class) if auto_class else None
            found.reloaded[label], found.generated[label] = use(result, traced, loader)
        elif len(plan) > 1:
            plans.extend((kind,) for kind in plan)


def emission(traced: Traced, groups: Sequence[Group]) -> tuple[Result | None, str]:
    """What pruning gave and ``yes``, or None and why the classes of the model cannot express it."""
    decide(traced.graph_module, one_gone(groups))
    try:
        result = Result.of(Pipeline(FINISH)(traced.graph_module).graph_module)
    except Exception as failure:
        return None, told(failure)
    if result.model is None:
        return None, "; ".join(result.report.model_reasons[:2])[:300]
    return result, "yes"


def use(result: Result, traced: Traced, auto_class: Any = None) -> tuple[str, str]:
    """Whether the slim model comes back from disk computing the same, and then generates the same with its cache.

    By :func:`fxprune.from_pretrained`; or by its own Auto class, of which nothing is generated.
    """
    dense: Any = traced.model
    inputs, compared = {"input_ids": token_ids()}, 1
    if auto_class is not None:
        inputs, compared = dict(facts_of(traced.graph_module)[Source].example_inputs), None

    def slim(folder: Path) -> Any:
        result.save_pretrained(folder)
        if auto_class is None:
            return fxprune.from_pretrained(folder, model_class=type(result.model))
        return auto_class.from_pretrained(folder, trust_remote_code=True)

    def stock(folder: Path) -> Any:
        dense.save_pretrained(folder)
        return (auto_class or type(dense)).from_pretrained(folder)

    verdict, back = _reloads(result.model, inputs, compared, slim)
    if verdict == "yes":
        return verdict, _generates(back, dense) if auto_class is None else ""
    other, _ = _reloads(dense, inputs, compared, stock)
    return verdict if other == "yes" else f"nor does the dense model: {other}", ""


def _reloads(model: Any, inputs: Inputs, outputs: int | None, there_and_back: Callable[[Path], Any]) -> tuple[str, Any]:
    """``yes`` and what came back from disk, or what went wrong and None; the first ``outputs`` are compared."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            back = there_and_back(Path(folder) / "model")
        expected = output_tensors(forward(model, **inputs))[:outputs]
        error = compare(expected, output_tensors(forward(back, **inputs))[:outputs])
    except Exception as failure:
        return told(failure), None
    return ("yes", back) if error <= TOLERANCE else (f"differs by {error:.1e}", None)


def _generates(slim: Any, dense: Any) -> str:
    """``yes``, or what is wrong with what ``slim`` generates with its cache; of ``dense`` where that is no better."""
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    verdicts = []
    for model in (slim, dense):
        try:
            cached, plain = (model.generate(token_ids(), **options, use_cache=cache) for cache in (True, False))
            verdicts.append("yes" if torch.equal(cached, plain) else "the cache changes what is generated")
        except Exception as failure:
            verdicts.append(told(failure))
        if verdicts[-1] == "yes":
            break
    return verdicts[0] if verdicts[-1] == "yes" else f"nor does the dense model: {verdicts[-1]}"
