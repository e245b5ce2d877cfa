"""Tracing: ``torch.export`` of a copy without storage, and the graph that it gives, bound to the real weights.

The copy has fake parameters, so nothing is computed and no memory is used, whatever the size of the model. A float32
model is traced in bfloat16: only so does the graph tell a cast *to float32* (a norm's upcast, to keep) from a cast
*back to the dtype of the model* (to follow the weights).
"""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import TraceError
from fxprune.graph.compat import fake_mode, is_impure, tree_map
from fxprune.graph.context import clear_errors, lean, neutral, quiet, tidy_later, without_fast_path
from fxprune.graph.counting import count_parameters
from fxprune.graph.facts import Blocks, Constants, Facts, Notes, Runnable, Shaped, Source, find_blocks, set_facts
from fxprune.graph.shapes import ShapedCalls, calls_of, retype
from fxprune.graph.tensors import is_input, names_by_identity, on_meta, weights
from fxprune.pipeline.arguments import flag
from fxprune.pipeline.notebook import html_table
from fxprune.trace.canonical import canonicalize, fold_constants, place_constants, plain_in_place
from fxprune.trace.checks import (
    check_copies,
    check_inputs,
    check_model,
    check_outputs,
    check_runs,
    check_values,
    model_dtype,
)
from fxprune.trace.fidelity import Fidelity, assess
from fxprune.trace.inputs import blank, default_inputs, dynamic_dims, fake_twin, hooks_left_out, without_cache
from fxprune.trace.limits import limit_sizes, pin_sizes, sizes_of
from fxprune.trace.lower import lower
from fxprune.trace.repeats.copies import stand_in
from fxprune.trace.repeats.grouping import Repeats, dependence, observe

__all__ = ["Traced", "trace"]


@dataclass(frozen=True)
class Traced:
    """A model as a graph.

    Args:
        graph_module: the ATen graph, canonical, sharing its parameters with the model.
        model: the model it was traced from.
        notes: what had to be given up on the way, in words; usually empty.
    """

    graph_module: fx.GraphModule
    model: nn.Module
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """The model and the size of its graph, in a line."""
        return f"<Traced {'; '.join(f'{name}: {value}' for name, value in self._rows())}>"

    def __str__(self) -> str:
        """The same, and the notes, one a line."""
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


@neutral()
@clear_errors("model", "Pass a module that runs on example_inputs, and check the arguments", TraceError)
def trace(
    model: nn.Module, example_inputs: Mapping[str, Any] | None = None, *, dynamic: bool = True, check: bool = True
) -> Traced:
    """Trace ``model`` to a graph that shares its weights and computes the same; the model itself is not touched.

    Args:
        model: any module that ``torch.export`` can trace, with real weights or on ``meta``, in any dtype.
        example_inputs: keyword inputs of ``forward``; for a Hugging Face model None, and ``input_ids`` is made.
        dynamic: let batch and sequence vary. Without, tracing takes half the time, which is enough for discovery;
            the graph then runs at the traced shape alone.
        check: run the model and the graph on a few inputs, and compare outputs and gradients.

    Raises:
        UnsupportedModelError: the model is quantised, on several devices, or has no parameters.
        ArgumentError: ``forward`` does not take the example inputs.
        TraceError: the module cannot be traced, or does not compute what its graph does; says at which line of its
            code, or at which node.
    """
    dynamic, check = flag("dynamic", dynamic), flag("check", check)
    _check(model, example_inputs, values=check)
    inputs = default_inputs(model, example_inputs)
    own = model_dtype(model)
    notes: list[str] = []
    portable = torch.bfloat16 if own == torch.float32 else own
    with tidy_later():
        seen = observe(model, inputs, own)
        depends = dependence(model, inputs, own, portable, seen)
    if depends.dtype:
        notes.append(f"runs in {own} alone: what the model computes depends on its dtype, in {depends.dtype}")
        portable = own
    failure: Exception | None = None
    fidelity: Fidelity | None = None
    none, repeats = Repeats(), Repeats() if seen is None else seen.repeats
    attempts = [(portable, dynamic, repeats), (portable, dynamic, none), (own, dynamic, none), (own, False, none)]
    for dtype, free, copied in dict.fromkeys(attempts):
        with tidy_later():
            try:
                program = _export(model, inputs, own, dtype, free, copied)
            except Exception as error:  # torch.export raises whatever the model's own code does
                if copied == none:
                    failure = failure or error
                    notes.append(f"not traceable in {dtype}, dynamic={free}: {_first_line(error)}")
                continue
            graph_module, limits = _graph_of(program, model, inputs, own, dtype)
            del program
        fidelity = assess(graph_module, model, example_inputs) if check else Fidelity(None)
        if not fidelity.where:
            break
        if copied == none:
            notes.append(f"not the same as the module if traced in {dtype}, dynamic={free}: {fidelity.where}")
    else:
        raise _refusal(model, failure, fidelity)
    if check and fidelity.error is None and example_inputs is not None and not on_meta(graph_module):
        check_runs(model, example_inputs)
    notes += [*limits, *fidelity.notes, *_left_out(model, depends.mode)]
    graph_module.recompile()
    _learn(graph_module, model, example_inputs, notes, fidelity)
    return Traced(graph_module, model, tuple(notes))


