"""Shrinking: blocks bypassed, parameters sliced, literals rewritten, shapes propagated; and its verification."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import fx, nn

from fxprune.axes import Index, kept_size
from fxprune.data.calibration import VerificationInputs, make_inputs
from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Groups
from fxprune.errors import FxpruneError, PlanError, VerificationError
from fxprune.graph.compat import (
    FakeTensorMode,
    FakeTensorProp,
    OpOverload,
    disable_fake_tensor_cache,
    enable_python_dispatcher,
    fake_mode,
    has_unbacked_sizes,
    is_impure,
    tree_leaves,
)
from fxprune.graph.context import Refusal, defer_gc
from fxprune.graph.facts import Change, Cut, Fact, Runnable, Shaped, Source, add_note, facts_of, fork
from fxprune.graph.shapes import ShapedCalls, calls_of, fits_mode, same_shapes, shape_key
from fxprune.graph.tensors import (
    as_parameter,
    copy_tensor,
    device_of,
    get_tensor,
    has_meta_weights,
    map_tensors,
    named_tensors,
    names_by_identity,
    read_argument,
    set_argument,
    set_tensor,
    submodule,
    take,
    tensor_name,
    weights,
)
from fxprune.masking.compare import (
    TOLERANCE,
    BlockOutput,
    Verified,
    compare,
    find_divergence,
    masked_by_block,
    slim_by_block,
    slim_outputs,
)
from fxprune.offload.files import offloaded
from fxprune.offload.prefetch import read_together, use_prefetcher
from fxprune.pipeline.arguments import argument, as_seed
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.pipeline.pipeline import PassSequence
from fxprune.removal.budget import cache_size
from fxprune.removal.removal import Bypassed, Removal, Removed, Scores, Sliced, scaled_numbers
from fxprune.trace.fidelity import Fidelity
from fxprune.trace.inputs import is_hugging_face, meta_twin


@dataclass(frozen=True, eq=False)
class SliceParametersPass(Pass):
    """Slices every tensor, constants of the code too, to its kept indices; tied tensors stay tied.

    Weights of norms that are kept as in the masked model are rescaled for statistics over fewer units.

    A tensor that loses nothing is copied, so that nothing is shared with the dense model. In place on a graph that
    shares its tensors with the model it was traced from, it is left alone, and the model gets the slim tensors as well,
    one at a time, so that a dense tensor is freed as soon as its slim one exists. What was cut off is kept until the
    removal is verified, so that the model can be restored.
    """

    name: ClassVar[str] = "slice-parameters"
    stage: ClassVar[str] = "shrink"
    writes: ClassVar[bool] = False
    changes: ClassVar[Change] = "weights"
    needs: ClassVar[tuple[type[Fact], ...]] = (Bypassed,)
    wants: ClassVar[tuple[type[Fact], ...]] = (Source,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Sliced,)
    drops: ClassVar[tuple[type[Fact], ...]] = (Bypassed, Runnable, Shaped)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        facts = facts_of(graph_module)
        removal, source = facts[Bypassed].removal, facts.get(Source)
        if source is not None and source.shares:
            source = replace(source, dense=meta_twin(source.model))
            facts.put(source)
        else:
            source = None
        aliases = {} if source is None else names_by_identity(source.model)
        tied: dict[int, list[str]] = {}
        for name, tensor in weights(graph_module):
            tied.setdefault(id(tensor), []).append(name)
        for names in tied.values():
            kept = next((removal.kept[name] for name in names if name in removal.kept), {})
            scaling = next((removal.scaled[name] for name in names if name in removal.scaled), None)
            if source is not None and not kept and scaling is None:
                continue
            dense = get_tensor(graph_module, names[0])
            in_model = aliases.get(id(dense), ())
            places: list[tuple[nn.Module, str]] = [(graph_module, name) for name in names]
            slim, pieces = _sliced(dense, kept, in_place=source is not None)
            if source is not None and in_model:
                cut = Cut(in_model, pieces) if scaling is None else Cut(in_model, (), dense)
                source = replace(source, cut=(*source.cut, cut))
                facts.put(source)
                places = [*((source.model, name) for name in in_model), *places]
            slim = slim if scaling is None else as_parameter(scaling.of(slim.detach()), slim)
            for module, name in places:
                set_tensor(module, name, slim)
        facts.put(Sliced(removal))
        return PassResult(graph_module, bool(removal.kept or removal.scaled))


def _sliced(
    tensor: torch.Tensor, kept: Mapping[int, Index], *, in_place: bool
) -> tuple[torch.Tensor, tuple[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor], ...]]:
    """A tensor cut to its kept indices, with the pieces of a ``Cut`` if ``in_place``; otherwise a copy, and none."""
    pieces = []
    value = tensor.detach() if in_place else read_together(tensor)
    for axis, index in kept.items():
        left = torch.from_numpy(index).to(value.device)
        if in_place:
            every = np.arange(value.shape[axis])
            lost = np.delete(every, index) if index.ndim == 1 else np.stack([np.delete(every, row) for row in index])
            gone = torch.from_numpy(lost).to(value.device)
            pieces.append((axis, left, gone, take(value, axis, gone)))
        value = take(value, axis, left)
    held = value if in_place else offloaded(value)
    is_new = in_place or kept or held is not value
    return as_parameter(held, tensor) if is_new else copy_tensor(tensor), tuple(pieces)


@dataclass(frozen=True, eq=False)
class PropagateShapesPass(Pass):
    """Recomputes ``node.meta["val"]`` of every node, symbolic where it was.

    Only nodes whose call changed, or whose inputs have other shapes, run again; and of those with the same call, as in
    blocks that lost the same number of units, only one. A shape that does not fit fails here, at the node where it
    arises, before any tensor is computed.
    """

    name: ClassVar[str] = "propagate-shapes"
    stage: ClassVar[str] = "shrink"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Runnable,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Shaped, ShapedCalls)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        inputs = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
        leaves = tree_leaves(inputs)
        mode = next((value.fake_mode for value in leaves if hasattr(value, "fake_mode")), None) or fake_mode()
        mode.allow_non_fake_inputs = True
        device = device_of(graph_module)
        if device.type == "meta":
            # values of a trace without storage are fake tensors on the CPU: none would count as known on ``meta``
            device = next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)), device)
        with mode:
            inputs = [map_tensors(v, lambda t: torch.empty(t.shape, dtype=t.dtype, device=device)) for v in inputs]
        facts = facts_of(graph_module)
        known = facts.get(ShapedCalls)
        calls = calls_of(graph_module.graph)
        same = {name for name, call in calls.items() if known is not None and known.calls.get(name) == call}
        # symbolic sizes are only understood by the Python side of torch's dispatcher, and torch's own cache of results
        # takes longer than ops with such sizes do
        with defer_gc(), enable_python_dispatcher(), disable_fake_tensor_cache(mode):
            _ShapeRun(graph_module, mode, same, device).propagate_dont_convert_inputs(*inputs)
        facts.put(ShapedCalls(calls))
        facts.put(Shaped())
        return PassResult(graph_module, False)


class _ShapeRun(FakeTensorProp):
    """Recomputes the shapes of nodes whose call is not among the ``same``; weights on meta are fake on ``device``.

    It reads weights as fake tensors, so that an op that writes to one does not change it.
    """

    def __init__(
        self, graph_module: fx.GraphModule, mode: FakeTensorMode, same: Set[str], device: torch.device
    ) -> None:
        super().__init__(graph_module, mode)
        self._same = same
        self._device = device
        self._weights: dict[object, torch.Tensor] = {}
        self._changed = set[fx.Node]()
        self._results: dict[object, tuple[Any, Any]] = {}
        self._keys: dict[fx.Node, object] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The known value of ``n`` if it is still valid, or the result of a node with the same call."""
        before = n.meta.get("val")
        if self._is_valid(n, before):
            return before
        key = self._call_key(n)
        if key is not None and key in self._results:
            result, n.meta["val"] = self._results[key]
        else:
            result = super().run_node(n)
            if key is not None and not has_unbacked_sizes(result):
                self._results[key] = result, n.meta.get("val")
        after = n.meta.get("val")
        if before is None or after is None or not same_shapes(before, after):
            self._changed.add(n)
        return result

    def _call_key(self, n: fx.Node) -> object:
        """A key for all that the shape of the result depends on; None if that is more than shapes of inputs."""
        if n.op != "call_function" or not isinstance(n.target, OpOverload) or n.target._schema.is_mutable:
            return None
        try:
            return n.target, self._key_of(n.args), tuple((name, self._key_of(x)) for name, x in n.kwargs.items())
        except TypeError:
            return None

    def _key_of(self, argument: Any) -> object:
        """The key of an argument of a node; that of a node's value is found once."""
        if isinstance(argument, tuple | list):
            return type(argument), tuple(map(self._key_of, argument))
        if not isinstance(argument, fx.Node):
            return shape_key(argument)
        if argument not in self._keys:
            self._keys[argument] = shape_key(self.env[argument])
        return self._keys[argument]

    def _is_valid(self, n: fx.Node, known: Any) -> bool:
        if n.op in ("placeholder", "output") or n.name not in self._same or not fits_mode(known, self._mode):
            return False
        if n.op != "get_attr":
            return self._changed.isdisjoint(n.all_input_nodes)
        value = self.fetch_attr(str(n.target))
        if not isinstance(value, torch.Tensor) or not isinstance(known, torch.Tensor):
            return False
        device = self._device if value.is_meta else value.device
        traits = value.shape, value.dtype, device, value.stride()
        return traits == (known.shape, known.dtype, known.device, known.stride())

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        if not isinstance(value, torch.Tensor):
            return value
        if self._device == value.device or not value.is_meta:
            return self._mode.from_tensor(value, static_shapes=True)
        traits = value.shape, value.stride(), value.dtype
        if traits not in self._weights:
            with self._mode:
                self._weights[traits] = torch.empty_strided(*traits[:2], dtype=value.dtype, device=self._device)
        return self._weights[traits]


