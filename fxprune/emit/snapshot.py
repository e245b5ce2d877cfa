"""Snapshots of a module: tensors, attributes, config fields; models on ``meta``, filled with tensors and run."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from fxprune.graph.compat import DeviceContext, tree_map
from fxprune.graph.context import Refusal, attempt, call_foreign, quiet
from fxprune.graph.facts import within
from fxprune.graph.shapes import MetaOpCache
from fxprune.graph.tensors import named_tensors, submodule
from fxprune.modelling.blocks import CannotBuildError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


def names_in(named: Mapping[str, T], path: str) -> dict[str, T]:
    """Return the values below a module, by name within it."""
    prefix = f"{path}."
    return {name[len(prefix) :]: value for name, value in named.items() if name.startswith(prefix)}


def slim_name(name: str, removed_blocks: Collection[str]) -> str | None:
    """Name in the slim model of a module or tensor of the dense one; None if it was removed.

    Blocks after a removed one, given by module paths such as ``"decoder.3"``, move up.
    """
    if within(f"{name}.", removed_blocks):
        return None
    gone: dict[str, list[int]] = {}
    for path, _, index in (block.rpartition(".") for block in removed_blocks):
        if index.isdigit():
            gone.setdefault(path, []).append(int(index))
    for path, indices in gone.items():
        index, dot, rest = name.removeprefix(f"{path}.").partition(".")
        if within(name, (path,)) and index.isdigit():
            return f"{path}.{int(index) - sum(other < int(index) for other in indices)}{dot}{rest}"
    return name


def common_module(names: Iterable[str]) -> str:
    """Path of the smallest module that holds all tensors of these names; empty for the whole."""
    paths = [name.split(".")[:-1] for name in names]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared)


Shape = tuple[int, ...]
Axis = tuple[str, int]
Number = int | tuple[int, ...]

MISSING_AXIS = -1
"""The axis reported for a tensor that only one of two modules has, or that has another number of axes."""


@dataclass(frozen=True)
class Snapshot:
    """Shapes and attributes of one built module.

    Args:
        shapes: shape by parameter and buffer name, tied names included.
        numbers: integer (or tuple of integers) attributes by module path and attribute name.
        scalars: float and bool attributes by module path and attribute name.
    """

    shapes: Mapping[str, Shape]
    numbers: Mapping[tuple[str, str], Number]
    scalars: Mapping[tuple[str, str], float]


def is_number(value: object) -> TypeGuard[Number]:
    """Whether a value is an integer or a tuple of integers; a bool is neither."""
    if type(value) is int:
        return True
    return isinstance(value, tuple) and bool(value) and all(type(item) is int for item in value)


def shapes_of(module: nn.Module) -> dict[str, Shape]:
    """Shapes by name of all parameters and buffers, tied and non-persistent ones included."""
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(module)}


def take_snapshot(module: nn.Module, skip: Collection[str] = ()) -> Snapshot:
    """Return the shapes and scalar attributes of a module, without the subtrees at the paths in ``skip``."""
    modules = [(path, child) for path, child in module.named_modules() if not within(f"{path}.", skip)]
    held = {(path, name): value for path, child in modules for name, value in vars(child).items()}
    held = {key: value for key, value in held.items() if key[1] != "training" and not key[1].startswith("_")}
    numbers = {key: value for key, value in held.items() if is_number(value)}
    scalars = {key: value for key, value in held.items() if isinstance(value, float | bool)}
    shapes = {name: shape for name, shape in shapes_of(module).items() if not within(name, skip)}
    return Snapshot(shapes, numbers, scalars)


def mismatches(shapes: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> frozenset[Axis]:
    """Axes on which two sets of shapes differ; see ``MISSING_AXIS`` for names that only one side has."""
    wrong: set[Axis] = {(name, MISSING_AXIS) for name in shapes.keys() ^ wanted.keys()}
    for name in shapes.keys() & wanted.keys():
        have, want = shapes[name], wanted[name]
        if len(have) != len(want):
            wrong.add((name, MISSING_AXIS))
            continue
        wrong.update((name, axis) for axis, size in enumerate(have) if size != want[axis])
    return frozenset(wrong)


@contextmanager
def without_storage() -> Iterator[None]:
    """Build modules on ``meta`` inside the context, without gradients and without warnings about odd configs."""
    with quiet(), Uninitialised("meta"), torch.no_grad():
        yield


class Uninitialised(DeviceContext):
    """A device context in which ``nn.init`` returns tensors on ``meta`` unchanged.

    Initialisation takes its time also without storage, and so does each context that intercepts calls of torch: this
    one does both jobs. It lies on top of the contexts of the caller, as ``with torch.device(...)`` does; the one of
    torch puts itself at the bottom, and loses one of two others.
    """

    __enter__ = TorchFunctionMode.__enter__
    __exit__ = TorchFunctionMode.__exit__

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == nn.init.__name__:
            tensor = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def build_on_meta(build: Callable[..., T], /, *args: Any, **kwargs: Any) -> T | Refusal:
    """Build something on ``meta``; return it, or the refusal of its constructor."""
    with without_storage():
        return attempt(build, *args, refusals=(CannotBuildError,), **kwargs)


_SHARED = frozenset(entry.name for entry in dataclasses.fields(PreTrainedConfig))
"""Fields that every config has; none of them is a width."""


@dataclass(frozen=True)
class Reads:
    """Names that a constructor read from its config.

    Args:
        integers: fields that hold an integer, or a list of the same integer throughout.
        unset: fields that are None, or absent and read with a default.
    """

    integers: tuple[str, ...]
    unset: tuple[str, ...]


def part_of(config: PreTrainedConfig, part: str) -> PreTrainedConfig:
    """Nested config that blocks are built from, by its path; the config itself for an empty one."""
    nested: PreTrainedConfig = attrgetter(part)(config) if part else config
    return nested


def value_of(config: PreTrainedConfig, name: str) -> int | None:
    """Integer that a config field holds, itself or as each entry of a list; else None."""
    value = vars(config).get(name)
    entries = value if type(value) in (list, tuple) and value else [value]
    return entries[0] if all(type(entry) is int and entry == entries[0] for entry in entries) else None


def block_entries(config: PreTrainedConfig, total: int, index: int) -> dict[str, int]:
    """Entries of one block in the config's lists of integers with one entry for each of ``total`` blocks, by field.

    There are none for a block of another list of blocks, which may be longer.
    """
    lists = _lists_by_block(config, total) if index < total else ()
    return {name: value[index] for name, value in lists if all(type(entry) is int for entry in value)}


def record_reads(config: PreTrainedConfig, build: Callable[[PreTrainedConfig], object]) -> Reads:
    """Record the config fields that a constructor reads.

    It is given a config whose class records every attribute access. If the constructor refuses such a config, every
    field counts as read.
    """
    probe, read, base = copy.deepcopy(config), set[str](), type(config)

    def record(self: PreTrainedConfig, name: str) -> Any:
        read.add(name)
        return call_foreign(base.__getattribute__, self, name)

    probe.__class__ = type(base.__name__, (base,), {"__getattribute__": record})
    if isinstance(build_on_meta(build, probe), Refusal):
        read = set(vars(config))
    aliases = config.attribute_map
    names = {aliases.get(name, name) for name in read if not name.startswith("_")} - _SHARED
    held = vars(config)
    integers = tuple(sorted(name for name in names if value_of(config, name) is not None))
    empty = (name for name in names if held.get(name) is None)
    return Reads(integers, tuple(sorted(name for name in empty if name in held or not hasattr(base, name))))


def keep_blocks(config: PreTrainedConfig, count_field: str | None, total: int, kept: Sequence[int]) -> None:
    """Make a config describe the kept blocks only: their count, if a field has it, and lists with an entry for each."""
    for name, value in _lists_by_block(config, total):
        vars(config)[name] = type(value)(value[index] for index in kept)
    if count_field:
        vars(config)[count_field] = len(kept)


def _lists_by_block(config: PreTrainedConfig, total: int) -> Iterator[tuple[str, Any]]:
    for name, value in list(vars(config).items()):
        foreign = name in _SHARED or name.startswith("_") or name.endswith(("token_id", "token_ids"))
        if type(value) in (list, tuple) and len(value) == total and not foreign:
            yield name, value


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
    return nested_configs([model.config, *(vars(module).get("config") for module in model.modules())])


def nested_configs(pending: list[Any]) -> list[PreTrainedConfig]:
    """Those of some values that are configs, and the configs nested in them."""
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
    """Return the differences between a model's tensors and those to be assigned to it, by dense name, in words.

    The shapes of ``loose`` slim names may differ: attributes were set to fit them.
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
        model: to be thrown away: some classes keep state between passes. It loses its padding token, whose absence from
            the input cannot be checked without data, and multiplies experts in batches, since grouped kernels refuse
            some widths on ``meta`` that they accept elsewhere.
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
    names = [name for name, tensor in named_tensors(model) if tensor.is_meta]
    for path, module in model.named_modules():
        names += [f"{path}.{k}" for k, v in vars(module).items() if isinstance(v, torch.Tensor) and v.is_meta]
    return names


