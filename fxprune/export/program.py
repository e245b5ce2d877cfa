"""A graph as a file that runs without this package: a ``torch.export`` program or an ONNX model."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxprune.data.verification import VerificationInputs, check_names, make_inputs
from fxprune.errors import ExportError, UnknownNameError, VerificationError
from fxprune.export.files import ROUGH, as_export_error, replacing
from fxprune.export.onnx import run_onnx, write_onnx
from fxprune.graph.compat import is_free, is_impure, size_hint, tree_leaves, tree_map, tree_unflatten
from fxprune.graph.context import clear_errors, neutral, quiet
from fxprune.graph.facts import facts_of, fork
from fxprune.graph.tensors import as_parameter, device_of, set_tensor, weights
from fxprune.masking.compare import TOLERANCE, compare
from fxprune.masking.masked_run import output_tensors
from fxprune.pipeline.arguments import as_path, flag, instance, one_of
from fxprune.trace.inputs import dynamic_dims

__all__ = ["export_graph", "has_kernels", "plain_tensor", "require_close", "strip"]

Inputs = Mapping[str, Any]


@neutral()
@clear_errors("export", "Pass a graph, a path and inputs that fit it", ExportError)
def export_graph(
    graph_module: fx.GraphModule,
    path: str | os.PathLike[str],
    *,
    example_inputs: Mapping[str, Any] | None = None,
    verify: bool = True,
) -> Path:
    """Write a program that computes what a graph does and needs neither this package nor the model's.

    Axes that vary in the graph vary in the program. It takes the inputs of the graph by keyword and returns what the
    graph returns; an output object of a model library becomes a dict. It holds weights and code for inference alone,
    in the dtype of the graph; a ``.pt2`` program runs on the device that the graph is on now.

    Args:
        graph_module: from :func:`fxprune.trace`, or the slim one of a result.
        path: where to; ``.pt2`` writes a program for ``torch.export.load``, ``.onnx`` an ONNX model (weights over 2 GB
            beside it in ``<path>.data``). Folders are made; what was there is replaced when the new file is complete.
        example_inputs: keyword inputs to verify with; by default those of pruning, or random token ids.
        verify: run what was exported and compare, an ONNX model in onnxruntime.

    Returns:
        The path.

    Warns:
        UserWarning: an axis that ought to vary is fixed; or the ONNX model could not be checked.

    Raises:
        UnknownNameError: the suffix is neither of the two.
        ExportError: the graph has no weights yet, torch cannot export it, or the packages for ONNX are missing.
        VerificationError: the program computes something else; nothing is written.
    """
    instance(
        "graph_module", graph_module, fx.GraphModule, "fxprune.trace(model).graph_module, or a result's", ExportError
    )
    path, verify = Path(as_path("path", path, error=ExportError)), flag("verify", verify)
    check_names(example_inputs, on_meta=False)
    known = [str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder"]
    for name in example_inputs or ():
        one_of("input of the graph", name, known)
    if path.suffix not in _WRITERS:
        raise UnknownNameError("suffix", path.suffix, _WRITERS)
    meta = next((name for name, tensor in weights(graph_module) if tensor.is_meta), None)
    if meta is not None:
        raise ExportError("has no values to export", where=meta, remedy="Give the model real weights instead of meta")
    verified = facts_of(graph_module).get(VerificationInputs)
    given = example_inputs if example_inputs is not None or verified is None else verified.values
    _WRITERS[path.suffix](graph_module, path, make_inputs(graph_module, given, seed=0), verify)
    return path


def _write_program(graph_module: fx.GraphModule, path: Path, inputs: Inputs, verify: bool) -> None:
    program = _program(graph_module, inputs)
    if verify:
        with torch.no_grad():
            _require_same(graph_module, inputs, output_tensors(program.module()(**inputs)), path)
    with replacing(path) as unfinished:
        torch.export.save(program, unfinished)


def _write_onnx(graph_module: fx.GraphModule, path: Path, inputs: Inputs, verify: bool) -> None:
    program = _program(graph_module, inputs)
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]

    def check(written: Path) -> None:
        _require_same(graph_module, inputs, output_tensors(run_onnx(written, tensors)), path)

    write_onnx(
        program,
        path,
        inputs=_leaf_names(dict(inputs), ""),
        outputs=_output_names(program),
        axes=_axis_names(program),
        check=check if verify and has_kernels(graph_module) else None,
    )


_WRITERS: dict[str, Callable[[fx.GraphModule, Path, Inputs, bool], None]] = {
    ".pt2": _write_program,
    ".onnx": _write_onnx,
}


def _program(graph_module: fx.GraphModule, inputs: Inputs) -> torch.export.ExportedProgram:
    """Return the graph as a program without example inputs and without the places in source files it came from."""
    work = _for_inference(graph_module)
    traced, dims = {}, {}
    for node in (node for node in work.graph.nodes if node.op == "placeholder"):
        name, value = str(node.target), node.meta["val"]
        traced[name] = _example(value, inputs[name], device_of(work))
        dims[name] = tree_map(_free_dims, value)
    with quiet(logging.WARNING), as_export_error():
        program = torch.export.export(work, (), traced, dynamic_shapes=dims, strict=False)
    strip(program)
    _warn_of_fixed_axes(program)
    return program


def _example(traced: Any, given: Any, device: torch.device) -> Any:
    """Return an input of the sizes that were traced, of the types that are given now."""
    if isinstance(traced, torch.Tensor):
        return torch.zeros([size_hint(size) for size in traced.shape], dtype=given.dtype, device=device)
    if isinstance(traced, Mapping):
        return {key: _example(value, given[key], device) for key, value in traced.items()}
    if isinstance(traced, list | tuple):
        return type(traced)(_example(value, item, device) for value, item in zip(traced, given, strict=True))
    return traced


def _free_dims(value: Any) -> dict[int, Any] | None:
    if not isinstance(value, torch.Tensor):
        return None
    return {axis: torch.export.Dim.AUTO if is_free(size) else None for axis, size in enumerate(value.shape)}


def strip(program: torch.export.ExportedProgram) -> None:
    """Take example inputs off a program, and the places in source files that its ops came from."""
    program.example_inputs = None
    for node in program.graph.nodes:
        for fact in ("stack_trace", "from_node"):
            node.meta.pop(fact, None)


def _for_inference(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph over the same tensors that has no gradients and returns plain containers."""
    work = fork(graph_module).eval()
    plain: dict[int, torch.Tensor] = {}
    for name, tensor in weights(graph_module):
        if id(tensor) not in plain:
            plain[id(tensor)] = plain_tensor(tensor)
        set_tensor(work, name, plain[id(tensor)])
    output = work.graph.output_node()
    output.args = fx.map_arg(output.args, _plain_output)
    work.graph.eliminate_dead_code(is_impure)
    work.recompile()
    return work


