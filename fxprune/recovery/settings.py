"""Settings of recovery: the recipe of the paper as defaults, checked before anything starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fxprune.errors import RecoveryError, UnknownNameError
from fxprune.pipeline.arguments import PRECISIONS, as_seed, flag, instance, number, one_of, whole_number

__all__ = ["FORMATS", "RecoverySettings", "settings_from"]

_LARGEST_SEED = 2**32 - 1
"""What numpy takes, which transformers seeds as well."""

FORMATS = ("auto", "instruction", "chat", "text")


@dataclass(frozen=True)
class RecoverySettings:
    """The recipe.

    Source: LLM-Pruner (arXiv 2305.11627), section 4.1 and its published post-training script, which warms up for 100 of
    about 1,550 steps and holds out 2,000 of about 50,000 samples: the fractions here. The script does not stop early:
    ``evaluations`` and ``patience`` are chosen so that a run that got nowhere ends after a third of its steps. ``clip``
    is the default of transformers.

    Args:
        rank: of the update of each pruned projection.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: on the input of the update.
        learning_rate: the largest, after warm-up.
        schedule: name of a transformers schedule: ``linear``, ``cosine``, ``constant_with_warmup``, ...
        warmup: fraction of the steps over which the rate rises from 0.
        epochs: passes over the data.
        batch: samples of one step, over all devices.
        micro_batch: samples of one forward pass on one device; the rest of ``batch`` is accumulated.
        max_tokens: longest sample; what is longer is cut, and counted.
        response_only: whether prompts do not count in the loss; plain text always counts whole.
        clip: largest norm of the gradient.
        held_out: fraction of the samples that is not trained on, or their number where 1 or more.
        evaluations: how often the held-out loss is taken in the whole run, and a checkpoint written.
        patience: how many evaluations without a new best loss end the training; the best one is kept.
        precision: ``bf16`` or ``float32``; ``auto`` is ``bf16`` where the device computes in it natively.
        data_format: what the rows are: ``instruction``, ``chat``, ``text``, or ``auto`` to look at each row.
        seed: of the split, the order, the initial update and dropout.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    learning_rate: float = 1e-4
    schedule: str = "linear"
    warmup: float = 0.06
    epochs: float = 2.0
    batch: int = 64
    micro_batch: int = 4
    max_tokens: int = 256
    response_only: bool = True
    clip: float = 1.0
    held_out: float = 0.04
    evaluations: int = 10
    patience: int = 3
    precision: str = "auto"
    data_format: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            RecoveryError: a number makes no sense.
            UnknownNameError: a name is not one of those known.
        """
        for name in ("rank", "batch", "micro_batch", "evaluations", "patience"):
            self._check(whole_number, name, least=1)
        self._check(whole_number, "max_tokens", least=2)
        for name in ("learning_rate", "epochs", "clip", "alpha", "held_out"):
            self._check(number, name, above=0)
        for name in ("warmup", "dropout"):
            self._check(number, name, least=0, below=1)
        self._check(as_seed, "seed", most=_LARGEST_SEED)
        flag("response_only", self.response_only)
        one_of("precision", self.precision, PRECISIONS)
        one_of("data_format", self.data_format, FORMATS)
        if self.schedule != type(self).schedule:
            from transformers import SchedulerType  # it brings torch and peft along, which only training needs

            one_of("schedule", self.schedule, (schedule.value for schedule in SchedulerType))

    def _check(self, check: Callable[..., Any], name: str, **bounds: float) -> None:
        """Put the number that ``check`` reads in the place of what was given."""
        object.__setattr__(self, name, check(name, getattr(self, name), error=RecoveryError, **bounds))


def settings_from(settings: RecoverySettings | None, changes: dict[str, Any]) -> RecoverySettings:
    """Return ``settings``, or the defaults, with ``changes`` by name.

    Raises:
        UnknownNameError: there is no such setting.
    """
    names = [field.name for field in dataclasses.fields(RecoverySettings)]
    for name in changes:
        if name not in names:
            raise UnknownNameError("setting", name, names)
    if settings is not None:
        instance("settings", settings, RecoverySettings, "a RecoverySettings, or None", RecoveryError)
    return dataclasses.replace(settings or RecoverySettings(), **changes)
