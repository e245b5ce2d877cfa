"""Checks of a model and its inputs before tracing; an error names the parameter or input, and a remedy."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from fxprune.data.verification import check_names
from fxprune.errors import ArgumentError, FxpruneError, TraceError, UnsupportedModelError
from fxprune.graph.context import Refusal, attempt, quiet
from fxprune.graph.tensors import computed_tensors
from fxprune.offload.ranks import check_one_device, check_unsharded
from fxprune.pipeline.arguments import format_value, refuse
from fxprune.trace.inputs import alias_twin, written_parameters

__all__ = [
    "check_copies",
    "check_inputs",
    "check_merged",
    "check_model",
    "check_outputs",
    "check_runs",
    "check_values",
    "clear_quantisation_marks",
    "is_marked_quantised",
    "model_dtype",
]

_MARKS = (
    "is_quantized",
    "hf_quantizer",
    "quantization_method",
    "quantization_config",
    "_is_quantized",
    "_pre_quantization_dtype",
)
"""Attributes that transformers sets on a model, or on its config, when it loads quantised weights."""

_DEQUANTISE = "Load it in float32, bfloat16 or float16, or call model.dequantize() first"


def check_model(model: Any) -> None:
    """Check that ``model`` can be pruned: a Python module with plain weights, in one piece and on one device."""
    _check_module(model)
    check_merged(model)
    named = list(model.named_parameters())
    if not named:
        raise UnsupportedModelError("it has no parameters", where=type(model).__name__, remedy="Pass one with weights")
    check_unsharded(model)
    if is_marked_quantised(model):
        _check_dequantised(model)
    for name, parameter in named:
        _check_parameter(name, parameter)
    check_one_device(model)


def check_merged(model: Any) -> None:
    """Refuse a model with adapters of PEFT: around it, or in its modules."""
    modules = model.modules() if isinstance(model, nn.Module) and "_modules" in vars(model) else ()
    wrapped = hasattr(model, "peft_config") and hasattr(model, "merge_and_unload")
    if wrapped or any("base_layer" in part._modules and hasattr(part, "unmerge") for part in modules):
        raise UnsupportedModelError(
            "it has adapters beside its weights",
            where=type(model).__name__,
            remedy="Call merge_and_unload() first, and pass the model that it returns",
        )


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        wanted = "an instance of torch.nn.Module, such as a model of transformers"
        if any(hasattr(model, name) for name in ("graph_module", "model")):
            wanted = "its .model, or the module it was made from"
        raise refuse("model", model, wanted, UnsupportedModelError)
    if "_parameters" not in vars(model) and not isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            "it was never initialised", where=type(model).__name__, remedy="Call super().__init__() in its __init__"
        )
    for path, module in model.named_modules():
        where = path or type(model).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError("it is TorchScript", where=where, remedy="Pass the original Python module")
        if "_orig_mod" in module._modules:
            raise UnsupportedModelError(
                "it is compiled", where=where, remedy="Pass its ._orig_mod, and compile the pruned model"
            )
        packed = next((name for name, value in vars(module).items() if isinstance(value, torch.ScriptObject)), None)
        if packed is not None:
            raise UnsupportedModelError(f"its {packed} holds packed weights", where=where, remedy=_DEQUANTISE)


def _check_parameter(name: str, parameter: torch.Tensor) -> None:
    what = ""
    if nn.parameter.is_lazy(parameter):
        what, remedy = "it is lazy and has no shape yet", "Run the model once, on any input"
    elif parameter.is_complex():
        what, remedy = f"its dtype is {parameter.dtype}", "Keep real and imaginary parts as two parameters"
    elif not parameter.dtype.is_floating_point or parameter.element_size() < 2:
        what, remedy = f"dtype {parameter.dtype} is a quantised format", "Dequantise the model first"
    elif parameter.layout != torch.strided or parameter.is_nested:
        what = f"its layout is {'nested' if parameter.is_nested else parameter.layout}"
        remedy = "Convert it to a dense tensor first, as with weight.to_dense()"
    elif not parameter.numel():
        what = f"it is empty, of shape {tuple(parameter.shape)}"
        remedy = "Remove it from the model, or gather the weights if they are sharded over processes"
    if what:
        raise UnsupportedModelError(what, where=name, remedy=remedy)


def check_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Check that ``forward`` takes these keyword inputs, and that a graph can."""
    check_names(inputs)
    if type(model).forward is nn.Module.forward and "forward" not in vars(model):
        raise UnsupportedModelError(
            "it has no forward", where=type(model).__name__, remedy="Pass a module that can be called"
        )
    signature = inspect.signature(model.forward)
    try:
        signature.bind(**inputs)
    except TypeError as error:
        raise ArgumentError(
            f"{type(model).__name__} takes {signature}: {error}",
            where="example_inputs",
            remedy="Pass the arguments of forward by name",
        ) from error
    check_names(inputs, on_meta=any(parameter.is_meta for parameter in model.parameters()))


