"""Tensors put into a model on ``meta``: assigned, never copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from fxprune.emit.attention import attending, configs_of
from fxprune.emit.meta import build_on_meta, on_meta
from fxprune.emit.snapshot import shapes_of
from fxprune.graph.attempts import Refusal, attempt
from fxprune.graph.dry import WorkedOutOnce
from fxprune.graph.silence import quiet
from fxprune.graph.tensors import submodule

__all__ = [
    "Rename",
    "assign",
    "has_odd_experts",
    "left_on_meta",
    "misfits",
    "missing_modules",
    "run_on_meta",
    "standins",
    "suit_experts",
]

Rename = Callable[[str], str | None]
"""The slim name of a dense tensor or module; None where it is gone."""

_ROW_BYTES = 16
"""Grouped kernels of torch want rows of matrices that lie side by side to begin at multiples of so many bytes."""


def misfits(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], rename: Rename, expected: frozenset[str]
) -> list[str]:
    """Return the differences between the tensors a model has and those it is to be given, in words.

    Args:
        model: the slim model.
        tensors: tensors by dense name.
        rename: dense names to slim names.
        expected: slim names whose shape was settled by setting attributes, and may differ.
    """
    have = shapes_of(model)
    want = {new: tuple(tensor.shape) for name, tensor in tensors.items() if (new := rename(name)) is not None}
    lines = [f"{name}: no tensor given for it" for name in have.keys() - want.keys()]
    lines += [f"{name}: the class has no such tensor, wanted {want[name]}" for name in want.keys() - have.keys()]
    for name in have.keys() & want.keys() - expected:
        if have[name] != want[name]:
            lines.append(f"{name}: wanted {want[name]}, obtained {have[name]}")
    return sorted(lines)


def missing_modules(model: nn.Module, dense: nn.Module, rename: Rename) -> list[str]:
    """Return the modules of the dense model that the slim one lacks, in words: its class does not build them."""
    there = {path for path, _ in model.named_modules()}
    wanted = [new for path, _ in dense.named_modules() if (new := rename(path)) is not None]
    return [f"{path}: the class builds no such module" for path in wanted if path not in there]


def assign(model: PreTrainedModel, dense: PreTrainedModel, tensors: Mapping[str, torch.Tensor], rename: Rename) -> None:
    """Give a model exactly the given tensors; tied names hold one parameter.

    Args:
        model: the slim model on ``meta``, with all modules of the dense one that remain.
        dense: the dense model, for which parameters are trained and which module is in training mode.
        tensors: tensors by dense name.
        rename: dense names to slim names.
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
            wrapped[id(tensor)] = _parameter(tensor, trained.get(name, True))
        owner._parameters[leaf] = wrapped[id(tensor)]
    for path, module in dense.named_modules():
        new = rename(path)
        if new is not None:
            submodule(model, new).training = module.training


def _parameter(tensor: torch.Tensor, trained: bool) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    floating = tensor.is_floating_point() or tensor.is_complex()
    return nn.Parameter(tensor.detach(), requires_grad=trained and floating)


def run_on_meta(model: PreTrainedModel, samples: int = 1, implementation: str | None = None) -> Refusal | None:
    """Return what stops a forward pass on ``meta``; None where it runs.

    Args:
        model: a model on ``meta``, to be thrown away: some classes keep state between passes. It loses its
            padding token, whose absence from the input cannot be checked without data, and multiplies experts
            in batches, since grouped kernels refuse some widths on ``meta`` that they take elsewhere.
        samples: number of sequences that go in.
        implementation: of attention; its own if None. One that the model does not take stops nothing.
    """
    for config in configs_of(model):
        vars(config).update(pad_token_id=None, _experts_implementation_internal="batched_mm")
    with on_meta():
        tokens = torch.zeros(samples, 5, dtype=torch.long)
    with attending(model, implementation or str(model.config._attn_implementation)) as taken:
        with WorkedOutOnce(), quiet(), torch.device("meta"), torch.no_grad():  # draws nothing: no need to look for it
            result = attempt(model.eval(), input_ids=tokens) if taken else None
        if isinstance(result, Refusal):  # the word of a run in which nothing takes the place of an op is the last
            result = build_on_meta(model, input_ids=tokens)
    return result if isinstance(result, Refusal) else None


def suit_experts(model: PreTrainedModel) -> None:
    """Let experts run one by one where they have a width that grouped kernels do not take."""
    for config in configs_of(model) if has_odd_experts(model) else ():
        if vars(config).get("_experts_implementation_internal") == "grouped_mm":
            vars(config)["_experts_implementation_internal"] = "eager"


def has_odd_experts(model: nn.Module) -> bool:
    """Whether some matrix of side by side ones has rows of a length that grouped kernels do not take."""
    foreign = (module for module in model.modules() if not type(module).__module__.startswith("torch.nn."))
    weights = (weight for module in foreign for weight in module.parameters(recurse=False) if weight.dim() == 3)
    return any(size * weight.element_size() % _ROW_BYTES for weight in weights for size in weight.shape[1:])


def left_on_meta(model: nn.Module) -> list[str]:
    """Return the names of tensors without storage: parameters, buffers and plain attributes."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names = [name for name, tensor in named if tensor.is_meta]
    for path, module in model.named_modules():
        names += [f"{path}.{k}" for k, v in vars(module).items() if isinstance(v, torch.Tensor) and v.is_meta]
    return names


def standins(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors of the same shapes and types on ``meta``, one for each distinct tensor."""
    made: dict[int, torch.Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty_like(tensor, device="meta")
    return {name: made[id(tensor)] for name, tensor in tensors.items()}