@dataclass
class DryRuns:
    """Forward passes of slim models on ``meta``, under the attention implementations that work for the dense model.

    The dense model, of which ``copy_dense`` makes a copy to be thrown away, is run only if a slim one fails, once per
    implementation. Failures show nothing where it does not run itself, under its own implementation.
    """

    copy_dense: Callable[[], PreTrainedModel]
    inputs: Mapping[str, Any] | None = None
    show_failures: bool = True
    _dense_works: dict[str, bool] = field(default_factory=dict)

    def failure_of(self, slim: PreTrainedModel, patched: bool = True) -> str | None:
        """Return why a slim model, to be thrown away, fails where the dense one runs; None if it does not fail.

        Each implementation may read attributes that were set (``patched``) in its own way. A model that its class
        builds from a config alone is run under its own implementation only.
        """
        own, *others = attention_implementations(slim)
        # flex attention refuses tensors on meta: a run under it shows nothing, and costs the import of a compiler
        for name in (own, *(name for name in others if name != "flex_attention")) if patched else (own,):
            found = run_on_meta(slim, self.inputs, implementation=name)
            if found is None:
                continue
            if name not in self._dense_works:
                dense = attempt(self.copy_dense)
                if isinstance(dense, Refusal):
                    return f"the dense model cannot be copied: {dense}"
                self._dense_works[name] = run_on_meta(dense, self.inputs, implementation=name) is None
                self.show_failures = self.show_failures and (name != own or self._dense_works[name])
            if self._dense_works[name]:
                return f"under {name} attention: {found}"
        return None