@dataclass(frozen=True, eq=False)
class MaskedOutputs:
    """Outputs of the dense graph with the removed structures zeroed, which the slim graph must reproduce.

    Args:
        inputs: keyword inputs of the run.
        outputs: float tensors, in order; None if the weights are on ``meta`` and nothing can be run.
        dense: the dense graph, to locate a difference; None if its tensors are freed as slim ones are made.
        leaving: outputs of each block, by node, where blocks are compared one by one.
    """

    inputs: Mapping[str, Any]
    outputs: tuple[torch.Tensor, ...] | None
    dense: fx.GraphModule | None
    leaving: Mapping[str, BlockOutput]


def record_masked_outputs(graph_module: fx.GraphModule, *, by_block: bool, seed: int) -> MaskedOutputs:
    """Run the dense graph once with masks.

    The inputs are those that the model was traced with if the caller gave them, else random ones from ``seed``; they
    are left as the fact :class:`VerificationInputs`.
    """
    facts = facts_of(graph_module)
    source, removal = facts.get(Source), facts[Removal]
    inputs = make_inputs(graph_module, None if source is None else source.example_inputs, seed)
    facts.put(VerificationInputs(inputs))
    fidelity = facts.get(Fidelity)
    is_random = fidelity is not None and fidelity.random
    if is_random or has_meta_weights(graph_module):
        why = "the module draws random numbers in evaluation" if is_random else "the weights are on meta"
        add_note(graph_module, f"not verified: {why}")
        return MaskedOutputs(inputs, None, None, {})
    outputs, leaving = masked_by_block(graph_module, removal, inputs, by_block=by_block)
    frees_dense = source is not None and source.shares
    return MaskedOutputs(inputs, outputs, None if frees_dense else fork(graph_module), leaving)


