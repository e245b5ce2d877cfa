"""The slim Hugging Face model of a slim graph, verified against the graph; whether stock classes can express a plan."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxprune.axes import Keep, kept_size
from fxprune.discovery.dependency import AxisMap
from fxprune.discovery.groups import Group
from fxprune.emit.emitter import Emission, emit
from fxprune.emit.patch import NormEpsilons, Resized, enlarged_epsilons, find_epsilons, set_attributes
from fxprune.emit.snapshot import attention_implementations, common_module, run_on_meta, slim_name, using_attention
from fxprune.emit.structure import carry_structure, describe_structure
from fxprune.errors import CheckpointError, PlanError, VerificationError
from fxprune.graph.context import Refusal, attempt, defer_gc, eval_mode, quiet
from fxprune.graph.facts import Blocks, Constants, Fact, Source, facts_of, within
from fxprune.graph.tensors import (
    as_parameter,
    copy_tensor,
    has_meta_weights,
    named_tensors,
    names_by_identity,
    take,
    weights,
)
from fxprune.masking.compare import ROUGH, TOLERANCE, compare
from fxprune.masking.masked_run import PreciseRun, UntouchedRun, output_tensors
from fxprune.removal.plan import Plan, keep_of, kept_index, kept_indices
from fxprune.removal.removal import Removal, RescaledNumber, scaled_numbers
from fxprune.trace.inputs import default_inputs, is_hugging_face, meta_twin, private_twin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAN_DIGEST = "fxprune_plan"
"""Attribute of a slim model with the digest of the plan that it came of."""


def stock_check(graph_module: fx.GraphModule, axes: AxisMap, groups: tuple[Group, ...]) -> Callable[[Plan], bool]:
    """Return a check of plans: does the slim model load in stock transformers from its config alone?

    The slim model is built without storage, so a plan is checked in the time its class takes to be built. Without a
    Hugging Face model every plan passes.
    """
    source = facts_of(graph_module).get(Source)
    if source is None or not is_hugging_face(source.model):
        return lambda _: True
    empty = meta_twin(source.model)

    def accepts(plan: Plan) -> bool:
        keep = keep_of(axes, groups, plan)
        numbers = scaled_numbers(axes, keep) if axes.norms else {}
        epsilons = find_epsilons(graph_module.graph, source.model, numbers) if numbers else NormEpsilons()
        slim = _left_by(axes, keep, plan.removed_blocks, empty)
        model = emit(empty, slim, plan.removed_blocks, epsilons=epsilons, known=source.known).model  # type: ignore[arg-type]
        try:
            return model is not None and describe_structure(model).is_stock
        except CheckpointError:
            return False

    return accepts


def _left_by(
    axes: AxisMap, keep: Keep, removed_blocks: Collection[str], model: nn.Module, *, empty: bool = True
) -> dict[str, torch.Tensor]:
    """The tensors that a removal leaves of a model, by all their names: on ``meta`` if ``empty``, else with values."""
    tensors = dict(named_tensors(model))
    exprs = {name: axes.tensors[name] for name in axes.weights()}
    slim: dict[str, torch.Tensor] = {}
    for aliases in names_by_identity(model).values():
        dense = tensors[aliases[0]]
        held = next((exprs[name] for name in aliases if name in exprs), ())
        sizes = [kept_size(expr, keep) for expr in held] or list(dense.shape)
        tensor = torch.empty(sizes, dtype=dense.dtype, device="meta") if empty else dense.detach()
        for axis, size in enumerate(sizes):
            if tensor.shape[axis] != size:
                kept = torch.from_numpy(kept_index(held, axis, keep))
                tensor = take(tensor, axis, kept.to(tensor.device))
        tensor = as_parameter(tensor, dense)
        slim.update((name, tensor) for name in aliases if not within(name, removed_blocks))
    return slim


def inexpressible(graph_module: fx.GraphModule, removal: Removal, kinds: Collection[str]) -> dict[str, str]:
    """The groups of some kinds that shrink although a Hugging Face model's classes cannot express it, with reasons.

    They are tried without storage; if they cannot shrink together, one of each kind and class of module is tried alone.
    """
    source = facts_of(graph_module).get(Source)
    if source is None or not is_hugging_face(source.model):
        return {}
    model = source.model
    asked = [group for group in removal.groups if group.kind in kinds]
    shrunk = [group for group in asked if group.factor is not None and removal.keep.touches(group.factor)]
    if not shrunk or not _refusal(graph_module, source, removal, shrunk):
        return {}
    if _refusal(graph_module, source, removal, ()):  # nor the dense model: it was changed since its class built it
        return {}
    alike: dict[object, list[Group]] = {}
    for group in shrunk:
        axes = tuple((m.name.rpartition(".")[2], m.axis) for m in group.parameters)
        scopes = [type(model.get_submodule(one.scope)) for one in _resized(source, replace(removal, groups=(group,)))]
        block = None if group.block is None else type(model.get_submodule(group.block))
        alike.setdefault((group.kind, axes, block, *scopes), []).append(group)
    found = {}
    for same in alike.values():
        reason = _refusal(graph_module, source, removal, same[:1])
        found.update({group.name: reason for group in same} if reason else {})
    return found


def _refusal(graph_module: fx.GraphModule, source: Source, removal: Removal, groups: Sequence[Group]) -> str:
    """Why no model can be emitted if ``groups`` alone shrink; empty if one can."""
    keep = removal.keep.only([group.factor for group in groups if group.factor is not None])
    part = replace(removal, keep=keep, removed_blocks=())
    kept, resized = _kept_units(graph_module, part), _resized(source, part)
    inputs, known = source.example_inputs, source.known
    model: Any = source.model
    with defer_gc(), quiet():
        left = _left_by(part.axes, part.keep, (), model)
        emission = emit(model, left, kept_units=kept, inputs=inputs, resized=resized, known=known, dry=True)
        if emission.model is not None and not emission.runs_dry and not _is_on_meta(model):
            given, left = default_inputs(model, inputs), _left_by(part.axes, part.keep, (), model, empty=False)

            def runs(slim: PreTrainedModel) -> bool:
                return _own_outputs(slim, given) is not None

            emission = emit(model, left, (), runs, kept, None, inputs, resized, known)
    return "" if emission.model is not None else emission.reasons[0]


def _is_on_meta(model: nn.Module) -> bool:
    """Whether a parameter of a model has no storage."""
    return any(parameter.is_meta for parameter in model.parameters())


@dataclass
class SlimVerifier:
    """Comparison of emitted models with the slim graph, on keyword inputs; the dense model may be on ``meta``."""

    slim: fx.GraphModule
    dense: PreTrainedModel
    inputs: Mapping[str, torch.Tensor]

    def __call__(self, candidate: PreTrainedModel) -> bool:
        """Whether outputs are the same in evaluation mode, under each attention implementation.

        An implementation under which the dense model fails too, or gives other outputs than under its own, is ignored;
        a failure under any other implementation than the model's own is a ``VerificationError``. So is a cache with
        which the model does not generate, or generates something else, if the dense model has storage and does better.
        """
        if has_meta_weights(self.slim):
            return True
        _, *others = attention_implementations(candidate)
        with eval_mode(candidate):
            if not self.agrees(candidate):
                return False
            fault = "" if _is_on_meta(self.dense) else _cache_fault(candidate, self.inputs)
            if fault and not _cache_fault(self.dense, self.inputs):
                raise VerificationError(fault, where="generation with its cache", remedy=_REMEDY)
            for name in others:
                fault = _fault(self._wanted, _outputs(candidate, self.inputs, name))
                if fault and self._dense_passes(name, crashed=fault != _DIFFERS):
                    raise VerificationError(fault, where=f"under {name} attention", remedy=_REMEDY)
        return True

    def agrees(self, candidate: PreTrainedModel) -> bool:
        """Whether outputs are the same under the attention implementation that the model has."""
        if has_meta_weights(self.slim):
            return True
        got = _own_outputs(candidate, self.inputs)
        return got is not None and not _fault(self._wanted, got)

    @cached_property
    def _wanted(self) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return output_tensors(UntouchedRun(self.slim).run(*self.inputs.values()))

    def _dense_passes(self, name: str, *, crashed: bool) -> bool:
        """Whether the dense model passes under an attention implementation that a candidate failed.

        If it is on ``meta``, only whether it runs can be checked.
        """
        if _is_on_meta(self.dense):
            return crashed and run_on_meta(meta_twin(self.dense), self.inputs, implementation=name) is None
        first, *_ = attention_implementations(self.dense)
        twin = private_twin(self.dense, self.inputs)
        want = _outputs(twin, self.inputs, first)
        return isinstance(want, tuple) and not _fault(want, _outputs(twin, self.inputs, name))


_DIFFERS = "it computes something else"
_REMEDY = "Use the graph, or report the model's config"


def _fault(want: Sequence[torch.Tensor], got: Sequence[torch.Tensor] | Refusal | None) -> str:
    """Return the fault of outputs; empty if there is none, or if there is no such implementation."""
    if isinstance(got, Refusal):
        return f"it does not run: {got}"
    same = got is None or (len(want) == len(got) and all(map(outputs_agree, want, got)))
    return "" if same else _DIFFERS


def _own_outputs(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...] | None:
    """Return the outputs of a model, in evaluation mode, as it is; raise the error that stops it."""
    with eval_mode(model):
        got = _outputs(model, inputs, attention_implementations(model)[0])
    if isinstance(got, Refusal):
        raise got.error
    return got


def _outputs(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], implementation: str
) -> tuple[torch.Tensor, ...] | Refusal | None:
    """Return the outputs of a model under an attention implementation; None if it does not accept that one."""
    parameters = inspect.signature(model.forward).parameters
    takes = "use_cache" in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    with using_attention(model, implementation) as accepted, torch.no_grad():
        found = attempt(partial(model, **inputs, **({"use_cache": False} if takes else {}))) if accepted else None
    return found if found is None or isinstance(found, Refusal) else output_tensors(found)


def _cache_fault(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> str:
    """Return the fault of the logits of two tokens generated with a cache beside those without; empty if none.

    The tokens are prescribed: which has the largest logit may be a matter of rounding.
    """
    if not model.can_generate():
        return ""
    twin: Any = private_twin(model, inputs)
    options: dict[str, Any] = {"max_new_tokens": 2, "num_beams": 1, "do_sample": False, "eos_token_id": None}
    options |= {"pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    generate = partial(twin.generate, **inputs, **options, prefix_allowed_tokens_fn=lambda *_: [1])
    with quiet(), torch.no_grad():
        plain, cached = attempt(generate, use_cache=False), attempt(generate, use_cache=True)
    if isinstance(plain, Refusal):
        return str(plain)
    # generation gives logits in float32, whatever they were computed in
    want = [logits.to(twin.dtype) for logits in plain.logits]
    return _fault(want, cached if isinstance(cached, Refusal) else [logits.to(twin.dtype) for logits in cached.logits])


def outputs_agree(want: torch.Tensor, got: torch.Tensor) -> bool:
    """Whether two outputs are equal up to rounding.

    In half precision at least half of the tokens must agree: a router that rounds differently may send single tokens to
    other experts.
    """
    if want.shape != got.shape or want.dtype in (torch.float32, torch.float64):
        return compare([want.float()], [got.float()]) <= TOLERANCE
    error = (want.float() - got.float()).abs().amax(dim=-1).median()
    return bool(error <= ROUGH * max(1.0, float(want.abs().max())))


def check_own_forward(
    slim: fx.GraphModule,
    source: Source,
    inputs: Mapping[str, Any],
    numbers: Mapping[tuple[str, tuple[Any, ...]], RescaledNumber] = MappingProxyType({}),
) -> None:
    """Check a module whose tensors were cut in place against the slim graph.

    The sizes in a graph are rewritten; those that a module's code holds, such as a number of heads, are not. Norm
    epsilons, which are ``numbers`` of the graph by the name of a node and the place of the argument, are set where
    attributes hold them. On ``meta`` only shapes are compared.

    Raises:
        PlanError: the module's own code fails, or computes something else.
    """
    epsilons = find_epsilons(slim.graph, source.model, numbers)
    if epsilons.reasons:
        raise _own_code_error(f"does not read its norm epsilons from attributes: {epsilons.reasons[0]}")
    before = set_attributes(source.model, epsilons.attributes)
    try:
        _compare(slim, source, inputs)
        if epsilons.values:
            with enlarged_epsilons(slim.graph, source.model, epsilons, {path: path for path, _ in epsilons.values}):
                _compare(slim, source, inputs)
    except BaseException:  # also on interrupts: the module must be restored
        set_attributes(source.model, before)
        raise


def _compare(slim: fx.GraphModule, source: Source, inputs: Mapping[str, Any]) -> None:
    twin = private_twin(source.model, inputs)
    with torch.no_grad(), quiet():
        found = attempt(partial(twin, **inputs))
        if isinstance(found, Refusal):
            raise _own_code_error(f"cannot run with what is left: {found}") from found.error
        wanted, got = output_tensors(PreciseRun(slim).run(*inputs.values())), output_tensors(found)
    if [tensor.shape for tensor in wanted] != [tensor.shape for tensor in got]:
        raise _own_code_error("gives outputs of other shapes with what is left")
    halves = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in got)
    if not has_meta_weights(slim) and compare(wanted, [t.float() for t in got]) > (ROUGH if halves else TOLERANCE):
        raise _own_code_error("computes something else with what is left")


def _own_code_error(fault: str) -> PlanError:
    return PlanError(
        f"the module's own code {fault}. The slim graph does not",
        where="inplace",
        remedy="Leave out inplace and use result.graph_module, or prune kinds whose number its code does not hold",
    )


@dataclass(frozen=True, eq=False)
class Emitted(Fact):
    """The slim Hugging Face model, or why there is none.

    Args:
        model: shares its tensors with the graph; None if its class cannot express the plan.
    """

    model: PreTrainedModel | None
    reasons: tuple[str, ...] = ()

    def require_model(self) -> PreTrainedModel:
        """Return the model, or raise a ``CheckpointError`` with the reasons why there is none."""
        if self.model is None:
            raise CheckpointError(
                f"there is no slim model to save: {'; '.join(self.reasons[:3])}",
                where="model",
                remedy="Export the graph instead: result.export('model.pt2')",
                shell="Leave --low-memory out, and the graph is written instead",
            )
        return self.model


def emit_from_graph(
    slim: fx.GraphModule, source: Source, removal: Removal, inputs: Mapping[str, torch.Tensor]
) -> Emission:
    """Emit a model of the source's class that holds the tensors of a slim graph and agrees with it on the inputs."""
    dense: PreTrainedModel = source.model if source.dense is None else source.dense  # type: ignore[assignment]
    verifier = SlimVerifier(slim, dense, inputs)
    epsilons = find_epsilons(slim.graph, dense, scaled_numbers(removal.axes, removal.keep))
    removed = removal.removed_blocks
    tensors = {name: tensor for own, tensor in weights(slim) for name in source.names.get(own, ())}
    for name, tensor in named_tensors(source.model):  # those that the graph does not read come from the dense model
        if name not in tensors and not within(name, removed):
            tensors[name] = tensor if source.shares else copy_tensor(tensor)
    with defer_gc(), quiet():  # once around all builds and runs: entering them for each costs more than a small block
        resized = _resized(source, removal)
        kept = _kept_units(slim, removal)
        emission = emit(dense, tensors, removed, verifier, kept, epsilons, inputs, resized, source.known)
    if emission.model is None:
        return emission
    carry_structure(emission.model)
    vars(emission.model)[PLAN_DIGEST] = removal.plan.digest
    if not epsilons.values:
        return emission
    names = {path: slim_name(path, removed) or path for path, _ in epsilons.values}
    with enlarged_epsilons(slim.graph, emission.model, epsilons, names):
        # a new verifier: the outputs that the other one caches are of other epsilons
        reads = SlimVerifier(slim, dense, inputs).agrees(emission.model)
    return emission if reads else Emission(None, (f"{next(iter(names))}: its norm does not read its epsilon",))


