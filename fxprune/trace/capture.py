"""Tracing: ``torch.export`` of a copy without storage, lowered to a graph that is bound to the real weights.

The copy has fake parameters, so nothing is computed and no memory is used, whatever the size of the model. A float32
model is traced in bfloat16: only then does the graph distinguish a cast *to float32* (a norm's upcast, to keep) from a
cast *back to the dtype of the model* (to follow the weights).
"""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import ArgumentError, TraceError
from fxprune.graph.compat import fake_mode, is_impure, tree_leaves, tree_map
from fxprune.graph.context import (
    Refusal,
    attempt,
    default_modes,
    defer_gc,
    hold_signals,
    plain_export,
    quiet,
    recompile_lazily,
    wrap_errors,
)
from fxprune.graph.counting import Work, count_bytes, count_macs, count_parameters
from fxprune.graph.facts import Blocks, Constants, Facts, Notes, Runnable, Shaped, Source, find_blocks, set_facts
from fxprune.graph.shapes import ShapedCalls, calls_of, change_dtype
from fxprune.graph.tensors import has_meta_weights, is_input, map_tensors, names_by_identity, weights
from fxprune.pipeline.arguments import flag
from fxprune.pipeline.pipeline import html_table
from fxprune.rules.registry import written_sources
from fxprune.trace.canonical import canonicalize, fold_constants, move_constants, remove_in_place_ops
from fxprune.trace.fidelity import Fidelity, compare_with_module, input_sizes, limit_sizes, pin_sizes
from fxprune.trace.inputs import (
    blank,
    check_copies,
    check_inputs,
    check_model,
    check_runs,
    check_values,
    deciding_inputs,
    default_inputs,
    dynamic_dims,
    fake_twin,
    hooks_left_out,
    keep_values,
    model_dtype,
    name_arguments,
    without_cache,
)
from fxprune.trace.lower import PLAIN_OPS, lower
from fxprune.trace.repeats.copies import skip_repeats
from fxprune.trace.repeats.grouping import Repeats, find_dependence, find_repeats


@dataclass(frozen=True)
class Traced:
    """A model as a graph.

    Args:
        graph_module: the ATen graph, canonical, sharing its parameters with the model.
        model: the model it was traced from.
        notes: limits of the graph in words; usually empty.
    """

    graph_module: fx.GraphModule
    model: nn.Module
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Traced {'; '.join(f'{name}: {value}' for name, value in self._rows())}>"

    def __str__(self) -> str:
        return "\n".join((*(f"{name}: {value}" for name, value in self._rows()), *self.notes))

    def _repr_html_(self) -> str:
        return html_table("Traced", [*self._rows(), *(("note", note) for note in self.notes)])

    def _rows(self) -> list[tuple[str, str]]:
        inputs = [node.name for node in self.graph_module.graph.nodes if is_input(node)]
        return [
            ("model", type(self.model).__name__),
            ("parameters", f"{count_parameters(self.graph_module):,}"),
            ("nodes", f"{len(self.graph_module.graph.nodes):,}"),
            ("inputs", ", ".join(inputs)),
        ]


@default_modes()
@wrap_errors("model", "Pass a module that runs on example_inputs, and check the arguments", TraceError)
def trace(
    model: nn.Module, example_inputs: Mapping[str, Any] | None = None, *, dynamic: bool = True, check: bool = True
) -> Traced:
    """Trace ``model`` to an ATen graph that shares its weights; the model itself is not changed.

    Args:
        model: any module that ``torch.export`` can trace, with real weights or on ``meta``, in any dtype.
        example_inputs: keyword inputs of ``forward``; if None, ``input_ids`` are made for a Hugging Face model.
        dynamic: let batch and sequence vary. Static shapes trace twice as fast, which is enough for discovery; the
            graph then runs at the traced shape alone.
        check: run the model and the graph on a few inputs, and compare outputs and gradients.

    Raises:
        UnsupportedModelError: the model is quantised, on several devices, or has no parameters.
        ArgumentError: ``forward`` does not take the example inputs.
        TraceError: the module cannot be traced, or its graph computes something else; names the line of its code, or
            the node.
    """
    dynamic, check = flag("dynamic", dynamic), flag("check", check)
    check_model(model)
    if example_inputs is not None:
        check_inputs(model, example_inputs)
    if check:
        check_values(model)
    inputs = default_inputs(model, example_inputs)
    on_meta = all(parameter.is_meta for parameter in model.parameters())
    with defer_gc() if on_meta else nullcontext():  # garbage holds no storage
        graph_module, fidelity, notes = _first_that_agrees(model, example_inputs, inputs, dynamic, check)
        if check and fidelity.error is None and example_inputs is not None and not has_meta_weights(graph_module):
            check_runs(model, example_inputs)
        _set_facts(graph_module, model, example_inputs, notes, fidelity)
    return Traced(graph_module, model, tuple(notes))


