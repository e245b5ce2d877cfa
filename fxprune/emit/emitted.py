"""The slim Hugging Face model of a slim graph, judged against the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from transformers import PreTrainedModel

from fxprune.emit.emitter import Emission, emit
from fxprune.emit.epsilons import exaggerated, find_places, set_attributes
from fxprune.emit.load import attending, implementations, run_on_meta
from fxprune.emit.snapshot import slim_name
from fxprune.errors import CheckpointError, PlanError, VerificationError
from fxprune.graph.context import Refusal, attempt, evaluating, quiet, tidy_later
from fxprune.graph.facts import Blocks, Constants, Fact, Source, facts_of, within
from fxprune.graph.tensors import copy_tensor, on_meta, weights
from fxprune.masking.compare import TOLERANCE, compare
from fxprune.masking.masked_run import PreciseRun, UntouchedRun, output_tensors
from fxprune.removal.plan import kept_of_constants
from fxprune.removal.removal import Removal, RescaledNumber, scaled_numbers
from fxprune.trace.inputs import alias_twin, meta_twin

__all__ = ["Emitted", "SlimJudge", "check_own_forward", "emit_from_graph"]

_ROUGH = 2e-2
"""Accepted difference in half precision, relative to the largest output: two orders of summation round apart."""


@dataclass
class SlimJudge:
    """Says whether an emitted model computes what the slim graph does.

    Args:
        slim: the slim graph.
        dense: the dense model; not changed. Its storage may be on ``meta``.
        inputs: keyword inputs of both.
    """

    slim: fx.GraphModule
    dense: PreTrainedModel
    inputs: Mapping[str, torch.Tensor]

    def __call__(self, candidate: PreTrainedModel) -> bool:
        """Return whether outputs are the same, in evaluation mode, whatever mode the model is in.

        An implementation under which the dense model does not run, or computes something else than under its own, says
        nothing about a candidate.

        Raises:
            VerificationError: it fails under another attention implementation than its own, and the dense model does
                not.
        """
        if on_meta(self.slim):
            return True
        own, *others = implementations(candidate)
        with evaluating(candidate):
            got = _outputs(candidate, self.inputs, own)
            if isinstance(got, Refusal):
                raise got.error
            if got is None or not _agree(self._wanted, got):
                return False
            for name in others:
                fault = _fault(self._wanted, _outputs(candidate, self.inputs, name))
                if fault and self._stands(name, crashed=fault != _DIFFERS):
                    raise VerificationError(fault, where=f"under {name} attention", remedy=_REMEDY)
        return True

    def agrees(self, candidate: PreTrainedModel) -> bool:
        """Return whether outputs are the same under the implementation of attention that the model has."""
        if on_meta(self.slim):
            return True
        with evaluating(candidate):
            got = _outputs(candidate, self.inputs, implementations(candidate)[0])
        return isinstance(got, torch.Tensor) and _agree(self._wanted, got)

    @cached_property
    def _wanted(self) -> torch.Tensor:
        with torch.no_grad():
            return output_tensors(UntouchedRun(self.slim).run(*self.inputs.values()))[0]

    def _stands(self, name: str, *, crashed: bool) -> bool:
        """Whether the dense model passes under an attention implementation what a candidate failed.

        Without values only the shapes that it works with can be tried.
        """
        if any(p.is_meta for p in self.dense.parameters()):
            return crashed and run_on_meta(meta_twin(self.dense), implementation=name) is None  # type: ignore[arg-type]
        first, *_ = implementations(self.dense)
        twin: PreTrainedModel = alias_twin(self.dense)  # type: ignore[assignment]
        want = _outputs(twin, self.inputs, first)
        return isinstance(want, torch.Tensor) and not _fault(want, _outputs(twin, self.inputs, name))


_DIFFERS = "it computes something else"
_REMEDY = "Use the graph, or report the model's config"


def _fault(want: torch.Tensor, got: torch.Tensor | Refusal | None) -> str:
    """Return what is wrong with an output, in words; empty where nothing is, or the implementation is not there."""
    if isinstance(got, Refusal):
        return f"it does not run: {got}"
    return "" if got is None or _agree(want, got) else _DIFFERS


def _outputs(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], implementation: str
) -> torch.Tensor | Refusal | None:
    """Return the first output of a model under an attention implementation; None where it does not take that one."""
    with attending(model, implementation) as taken, torch.no_grad():
        found = attempt(partial(model, **inputs, use_cache=False)) if taken else None
    return found if found is None or isinstance(found, Refusal) else output_tensors(found)[0]


def _agree(want: torch.Tensor, got: torch.Tensor) -> bool:
    """Whether two outputs are equal but for rounding.

    In half precision that is asked of half of the tokens: a router that rounds otherwise may send single ones to others
    of its experts.
    """
    if want.shape != got.shape or want.dtype in (torch.float32, torch.float64):
        return compare([want.float()], [got.float()]) <= TOLERANCE
    apart = (want.float() - got.float()).abs().amax(dim=-1).median()
    return bool(apart <= _ROUGH * max(1.0, float(want.abs().max())))


"""Accepted difference in half precision, in which the module runs and the graph does not."""


Numbers = Mapping[tuple[str, tuple[Any, ...]], RescaledNumber]


def check_own_forward(
    slim: fx.GraphModule,
    source: Source,
    inputs: Mapping[str, Any],
    numbers: Numbers = MappingProxyType({}),
) -> None:
    """Check that a module whose tensors were cut in place still computes what the slim graph does.

    The sizes in a graph are rewritten; those that a module's code holds, such as a number of heads, are not. What its
    norms add is, where attributes hold that.

    Args:
        slim: the slim graph.
        source: the module that it came from; it runs as a copy that shares its parameters. What is on ``meta`` is run
            for its shapes alone.
        inputs: keyword inputs of both.
        numbers: numbers of the graph that changed, by the name of a node and where in it they stand.

    Raises:
        PlanError: the module's own code cannot run any more, or computes something else.
    """
    epsilons = find_places(slim.graph, source.model, numbers)
    if epsilons.reasons:
        raise _refusal(f"cannot be told what its norms add now: {epsilons.reasons[0]}")
    before = set_attributes(source.model, epsilons.attributes)
    try:
        _compare(slim, source, inputs)
        if epsilons.values:
            with exaggerated(slim.graph, source.model, epsilons, {path: path for path, _ in epsilons.values}):
                _compare(slim, source, inputs)
    except BaseException:  # whatever stops it: the module is made whole again
        set_attributes(source.model, before)
        raise


def _compare(slim: fx.GraphModule, source: Source, inputs: Mapping[str, Any]) -> None:
    """Compare what the module computes with what the graph does."""
    twin = alias_twin(source.model)
    with torch.no_grad(), quiet():
        found = attempt(partial(twin, **inputs))
        if isinstance(found, Refusal):
            raise _refusal(f"cannot run with what is left: {found}") from found.error
        wanted, got = output_tensors(PreciseRun(slim).run(*inputs.values())), output_tensors(found)
    if [tensor.shape for tensor in wanted] != [tensor.shape for tensor in got]:
        raise _refusal("gives outputs of other shapes with what is left")
    halves = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in got)
    if not on_meta(slim) and compare(wanted, [t.float() for t in got]) > (_ROUGH if halves else TOLERANCE):
        raise _refusal("computes something else with what is left")


def _refusal(what: str) -> PlanError:
    return PlanError(
        f"the module's own code {what}. The slim graph does not",
        where="inplace",
        remedy="Leave out inplace and use result.graph_module, or prune kinds whose number its code does not hold",
    )


@dataclass(frozen=True, eq=False)
class Emitted(Fact):
    """The slim Hugging Face model, or why there is none.

    Args:
        model: shares its tensors with the graph; None where no class can express the plan.
        reasons: why there is none; empty where there is one.
    """

    model: PreTrainedModel | None
    reasons: tuple[str, ...] = ()

    def require_model(self) -> PreTrainedModel:
        """Return the model.

        Raises:
            CheckpointError: there is none.
        """
        if self.model is None:
            raise CheckpointError(
                f"there is no slim model to save: {'; '.join(self.reasons[:3])}",
                where="model",
                remedy="Export the graph instead: result.export('model.pt2')",
            )
        return self.model


def emit_from_graph(
    slim: fx.GraphModule, source: Source, removal: Removal, inputs: Mapping[str, torch.Tensor]
) -> Emission:
    """Return a model of the source's class that holds the tensors of a slim graph and computes what it does.

    Args:
        slim: the slim graph.
        source: the dense model it came from; a Hugging Face model.
        removal: what was removed.
        inputs: keyword inputs on which graph and model have to agree.
    """
    dense: PreTrainedModel = source.model if source.dense is None else source.dense  # type: ignore[assignment]
    judge = SlimJudge(slim, dense, inputs)
    epsilons = find_places(slim.graph, dense, scaled_numbers(removal.axes, removal.keep))
    tensors, removed = _tensors(slim, source, removal), removal.removed_blocks
    with tidy_later(), quiet():  # around all that is built and run: each of these alone costs more than a small block
        emission = emit(dense, tensors, removed, judge, _numbered(slim, removal), epsilons)
    if emission.model is None or not epsilons.values:
        return emission
    names = {path: slim_name(path, removed) or path for path, _ in epsilons.values}
    with exaggerated(slim.graph, emission.model, epsilons, names):
        reads = SlimJudge(slim, dense, inputs).agrees(emission.model)
    return emission if reads else Emission(None, (f"{next(iter(names))}: its norm does not read what it is to add",))


def _tensors(slim: fx.GraphModule, source: Source, removal: Removal) -> dict[str, torch.Tensor]:
    """Every tensor of the slim model by its dense name; what the graph does not read comes from the dense model."""
    tensors = {name: tensor for own, tensor in weights(slim) for name in source.names.get(own, ())}
    model = source.model
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            if name not in tensors and not within(name, removal.removed_blocks):
                tensors[name] = tensor if source.shares else copy_tensor(tensor)
    return tensors


def _numbered(slim: fx.GraphModule, removal: Removal) -> dict[str, dict[int, list[int]]]:
    """Units that stay of the tables the model's code makes by number: by block that reads one (else empty), by size."""
    facts, axes = facts_of(slim), removal.axes
    blocks, constants = facts[Blocks].paths, facts[Constants].names
    found: dict[str, dict[int, list[int]]] = {}
    kept_of = kept_of_constants(axes, removal.keep)
    for node in slim.graph.nodes:
        if node.op != "get_attr" or node.target not in constants:
            continue
        stack = node.meta.get("nn_module_stack") or {}
        block = next((path for path, _ in stack.values() if path in blocks), "")
        for axis, kept in kept_of.get(str(node.target), {}).items():
            found.setdefault(block, {})[axes.tensors[str(node.target)][axis].size] = kept
    return found