def _check(model: nn.Module, example_inputs: Mapping[str, Any] | None, *, values: bool) -> None:
    """Refuse what cannot be traced, before any of it is."""
    check_model(model)
    if example_inputs is not None:
        check_inputs(model, example_inputs)
    if values:
        check_values(model)


def _graph_of(
    program: torch.export.ExportedProgram,
    model: nn.Module,
    inputs: Mapping[str, Any],
    own: torch.dtype,
    dtype: torch.dtype,
) -> tuple[fx.GraphModule, list[str]]:
    """Return a program as a canonical graph bound to the weights, and the sizes that it holds for, in words."""
    graph_module = lower(program, model, dtype if dtype != torch.float32 else None, fixed={"use_cache"} - set(inputs))
    if dtype != own:  # the graph runs on what it was not traced in
        retype(graph_module.graph, dtype, own)
    plain_in_place(graph_module)
    fold_constants(graph_module, model)
    canonicalize(graph_module)
    place_constants(graph_module, model)
    sizes = sizes_of(graph_module.graph)
    graph_module.graph.eliminate_dead_code(is_impure)
    check_outputs(graph_module, model)
    pinned = pin_sizes(graph_module)
    limits = [f"runs at {pinned}"] if pinned else []
    limits += [f"holds for {limit}" for limit in limit_sizes(graph_module, sizes)]
    graph_module.graph.eliminate_dead_code(is_impure)
    return graph_module, limits


def _refusal(model: nn.Module, failure: Exception | None, fidelity: Fidelity | None) -> TraceError:
    name = type(model).__name__
    if fidelity is not None and fidelity.where:
        return TraceError(
            f"the graph of {name} computes something else than {name} does: outputs differ by {fidelity.error:.1e}",
            where=fidelity.where,
            remedy="What that code does must follow from inputs and weights alone; pass other inputs, or freeze "
            "what depends on state, time or global settings",
        )
    assert failure is not None
    check_copies(model)
    error = TraceError(
        f"{name} cannot be traced: {_first_line(failure)}",
        where=_culprit(failure) or f"forward of {name}",
        remedy="Rewrite that line without data-dependent Python, or pass other example_inputs",
    )
    error.__cause__ = failure
    return error


def _left_out(model: nn.Module, call: str) -> list[str]:
    """Return what is not in the graph, in words; ``call`` is the first that the model makes otherwise in train()."""
    hooked = hooks_left_out(model)
    notes = [f"without the hooks of {', '.join(hooked)}"] if hooked else []
    return notes + ([f"the graph is the model in eval(): in train() it differs, first in {call}"] if call else [])


def _learn(
    graph_module: fx.GraphModule,
    model: nn.Module,
    example_inputs: Mapping[str, Any] | None,
    notes: list[str],
    fidelity: Fidelity,
) -> None:
    """Give the graph the facts that are known once it is traced."""
    own = names_by_identity(model)
    names = {name: own.get(id(tensor), ()) for name, tensor in weights(graph_module)}
    held = {name for several in own.values() for name in several}
    facts = Facts()
    facts.put(Source(model, names, example_inputs))
    facts.put(Blocks(find_blocks(model)))
    facts.put(Constants(tuple(name for name in names if name not in held)))
    facts.put(Notes(tuple(notes)))
    facts.put(fidelity)
    facts.put(Runnable())
    facts.put(Shaped())
    facts.put(ShapedCalls(calls_of(graph_module.graph)))
    set_facts(graph_module, facts)


def _export(
    model: nn.Module, inputs: dict[str, Any], own: torch.dtype, dtype: torch.dtype, dynamic: bool, repeats: Repeats
) -> torch.export.ExportedProgram:
    mode = fake_mode()
    twin = fake_twin(model, mode, own, dtype)
    inputs = tree_map(lambda value: blank(value, own, dtype), inputs) | without_cache(twin)
    dims = dynamic_dims(inputs)
    stand_in(twin, repeats)
    if not dynamic:
        with mode:
            inputs = tree_map(
                lambda value: torch.empty_like(value) if isinstance(value, torch.Tensor) else value, inputs
            )
    with quiet(), without_fast_path(), lean(), torch.enable_grad():
        return torch.export.export(twin, (), inputs, dynamic_shapes=dims if dynamic else None, strict=False)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _culprit(error: Exception) -> str:
    """Return file, line and code of the innermost frame that is the model's own; empty where none is."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_machinery(frame.filename)]
    return f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}: {own[-1].line}" if own else ""


def _is_machinery(file: str) -> bool:
    """Whether a file belongs to torch, to this package or to Python itself, or is none."""
    library = file.startswith(sysconfig.get_path("stdlib")) and "site-packages" not in file
    return library or "/torch/" in file or "/fxprune/" in file or file.startswith("<")
