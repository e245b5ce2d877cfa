"""What a model's config does not say about it, found by building the model again from that config."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fxprune.emit.fields import part_of
from fxprune.emit.layout import survey
from fxprune.emit.snapshot import shapes_of
from fxprune.errors import CheckpointError
from fxprune.layerwise import PLACE, SECTION, AnyWidths, Layerwise
from fxprune.quiet import quiet
from fxprune.selecting import INPUTS

__all__ = ["Structure", "describe", "parse_config", "pruned_class", "stock_class", "stock_config"]


@dataclass(frozen=True)
class Structure:
    """How a model differs from what its class builds from its config.

    Attributes:
        layers: by layer, the config fields in which it differs from the model's config.
        section: what no config field can say; see :func:`fxprune.layerwise.restructure`.
        refusal: what the stock config class says to the config; empty where it accepts it.
    """

    layers: Mapping[int, Mapping[str, Any]]
    section: Mapping[str, Any]
    refusal: str = ""

    @property
    def is_stock(self) -> bool:
        """Whether the stock class builds the model from its config alone."""
        return not self.differences

    @property
    def differences(self) -> tuple[str, ...]:
        """Why it does not, in words."""
        said = [f"its config class refuses these widths: {self.refusal}"] if self.refusal else []
        said += ["its layers differ in width"] if self.layers else []
        for part, words in _WORDS.items():
            names = sorted(self.section[part])
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            said += [f"{words}: {names[0] or 'the model'}{more}"] if names else []
        return tuple(said)


_WORDS = {
    "built_with": "its class cannot be built with what the slim model needs of",
    "attributes": "no config field sets an attribute of",
    "shapes": "no config field sets the shape of",
    "buffers": "the class makes other values for",
    "places": "the class builds another kind of layer at",
    "inputs": "no config field says which units remain of what is passed to",
}


def describe(model: PreTrainedModel) -> Structure:
    """The structure of ``model``, from which :func:`fxprune.from_pretrained` builds it again, is known.

    Args:
        model: an emitted model, before or after training; its storage may be on ``meta``.

    Raises:
        CheckpointError: it cannot be built from a config and plain data.
    """
    layout = survey(model)
    layers = vars(model).get("fxprune_layer_fields") or {}
    blocks = layout.stacks[0].path if layout.stacks else ""
    built_with = dict(vars(model).get("fxprune_built_with") or {})
    section: dict[str, Any] = {"class": stock_class(model).__name__, "blocks": blocks, "part": layout.part}
    section |= {"attributes": {}, "shapes": {}, "buffers": {}, "built_with": built_with}
    section["holds"] = {name: vars(part_of(model.config, layout.part))[name] for name in built_with}
    data = _as_json(model.config)
    refusal = _refusal(type(model.config), data)
    numbered = enumerate(layout.stacks[0].blocks if layout.stacks else ())
    section["places"] = {str(i): vars(block)[PLACE] for i, block in numbered if PLACE in vars(block)}
    section["inputs"] = {path: vars(m)[INPUTS] for path, m in model.named_modules() if INPUTS in vars(m)}
    twin = _build(model, data, layers, section)
    _check_names(model, twin)
    section["attributes"] = _attributes(model, twin)
    persistent, made = _shapes(model, twin), _buffers(model, twin, keep_all=bool(built_with))
    section["shapes"] = {name: shape for name, shape in persistent.items() if name not in made}
    section["buffers"] = made
    return Structure(layers, section, refusal)


def stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class of ``model``, without what a loader of ours mixed in."""
    found: type[PreTrainedModel] = next(c for c in type(model).__mro__ if not issubclass(c, Layerwise))  # type: ignore[assignment]
    return found