def verify_removal(graph_module: fx.GraphModule, expected: MaskedOutputs) -> Verified:
    """Run the slim graph once and compare, block by block if the outputs of blocks were recorded."""
    facts = facts_of(graph_module)
    verified = Verified(None)
    if expected.outputs is not None:
        blocks: Mapping[str, float] = {}
        with _runs(graph_module):
            if expected.leaving:
                found, blocks = slim_by_block(graph_module, expected.leaving, expected.inputs)
            else:
                found = slim_outputs(graph_module, expected.inputs)
        error = max(compare(expected.outputs, found), *blocks.values(), 0.0)
        verified = Verified(error, blocks)
        if not error <= TOLERANCE:
            wrong = (f"{block}, on its masked inputs" for block, one in blocks.items() if not one <= TOLERANCE)
            where = next(wrong, "the outputs (prune with $inplace=False to see the node)")
            if expected.dense is not None:
                where = find_divergence(expected.dense, graph_module, facts[Removed].removal, expected.inputs)
            what = f"slim and masked outputs differ by {error:.2e}, more than {TOLERANCE:.0e}"
            remedy = "Please report the model's config; freeze the group concerned by leaving its kind out"
            raise VerificationError(what, where=where, remedy=remedy)
    if verified.blocks:
        largest = f"{verified.blocks[verified.worst]:.1e} in {verified.worst}"
        add_note(graph_module, f"verified block by block: the largest difference is {largest}")
    source = facts.get(Source)
    if source is not None and source.cut and is_hugging_face(source.model):
        # The pieces cut off were kept to undo a failed removal. The code of other modules is checked only on emission.
        facts.put(replace(source, cut=()))
    return verified