def _first_that_agrees(
    model: nn.Module, example_inputs: Mapping[str, Any] | None, inputs: dict[str, Any], dynamic: bool, check: bool
) -> tuple[fx.GraphModule, Fidelity, list[str]]:
    """The graph of the first faithful export, its fidelity, and notes; exports are tried in a fixed order."""
    native = model_dtype(model)
    portable = torch.bfloat16 if native == torch.float32 else native
    with defer_gc():
        dry_run = find_repeats(model, inputs, native)
        depends = find_dependence(model, inputs, native, portable, dry_run)
    notes: list[str] = []
    if depends.dtype:
        notes.append(f"runs in {native} alone: the model's code depends on its dtype, in {depends.dtype}")
        portable = native
    failure: Exception | None = None
    fidelity: Fidelity | None = None
    deciding = deciding_inputs(model, inputs)
    # from the fastest and most general way to the safest: dtype, dynamic sizes, blocks to copy, and whether values of
    # inputs that decide the graph are those of the example
    ways = [(portable, dynamic, dry_run.repeats if dry_run else (), False), (portable, dynamic, (), False)]
    ways += [(portable, dynamic, (), True)] if deciding else []
    ways += [(native, dynamic, (), False), (native, False, (), False)]
    for dtype, free, copied, decided in dict.fromkeys(ways):
        known = deciding if decided else {}
        with defer_gc():
            try:
                program = _export(model, inputs, native, dtype, free, copied, known)
            except Exception as error:  # torch.export passes on any error of the model's own code
                if not copied:
                    failure = failure or error
                    notes.append(f"not traceable in {dtype}, dynamic={free}: {_first_line(error)}")
                continue
            with recompile_lazily():
                graph_module, limits = _graph_of(program, model, inputs, native, dtype, known)
            del program
        fidelity = compare_with_module(graph_module, model, example_inputs) if check else Fidelity(None)
        if not fidelity.where:
            break
        if not copied:
            notes.append(f"not the same as the module if traced in {dtype}, dynamic={free}: {fidelity.where}")
    else:
        raise _trace_error(model, example_inputs, failure, fidelity)
    hooked = hooks_left_out(model)
    notes += [*limits, *fidelity.notes]
    notes += [f"without the hooks of {', '.join(hooked)}"] if hooked else []
    in_eval = f"the graph is the model in eval(): in train() it differs, first in {depends.mode}"
    return graph_module, fidelity, notes + ([in_eval] if depends.mode else [])


def _graph_of(
    program: torch.export.ExportedProgram,
    model: nn.Module,
    inputs: Mapping[str, Any],
    native: torch.dtype,
    dtype: torch.dtype,
    known: Mapping[str, torch.Tensor],
) -> tuple[fx.GraphModule, list[str]]:
    """The canonical graph of a program, bound to the weights, and the limits on its inputs in words."""
    fixed = {"use_cache"} - set(inputs)
    graph_module = lower(program, model, dtype if dtype != torch.float32 else None, fixed, known)
    if dtype != native:
        change_dtype(graph_module.graph, dtype, native)
    remove_in_place_ops(graph_module)
    fold_constants(graph_module, model)
    canonicalize(graph_module)
    move_constants(graph_module, model)
    _refuse_writes_to_parameters(graph_module)
    sizes = input_sizes(graph_module.graph)
    graph_module.graph.eliminate_dead_code(is_impure)
    if not graph_module.graph.output_node().all_input_nodes:  # all of it would be dead code
        raise TraceError(
            "it returns no tensor",
            where=f"forward of {type(model).__name__}",
            remedy="Return tensors, or lists, tuples and dicts of them",
        )
    pinned = pin_sizes(graph_module)
    limits = [f"runs at the values of {', '.join(known)} that it was traced with"] if known else []
    limits += [f"runs at {pinned}"] if pinned else []
    limits += [f"holds for {limit}" for limit in limit_sizes(graph_module, sizes)]
    graph_module.graph.eliminate_dead_code(is_impure)
    return graph_module, limits


def _refuse_writes_to_parameters(graph_module: fx.GraphModule) -> None:
    """Raise if the graph changes a parameter in each run, as of a model that rescales its weights in the first one.

    The bound on the norm of an embedding's rows is left: repeated, it changes nothing.
    """
    parameters = {name for name, tensor in weights(graph_module) if isinstance(tensor, nn.Parameter)}
    written = sorted(parameters & written_sources(graph_module.graph, {torch.ops.aten.embedding_renorm_.default}))
    if written:
        remedy = "If it does so in its first run alone, run the model once before"
        raise TraceError(
            "forward changes parameters in place",
            where=", ".join(written[:3]),
            remedy=remedy,
            shell=f"{remedy}, and prune it from Python",
        )


