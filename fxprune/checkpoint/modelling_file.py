"""The modelling file of a checkpoint: the text with which transformers builds the slim model, without this package."""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType

import transformers
from transformers import PreTrainedModel

from fxprune.checkpoint.classes import stock_class, stock_config
from fxprune.modelling import block_config, blocks, layerwise, overrides, table_rows

__all__ = ["MODELLING", "write_modelling"]

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
