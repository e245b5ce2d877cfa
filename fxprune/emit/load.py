"""Assignment of tensors to a model on ``meta``, and forward passes under each attention implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from fxprune.emit.snapshot import build_on_meta, shapes_of, without_storage
from fxprune.graph.compat import tree_map
from fxprune.graph.context import Refusal, attempt, quiet
from fxprune.graph.shapes import MetaOpCache
from fxprune.graph.tensors import submodule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "DryRuns",
    "assign_tensors",
    "attention_implementations",
    "configs_of",
    "has_unaligned_experts",
    "names_on_meta",
    "run_on_meta",
    "shape_errors",
    "use_eager_experts",
    "using_attention",
]

_HELD = "_attn_implementation_internal"

_SWITCHABLE = {"eager": None, "sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}
"""The implementations that run on every device, and the attribute of a class that says whether it has one."""


def attention_implementations(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the attention implementations that a model can be run under on any device, its own first.

    Those that need a kind of device or a package, as flash attention does, are left out unless the model uses one.
    """
    own = str(model.config._attn_implementation or "eager")
    if not model._can_set_attn_implementation():
        return (own,)
    available = (name for name, flag in _SWITCHABLE.items() if flag is None or getattr(model, flag, False))
    return tuple(dict.fromkeys((own, *available)))


@contextmanager
def using_attention(model: PreTrainedModel, implementation: str) -> Iterator[bool]:
    """Set the attention implementation of a model inside the context; yields whether the model accepts it.

    Code that transformers would compile runs eagerly: compiling takes seconds for each shape.
    """
    held = [(config, vars(config)[_HELD]) for config in configs_of(model) if _HELD in vars(config)]
    try:
        with quiet(), torch.compiler.set_stance("force_eager"):
            same = implementation == model.config._attn_implementation
            yield same or not isinstance(attempt(model.set_attn_implementation, implementation), Refusal)
    finally:
        for config, value in held:
            vars(config)[_HELD] = value


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Configs of a model and of its modules, and those nested in them."""
    pending = [model.config, *(vars(module).get("config") for module in model.modules())]
    found: dict[int, PreTrainedConfig] = {}
    while pending:
        config = pending.pop(0)
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            pending.extend(vars(config).values())
    return list(found.values())


Rename = Callable[[str], str | None]
"""The slim name of a dense tensor or module; None if it was removed."""

_ROW_BYTES = 16
"""Alignment that grouped matrix kernels of torch require of the rows of stacked matrices, in bytes."""


def shape_errors(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], rename: Rename, loose: frozenset[str]
) -> list[str]:
    """Return the differences between the tensors of a model and those to be assigned to it, in words.

    Args:
        tensors: by dense name.
        loose: slim names whose shapes may differ: attributes were set to fit them.
    """
    have = shapes_of(model)
    want = {new: tuple(tensor.shape) for name, tensor in tensors.items() if (new := rename(name)) is not None}
    lines = [f"{name}: no tensor given for it" for name in have.keys() - want.keys()]
    lines += [f"{name}: the class has no such tensor, wanted {want[name]}" for name in want.keys() - have.keys()]
    for name in have.keys() & want.keys() - loose:
        if have[name] != want[name]:
            lines.append(f"{name}: wanted {want[name]}, obtained {have[name]}")
    return sorted(lines)


def assign_tensors(
    model: PreTrainedModel, dense: PreTrainedModel, tensors: Mapping[str, torch.Tensor], rename: Rename
) -> None:
    """Assign exactly the given tensors, by dense name, to a slim model on ``meta``; tied names share one parameter.

    Whether a parameter is trained and the mode of each module are copied from the dense model.
    """
    trained = {name: p.requires_grad for name, p in dense.named_parameters(remove_duplicate=False)}
    wrapped: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        new = rename(name)
        if new is None:
            continue
        owner_path, _, leaf = new.rpartition(".")
        owner = submodule(model, owner_path)
        if leaf not in owner._parameters:
            owner._buffers[leaf] = tensor
            continue
        if id(tensor) not in wrapped:
            floating = tensor.is_floating_point() or tensor.is_complex()
            wrapped[id(tensor)] = (
                tensor
                if isinstance(tensor, nn.Parameter)
                else nn.Parameter(tensor.detach(), requires_grad=trained.get(name, True) and floating)
            )
        owner._parameters[leaf] = wrapped[id(tensor)]
    for path, module in dense.named_modules():
        new = rename(path)
        if new is not None:
            submodule(model, new).training = module.training


def run_on_meta(
    model: PreTrainedModel, inputs: Mapping[str, Any] | None = None, implementation: str | None = None
) -> Refusal | None:
    """Run a forward pass on ``meta``; return the refusal that stops it, or None.

    Args:
        model: a model on ``meta``, to be thrown away: some classes keep state between passes. It loses its
            padding token, whose absence from the input cannot be checked without data, and multiplies experts
            in batches, since grouped kernels refuse some widths on ``meta`` that they accept elsewhere.
        inputs: of the shapes to run on; None for five token ids.
        implementation: of attention; its own if None. One that the model does not accept is no failure.
    """
    for config in configs_of(model):
        vars(config).update(pad_token_id=None, _experts_implementation_internal="batched_mm")
    with without_storage():
        given = {"input_ids": torch.zeros(1, 5, dtype=torch.long)} if inputs is None else dict(inputs)
        given = tree_map(lambda value: value.to("meta") if isinstance(value, torch.Tensor) else value, given)
    with using_attention(model, implementation or str(model.config._attn_implementation)) as taken:
        with MetaOpCache(), quiet(), torch.device("meta"), torch.no_grad():  # no random numbers are drawn
            result = attempt(partial(model.eval(), **given)) if taken else None
        if isinstance(result, Refusal):  # the cached shapes may be at fault: a plain run decides
            result = build_on_meta(partial(model, **given))
    return result if isinstance(result, Refusal) else None


def use_eager_experts(model: PreTrainedModel) -> None:
    """Run experts one by one if they have a width that grouped kernels do not accept."""
    for config in configs_of(model) if has_unaligned_experts(model) else ():
        if vars(config).get("_experts_implementation_internal") == "grouped_mm":
            vars(config)["_experts_implementation_internal"] = "eager"


def has_unaligned_experts(model: nn.Module) -> bool:
    """Whether some stack of matrices has rows of a length that grouped kernels do not accept."""
    foreign = (module for module in model.modules() if not type(module).__module__.startswith("torch.nn."))
    weights = (weight for module in foreign for weight in module.parameters(recurse=False) if weight.dim() == 3)
    return any(size * weight.element_size() % _ROW_BYTES for weight in weights for size in weight.shape[1:])


def names_on_meta(model: nn.Module) -> list[str]:
    """Names of the tensors without storage: parameters, buffers and plain attributes."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names = [name for name, tensor in named if tensor.is_meta]
    for path, module in model.named_modules():
        names += [f"{path}.{k}" for k, v in vars(module).items() if isinstance(v, torch.Tensor) and v.is_meta]
    return names


