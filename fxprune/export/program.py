"""Export of a graph to a file that runs without this package: a ``torch.export`` program or an ONNX model."""

from __future__ import annotations

import errno
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxprune.data.calibration import VerificationInputs, check_names, make_inputs
from fxprune.errors import ExportError, FxpruneError, UnknownNameError, VerificationError
from fxprune.graph.compat import is_free, is_impure, size_hint, tree_map, tree_unflatten
from fxprune.graph.context import default_modes, quiet, wrap_errors
from fxprune.graph.facts import facts_of, fork
from fxprune.graph.tensors import as_parameter, device_of, set_tensor, tensors_of, weights
from fxprune.masking.compare import ROUGH, TOLERANCE, compare
from fxprune.masking.masked_run import output_tensors
from fxprune.offload.atomic import atomic_path
from fxprune.pipeline.arguments import as_path, flag, instance, one_of
from fxprune.trace.inputs import free_axes

COMPANIONS = (".data",)
"""Endings of files beside an ONNX model, named after it: weights over 2 GB."""


@contextmanager
def wrap_export_errors(where: str = "graph_module") -> Iterator[None]:
    """Turn exceptions of torch and onnxruntime into an ExportError of one line, except for out-of-memory errors."""
    try:
        yield
    except (FxpruneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch and onnxruntime raise many types, some of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"cannot be exported: {reason}", where=where, remedy="The cause has the details") from error