@contextmanager
def _runs(slim: fx.GraphModule) -> Iterator[None]:
    """Name the node at which a slim graph does not run: the rule of its op says less than the op does."""
    try:
        yield
    except (FxpruneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # an op of the user may raise anything
        said = re.search(r"While executing %(\w+)", str(error))  # torch adds the node to the message
        node = next((node for node in slim.graph.nodes if said and node.name == said[1]), None)
        raise VerificationError(
            f"the slim graph does not run: {Refusal(error)}",
            where="the slim graph" if node is None else f"{node.name} ({node.target})",
            remedy="Check the rule of this op: a size among its arguments needs op.size_argument, an axis that has to "
            "stay op.freeze; if the rule is none of yours, please report this as a defect of fxprune",
        ) from error


@dataclass(frozen=True, eq=False)
class BypassBlocksPass(Pass):
    """Replaces each removed block by the identity; eliminate-dead-code then removes its nodes."""

    name: ClassVar[str] = "bypass-blocks"
    stage: ClassVar[str] = "shrink"
    writes: ClassVar[bool] = False
    needs: ClassVar[tuple[type[Fact], ...]] = (Dependencies, Removal)
    gives: ClassVar[tuple[type[Fact], ...]] = (Bypassed,)
    drops: ClassVar[tuple[type[Fact], ...]] = (Removal, Dependencies, Groups, Scores, Verified)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        facts = facts_of(graph_module)
        removal, axes = facts[Removal], facts[Dependencies].axes
        if removal.axes is not axes:
            remedy = "Decide on this one, or carry the plan over as text with plan-from-json"
            raise PlanError("the removal was decided on another graph", where=f"pass {self.name}", remedy=remedy)
        nodes = {node.name: node for node in graph_module.graph.nodes}
        bypasses = [axes.bypasses[block] for block in removal.removed_blocks]
        # last block first: the input of a block may be the output of another removed one
        for bypass in sorted(bypasses, key=lambda bypass: nodes[bypass.target], reverse=True):
            nodes[bypass.target].replace_all_uses_with(nodes[bypass.source])
        facts.put(Bypassed(removal))
        return PassResult(graph_module, bool(bypasses))


@dataclass(frozen=True, eq=False)
class RewriteLiteralsPass(Pass):
    """Rewrites view sizes, slice bounds, split sizes, normalised shapes, repeat and group counts to the slim axes.

    A size computed at run time that has a pruned part (batch times heads) is scaled by new over old, unless it is read
    off a tensor that lost that part. The epsilon added to an average is multiplied by old over new in a norm that is
    kept as in the masked model.
    """

    name: ClassVar[str] = "rewrite-literals"
    stage: ClassVar[str] = "shrink"
    writes: ClassVar[bool] = False
    needs: ClassVar[tuple[type[Fact], ...]] = (Sliced,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Removed, Runnable)
    drops: ClassVar[tuple[type[Fact], ...]] = (Sliced,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        facts = facts_of(graph_module)
        removal = facts[Sliced].removal
        nodes = {node.name: node for node in graph_module.graph.nodes}
        changed = False
        for literal in removal.axes.size_arguments:
            node = nodes.get(literal.node)
            old, new = literal.expr.size, kept_size(literal.expr, removal.keep)
            if node is None or old == new:
                continue
            current = read_argument(node, literal.path)
            if current == -1:
                continue
            if isinstance(current, fx.Node):
                graph = node.graph
                old = _slim_value(current, removal, old)
                if old == new:
                    continue
                with graph.inserting_before(node):
                    product = graph.call_function(operator.mul, (current, new))
                    size = graph.call_function(operator.floordiv, (product, old))
            else:
                size = new + literal.offset
            set_argument(node, literal.path, size)
            changed = True
        for (name, path), number in scaled_numbers(removal.axes, removal.keep).items():
            if name in nodes:
                set_argument(nodes[name], path, number.after)
                changed = True
        facts.put(Removed(removal))
        facts.put(Runnable())
        graph_module.recompile()
        return PassResult(graph_module, changed)


def _slim_value(size: fx.Node, removal: Removal, dense: int) -> int:
    """The value of a size computed at run time once tensors are slim; ``dense`` if it is not one of their sizes."""

    def value(node: Any) -> Any:
        if node.target is torch.ops.aten.sym_size.int:
            source, axis = cast(tuple[fx.Node, int], node.args)
            return kept_size(removal.axes.tensors[tensor_name(source)][axis], removal.keep)
        if not callable(node.target) or isinstance(node.target, OpOverload):
            raise KeyError(node.name)
        return node.target(*fx.map_arg(node.args, value))

    try:
        return int(value(size))
    except KeyError:
        return dense


@dataclass(frozen=True, eq=False)
class EliminateDeadCodePass(Pass):
    """Removes every node and tensor that the output does not need; the graph is linted and recompiled."""

    name: ClassVar[str] = "eliminate-dead-code"
    stage: ClassVar[str] = "shrink"
    writes: ClassVar[bool] = False
    keeps: ClassVar[tuple[type[Fact], ...]] = (Verified,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        changed = graph_module.graph.eliminate_dead_code(is_impure)
        read = {name for name, _ in weights(graph_module)}
        for name in [name for name, _ in named_tensors(graph_module) if name not in read]:
            owner, _, leaf = name.rpartition(".")
            delattr(submodule(graph_module, owner), leaf)
            changed = True
        graph_module.delete_all_unused_submodules()
        if changed:  # an unchanged graph has been linted before
            graph_module.graph.lint()
        graph_module.recompile()
        return PassResult(graph_module, changed)


@dataclass(frozen=True, eq=False)
class ShrinkPass(PassSequence):
    """Carries out a removal: blocks are bypassed, tensors cut, literals rewritten, and dead code eliminated.

    With ``verify`` the outputs of the masked dense graph are recorded before, and the slim graph is compared after.
    """

    name: ClassVar[str] = "shrink"
    stage: ClassVar[str] = "shrink"

    verify: bool = argument(False, "Check that the slim graph equals the dense one with the same structures zeroed.")
    by_block: bool = argument(
        False, "Compare every block of the slim graph on its own masked inputs, and report the worst."
    )
    seed: int = argument(0, "Seed of random verification inputs.", check=as_seed)

    @property
    def steps(self) -> tuple[Pass, ...]:
        return (
            BypassBlocksPass(),
            EliminateDeadCodePass(),
            SliceParametersPass(),
            RewriteLiteralsPass(),
            PropagateShapesPass(),
            EliminateDeadCodePass(),
        )

    @property
    def gives(self) -> tuple[type[Fact], ...]:  # type: ignore[override]
        return (*super().gives, VerificationInputs, Verified) if self.verify else super().gives

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        cache, expected = cache_size(graph_module, facts_of(graph_module)[Removal]), None
        if self.verify:
            with use_prefetcher(True):
                expected = record_masked_outputs(graph_module, by_block=self.by_block, seed=self.seed)
        result = super().call(graph_module)
        facts = facts_of(result.graph_module)
        if cache is not None:
            facts.put(cache)
        if expected is not None:
            with use_prefetcher(True):
                facts.put(verify_removal(result.graph_module, expected))
        return result
