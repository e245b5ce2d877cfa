"""Structure of a slim model: blocks removed, rows of tables, and differences from what its stock class builds."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

from fxprune.emit.layout import Layout, find_layout, stock_class, stock_config
from fxprune.emit.snapshot import (
    Uninitialised,
    build_on_meta,
    keep_blocks,
    part_of,
    run_on_meta,
    shapes_of,
    take_snapshot,
    without_storage,
)
from fxprune.errors import CheckpointError
from fxprune.graph.context import Refusal, attempt, quiet, replaced
from fxprune.graph.facts import within
from fxprune.modelling.blocks import BUILT_AT, CannotBuildError, builder_of, names_index, renumber
from fxprune.modelling.layerwise import OVERRIDES, SECTION, AnyWidths, Layerwise, Overrides, section_of
from fxprune.modelling.table_rows import INPUTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pruned_class(stock: type[PreTrainedModel], config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """Class like ``stock`` that builds blocks of their own widths from a config that allows them; one for each."""
    return _pruned_class(stock, _relaxed_config(config))  # type: ignore[arg-type]  # mypy: a class has no hash


@cache
def _pruned_class(stock: type[PreTrainedModel], relaxed: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    def reduce(self: PreTrainedModel, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = nn.Module.__reduce_ex__(self, protocol)
        return _empty, (pruned_class, stock, stock_config(relaxed)), *reduced[2:]

    members = {"config_class": relaxed, "__reduce_ex__": reduce, "__module__": stock.__module__}
    return type(stock.__name__, (Layerwise, stock), members)


@cache
def _relaxed_config(config: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Config class like ``config`` that allows any widths; its instances can be copied and sent to other processes.

    The Auto classes of transformers build pruned models from it: they look up the class of a config by its name.
    """
    if issubclass(config, AnyWidths):
        return config

    def reduce(self: PreTrainedConfig) -> tuple[Any, ...]:
        return _empty, (_relaxed_config, config), dict(vars(self))

    members = {"__reduce__": reduce, "__module__": config.__module__}
    relaxed = type(config.__name__, (AnyWidths, config), members)
    is_known = getattr(transformers, config.__name__, None) is config
    for auto in vars(transformers.models.auto.modeling_auto).values() if is_known else ():
        known: Any = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        stock = None if known is None else attempt(known.get, config, None)  # its package may be missing
        if isinstance(stock, type):
            auto.register(relaxed, pruned_class(stock, relaxed), exist_ok=True)
    return relaxed


def _empty(make: Any, *classes: type) -> Any:
    made = make(*classes)
    return made.__new__(made)


def parse_config(text: str) -> dict[str, Any]:
    """Parse the text of a ``config.json``; transformers writes infinity and NaN as ``{"__float__": "Infinity"}``."""

    def decoded(value: dict[str, Any]) -> Any:
        return float(value["__float__"]) if value.keys() == {"__float__"} else value

    found: dict[str, Any] = json.loads(text, object_hook=decoded)
    return found


@dataclass(frozen=True)
class Structure:
    """Differences of a model from the one that its class builds from its config.

    Args:
        overrides: the differences that no config field of the whole model expresses.
        where: name of the stock ``class``, module path of the ``blocks`` and the ``part`` of the config that
            describes them.
        refusal: the validation error of the stock config class; empty if it accepts the config.
    """

    overrides: Overrides
    where: Mapping[str, str]
    refusal: str = ""

    @property
    def is_stock(self) -> bool:
        """Whether the stock class builds the model from its config alone."""
        return not self.refusal and self.overrides == Overrides()


