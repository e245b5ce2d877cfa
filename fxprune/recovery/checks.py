"""What is asked of a recovery, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from transformers import PreTrainedModel

from fxprune.errors import DataError, RecoveryError, UnsupportedModelError
from fxprune.graph.spread import check_loaded
from fxprune.pipeline.arguments import as_path, flag, function, instance, refuse
from fxprune.recovery.data import TrainingData
from fxprune.recovery.distil import Distillation
from fxprune.removal.plan import Plan

if TYPE_CHECKING:
    from fxprune.result import Result

__all__ = ["check_ids", "check_options", "check_pruned", "is_result", "padding_of"]


def is_result(pruned: Any) -> TypeGuard[Result]:
    """Whether ``pruned`` is what a prune gives, by its parts: the module of its class stands above this one."""
    parts = ("graph_module", "model", "plan", "report")
    return not isinstance(pruned, type) and all(hasattr(pruned, name) for name in parts)


def check_pruned(pruned: Any, result: Result | None, tokenizer: Any) -> None:
    """Refuse what is no model to train, or no tokenizer.

    Args:
        pruned: what the caller passed.
        result: the same where it is what a prune gives; else None.
        tokenizer: of the model.

    Raises:
        UnsupportedModelError: there is no Hugging Face model, or its weights are not here.
        RecoveryError: it is no tokenizer.
    """
    model = pruned if result is None else result.model
    if not isinstance(model, PreTrainedModel):
        reasons = "" if result is None else "; ".join(result.report.model_reasons[:3])
        raise UnsupportedModelError(
            f"there is no Hugging Face model to train{f': {reasons}' if reasons else ''}",
            where="pruned",
            remedy="Pass the result of a prune that gave one; a graph trains in a loop of your own",
        )
    check_loaded(model, "pruned")
    function("tokenizer", tokenizer, "the tokenizer of the model", RecoveryError)
    missing = [name for name in ("pad_token_id", "eos_token_id") if not hasattr(tokenizer, name)]
    if missing:
        raise RecoveryError(f"it has no {missing[0]}", where="tokenizer", remedy="Pass the tokenizer of the model")


def check_options(plan: Any, distil: Any, folder: Any, inplace: Any, arguments: Any) -> None:
    """Refuse arguments of other types.

    Raises:
        RecoveryError: one is of another type.
        ArgumentError: ``inplace`` is no bool.
    """
    if plan is not None:
        instance("plan", plan, Plan, "a Plan, as in result.plan, or None", RecoveryError)
    if distil is not None and not isinstance(distil, Distillation | PreTrainedModel):
        raise refuse("distil", distil, "the dense model, a Distillation, or None", RecoveryError)
    if folder is not None:
        as_path("folder", folder, error=RecoveryError)
    flag("inplace", inplace)
    named = isinstance(arguments, Mapping) and all(isinstance(name, str) for name in arguments)
    if arguments is not None and not named:
        raise refuse("arguments", arguments, "arguments of TrainingArguments by name, or None", RecoveryError)


def check_ids(samples: TrainingData, model: PreTrainedModel) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        DataError: there are such.
    """
    rows = _rows(model)
    largest = max(max(example.ids) for example in (*samples.train, *samples.held_out))
    if largest >= rows:
        raise DataError(
            f"the tokenizer gives {largest}, the model knows 0 to {rows - 1}",
            where="tokenizer",
            remedy="Pass the tokenizer of this model",
        )


def _rows(model: PreTrainedModel) -> int:
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def padding_of(tokenizer: Any, model: PreTrainedModel) -> int:
    """Return an id that the model knows, to pad with: it is masked, and tokenizers may have more ids than that."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in known if token is not None and token < _rows(model)))
