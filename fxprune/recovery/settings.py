"""Settings of recovery: the one declaration behind :func:`fxprune.recover` and the command, readable without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from fxprune.errors import RecoveryError, UnknownNameError
from fxprune.pipeline.arguments import Arguments, Precision, argument, as_seed, instance, one_of

Format = Literal["auto", "instruction", "chat", "completion", "text"]

TRAINING = "Training"
"""Panel of the settings that are options of the command."""

_argument: Callable[..., Any] = partial(argument, error=RecoveryError)
_option: Callable[..., Any] = partial(_argument, panel=TRAINING)


def _check_schedule(name: str, value: Any) -> str:
    from transformers import SchedulerType

    return one_of(name, value, [schedule.value for schedule in SchedulerType])


@dataclass(frozen=True)
class RecoverySettings(Arguments):
    """The recipe of a recovery.

    Source: LLM-Pruner (arXiv 2305.11627), section 4.1 and its published post-training script, which warms up for 100 of
    about 1,550 steps and holds out 2,000 of about 50,000 samples: the fractions here. The script does not stop early;
    ``evaluations`` and ``patience`` are chosen so that a run without progress ends after a third of its steps.
    ``clip`` is the default of transformers.
    """

    rank: int = _option(8, "Rank of the update of each pruned projection.", least=1)
    alpha: float = _option(16, "The update is scaled by alpha / rank.", above=0)
    dropout: float = _argument(0.05, "Dropout on the input of the update.", least=0, below=1)
    learning_rate: float = _option(1e-4, "Largest learning rate, after warm-up.", above=0)
    schedule: str = argument(
        "linear", "Name of a transformers schedule: linear, cosine, constant_with_warmup, ...", check=_check_schedule
    )
    warmup: float = _argument(
        0.06, "Fraction of the steps over which the learning rate rises from 0.", least=0, below=1
    )
    epochs: float = _option(2.0, "Passes over the data.", above=0)
    batch: int = _option(64, "Samples per step, over all devices.", least=1)
    micro_batch: int = _option(
        4, "Samples per forward pass on one device; gradients are accumulated up to the batch.", least=1
    )
    max_tokens: int = _option(256, "Longest sample; longer ones are cut, and counted.", least=2)
    response_only: bool = argument(True, "Leave prompts out of the loss; plain text always counts whole.")
    clip: float = _argument(1.0, "Largest gradient norm.", above=0)
    held_out: float = _option(0.04, "Fraction of the samples to hold out, or their number if 1 or more.", above=0)
    evaluations: int = _argument(10, "Evaluations of the held-out loss in the run; each writes a checkpoint.", least=1)
    patience: int = _argument(
        3,
        """Evaluations without a new best loss after which training ends, unless the loss is falling again; the best
        weights are kept.""",
        least=1,
    )
    precision: Precision = argument(
        "auto", "Precision of training; auto is bf16 if the device supports it natively.", panel=TRAINING
    )
    data_format: Format = argument("auto", "Kind of the rows; auto to tell it for each row.")
    seed: int = argument(
        0,
        "Seed of the split, the order, the initial updates and dropout.",
        check=partial(as_seed, most=2**32 - 1, error=RecoveryError),  # numpy, which is seeded too, takes no larger one
        panel=TRAINING,
    )


def settings_from(settings: RecoverySettings | None, changes: dict[str, Any]) -> RecoverySettings:
    """Settings, or the defaults, with changes by name."""
    names = [field.name for field in dataclasses.fields(RecoverySettings)]
    for name in changes:
        if name not in names:
            raise UnknownNameError("setting", name, names)
    if settings is not None:
        instance("settings", settings, RecoverySettings, "a RecoverySettings, or None", RecoveryError)
    return dataclasses.replace(settings or RecoverySettings(), **changes)