def describe_structure(model: PreTrainedModel) -> Structure:
    """Compare an emitted model, which may be on ``meta``, with the one that its stock class builds from its config.

    Raises:
        CheckpointError: it cannot be built from a config and plain data.
    """
    layout = find_layout(model)
    path = layout.stacks[0].path if layout.stacks else ""
    where = {"class": stock_class(model).__name__, "blocks": path, "part": layout.part}
    known: Overrides = vars(model).get(OVERRIDES) or Overrides()
    held = vars(part_of(model.config, layout.part))
    overrides = Overrides(
        block_fields=known.block_fields,
        absent=known.absent,
        built_at=layout.built_at(),
        built_with=known.built_with,
        written_afterwards={name: held[name] for name in known.built_with},
        inputs={p: vars(module)[INPUTS] for p, module in model.named_modules() if INPUTS in vars(module)},
    )
    data = parse_config(model.config.to_json_string(use_diff=False))
    data.pop(SECTION, None)
    twin = _built(model, {**data, SECTION: section_of(overrides, where)})
    shapes, built = shapes_of(model), shapes_of(twin)
    odd = sorted(shapes.keys() ^ built.keys())
    paths = ({path for path, _ in m.named_modules(remove_duplicate=False)} for m in (model, twin))
    odd += sorted(set.symmetric_difference(*paths))
    if odd:
        remedy = "Save a model as it was emitted; merge adapters first"
        raise CheckpointError("only one of the model and its config has it", where=odd[0], remedy=remedy)
    buffers = _buffers(model, twin, keep_all=bool(known.built_with))
    resized = {name: list(shape) for name, shape in shapes.items() if shape != built[name] and name not in buffers}
    overrides = dataclasses.replace(overrides, attributes=_attributes(model, twin), shapes=resized, buffers=buffers)
    with quiet():
        made = attempt(stock_config(type(model.config)).from_dict, dict(data))
    refusal = " ".join(str(made.error).split()) if isinstance(made, Refusal) else ""
    return Structure(overrides, where, refusal)


def carry_structure(model: PreTrainedModel) -> None:
    """Make the class of an emitted model build the same one from ``model.config``.

    A model that its stock class builds from its config stays as it is, and so does one that cannot be built again.
    """
    structure = attempt(describe_structure, model, refusals=(CheckpointError,))
    if isinstance(structure, Refusal) or structure.is_stock:
        return
    pruned: Any = pruned_class(stock_class(model), type(model.config))
    model.__class__, model.config.__class__ = pruned, pruned.config_class
    vars(model.config)[SECTION] = section_of(structure.overrides, structure.where)
    vars(model)[OVERRIDES] = structure.overrides


def _built(model: PreTrainedModel, data: Mapping[str, Any]) -> nn.Module:
    """Build a model from a config as a loader does: parameters on ``meta``, buffers real."""
    cls: Any = pruned_class(stock_class(model), type(model.config))
    with quiet(), _parameters_on_meta(), Uninitialised(torch.get_default_device()), torch.no_grad():
        twin: nn.Module | Refusal = attempt(
            lambda: cls(cls.config_class.from_dict(dict(data))), refusals=(CannotBuildError,)
        )
    if isinstance(twin, Refusal):
        raise CheckpointError(
            f"its class cannot be built from its config: {twin}",
            where=type(model).__name__,
            remedy="Export the graph instead: result.export('model.pt2')",
            shell="Write the graph instead: let --out end in .pt2",
        ) from twin.error
    return twin


