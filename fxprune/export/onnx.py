"""A ``torch.export`` program as an ONNX model, and an ONNX model run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fxprune.export.files import as_export_error, replacing, require_packages
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
    """Write an ONNX model.

    Args:
        program: what it computes.
        path: where to.
        inputs: a name for each tensor that goes in.
        outputs: a name for each that comes out.
        axes: for each tensor that goes in, names of axes that vary.
        check: called with the path of the model before it is moved into place; raises if it is wrong.

    Raises:
        ExportError: torch cannot make one, or packages are missing.
    """
    require_packages("onnx", "onnxscript", *(["onnxruntime"] if check is not None else []))
    spec = program.call_spec.in_spec
    assert spec is not None
    dims: Any = tree_unflatten(_beside_constants(program, axes), spec)[1]
    names: dict[str, Any] = {"input_names": list(inputs), "output_names": list(outputs), "dynamic_shapes": dims}
    with quiet(logging.WARNING), as_export_error(path):
        model = torch.onnx.export(program, (), dynamo=True, verbose=False, optimize=False, **names)
        assert model is not None
        _shorten(model.model)
    with replacing(path) as unfinished:
        model.save(unfinished)
        if check is not None:
            check(unfinished)


def _shorten(model: Any) -> None:
    """Fold constants and drop what is there twice.

    onnxruntime fuses what it can when it loads a model. Matching the rewrite rules of onnxscript, which come to the
    same speed, takes as long as the rest of an export.
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


def _beside_constants(program: torch.export.ExportedProgram, axes: Sequence[dict[int, str]]) -> list[Any]:
    """Return for each input the names of its axes, None for one that is no tensor."""
    left = iter(axes)
    nodes = {node.name for node in program.graph.nodes}
    return [
        next(left) if isinstance(name, str) and name in nodes else None for name in program.graph_signature.user_inputs
    ]


def run_onnx(path: Path, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return what an ONNX model computes on a CPU.

    Args:
        path: of the model.
        inputs: what goes in, in its order.
    """
    import onnxruntime

    with as_export_error(path):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        feeds = {entry.name: value.cpu().numpy() for entry, value in zip(session.get_inputs(), inputs, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feeds)]
