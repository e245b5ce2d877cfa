"""Low-rank updates beside the projections that a plan shrank; they leave no trace once they are merged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fxprune.emit.snapshot import slim_name
from fxprune.errors import RecoveryError, VerificationError
from fxprune.graph.context import evaluating
from fxprune.masking.compare import TOLERANCE, compare
from fxprune.recovery.settings import RecoverySettings
from fxprune.removal.plan import Plan

__all__ = ["Targets", "attach_lora", "find_targets", "merge_lora"]


@dataclass(frozen=True)
class Targets:
    """What is trained.

    Args:
        modules: paths of the projections that get an update, in the model's order.
        skipped: parameters of the plan that belong to none, with the reason; norms and biases are not listed.
    """

    modules: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)


def find_targets(model: nn.Module, plan: Plan | None) -> Targets:
    """Find the linear maps of a slim model whose weight the plan shrank; all but the output's where none shrank.

    A weight that two modules share is left out: an update merged into one of them would change the other.

    Args:
        model: the slim model.
        plan: what was removed, with the names of the dense model; None, or one that removes whole blocks alone, for
            all linear maps.

    Raises:
        RecoveryError: there is nothing to train.
    """
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    modules: list[str] = []
    skipped: dict[str, str] = {}
    for name in _wanted(model, plan):
        path, _, leaf = name.rpartition(".")
        owner = _submodule(model, path)
        parameter = None if owner is None else owner._parameters.get(leaf)
        if owner is None or parameter is None or parameter.dim() < 2:
            continue
        if not isinstance(owner, nn.Linear | Conv1D):
            skipped[name] = f"{type(owner).__name__} has no low-rank update here"
        elif owners[id(parameter)] > 1:
            skipped[name] = "its weight is tied to another module's"
        else:
            modules.append(path)
    if not modules:
        reasons = "; ".join(f"{name}: {why}" for name, why in skipped.items())
        raise RecoveryError(
            f"no projection to train{f' ({reasons})' if reasons else ''}",
            where="plan",
            remedy="Pass the result of a prune that removed something, or the plan with the slim model",
        )
    return Targets(tuple(dict.fromkeys(modules)), skipped)


def attach_lora(model: Any, targets: Targets, settings: RecoverySettings) -> Any:
    """Put trainable low-rank updates beside the targets of a model; freeze all else.

    Args:
        model: the slim model.
        targets: the projections that get an update.
        settings: rank, scale and dropout of the updates.

    Returns:
        PEFT's wrapper around ``model``, which itself holds the updates until :func:`merge_lora`.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    transposed = any(isinstance(_submodule(model, path), Conv1D) for path in targets.modules)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=list(targets.modules),
        fan_in_fan_out=transposed,
    )
    wrapped = get_peft_model(model, config)
    # PEFT would read the config again where the model came from, with stock code that refuses some slim ones
    wrapped.peft_config["default"].base_model_name_or_path = ""
    return wrapped


def merge_lora(wrapped: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[Any, float]:
    """Add the updates to the weights of the model, and remove them beside it.

    Args:
        wrapped: what :func:`attach_lora` returned.
        inputs: keyword inputs to compare the model on, before and after.

    Returns:
        The model alone, and by how much its logits moved, relative to the largest or 1.

    Raises:
        VerificationError: logits of a float32 model moved by more than the tolerance. Weights in lower precision are
            rounded once more, by which logits move too; then only one that is no number is refused.
    """
    before = _logits(wrapped, inputs)
    model = wrapped.merge_and_unload(safe_merge=True)
    error = compare([before], [_logits(model, inputs)])
    precise = next(model.parameters()).dtype in (torch.float32, torch.float64)
    if error > TOLERANCE if precise else error == float("inf"):
        raise VerificationError(
            f"merging moved the logits by {error:.2e}, more than {TOLERANCE:.0e}",
            where="merge",
            remedy="Please report the model's config",
        )
    return model, error


def _wanted(model: nn.Module, plan: Plan | None) -> Iterator[str]:
    """Yield the names of the parameters to train, in the model's order."""
    if plan is None or not plan.kept:
        get_output = getattr(model, "get_output_embeddings", None)
        output = get_output() if callable(get_output) else None
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear | Conv1D) and module is not output:
                yield f"{path}.weight"
        return
    order = {name: place for place, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    renamed = (slim_name(name, plan.removed_blocks) for name in plan.kept)
    yield from sorted((name for name in renamed if name in order), key=order.__getitem__)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _logits(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad(), evaluating(model):
        device = next(model.parameters()).device
        logits: torch.Tensor = model(
            **{name: value.to(device) for name, value in inputs.items()}, use_cache=False
        ).logits
    return logits.float()