def check_values(model: nn.Module) -> None:
    """Check that weights are finite: otherwise scores mean nothing, and outputs cannot be compared."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        value = parameter.detach()
        # the sum needs no memory and is finite only if every term is; if it overflows, look at each
        if not bool(value.sum().isfinite()) and not bool(value.isfinite().all()):
            raise UnsupportedModelError(
                "it holds values that are NaN or infinite", where=name, remedy="Load the weights again, or repair them"
            )


def check_runs(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Check that a copy of the model runs on its keyword inputs."""
    twin = alias_twin(model, written_parameters(model, inputs))
    with quiet(), torch.no_grad():
        found = attempt(twin, **dict(inputs))
    if isinstance(found, Refusal):
        raise ArgumentError(
            f"{type(model).__name__} does not run on them: {found}",
            where="example_inputs",
            remedy="Pass inputs on which model(**example_inputs) runs",
        ) from found.error


def check_outputs(graph_module: fx.GraphModule, model: nn.Module) -> None:
    """Check that a graph returns a tensor: otherwise all of it would be dead code."""
    if not graph_module.graph.output_node().all_input_nodes:
        raise TraceError(
            "it returns no tensor",
            where=f"forward of {type(model).__name__}",
            remedy="Return tensors, or lists, tuples and dicts of them",
        )


def check_copies(model: nn.Module) -> None:
    """Check that Python can copy a model, since a graph is traced from a copy."""
    parts = (*model.modules(), *model.parameters(), *model.buffers(), *computed_tensors(model))
    memo = {id(part): part for part in parts}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            refused = None if name.endswith("_hooks") else _refused_copy(value, memo)
            if refused is not None:
                raise UnsupportedModelError(
                    f"{format_value(value)} that cannot be copied: {refused}",
                    where=f"{path}.{name}" if path else name,
                    remedy="Remove the attribute while the model is pruned, or define __deepcopy__ on it",
                )
    for path, module in model.named_modules():
        others = {key: value for key, value in memo.items() if value is not module}
        refused = _refused_copy(module, others)
        if refused is not None:
            raise UnsupportedModelError(
                f"a {type(module).__name__} that cannot be copied: {refused}",
                where=path or "model",
                remedy="Correct its __deepcopy__ or __getstate__",
            )


def _refused_copy(value: Any, memo: Mapping[int, Any]) -> Refusal | None:
    found = attempt(copy.deepcopy, value, dict(memo), refusals=(FxpruneError,))
    return found if isinstance(found, Refusal) else None


def is_marked_quantised(model: nn.Module) -> bool:
    """Whether a loader marked ``model`` as quantised; its weights may have been converted to floats since."""
    return bool(getattr(model, "is_quantized", False)) or getattr(model, "hf_quantizer", None) is not None


def clear_quantisation_marks(model: nn.Module) -> None:
    """Remove the marks of quantisation from ``model`` and its config, so that transformers saves and trains it."""
    for name in _MARKS:
        vars(model).pop(name, None)
        vars(getattr(model, "config", model)).pop(name, None)


def _check_dequantised(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter:
            raise UnsupportedModelError(
                f"a {type(parameter).__name__} is a quantised weight", where=name, remedy=_DEQUANTISE
            )
    for name, buffer in model.named_buffers():
        if buffer.dim() >= 2 and not buffer.dtype.is_floating_point and buffer.dtype != torch.bool:
            raise UnsupportedModelError(
                f"{buffer.dtype} of shape {tuple(buffer.shape)} in a model marked as quantised holds packed weights",
                where=name,
                remedy=_DEQUANTISE,
            )


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that most parameters have, by number of elements."""
    count: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        count[parameter.dtype] = count.get(parameter.dtype, 0) + parameter.numel()
    return max(count, key=lambda dtype: count[dtype])
