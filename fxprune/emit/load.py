"""Tensors assigned to a model on ``meta``, and runs under each attention implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fxprune.emit.snapshot import build_on_meta, on_meta, shapes_of
from fxprune.graph.context import Refusal, attempt, quiet
from fxprune.graph.shapes import WorkedOutOnce
from fxprune.graph.tensors import submodule

__all__ = [
    "DryRuns",
    "Rename",
    "assign",
    "attending",
    "configs_of",
    "has_odd_experts",
    "implementations",
    "left_on_meta",
    "misfits",
    "missing_modules",
    "run_on_meta",
    "standins",
    "suit_experts",
]

_HELD = "_attn_implementation_internal"

_SWITCHABLE = {"eager": None, "sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}
"""What runs on every device, and the attribute of a class that says whether it has it."""


def implementations(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the attention implementations that a model can be run under here, its own first.

    Those that ask for a kind of device or a package of their own, as flash attention does, are left out unless the
    model runs under one.
    """
    own = str(model.config._attn_implementation or "eager")
    if not model._can_set_attn_implementation():
        return (own,)
    had = (name for name, flag in _SWITCHABLE.items() if flag is None or getattr(model, flag, False))
    return tuple(dict.fromkeys((own, *had)))


@contextmanager
def attending(model: PreTrainedModel, implementation: str) -> Iterator[bool]:
    """Run a model under an attention implementation while the context lasts; yields whether it takes that one.

    What transformers would compile first runs as it is: compiling takes seconds for each shape.

    Args:
        model: its configs are as they were afterwards.
        implementation: one of those that :func:`implementations` returns.
    """
    held = [(config, vars(config)[_HELD]) for config in configs_of(model) if _HELD in vars(config)]
    try:
        with quiet(), torch.compiler.set_stance("force_eager"):
            taken = implementation == model.config._attn_implementation or not isinstance(
                attempt(model.set_attn_implementation, implementation), Refusal
            )
            yield taken
    finally:
        for config, value in held:
            vars(config)[_HELD] = value


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return the config of a model, those of its modules, and those nested in them."""
    pending = [model.config, *(vars(module).get("config") for module in model.modules())]
    found: dict[int, PreTrainedConfig] = {}
    while pending:
        config = pending.pop(0)
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            pending.extend(vars(config).values())
    return list(found.values())


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


_NEEDS_STORAGE = "flex_attention"
"""Refuses tensors on ``meta``: a run under it tells nothing, and costs the import of a compiler."""


class DryRuns:
    """Says what stops a slim model on ``meta``.

    It has to run under the attention implementations under which the dense model does. The dense model is only run
    where a slim one fails, and once.

    Args:
        dense: a copy of the dense model on ``meta``, to be thrown away.
    """

    def __init__(self, dense: PreTrainedModel) -> None:
        own, *others = implementations(dense)
        self._dense = dense
        self._names = (own, *(name for name in others if name != _NEEDS_STORAGE))
        self._stands: dict[str, bool] = {}

    def failure_of(self, slim: PreTrainedModel, patched: bool = True) -> str | None:
        """Return what stops ``slim``, a model to be thrown away, in words; None where it runs as the dense one does.

        Args:
            slim: the model.
            patched: whether attributes of its modules are set by hand, which each implementation may read in its own
                way. A model that its class makes of a config alone is run under its own implementation.
        """
        for name in self._names if patched else self._names[:1]:
            found = run_on_meta(slim, implementation=name)
            if found is not None and self._dense_runs(name):
                return f"under {name} attention: {found}"
        return None

    def _dense_runs(self, name: str) -> bool:
        if name not in self._stands:
            self._stands[name] = run_on_meta(self._dense, implementation=name) is None
        return self._stands[name]
