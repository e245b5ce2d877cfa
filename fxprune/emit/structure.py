"""Structure of a slim model: its differences from the model that its stock class builds from its config."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig

from fxprune.emit.layout import find_layout
from fxprune.emit.snapshot import part_of, shapes_of
from fxprune.errors import CheckpointError
from fxprune.graph.context import Refusal, attempt, quiet
from fxprune.modelling.blocks import BUILT_AT, CannotBuildError
from fxprune.modelling.layerwise import SECTION, AnyWidths, Layerwise, section_of
from fxprune.modelling.overrides import OVERRIDES, Overrides
from fxprune.modelling.table_rows import INPUTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Structure", "describe_structure", "parse_config", "pruned_class", "stock_class", "stock_config"]


def stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Class of a model without the mixins of a pruned model's loader."""
    found: type[PreTrainedModel] = next(c for c in type(model).__mro__ if not issubclass(c, Layerwise))  # type: ignore[assignment]
    return found


def stock_config(config: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Class of a config without the mixins of a pruned model's loader."""
    found: type[PreTrainedConfig] = next(c for c in config.__mro__ if not issubclass(c, AnyWidths))  # type: ignore[assignment]
    return found


def pruned_class(stock: type[PreTrainedModel], config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """Class like ``stock`` that builds blocks of their own widths from a config that allows them."""
    return type(stock.__name__, (Layerwise, stock), {"config_class": _relaxed_config(config)})


_RELAXED: dict[type, type[PreTrainedConfig]] = {}


def _relaxed_config(config: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Config class like ``config`` that allows any widths; its instances can be copied and sent to other processes."""
    if issubclass(config, AnyWidths):
        return config

    def reduce(self: PreTrainedConfig) -> tuple[Any, ...]:
        return _empty_config, (config,), dict(vars(self))

    if config not in _RELAXED:
        _RELAXED[config] = type(config.__name__, (AnyWidths, config), {"__reduce__": reduce})
    return _RELAXED[config]


def _empty_config(config: type[PreTrainedConfig]) -> PreTrainedConfig:
    relaxed = _relaxed_config(config)
    return relaxed.__new__(relaxed)


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
        return not self.differences

    @property
    def differences(self) -> tuple[str, ...]:
        lines = [f"its config class refuses these widths: {self.refusal}"] if self.refusal else []
        lines += ["its blocks differ in width"] if self.overrides.block_fields or self.overrides.absent else []
        for part, words in _WORDS.items():
            names = sorted(getattr(self.overrides, part))
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines += [f"{words}: {names[0] or 'the model'}{more}"] if names else []
        return tuple(lines)


_WORDS = {
    "built_with": "its class cannot be built with the value that the slim model needs of",
    "attributes": "no config field sets an attribute of",
    "shapes": "no config field sets the shape of",
    "buffers": "the class makes other values for",
    "built_at": "the class builds another kind of block at",
    "inputs": "no config field says which units remain in the inputs of",
}


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
        built_at={p: vars(block)[BUILT_AT] for p, (_, block) in layout.blocks().items() if BUILT_AT in vars(block)},
        built_with=known.built_with,
        written_afterwards={name: held[name] for name in known.built_with},
        inputs={p: vars(module)[INPUTS] for p, module in model.named_modules() if INPUTS in vars(module)},
    )
    data = parse_config(model.config.to_json_string(use_diff=False))
    data.pop(SECTION, None)
    twin = _build(model, data, section_of(overrides, where))
    shapes, built = shapes_of(model), shapes_of(twin)
    odd = sorted(shapes.keys() ^ built.keys())
    odd += sorted({path for path, _ in model.named_modules()} ^ {path for path, _ in twin.named_modules()})
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


def _build(model: PreTrainedModel, data: Mapping[str, Any], section: Mapping[str, Any]) -> nn.Module:
    """Build a model as a loader does: parameters on ``meta``, buffers real."""
    cls = pruned_class(stock_class(model), type(model.config))

    def build() -> nn.Module:
        config: Any = cls.config_class
        return cls(config.from_dict({**data, SECTION: section}))

    with quiet(), init_empty_weights(include_buffers=False), torch.no_grad():
        twin = attempt(build, refusals=(CannotBuildError,))
    if isinstance(twin, Refusal):
        raise CheckpointError(
            f"its class cannot be built from its config: {twin}",
            where=type(model).__name__,
            remedy="Export the graph instead: result.export('model.pt2')",
        ) from twin.error
    return twin


def _attributes(model: nn.Module, twin: nn.Module) -> dict[str, dict[str, Any]]:
    twins: dict[str, nn.Module] = dict(twin.named_modules())
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