def _resized(source: Source, removal: Removal) -> list[Resized]:
    """The numbers that change with each group; none for channels, whose number equals too many others."""
    found = []
    for group in removal.groups:
        if group.factor is None or group.kind == "channel" or not removal.keep.touches(group.factor):
            continue
        alone = removal.keep.only([group.factor])
        held = [(source.names.get(m.name, ()), m.axis, m.expr.size, kept_size(m.expr, alone)) for m in group.members]
        sizes = {before: after for names, _, before, after in held if names}
        axes = {(name, axis): after for names, axis, _, after in held for name in names}
        sizes[group.size] = removal.keep.count(group.factor)
        found.append(Resized(common_module(names[0] for names, *_ in held if names), sizes, axes))
    return found


def _kept_units(slim: fx.GraphModule, removal: Removal) -> dict[str, dict[int, list[int]]]:
    facts, axes = facts_of(slim), removal.axes
    blocks, constants = frozenset(facts[Blocks].paths), facts[Constants].names
    kept_of = kept_indices(axes, removal.keep, constants)
    found: dict[str, dict[int, list[int]]] = {}
    for node in slim.graph.nodes:
        if node.op != "get_attr" or node.target not in constants:
            continue
        stack = node.meta.get("nn_module_stack") or {}
        block = next((path for path, _ in stack.values() if path in blocks), "")
        for axis, kept in kept_of.get(str(node.target), {}).items():
            found.setdefault(block, {})[axes.tensors[str(node.target)][axis].size] = kept.tolist()
    return found
