"""ONNX models: written from a ``torch.export`` program, and run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fxprune.export.files import atomic_path, require_packages, wrap_export_errors
from fxprune.graph.compat import tree_unflatten
from fxprune.graph.context import quiet

__all__ = ["run_onnx", "write_onnx"]


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
    with atomic_path(path) as unfinished:
        model.save(unfinished)
        if check is not None:
            check(unfinished)


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