def stock_config(config: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The class of a config, without what a loader of ours mixed in."""
    found: type[PreTrainedConfig] = next(c for c in config.__mro__ if not issubclass(c, AnyWidths))  # type: ignore[assignment]
    return found


def pruned_class(stock: type[PreTrainedModel], config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """A class like ``stock`` that builds layers of their own widths from a config that allows them."""
    if issubclass(config, AnyWidths):
        relaxed: type[PreTrainedConfig] = config
    else:
        relaxed = type(config.__name__, (AnyWidths, config), {})
    return type(stock.__name__, (Layerwise, stock), {"config_class": relaxed})


def parse_config(text: str) -> dict[str, Any]:
    """What a ``config.json`` says; transformers writes infinity and NaN as ``{"__float__": "Infinity"}``.

    Raises:
        ValueError: it is not JSON.
    """

    def decoded(value: dict[str, Any]) -> Any:
        return float(value["__float__"]) if value.keys() == {"__float__"} else value

    found: dict[str, Any] = json.loads(text, object_hook=decoded)
    return found


def _as_json(config: PreTrainedConfig) -> dict[str, Any]:
    plain = parse_config(config.to_json_string(use_diff=False))
    plain.pop(SECTION, None)
    return plain


def _refusal(config: type[PreTrainedConfig], data: Mapping[str, Any]) -> str:
    try:
        with quiet():
            stock_config(config).from_dict(dict(data))
    except Exception as error:
        return " ".join(str(error).split())
    return ""


def _build(
    model: PreTrainedModel, data: Mapping[str, Any], layers: Mapping[int, Mapping[str, Any]], section: Mapping[str, Any]
) -> nn.Module:
    """The model as a loader builds it: parameters on ``meta``, buffers real."""
    cls = pruned_class(stock_class(model), type(model.config))
    holder = {"layers": {str(i): dict(fields) for i, fields in layers.items()}, **section}
    try:
        with quiet(), init_empty_weights(include_buffers=False), torch.no_grad():
            config: Any = cls.config_class
            return cls(config.from_dict({**data, SECTION: holder}))
    except Exception as error:
        raise CheckpointError(
            f"its class cannot be built from its config: {type(error).__name__}: {error}",
            where=type(model).__name__,
            remedy="Export the graph instead: result.export('model.pt2')",
        ) from error


def _check_names(model: nn.Module, twin: nn.Module) -> None:
    odd = sorted(shapes_of(model).keys() ^ shapes_of(twin).keys())
    odd += sorted({path for path, _ in model.named_modules()} ^ {path for path, _ in twin.named_modules()})
    if odd:
        raise CheckpointError(
            "only the model or what its config builds has it",
            where=odd[0],
            remedy="Save a model as it was emitted; merge adapters first",
        )


def _attributes(model: nn.Module, twin: nn.Module) -> dict[str, dict[str, Any]]:
    """Plain attributes that differ, by module path."""
    twins = dict(twin.named_modules())
    found: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        there = vars(twins[path])
        for name, value in vars(module).items():
            if name.startswith(("_", SECTION)) or name == "training" or name not in there:
                continue
            if _is_plain(value) and value != there[name] and (_is_plain(there[name])):
                found.setdefault(path, {})[name] = list(value) if isinstance(value, tuple) else value
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(isinstance(item, int | float | str) for item in value)
    return value is None or isinstance(value, int | float | str)


def _shapes(model: nn.Module, twin: nn.Module) -> dict[str, list[int]]:
    built = shapes_of(twin)
    return {name: list(shape) for name, shape in shapes_of(model).items() if shape != built[name]}


def _buffers(model: nn.Module, twin: nn.Module, *, keep_all: bool) -> dict[str, list[int]]:
    """Buffers no checkpoint holds by itself, and that come out otherwise when the class makes them.

    A loader makes them anew after the config has been given its last values, so all are kept where it changes late.
    """
    made = dict(twin.named_buffers(remove_duplicate=False))
    stored = set(model.state_dict(keep_vars=True))
    unfilled = _unfilled(twin)
    found: dict[str, list[int]] = {}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        other = made[name]
        if name in stored:
            continue
        kept = keep_all or name.rpartition(".")[0] in unfilled
        if kept or buffer.shape != other.shape or not (buffer.is_meta or _equal(buffer, other)):
            found[name] = list(buffer.shape)
    return found


def _unfilled(twin: nn.Module) -> set[str]:
    """Modules whose buffers, where no checkpoint holds them, stock classes cannot fill as a loader asks them to."""
    found = set()
    for owner, model in twin.named_modules():
        for path, module in model.named_modules() if isinstance(model, PreTrainedModel) else ():
            if module._non_persistent_buffers_set:
                try:
                    model._init_weights(copy.deepcopy(module))
                except (RuntimeError, ValueError, IndexError):
                    found.add(f"{owner}.{path}".strip("."))
    return found


def _equal(buffer: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(buffer.detach().cpu(), other.to(buffer.dtype).cpu())