_BUILDING = threading.Lock()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put the parameters of modules made in this context on ``meta``, in this thread alone."""
    with _BUILDING:
        register, thread = nn.Module.register_parameter, threading.get_ident()

        def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            register(module, name, parameter)
            if parameter is not None and threading.get_ident() == thread:
                empty = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
                empty._is_hf_initialized = True  # type: ignore[attr-defined]  # random numbers take time on meta too
                module._parameters[name] = empty

        with replaced(nn.Module, register_parameter=on_meta):
            yield


def _attributes(model: nn.Module, twin: nn.Module) -> dict[str, dict[str, Any]]:
    twins: dict[str, nn.Module] = dict(twin.named_modules(remove_duplicate=False))
    found: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        held, there = vars(module), vars(twins[path])
        for name in held.keys() & there.keys() - {"training"}:
            value = held[name]
            if name.startswith(("_", SECTION)) or not (_is_plain(value) and _is_plain(there[name])):
                continue
            if value != there[name]:
                found.setdefault(path, {})[name] = list(value) if isinstance(value, tuple) else value
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(isinstance(item, int | float | str) for item in value)
    return value is None or isinstance(value, int | float | str)


def _buffers(model: nn.Module, twin: nn.Module, *, keep_all: bool) -> dict[str, list[int]]:
    """Return the non-persistent buffers that differ when the class makes them, with their shapes.

    A loader makes them after the config has been given its last values, so all are kept if it changes late.
    """
    made = dict(twin.named_buffers(remove_duplicate=False))
    stored = set(model.state_dict(keep_vars=True))
    unfilled = _unfilled(twin)
    found: dict[str, list[int]] = {}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        other = made[name]
        if name in stored:
            continue
        kept = keep_all or name.rpartition(".")[0] in unfilled or buffer.shape != other.shape
        if kept or not (buffer.is_meta or torch.equal(buffer.detach().cpu(), other.to(buffer.dtype).cpu())):
            found[name] = list(buffer.shape)
    return found


def _unfilled(twin: nn.Module) -> set[str]:
    """Return the modules whose non-persistent buffers stock classes cannot fill as a loader asks, tried on copies."""
    found: set[str] = set()
    for owner, model in twin.named_modules():
        if not isinstance(model, transformers.PreTrainedModel):
            continue
        for path, module in model.named_modules():
            buffers = module._non_persistent_buffers_set
            if buffers and isinstance(attempt(model._init_weights, copy.deepcopy(module)), Refusal):
                found.add(f"{owner}.{path}".strip("."))
    return found


def remove_blocks(model: PreTrainedModel, removed: Collection[str], layout: Layout) -> None:
    """Remove blocks from a model, which is changed in place, and from its config, and renumber the others."""
    for stack in layout.stacks:
        kept = [index for index, path in enumerate(stack.paths()) if path not in removed]
        if len(kept) == len(stack.blocks):
            continue
        counted = stack is layout.stacks[0]  # the config counts the blocks of the first list only
        blocks: Any = model.get_submodule(stack.path)
        whole = part_of(model.config, stack.part)
        shorter = copy.deepcopy(whole)
        if counted:
            keep_blocks(shorter, layout.count_field, layout.depth, kept)
        for new, old in enumerate(kept):
            if old != new or counted:
                _move(blocks[old], (whole, old), (shorter, new), counted)
        if counted:
            held = [vars(m).get("config") for path in layout.blocks() for m in model.get_submodule(path).modules()]
            configs = {id(config): config for config in (whole, *held) if isinstance(config, PreTrainedConfig)}
            for config in configs.values():
                keep_blocks(config, layout.count_field, layout.depth, kept)
        for old in sorted({*range(len(stack.blocks))} - {*kept}, reverse=True):
            del blocks[old]


def _move(
    block: nn.Module, before: tuple[PreTrainedConfig, int], after: tuple[PreTrainedConfig, int], counted: bool
) -> None:
    """Set the attributes of a block that hold its index, and record where it was built if its class chooses by index.

    It is built at both indices, from the config of all blocks and from that of the kept ones: an attribute that differs
    between the two is the index, and a block of another kind shows that its class chooses the kind by index.
    """
    builder = builder_of(block, vars(block).get(BUILT_AT))
    made = [] if builder is None else [build_on_meta(builder, copy.deepcopy(c), i) for c, i in (before, after)]
    built = [one for one in made if isinstance(one, nn.Module)]
    numbers = [take_snapshot(one).numbers for one in built]
    (whole, old), (shorter, new) = before, after

    def follows(path: str, name: str) -> bool:
        key = (path, name)
        if len(numbers) == 2 and key in numbers[0] and key in numbers[1]:
            return (numbers[0][key], numbers[1][key]) == (old, new)
        return names_index(name)

    renumber(block, old, new, follows)
    if not counted or BUILT_AT in vars(block) or len(built) < 2 or _kinds(built[0]) == _kinds(built[1]):
        return
    plain = {name: value for name, value in vars(whole).items() if type(value) in (int, list, tuple)}
    fields = {name: value for name, value in plain.items() if vars(shorter)[name] != value}
    vars(block)[BUILT_AT] = {"index": old, "fields": fields}


def _kinds(block: nn.Module) -> dict[str, type]:
    tensors = {name: type(p) for name, p in block.named_parameters(remove_duplicate=False)}
    return {**{path: type(module) for path, module in block.named_modules()}, **tensors}


KeptUnits = Mapping[str, Mapping[int, Sequence[int]]]
"""By module path of a block (empty for all blocks) and number of units before, the numbers of those that remain."""

_SAMPLES = 7
"""A batch size unlike any number of heads: it tells an axis of all samples' units from one of a sample's."""


def find_inputs(
    model: PreTrainedModel,
    slim: nn.Module,
    layout: Layout,
    kept_units: KeptUnits,
    inputs: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Find the arguments in which modules with fewer units than before receive all of them, by a dense forward pass.

    An argument counts if one of its axes has the length of all units, for one sample or for all samples together. The
    result is as :func:`fxprune.modelling.table_rows.select_inputs` takes it, by dense module path.

    Args:
        model: a copy of the dense model on ``meta``, to be thrown away.
        slim: the slim model on ``meta``, before blocks are removed.
        inputs: of the shapes that the model runs on; token ids by default.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    shrunk = _shrunk(model, slim, layout, kept_units)

    def record(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        units, kept = shrunk[path]
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            shape = list(value.shape) if isinstance(value, torch.Tensor) else []
            axes = [shape.index(size) for size in (_SAMPLES * units, units) if size in shape]
            if axes:
                found.setdefault(path, {})[name] = {"axis": axes[0], "of": units, "kept": kept}

    for path in shrunk:
        model.get_submodule(path).register_forward_pre_hook(partial(record, path), with_kwargs=True)
    with without_storage():
        tokens = {"input_ids": torch.zeros(1, 5, dtype=torch.long)}
        values = {name: value for name, value in (inputs or tokens).items() if isinstance(value, torch.Tensor)}
        given = {name: torch.empty(_SAMPLES, *value.shape[1:], dtype=value.dtype) for name, value in values.items()}
    run_on_meta(model, given)
    # a block may count the units of the attention that it passes the table on to: select only in the innermost module
    return {path: entries for path, entries in found.items() if not any(within(inner, (path,)) for inner in found)}


def _shrunk(
    model: nn.Module, slim: nn.Module, layout: Layout, kept_units: KeptUnits
) -> dict[str, tuple[int, list[int]]]:
    """Return, by path, the modules with fewer units: the number of units before and the numbers of those that remain.

    They are the modules with an attribute that held the old number of units and holds the new one.
    """
    found: dict[str, tuple[int, list[int]]] = {}
    twins: dict[str, nn.Module] = dict(slim.named_modules())
    for block in layout.blocks():
        known = {**kept_units.get("", {}), **kept_units.get(block, {})}
        for path, module in model.get_submodule(block).named_modules(prefix=block) if known else ():
            there = vars(twins[path]) if path in twins else {}
            held = [(value, there.get(name)) for name, value in vars(module).items() if type(value) is int]
            counted = dict(known)  # also among the units that a module of a pruned model selects already
            for entry in vars(module).get(INPUTS, {}).values():
                if entry["of"] in known:
                    left = set(known[entry["of"]])
                    counted[len(entry["kept"])] = [i for i, unit in enumerate(entry["kept"]) if unit in left]
            for units, kept in counted.items():
                if (units, len(kept)) in held:
                    found[path] = (units, list(kept))
                    break
    return found


def combined_inputs(
    model: nn.Module, more: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Compose the row selections that a model has already with further ones, by module path and argument.

    The further ones are counted among the rows that are selected already.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path, module in model.named_modules():
        held = vars(module).get(INPUTS, {})
        if held or path in more:
            found[path] = {name: dict(entry) for name, entry in held.items()}
        for name, entry in more.get(path, {}).items():
            first = found[path].get(name)
            kept = entry["kept"] if first is None else [first["kept"][i] for i in entry["kept"]]
            found[path][name] = {**(first or entry), "kept": kept}
    return found