def plain_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` without gradient; a copy where it is part of a larger storage, which would be stored whole."""
    value = tensor.detach()
    if value.untyped_storage().nbytes() != value.nbytes:
        value = value.clone(memory_format=torch.contiguous_format)
    return as_parameter(value, tensor).requires_grad_(False)


def _plain_output(value: fx.Node) -> Any:
    """Return, in place of an output object, a dict of those of its fields that are there."""
    if not isinstance(value.target, type):
        return value
    fields = {name: field for name, field in value.kwargs.items() if field is not None}
    return fx.map_arg(fields, _plain_output)


def _output_names(program: torch.export.ExportedProgram) -> list[str]:
    """Return a name for each output: keys and indices on the way to it."""
    spec = program.call_spec.out_spec
    assert spec is not None
    return _leaf_names(tree_unflatten(range(spec.num_leaves), spec), "")


def _leaf_names(structure: Any, name: str) -> list[str]:
    """Return a name for each tensor in a structure; what is no tensor, and no number that stands for one, has none."""
    if not isinstance(structure, Mapping | tuple | list):
        return [name or "output"] if isinstance(structure, torch.Tensor | int) else []
    parts = structure.items() if isinstance(structure, Mapping) else enumerate(structure)
    return [leaf for key, part in parts for leaf in _leaf_names(part, f"{name}_{key}" if name else f"{key}")]


def _axis_names(program: torch.export.ExportedProgram) -> list[dict[int, str]]:
    """Return names for the axes of the first input that vary; the others share them where they have to be equal."""
    shapes = [value.shape for value in _inputs_of(program).values()]
    first = {axis: name for axis, name in enumerate(("batch", "sequence")) if axis < len(shapes[0])}
    free = {axis: name for axis, name in first.items() if is_free(shapes[0][axis])}
    return [{} if i else free for i in range(len(shapes))]


def _inputs_of(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    """Return the fake value of each tensor that goes in, by name."""
    taken = program.graph_signature.user_inputs
    return {
        node.name: node.meta["val"]
        for node in program.graph.nodes
        if node.name in taken and isinstance(node.meta.get("val"), torch.Tensor)
    }


def _warn_of_fixed_axes(program: torch.export.ExportedProgram) -> None:
    values = _inputs_of(program)
    for name, axes in dynamic_dims(values).items():
        for axis in axes or ():
            size = values[name].shape[axis]
            if not is_free(size):
                warnings.warn(f"{name}: axis {axis} is fixed; the program runs at {size} alone", stacklevel=6)


def _require_same(graph_module: fx.GraphModule, inputs: Inputs, got: tuple[torch.Tensor, ...], path: Path) -> None:
    with torch.no_grad():
        require_close(output_tensors(graph_module(**inputs)), got, path)


def require_close(want: Sequence[torch.Tensor], got: Sequence[torch.Tensor], path: Path) -> None:
    """Refuse a program that computes something else.

    Args:
        want: what it has to compute.
        got: what it computes.
        path: of its file, for the message.

    Raises:
        VerificationError: it does.
    """
    tolerance = TOLERANCE if want[0].element_size() >= 4 else ROUGH
    error = compare([value.float().cpu() for value in want], [value.float().cpu() for value in got])
    if not error <= tolerance:
        raise VerificationError(
            f"the exported program differs from the graph by {error:.2e}, more than {tolerance:.0e}",
            where=path.name,
            remedy="Please report the model's config and the versions of torch and onnxruntime",
        )


def has_kernels(module: nn.Module) -> bool:
    """Return whether onnxruntime on a CPU can run a module: it has few kernels for bfloat16."""
    if not any(tensor.dtype == torch.bfloat16 for tensor in module.parameters()):
        return True
    warnings.warn(
        "not checked: onnxruntime does not run bfloat16 on a CPU; float() first for one that does", stacklevel=4
    )
    return False