def _trace_error(
    model: nn.Module, example_inputs: Mapping[str, Any] | None, failure: Exception | None, fidelity: Fidelity | None
) -> TraceError:
    name = type(model).__name__
    if fidelity is not None and fidelity.where:
        return TraceError(
            f"the graph of {name} computes something else than {name} does: outputs differ by {fidelity.error:.1e}",
            where=fidelity.where,
            remedy="Make that code depend on inputs and weights alone, not on state, time or global settings; or pass "
            "other inputs",
        )
    assert failure is not None
    check_copies(model)
    shell = "Rewrite that line without data-dependent Python"
    remedy = f"{shell}, or pass other example_inputs"
    where = f"forward of {name}"
    frames = traceback.extract_tb(failure.__traceback__)
    for frame in frames:
        builtin = frame.filename.startswith(sysconfig.get_path("stdlib")) and "site-packages" not in frame.filename
        if not builtin and not re.search("/torch/|/fxprune/|^<", frame.filename):
            where = f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
    if any(re.search("/torch/(_higher_order_ops|nn/attention)/", frame.filename) for frame in frames):
        remedy = shell = PLAIN_OPS
    elif example_inputs is not None and not any(parameter.is_meta for parameter in model.parameters()):
        found = attempt(check_runs, model, example_inputs, refusals=(ArgumentError,))
        if isinstance(found, Refusal) and isinstance(found.error, ArgumentError):
            remedy = "The model itself does not run on these example_inputs: pass others"
    error = TraceError(f"{name} cannot be traced: {_first_line(failure)}", where=where, remedy=remedy, shell=shell)
    error.__cause__ = failure
    return error


def _set_facts(
    graph_module: fx.GraphModule,
    model: nn.Module,
    example_inputs: Mapping[str, Any] | None,
    notes: list[str],
    fidelity: Fidelity,
) -> None:
    in_model = names_by_identity(model)
    names = {name: in_model.get(id(tensor), ()) for name, tensor in weights(graph_module)}
    held = {name for several in in_model.values() for name in several}
    constants = Constants(tuple(name for name in names if name not in held))
    about = Source(model, names, example_inputs), Blocks(find_blocks(model)), constants, Notes(tuple(notes)), fidelity
    facts = Facts()
    for fact in (*about, Runnable(), Shaped(), ShapedCalls(calls_of(graph_module.graph))):
        facts.put(fact)
    set_facts(graph_module, facts)
    kind = type(model).__name__
    on_hub = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "").rstrip("/").rpartition("/")[2]
    read = {id(tensor) for _, tensor in weights(graph_module)}
    outside = sum(one.numel() for one in model.parameters() if id(one) not in read)
    name, memory = f"{on_hub} ({kind})" if on_hub else kind, count_bytes(graph_module)
    parameters, macs = count_parameters(graph_module), count_macs(graph_module)
    facts.put(Work(parameters, macs, memory=memory, model=name, outside=outside))


def _export(
    model: nn.Module,
    inputs: dict[str, Any],
    native: torch.dtype,
    dtype: torch.dtype,
    dynamic: bool,
    repeats: Repeats,
    known: Mapping[str, torch.Tensor],
) -> torch.export.ExportedProgram:
    mode = fake_mode()
    twin = fake_twin(model, mode, native, dtype)
    inputs = tree_map(lambda value: blank(value, native, dtype), inputs) | without_cache(twin)
    dims = dynamic_dims(inputs) | dict.fromkeys(known)
    name_arguments(twin, inputs)
    if known:
        keep_values(twin, known, dtype)
    skip_repeats(twin, repeats)
    if not dynamic:
        with mode:
            inputs = map_tensors(inputs, torch.empty_like)
    export = partial(torch.export.export, twin, (), inputs, dynamic_shapes=dims if dynamic else None, strict=False)
    with hold_signals(), quiet(), plain_export(), torch.enable_grad():
        try:
            return export()
        except RuntimeError as error:
            if _UNKNOWN not in str(error):
                raise
            twin.register_forward_hook(_leave_out_objects)
            return export()


_UNKNOWN = "in output, which is not a known type"
"""What ``torch.export`` says of an object among the outputs."""

_RETURNED = (torch.Tensor, int, float, complex, str, type(None))
"""Types that ``torch.export`` takes as outputs."""


def _leave_out_objects(module: nn.Module, args: Any, output: Any) -> Any:
    """Hook of the outermost module: without named outputs such as a cache, which no graph can return."""
    if not isinstance(output, dict):
        return output
    kept = {name: x for name, x in output.items() if all(isinstance(leaf, _RETURNED) for leaf in tree_leaves(x))}
    return output if len(kept) == len(output) else type(output)(**kept)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
