"""Copies of a model that share nothing with it that a run could change: what is traced or run is never the user's own.

A copy has the model's parameters without storage, or over the same storage; its buffers and everything else that
Python code may write to are its own. Hooks that a user registered see no call of it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fxprune.graph.compat import FakeTensorMode
from fxprune.graph.tensors import as_parameter, computed_tensors
from fxprune.trace.inputs import is_hugging_face

__all__ = ["alias_twin", "dry_twin", "fake_twin", "hooks_left_out", "meta_twin", "without_cache"]

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