class DryRuns:
    """Forward passes of slim models on ``meta``, under the attention implementations that work for the dense model.

    The dense model, a copy on ``meta`` to be thrown away, is run only if a slim one fails, once per implementation.
    Both are run on ``inputs`` as :func:`run_on_meta` takes them.
    """

    def __init__(self, dense: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> None:
        own, *others = attention_implementations(dense)
        self._dense, self.inputs = dense, inputs
        # flex attention refuses tensors on meta: a run under it shows nothing, and costs the import of a compiler
        self._names = (own, *(name for name in others if name != "flex_attention"))
        self._dense_works: dict[str, bool] = {}

    def failure_of(self, slim: PreTrainedModel, patched: bool = True) -> str | None:
        """Return why a slim model, to be thrown away, fails where the dense one runs; None if it does not fail.

        Each implementation may read attributes that were set (``patched``) in its own way. A model that its class
        builds from a config alone is run under its own implementation only.
        """
        for name in self._names if patched else self._names[:1]:
            found = run_on_meta(slim, self.inputs, implementation=name)
            if found is None:
                continue
            if name not in self._dense_works:
                self._dense_works[name] = run_on_meta(self._dense, self.inputs, implementation=name) is None
            if self._dense_works[name]:
                return f"under {name} attention: {found}"
        return None