def write_program(
    program: torch.export.ExportedProgram,
    path: Path,
    module: nn.Module,
    calls: Sequence[Mapping[str, Any]],
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    axes: Sequence[dict[int, str]],
) -> None:
    """Write a program in the format of its suffix, once it gives the outputs of a module for ``calls``, by keyword.

    ``inputs`` and ``outputs`` name those of an ONNX model, and ``axes`` the dynamic axes of each of its inputs.
    """

    def check(run: Callable[[Mapping[str, Any]], Any]) -> None:
        for given in calls:
            got = output_tensors(run(given))
            with torch.no_grad(), quiet(logging.ERROR):
                want = output_tensors(module(**given))
            tolerance = TOLERANCE if want[0].element_size() >= 4 else ROUGH
            error = compare([value.float().cpu() for value in want], [value.float().cpu() for value in got])
            if not error <= tolerance:
                what = f"the exported program differs from the graph by {error:.2e}, more than {tolerance:.0e}"
                remedy = "Please report the model's config and the versions of torch and onnxruntime"
                raise VerificationError(what, where=path.name, remedy=remedy)

    if path.suffix == ".pt2":
        if calls:
            with torch.no_grad():
                exported = program.module()
                check(lambda given: exported(**given))
        _save_program(program, path)
        return
    needed = ["onnx", "onnxscript", *(["onnxruntime"] if calls else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX needs {', '.join(missing)}", where="packages", remedy="pip install 'fxprune[onnx]'")
    nodes, left = {node.name for node in program.graph.nodes}, iter(axes)
    # inputs that are not tensors are listed by value instead of the name of a node, and have no axes
    leaves = [next(left) if isinstance(i, str) and i in nodes else None for i in program.graph_signature.user_inputs]
    assert program.call_spec.in_spec is not None
    dims: Any = tree_unflatten(leaves, program.call_spec.in_spec)[1]
    names: dict[str, Any] = {"input_names": list(inputs), "output_names": list(outputs), "dynamic_shapes": dims}
    with wrap_export_errors(path.name):
        with quiet(logging.WARNING):
            model = torch.onnx.export(program, (), dynamo=True, verbose=False, optimize=False, **names)
            assert model is not None
            _simplify(model.model)
        with atomic_path(path, ExportError, parents=True, companions=COMPANIONS) as unfinished:
            model.save(unfinished)
            _require_whole(unfinished)
            check(lambda given: run_onnx(unfinished, tensors_of(given)))


def _require_whole(path: Path) -> None:
    """Refuse truncated external weights: their writer swallows the error of a full disk."""
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

    with wrap_export_errors(path.name):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        feeds = {entry.name: value.cpu().numpy() for entry, value in zip(session.get_inputs(), inputs, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feeds)]


@default_modes()
@wrap_errors("export", "Pass a graph, a path and inputs that fit it", ExportError)
def export_graph(
    graph_module: fx.GraphModule,
    path: str | os.PathLike[str],
    *,
    example_inputs: Mapping[str, Any] | None = None,
    verify: bool = True,
) -> Path:
    """Write a graph as a program that needs neither this package nor the model's.

    Dynamic axes of the graph are dynamic in the program. It takes the inputs of the graph by keyword and returns its
    outputs; an output object of a model library becomes a dict. It holds weights and code for inference only, in the
    dtype of the graph; a ``.pt2`` program runs on the device that the graph is on now.

    Args:
        graph_module: a graph from :func:`fxprune.trace`, or the slim graph of a result.
        path: the file to write: ``.pt2`` for ``torch.export.load``, or ``.onnx`` (with weights over 2 GB beside it in
            ``<path>.data``). Folders are made; an existing file is replaced when the new one is complete.
        example_inputs: keyword inputs to verify with; by default those of pruning, or random token ids.
        verify: run the exported file and compare, an ONNX model in onnxruntime.

    Warns:
        UserWarning: an axis is unexpectedly fixed, or the ONNX model could not be checked.

    Raises:
        UnknownNameError: the suffix is neither of the two.
        ExportError: the graph has no weights yet, torch cannot export it, or the packages for ONNX are missing.
        VerificationError: the program computes something else; nothing is written.
    """
    wanted = "fxprune.trace(model).graph_module, or a result's"
    instance("graph_module", graph_module, fx.GraphModule, wanted, ExportError)
    path, verify = Path(as_path("path", path, error=ExportError)), flag("verify", verify)
    if path.suffix not in (".pt2", ".onnx"):
        raise UnknownNameError("suffix", path.suffix, (".pt2", ".onnx"))
    check_names(example_inputs, on_meta=False)
    known = [str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder"]
    for name in example_inputs or ():
        one_of("input of the graph", name, known)
    meta = next((name for name, tensor in weights(graph_module) if tensor.is_meta), None)
    if meta is not None:
        raise ExportError("has no values to export", where=meta, remedy="Give the model real weights instead of meta")
    verified = facts_of(graph_module).get(VerificationInputs)
    given = example_inputs if example_inputs is not None or verified is None else verified.values
    inputs = make_inputs(graph_module, given, seed=0)
    program, values = _export(graph_module, inputs)
    spec = program.call_spec.out_spec
    assert spec is not None
    named = enumerate(zip(("batch", "sequence"), values[0].shape if values else (), strict=False))
    dynamic = {axis: name for axis, (name, size) in named if is_free(size)}  # all inputs share those of the first
    write_program(
        program,
        path,
        graph_module,
        [inputs] if verify and can_check(graph_module, path) else [],
        inputs=_leaf_names(inputs, ""),
        outputs=_leaf_names(tree_unflatten(range(spec.num_leaves), spec), ""),
        axes=[{} if i else dynamic for i in range(len(values))],
    )
    return path


def _export(
    graph_module: fx.GraphModule, inputs: Mapping[str, Any]
) -> tuple[torch.export.ExportedProgram, list[torch.Tensor]]:
    """The program of a graph and its input tensors, with a warning for each axis that is unexpectedly fixed."""
    work = _for_inference(graph_module)
    device = device_of(work)

    def example(value: Any, given: Any) -> Any:
        """An input with the traced sizes and the dtype of the given value."""
        if not isinstance(value, torch.Tensor):
            return value
        return torch.zeros([size_hint(size) for size in value.shape], dtype=given.dtype, device=device)

    def dynamic_axes(value: Any) -> dict[int, Any] | None:
        if not isinstance(value, torch.Tensor):
            return None
        return {axis: torch.export.Dim.AUTO if is_free(size) else None for axis, size in enumerate(value.shape)}

    traced, dims = {}, {}
    for node in work.graph.find_nodes(op="placeholder"):
        name, value = str(node.target), node.meta["val"]
        traced[name] = tree_map(example, value, inputs[name])
        dims[name] = tree_map(dynamic_axes, value)
    with quiet(logging.WARNING), wrap_export_errors():
        program = torch.export.export(work, (), traced, dynamic_shapes=dims, strict=False)
    strip_metadata(program)
    taken = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    values = {node.name: node.meta["val"] for node in taken if isinstance(node.meta.get("val"), torch.Tensor)}
    for name, value in values.items():
        for axis, size in enumerate(value.shape[: free_axes(value)]):
            if not is_free(size):
                warnings.warn(f"{name}: axis {axis} is fixed; the program runs only at {size}", stacklevel=5)
    return program, list(values.values())


def _save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a program as a ``.pt2`` file."""
    with (
        wrap_export_errors(path.name),
        atomic_path(path, ExportError, parents=True) as unfinished,
        _Archive(unfinished.open("wb", buffering=0)) as file,
    ):
        try:
            torch.export.save(program, file)
        finally:
            if file.error is not None:
                raise file.error


class _Archive(io.BufferedWriter):
    """Output file that keeps its first write error and ignores later writes.

    After any error torch still writes the end of its archive, in a destructor, where a second one ends the process.
    """

    error: BaseException | None = None

    def write(self, data: Any, /) -> int:
        if self.error is None:
            try:
                return super().write(data)
            except BaseException as error:  # an interrupt would end the process as well
                self.error = error
        return len(data)


def strip_metadata(program: torch.export.ExportedProgram) -> None:
    """Remove example inputs and source locations, which name files of this machine, from a program."""
    program.example_inputs = None
    for node in program.graph.nodes:
        for fact in ("stack_trace", "from_node"):
            node.meta.pop(fact, None)


def _for_inference(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A graph over the same tensors, without gradients, that returns plain containers."""
    work = fork(graph_module).eval()
    for name, tensor in plain_tensors(weights(graph_module)).items():
        set_tensor(work, name, tensor)
    output = work.graph.output_node()
    output.args = fx.map_arg(output.args, _plain_output)
    work.graph.eliminate_dead_code(is_impure)
    work.recompile()
    return work


def plain_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors by name without gradients; copies of those in a larger storage, which would be saved whole."""
    made: dict[str, torch.Tensor] = {}
    by_identity: dict[int, torch.Tensor] = {}
    for name, tensor in named:
        if id(tensor) not in by_identity:  # tied ones stay tied
            value = tensor.detach()
            if value.untyped_storage().nbytes() != value.nbytes:
                value = value.clone(memory_format=torch.contiguous_format)
            by_identity[id(tensor)] = as_parameter(value, tensor).requires_grad_(False)
        made[name] = by_identity[id(tensor)]
    return made


def _plain_output(value: fx.Node) -> Any:
    """A dict of the fields of an output object that are not None; other values as they are."""
    if not isinstance(value.target, type):
        return value
    fields = {name: field for name, field in value.kwargs.items() if field is not None}
    return fx.map_arg(fields, _plain_output)


def _leaf_names(structure: Any, name: str) -> list[str]:
    """A name for each tensor, or index of one, in a structure: the keys and indices on the way to it."""
    if not isinstance(structure, Mapping | tuple | list):
        return [name or "output"] if isinstance(structure, torch.Tensor | int) else []
    parts = structure.items() if isinstance(structure, Mapping) else enumerate(structure)
    return [leaf for key, part in parts for leaf in _leaf_names(part, f"{name}_{key}" if name else f"{key}")]


def can_check(module: nn.Module, path: Path) -> bool:
    """Whether a file can be compared with its module here; warns for bfloat16, which onnxruntime lacks on a CPU."""
    if path.suffix != ".onnx" or not any(tensor.dtype == torch.bfloat16 for tensor in module.parameters()):
        return True
    what = "not checked: onnxruntime does not run bfloat16 on a CPU; call float() first to have it checked"
    warnings.warn(what, stacklevel=4)
    return False
