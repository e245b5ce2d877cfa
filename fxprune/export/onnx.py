"""ONNX models: export and runs; and the checks and file writing that all exports share."""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fxprune.errors import ExportError, FxpruneError
from fxprune.graph.compat import tree_unflatten
from fxprune.graph.context import quiet
from fxprune.offload.atomic import atomic_path

__all__ = ["COMPANIONS", "LOW_PRECISION_TOLERANCE", "run_onnx", "wrap_export_errors", "write_onnx"]

LOW_PRECISION_TOLERANCE = 2e-2
"""Accepted difference of logits with weights narrower than float32: two runtimes round at different places.

One rounding to bfloat16 is off by up to ``2**-8``; this leaves room for five that add up.
"""

COMPANIONS = (".data",)
"""Endings of files beside an ONNX model, named after it: weights over 2 GB."""


def require_packages(*names: str) -> None:
    """Raise ExportError if packages that ONNX needs are missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX needs {', '.join(missing)}", where="packages", remedy="pip install 'fxprune[onnx]'")


@contextmanager
def wrap_export_errors(path: Path | None = None) -> Iterator[None]:
    """Turn exceptions of torch and onnxruntime into an ExportError of one line; those for want of memory stay."""
    try:
        yield
    except (FxpruneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch and onnxruntime raise many types, some of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = path.name if path is not None else "graph_module"
        raise ExportError(f"cannot be exported: {reason}", where=where, remedy="The cause has the details") from error


def write_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    axes: Sequence[dict[int, str]],
    check: Callable[[Path], None] | None,
) -> None:
    """Write a program as an ONNX model.

    ``axes`` names the dynamic axes of each input tensor. ``check`` is called with the path of the model before it is
    moved into place, and raises if the model is wrong.
    """
    require_packages("onnx", "onnxscript", *(["onnxruntime"] if check is not None else []))
    spec = program.call_spec.in_spec
    assert spec is not None
    nodes, left = {node.name for node in program.graph.nodes}, iter(axes)
    # inputs that are not tensors are listed by value instead of the name of a node, and have no axes
    leaves = [next(left) if isinstance(i, str) and i in nodes else None for i in program.graph_signature.user_inputs]
    dims: Any = tree_unflatten(leaves, spec)[1]
    names: dict[str, Any] = {"input_names": list(inputs), "output_names": list(outputs), "dynamic_shapes": dims}
    with quiet(logging.WARNING), wrap_export_errors(path):
        model = torch.onnx.export(program, (), dynamo=True, verbose=False, optimize=False, **names)
        assert model is not None
        _simplify(model.model)
    with wrap_export_errors(path), atomic_path(path, ExportError, parents=True, companions=COMPANIONS) as unfinished:
        model.save(unfinished)
        _require_whole(unfinished)
        if check is not None:
            check(unfinished)


def _require_whole(path: Path) -> None:
    """Refuse weights beside a model that end too early: their writer loses the error of a disk full at the end."""
    for data in (path.with_name(path.name + ending) for ending in COMPANIONS):
        if data.exists():
            import onnx_ir

            tensors = [value.const_value for value in onnx_ir.load(path).graph.initializers.values()]
            ends = [(t.offset or 0) + (t.length or 0) for t in tensors if isinstance(t, onnx_ir.ExternalTensor)]
            if data.stat().st_size < max(ends, default=0):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _simplify(model: Any) -> None:
    """Fold constants and remove duplicates.

    The rewrite rules of onnxscript are left out: onnxruntime fuses ops when it loads a model, which is as fast in the
    end, and matching the rules takes as long as the rest of an export.
    """
    from onnx_ir.passes import Sequential, common
    from onnxscript import optimizer

    common.InlinePass()(model)
    optimizer.fold_constants(model)
    Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def run_onnx(path: Path, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs of an ONNX model for ``inputs``, in the order in which the model takes them, on a CPU."""
    import onnxruntime

    with wrap_export_errors(path):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        feeds = {entry.name: value.cpu().numpy() for entry, value in zip(session.get_inputs(), inputs, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feeds)]
