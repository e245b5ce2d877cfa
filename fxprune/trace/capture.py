"""Tracing: ``torch.export`` of a copy without storage, and the graph that it gives, bound to the real weights.

The copy has fake parameters, so nothing is computed and no memory is used, whatever the size of the model. A float32
model is traced in bfloat16: only so does the graph tell a cast *to float32* (a norm's upcast, to keep) from a cast
*back to the dtype of the model* (to follow the weights).
"""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import TraceError
from fxprune.graph.blocks import Blocks, find_blocks
from fxprune.graph.compat import FakeTensorMode, fake_mode, is_impure
from fxprune.graph.facts import Facts, Notes, Runnable, Shaped, set_facts
from fxprune.graph.silence import quiet
from fxprune.graph.source import Constants, Source
from fxprune.graph.tensors import as_parameter, names_by_identity, weights
from fxprune.trace.canonical import canonicalize, plain_in_place
from fxprune.trace.checks import check_model, model_dtype
from fxprune.trace.fold import fold_constants, place_constants
from fxprune.trace.inputs import default_inputs, dynamic_dims, is_hugging_face
from fxprune.trace.lower import lower
from fxprune.trace.sizes import pin_sizes

__all__ = ["Traced", "meta_twin", "trace"]


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


def trace(model: nn.Module, example_inputs: Mapping[str, Any] | None = None, *, dynamic: bool = True) -> Traced:
    """Trace ``model`` to a graph that shares its weights; the model itself is not touched.

    Args:
        model: any module that ``torch.export`` can trace, with real weights or on ``meta``, in any dtype.
        example_inputs: keyword inputs of ``forward``; for a Hugging Face model None, and ``input_ids`` is made.
        dynamic: let batch and sequence vary. Without, tracing takes half the time, which is enough for discovery;
            the graph then runs at the traced shape alone.

    Raises:
        UnsupportedModelError: the model is quantised, on several devices, or has no parameters.
        TraceError: the module cannot be traced; says at which line of its code.
    """
    check_model(model)
    inputs = default_inputs(model, example_inputs)
    own = model_dtype(model)
    attempts = [(torch.bfloat16 if own == torch.float32 else own, dynamic), (own, dynamic), (own, False)]
    notes: list[str] = []
    failure: Exception | None = None
    for dtype, free in dict.fromkeys(attempts):
        try:
            program = _export(model, inputs, own, dtype, free)
            break
        except Exception as error:  # torch.export raises whatever the model's own code does
            failure = failure or error
            notes.append(f"not traceable in {dtype}, dynamic={free}: {_first_line(error)}")
    else:
        assert failure is not None
        raise TraceError(
            f"{type(model).__name__} cannot be traced: {_first_line(failure)}",
            where=_culprit(failure),
            remedy="Rewrite that line without data-dependent Python, or pass other example_inputs",
        ) from failure
    portable = dtype if dtype != torch.float32 else None
    graph_module = lower(program, model, portable)
    _restore_inputs(graph_module, own, dtype)
    plain_in_place(graph_module)
    fold_constants(graph_module, model)
    canonicalize(graph_module)
    place_constants(graph_module, model)
    graph_module.graph.eliminate_dead_code(is_impure)
    graph_module.recompile()
    pinned = pin_sizes(graph_module) if dynamic else ""
    notes += [f"runs at {pinned}"] if pinned else []
    _learn(graph_module, model, example_inputs, notes)
    return Traced(graph_module, model, tuple(notes))


def _learn(
    graph_module: fx.GraphModule, model: nn.Module, example_inputs: Mapping[str, Any] | None, notes: list[str]
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
    facts.put(Runnable())
    facts.put(Shaped())
    set_facts(graph_module, facts)


def _export(
    model: nn.Module, inputs: dict[str, Any], own: torch.dtype, dtype: torch.dtype, dynamic: bool
) -> torch.export.ExportedProgram:
    mode = fake_mode()
    twin = _fake_copy(model, mode, own, dtype)
    inputs = {name: _traced_input(value, own, dtype) for name, value in inputs.items()}
    fixed: dict[str, Any] = {}
    if is_hugging_face(model):
        _prefer_traceable_attention(twin)
        fixed = _without_cache(twin)
    dims = dynamic_dims(inputs) | {name: None for name in fixed}
    if not dynamic:
        with mode:
            inputs = {k: torch.empty_like(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with quiet(), _without_fast_path():
        return torch.export.export(twin, (), inputs | fixed, dynamic_shapes=dims if dynamic else None, strict=False)


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Make attention modules of torch trace to many small ops, not to one op for a whole block."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _fake_copy(model: nn.Module, mode: FakeTensorMode, own: torch.dtype, dtype: torch.dtype) -> nn.Module:
    """Return a copy whose parameters and buffers have no storage, the parameters of dtype ``own`` made ``dtype``."""
    memo: dict[int, Any] = {}
    with mode:
        for tensor in (*model.parameters(), *model.buffers()):
            wanted = dtype if isinstance(tensor, nn.Parameter) and tensor.dtype == own else tensor.dtype
            memo[id(tensor)] = as_parameter(torch.empty(tensor.shape, dtype=wanted, device="cpu"), tensor)
    return copy.deepcopy(model, memo).eval()


def meta_twin(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` that has everything but storage."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = as_parameter(torch.empty_like(tensor, device="meta"), tensor)
    return copy.deepcopy(model, memo)


def _traced_input(value: Any, own: torch.dtype, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.zeros(value.shape, dtype=dtype if value.dtype == own else value.dtype)


def _restore_inputs(graph_module: fx.GraphModule, own: torch.dtype, dtype: torch.dtype) -> None:
    """Give inputs that were made ``dtype`` for tracing the dtype ``own`` again, which is what the graph runs on."""
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and node.meta["val"].dtype == dtype:
            node.meta["val"] = node.meta["val"].to(own)


def _prefer_traceable_attention(model: Any) -> None:
    """Choose attention and experts that trace to plain ATen ops; ``model`` is our own copy."""
    if model.config._attn_implementation not in ("sdpa", "eager"):
        model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
    if getattr(model.config, "_experts_implementation", None) is not None:
        model.config._experts_implementation = "batched_mm"


def _without_cache(model: Any) -> dict[str, bool]:
    """Keep ``model``, our own copy, from returning a cache; return the arguments that this takes besides its config.

    An argument that ``forward`` takes among its keywords only would fix all sizes: exporting does not allow it beside
    dynamic ones.
    """
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "use_cache"):
            config.use_cache = False
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _culprit(error: Exception) -> str:
    """Return file, line and code of the innermost frame that is the model's own, not torch's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "/fxprune/" not in f.filename]
    last = (own or frames)[-1]
    return f"{last.filename}:{last.lineno} in {last.name}: {last.line}"
