"""Example inputs, and copies of a model to run them on.

A copy has the model's parameters without storage, or over the same storage; its buffers and everything else that
Python code may write to are its own. Hooks that a user registered see no call of it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fxprune.errors import TraceError
from fxprune.graph.compat import FakeTensorMode, tree_map
from fxprune.graph.tensors import as_parameter, computed_tensors

__all__ = [
    "alias_twin",
    "blank",
    "default_inputs",
    "dry_twin",
    "dynamic_dims",
    "fake_twin",
    "free_axes",
    "hooks_left_out",
    "is_hugging_face",
    "meta_twin",
    "without_cache",
]

BATCH, TOKENS = 2, 7
"""``torch.export`` takes a size of 1 for a constant, and widths and numbers of heads are hardly ever multiples of 7."""


def is_hugging_face(model: nn.Module) -> bool:
    """Whether ``model`` is one of transformers' models."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def default_inputs(model: nn.Module, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return keyword inputs to trace ``model`` with.

    Args:
        model: the model.
        given: the caller's inputs; None for a Hugging Face model, which gets ``input_ids`` of shape (2, 7).

    Raises:
        TraceError: no inputs were given for a model that is not a Hugging Face one.
    """
    if given is not None:
        return _as_in_signature(model, given)
    if not is_hugging_face(model) or getattr(model, "main_input_name", "") != "input_ids":
        raise TraceError(
            f"cannot make inputs for {type(model).__name__}",
            where="example_inputs",
            remedy="Pass example_inputs={'name': tensor, ...}, the keyword arguments of its forward",
        )
    return {"input_ids": torch.zeros(BATCH, TOKENS, dtype=torch.long)}


def _as_in_signature(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs in the order in which ``forward`` takes them; a graph takes them in that order by position."""
    order = {name: place for place, name in enumerate(inspect.signature(model.forward).parameters)}
    return dict(sorted(given.items(), key=lambda item: order.get(item[0], len(order))))


def free_axes(value: torch.Tensor) -> int:
    """Return how many leading axes of an input may vary, as far as the model allows it: batch, and sequence.

    Integers are tokens ``(batch, sequence)``; floats of three axes are ``(batch, sequence, width)``, others
    ``(batch, ...)``.
    """
    return min(value.dim(), 2 if not value.is_floating_point() or value.dim() == 3 else 1)


def dynamic_dims(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return which axes of each tensor may vary, in the structure of ``inputs``."""
    auto = torch.export.Dim.AUTO

    def free(value: Any) -> dict[int, Any] | None:
        return dict.fromkeys(range(free_axes(value)), auto) if isinstance(value, torch.Tensor) else None

    return {name: tree_map(free, value) for name, value in inputs.items()}


def blank(value: Any, own: torch.dtype, dtype: torch.dtype) -> Any:
    """Return zeros in place of a tensor, wherever tensors are made just now; anything else as it is.

    Args:
        value: an input of a model.
        own: the dtype of the weights of the model.
        dtype: what a tensor of that dtype gets.
    """
    if not isinstance(value, torch.Tensor):
        return value
    return torch.zeros(value.shape, dtype=dtype if value.dtype == own else value.dtype)


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def meta_twin(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` that has everything but storage."""
    return _twin(model, lambda tensor: as_parameter(torch.empty_like(tensor, device="meta"), tensor))


def fake_twin(model: nn.Module, mode: FakeTensorMode, own: torch.dtype, dtype: torch.dtype) -> nn.Module:
    """Return a copy to trace, in evaluation mode, whose tensors are those of ``mode``.

    Args:
        model: the model.
        mode: makes the tensors, without storage and on the CPU.
        own: the dtype of the parameters that get another one.
        dtype: the dtype they get.
    """

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        wanted = dtype if isinstance(tensor, nn.Parameter) and tensor.dtype == own else tensor.dtype
        with mode:  # around this alone: a plain tensor among the attributes is copied with its storage
            return as_parameter(torch.empty(tensor.shape, dtype=wanted, device="cpu"), tensor)

    return _as_traced(_twin(model, fake))


def dry_twin(model: nn.Module, own: torch.dtype, dtype: torch.dtype) -> nn.Module:
    """Return a copy to run on ``meta``, in evaluation mode: nothing is computed, and it is quicker than fake tensors.

    Args:
        model: the model.
        own: the dtype of the parameters that get another one.
        dtype: the dtype they get.
    """

    def dry(tensor: torch.Tensor) -> torch.Tensor:
        wanted = dtype if isinstance(tensor, nn.Parameter) and tensor.dtype == own else tensor.dtype
        return as_parameter(torch.empty(tensor.shape, dtype=wanted, device="meta"), tensor)

    return _as_traced(_twin(model, dry))


def alias_twin(model: nn.Module) -> nn.Module:
    """Return a copy to run, in evaluation mode, whose parameters are in the memory of the model's own.

    They ask for gradients, and what they get is theirs alone. Buffers, which code may write to, are copied.
    """

    def alias(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            return tensor.detach().clone()
        return nn.Parameter(tensor.detach(), requires_grad=not tensor.is_inference())

    return _as_traced(_twin(model, alias))


def without_cache(model: Any) -> dict[str, bool]:
    """Keep ``model``, a copy, from returning a cache; return the arguments that this takes besides its config.

    An argument that ``forward`` takes among its keywords only would fix all sizes: exporting does not allow it beside
    dynamic ones.
    """
    if not is_hugging_face(model):
        return {}
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "use_cache"):
            config.use_cache = False
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def hooks_left_out(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the modules with hooks that copies do not have: those that torch did not register."""
    return tuple(dict.fromkeys(path or "the model" for path, _, _ in _hooks(model, _is_foreign)))


def _twin(model: nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = make(tensor)
    for tensor in computed_tensors(model):
        memo[id(tensor)] = tensor.detach().clone()
    for _, table, key in _hooks(model, _is_foreign):
        memo[id(table[key])] = None  # it may hold anything: it is not copied
    twin = copy.deepcopy(model, memo)
    for _, table, key in _hooks(twin, lambda hook: hook is None):
        del table[key]
    return twin


def _as_traced(twin: nn.Module) -> nn.Module:
    """Return ``twin`` in evaluation mode, with attention and experts that trace to plain ATen ops."""
    if is_hugging_face(twin):
        model: Any = twin
        if model.config._attn_implementation not in ("sdpa", "eager"):
            model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
        if getattr(model.config, "_experts_implementation", None) is not None:
            model.config._experts_implementation = "batched_mm"
    return twin.eval()


def _hooks(model: nn.Module, wanted: Callable[[Any], bool]) -> Iterator[tuple[str, dict[int, Any], int]]:
    """Yield the path of the module, the table and the key of each hook that is ``wanted``."""
    for path, module in model.named_modules():
        for name in _HOOKS:
            table = getattr(module, name)
            for key in [key for key, hook in table.items() if wanted(hook)]:
                yield path, table, key


def _is_foreign(hook: Any) -> bool:
    """Whether ``hook`` is none of torch, which computes weights in some, and does not say that the model needs it."""
    return not getattr(hook, "part_of_model", False) and _root_of(hook) != "torch"


def _root_of(hook: Any) -> str:
    """Return the name of the package that ``hook`` comes from."""
    return str(getattr(hook, "__module__", None) or type(hook).__module__).partition(".")[0]
