"""The modelling file saved beside weights that no stock class builds."""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType

import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from fxprune.emit.structure import stock_class, stock_config
from fxprune.modelling import block_config, blocks, layerwise, overrides, table_rows

__all__ = ["MODELLING", "write_modelling"]

MODELLING = "modeling_fxprune"
"""Name of the module."""

_SOURCES = (table_rows, block_config, blocks, overrides, layerwise)
"""Modules whose text makes up that module, each behind those it imports from."""


def write_modelling(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Write the modelling file of a model; return its classes by the Auto class of transformers that loads each.

    Besides the model's own class it has that of the inner model without a head, since serving engines build their own
    models around that one. Nothing is written for a class that is not one of transformers'.
    """
    stock, config = stock_class(model), stock_config(type(model.config))
    if getattr(transformers, stock.__name__, None) is not stock or not hasattr(transformers, config.__name__):
        return {}
    base = type(model.base_model)
    is_known = getattr(transformers, base.__name__, None) is base
    has_inner = model.base_model is not model and is_known
    has_inner = has_inner and getattr(base, "config_class", None) is stock.config_class
    inner = (base.__name__, stock.base_model_prefix) if has_inner else None
    text = _modelling(stock.__name__, config.__name__, inner)
    (folder / f"{MODELLING}.py").write_text(text, encoding="utf-8")
    classes = {"AutoConfig": config.__name__}  # engines read the first entry
    classes |= {} if inner is None else {"AutoModel": inner[0]}
    classes |= dict.fromkeys(_auto_classes(stock), stock.__name__)
    return {loader: f"{MODELLING}.{name}" for loader, name in classes.items()}


def _auto_classes(stock: type[PreTrainedModel]) -> list[str]:
    """Names of the Auto classes of transformers that load a class, the one for its task last."""
    found = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(getattr(auto, "_model_mapping", None), "_model_mapping", None)
        if isinstance(auto, type) and isinstance(mapping, dict):  # names, where a lazy mapping would import every class
            named = (names if isinstance(names, tuple | list) else (names,) for names in mapping.values())
            found += [name] if any(stock.__name__ in names for names in named) else []
    tasks = [name for name in found if name != "AutoModelForPreTraining"]
    return tasks or found


def _modelling(model: str, config: str, base: tuple[str, str] | None = None) -> str:
    """Return the text of a modelling file for a stock class and its config class.

    ``base`` is the class of the inner model, and its module path in the model.
    """
    source = "\n\n".join(_without_own_imports(module) for module in _SOURCES)
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


def _without_own_imports(module: ModuleType) -> str:
    """Return the text of a module of ours without imports from the package: it stands behind the imported text."""
    assert module.__file__ is not None
    text = Path(module.__file__).read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in ("__future__", "fxprune"):
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    return "\n".join(lines)
