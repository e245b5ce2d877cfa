"""Low-rank updates (LoRA) of the projections that a plan shrank: find, attach, merge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fxprune.emit.snapshot import slim_name
from fxprune.errors import RecoveryError, VerificationError
from fxprune.graph.context import eval_mode
from fxprune.masking.compare import TOLERANCE, compare
from fxprune.offload.distributed import is_fully_sharded, reshard
from fxprune.recovery.settings import RecoverySettings
from fxprune.removal.plan import Plan


@dataclass(frozen=True)
class Targets:
    """Projections to train: their paths in the model's order, and skipped matrices of the plan with the reason."""

    modules: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)


def find_targets(model: nn.Module, plan: Plan | None) -> Targets:
    """Find the linear maps of a slim model whose weight the plan shrank.

    A weight that two modules share is left out: an update merged into one of them would change the other.

    Args:
        plan: the plan of the prune, in the names of the dense model. For None, or a plan that removes only whole
            blocks, all linear maps except the output are found.

    Raises:
        RecoveryError: there is nothing to train.
    """
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    modules: list[str] = []
    skipped: dict[str, str] = {}
    named_modules = dict(model.named_modules(remove_duplicate=False))
    if plan is None or not plan.kept:
        get_output = getattr(model, "get_output_embeddings", None)
        output = get_output() if callable(get_output) else None
        linear = ((path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
        names = [f"{path}.weight" for path, module in linear if module is not output]
    else:
        order = {name: place for place, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
        renamed = (slim_name(name, plan.removed_blocks) for name in plan.kept)
        names = sorted((name for name in renamed if name in order), key=order.__getitem__)
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = named_modules[path]
        parameter = owner._parameters[leaf]
        if parameter is None or parameter.dim() < 2:
            continue
        if not isinstance(owner, nn.Linear | Conv1D):
            skipped[name] = f"{type(owner).__name__} has no low-rank update here"
        elif owners[id(parameter)] > 1:
            skipped[name] = "its weight is tied to another module's"
        else:
            modules.append(path)
    if not modules:
        reasons = "; ".join(f"{name}: {why}" for name, why in skipped.items())
        what = f"no projection to train{f' ({reasons})' if reasons else ''}"
        remedy = "Pass the result of a prune that removed something, or the plan with the slim model"
        raise RecoveryError(what, where="plan", remedy=remedy)
    return Targets(tuple(dict.fromkeys(modules)), skipped)


def attach_lora(model: Any, targets: Targets, settings: RecoverySettings) -> Any:
    """Attach trainable low-rank updates to the targets of a model, and freeze all other parameters.

    PEFT's wrapper is returned; the updates are inside ``model`` until :func:`merge_lora`.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    transposed = any(isinstance(model.get_submodule(path), Conv1D) for path in targets.modules)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=list(targets.modules),
        fan_in_fan_out=transposed,
    )
    wrapped = get_peft_model(model, config)
    # else PEFT reads the config in the model's folder again, with stock classes that refuse some slim configs
    wrapped.peft_config["default"].base_model_name_or_path = ""
    return wrapped


def merge_lora(wrapped: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[Any, float]:
    """Merge the updates into the weights of the model; of a sharded one, each process into its shards.

    Args:
        inputs: keyword inputs on which the model before and after is compared.

    Returns:
        The model, and the change of its logits relative to the largest or 1.

    Raises:
        VerificationError: logits of a float32 model moved by more than the tolerance, or became NaN. In lower
            precision the merged weights are rounded again, so any finite change is accepted.
    """
    before = _logits(wrapped, inputs)
    if is_fully_sharded(wrapped):
        from peft.tuners.lora import LoraLayer
        from torch.distributed.tensor import distribute_tensor

        reshard(wrapped)
        layers: list[Any] = [module for module in wrapped.modules() if isinstance(module, LoraLayer)]
        for layer in layers:  # the update of one weight is whole at a time
            weight: Any = layer.get_base_layer().weight
            update = layer.get_delta_weight(layer.active_adapters[0]).detach().to(weight.dtype)
            part = distribute_tensor(update, weight.device_mesh, weight.placements, src_data_rank=None)
            weight.detach().to_local().add_(part.to_local())
        model = wrapped.unload()
    else:
        model = wrapped.merge_and_unload(safe_merge=True)
    error = compare([before], [_logits(model, inputs)])
    precise = next(model.parameters()).dtype in (torch.float32, torch.float64)
    if error > TOLERANCE if precise else error == float("inf"):
        what = f"merging moved the logits by {error:.2e}, more than {TOLERANCE:.0e}"
        raise VerificationError(what, where="merge", remedy="Please report the model's config")
    return model, error


def _logits(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad(), eval_mode(model):
        device = next(model.parameters()).device
        outputs = model(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False)
    logits: torch.Tensor = outputs.logits
    return logits.float()
