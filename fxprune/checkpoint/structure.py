"""Structure of a slim model that its config does not hold, and the modelling file that builds it."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fxprune.emit.layout import survey
from fxprune.emit.snapshot import part_of, shapes_of
from fxprune.errors import CheckpointError
from fxprune.graph.context import Refusal, attempt, quiet
from fxprune.modelling import block_config, blocks, layerwise, overrides, table_rows
from fxprune.modelling.blocks import BUILT_AT, CannotBuildError
from fxprune.modelling.layerwise import SECTION, AnyWidths, Layerwise, section_of
from fxprune.modelling.overrides import OVERRIDES, Overrides
from fxprune.modelling.table_rows import INPUTS

__all__ = [
    "MODELLING",
    "Structure",
    "describe",
    "parse_config",
    "pruned_class",
    "stock_class",
    "stock_config",
    "write_modelling",
]


def stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Return the class of a model, without what a loader of ours mixed in."""
    found: type[PreTrainedModel] = next(c for c in type(model).__mro__ if not issubclass(c, Layerwise))  # type: ignore[assignment]
    return found


def stock_config(config: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Return the class of a config, without what a loader of ours mixed in."""
    found: type[PreTrainedConfig] = next(c for c in config.__mro__ if not issubclass(c, AnyWidths))  # type: ignore[assignment]
    return found


def pruned_class(stock: type[PreTrainedModel], config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """Return a class like ``stock`` that builds blocks of their own widths from a config that allows them."""
    if issubclass(config, AnyWidths):
        relaxed: type[PreTrainedConfig] = config
    else:
        relaxed = type(config.__name__, (AnyWidths, config), {})
    return type(stock.__name__, (Layerwise, stock), {"config_class": relaxed})


def parse_config(text: str) -> dict[str, Any]:
    """Return what a ``config.json`` says; transformers writes infinity and NaN as ``{"__float__": "Infinity"}``.

    Raises:
        ValueError: it is not JSON.
    """

    def decoded(value: dict[str, Any]) -> Any:
        return float(value["__float__"]) if value.keys() == {"__float__"} else value

    found: dict[str, Any] = json.loads(text, object_hook=decoded)
    return found


MODELLING = "modeling_fxprune"
"""Name of the module saved beside weights that no stock class builds."""

_TEXTS = (table_rows, block_config, blocks, overrides, layerwise)
"""Modules whose text makes up that module, each behind those it imports from."""


def write_modelling(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Write the modelling file of a model; return the classes in it, by the class of transformers that loads each.

    Beside the model's own class it has that of the model inside which has no head of its own, as serving engines build
    theirs around that one. Nothing is written for a class that is not one of transformers'.
    """
    stock, config = stock_class(model), stock_config(type(model.config))
    if not _is_known(stock) or not hasattr(transformers, config.__name__):
        return {}
    base = type(model.base_model)
    around = (
        model.base_model is model
        or not _is_known(base)
        or getattr(base, "config_class", None) is not stock.config_class
    )
    inner = None if around else (base.__name__, stock.base_model_prefix)
    text = _modelling(stock.__name__, config.__name__, inner)
    (folder / f"{MODELLING}.py").write_text(text, encoding="utf-8")
    classes = {"AutoConfig": config.__name__}  # engines read the first entry
    classes |= {} if inner is None else {"AutoModel": inner[0]}
    classes |= {"AutoModelForCausalLM": stock.__name__}
    return {loader: f"{MODELLING}.{name}" for loader, name in classes.items()}


def _is_known(kind: type) -> bool:
    return getattr(transformers, kind.__name__, None) is kind


def _modelling(model: str, config: str, base: tuple[str, str] | None = None) -> str:
    """Return the text of a modelling file.

    Args:
        model: name of the stock class.
        config: name of its config class.
        base: name of the class of the model inside, and its module path there.
    """
    source = "\n\n".join(_standing_alone(module) for module in _TEXTS)
    text = f'''from __future__ import annotations

{source}

from transformers import {config} as StockConfig  # noqa: E402
from transformers import {model} as StockModel  # noqa: E402


class {config}(AnyWidths, StockConfig):
    """The config of a pruned model."""


class {model}(Layerwise, StockModel):
    """A pruned model; named like its stock class, by which names of weights on disk are looked up."""

    config_class = {config}
'''
    if base is None:
        return text
    return f'''{text}

from transformers import {base[0]} as StockBase  # noqa: E402


class {base[0]}(Layerwise, StockBase):
    """The pruned model without its head."""

    config_class = {config}
    part_of_model = "{base[1]}"
'''


def _standing_alone(module: ModuleType) -> str:
    """Return the text of a module of ours, without imports from the package: it stands behind what it imports."""
    assert module.__file__ is not None
    text = Path(module.__file__).read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in ("__future__", "fxprune"):
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    return "\n".join(lines)


@dataclass(frozen=True)
class Structure:
    """How a model differs from what its class builds from its config.

    Args:
        overrides: what no config field of the whole model says.
        where: name of the stock ``class``, module path of the ``blocks`` and the ``part`` of the config that
            describes them.
        refusal: what the stock config class says to the config; empty where it accepts it.
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
        """Why it does not, in words."""
        said = [f"its config class refuses these widths: {self.refusal}"] if self.refusal else []
        said += ["its blocks differ in width"] if self.overrides.block_fields or self.overrides.absent else []
        for part, words in _WORDS.items():
            names = sorted(getattr(self.overrides, part))
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            said += [f"{words}: {names[0] or 'the model'}{more}"] if names else []
        return tuple(said)


_WORDS = {
    "built_with": "its class cannot be built with what the slim model needs of",
    "attributes": "no config field sets an attribute of",
    "shapes": "no config field sets the shape of",
    "buffers": "the class makes other values for",
    "built_at": "the class builds another kind of block at",
    "inputs": "no config field says which units remain of what is passed to",
}


def describe(model: PreTrainedModel) -> Structure:
    """Return the structure of a model, from which :func:`fxprune.from_pretrained` builds it again.

    Args:
        model: an emitted model, before or after training; its storage may be on ``meta``.

    Raises:
        CheckpointError: it cannot be built from a config and plain data.
    """
    layout = survey(model)
    path = layout.stacks[0].path if layout.stacks else ""
    where = {"class": stock_class(model).__name__, "blocks": path, "part": layout.part}
    told: Overrides = vars(model).get(OVERRIDES) or Overrides()
    held = vars(part_of(model.config, layout.part))
    overrides = Overrides(
        block_fields=told.block_fields,
        absent=told.absent,
        built_at={p: vars(block)[BUILT_AT] for p, (_, block) in layout.blocks().items() if BUILT_AT in vars(block)},
        built_with=told.built_with,
        written_afterwards={name: held[name] for name in told.built_with},
        inputs={p: vars(module)[INPUTS] for p, module in model.named_modules() if INPUTS in vars(module)},
    )
    data = _as_json(model.config)
    twin = _build(model, data, section_of(overrides, where))
    _check_names(model, twin)
    persistent, made = _shapes(model, twin), _buffers(model, twin, keep_all=bool(told.built_with))
    overrides = dataclasses.replace(
        overrides,
        attributes=_attributes(model, twin),
        shapes={name: shape for name, shape in persistent.items() if name not in made},
        buffers=made,
    )
    return Structure(overrides, where, _refusal(type(model.config), data))


def _as_json(config: PreTrainedConfig) -> dict[str, Any]:
    plain = parse_config(config.to_json_string(use_diff=False))
    plain.pop(SECTION, None)
    return plain


def _refusal(config: type[PreTrainedConfig], data: Mapping[str, Any]) -> str:
    """Return what the stock config class has against a config; empty where it takes it."""
    with quiet():
        made = attempt(stock_config(config).from_dict, dict(data))
    return " ".join(str(made.error).split()) if isinstance(made, Refusal) else ""


def _build(model: PreTrainedModel, data: Mapping[str, Any], section: Mapping[str, Any]) -> nn.Module:
    """Return the model as a loader builds it: parameters on ``meta``, buffers real."""
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
    """Return the plain attributes that differ, by module path."""
    twins: dict[str, nn.Module] = dict(twin.named_modules())
    pairs = {path: (vars(module), vars(twins[path])) for path, module in model.named_modules()}
    found = {path: _differing(held, there) for path, (held, there) in pairs.items()}
    return {path: own for path, own in found.items() if own}


def _differing(held: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain attributes of one module that its twin has otherwise, as JSON values."""
    found: dict[str, Any] = {}
    for name in held.keys() & there.keys() - {"training"}:
        value = held[name]
        if name.startswith(("_", SECTION)) or not (_is_plain(value) and _is_plain(there[name])):
            continue
        if value != there[name]:
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(isinstance(item, int | float | str) for item in value)
    return value is None or isinstance(value, int | float | str)


def _shapes(model: nn.Module, twin: nn.Module) -> dict[str, list[int]]:
    built = shapes_of(twin)
    return {name: list(shape) for name, shape in shapes_of(model).items() if shape != built[name]}


def _buffers(model: nn.Module, twin: nn.Module, *, keep_all: bool) -> dict[str, list[int]]:
    """Return the buffers no checkpoint holds by itself, and that come out otherwise when the class makes them.

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
    """Return the modules whose buffers, where no checkpoint holds them, stock classes cannot fill as a loader asks."""
    found: set[str] = set()
    owners = [(path, model) for path, model in twin.named_modules() if isinstance(model, PreTrainedModel)]
    for owner, model in owners:
        filled = {path: module for path, module in model.named_modules() if module._non_persistent_buffers_set}
        found |= {f"{owner}.{path}".strip(".") for path, module in filled.items() if not _fills(model, module)}
    return found


def _fills(model: PreTrainedModel, module: nn.Module) -> bool:
    """Whether a stock class fills a module that it owns, tried on a copy."""
    return not isinstance(attempt(model._init_weights, copy.deepcopy(module)), Refusal)


def _equal(buffer: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(buffer.detach().cpu(), other.to(buffer.dtype).cpu())
