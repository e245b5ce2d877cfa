"""The training loop: transformers' Trainer, with distillation and early stopping."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fxprune.data.calibration import IGNORED
from fxprune.errors import RecoveryError
from fxprune.graph.context import evaluating
from fxprune.offload.prefetch import has_bf16
from fxprune.offload.ranks import input_device
from fxprune.pipeline.arguments import instance, number
from fxprune.pipeline.contract import Track, no_progress
from fxprune.recovery.data import TrainingData, collate
from fxprune.recovery.settings import RecoverySettings

__all__ = ["Distillation", "RecoveryTrainer", "distillation_sum", "make_trainer", "vocabulary_of"]

_SLICE = 512
"""Positions compared at once: two float32 distributions over 128,000 tokens take half a gigabyte then."""

_CPU_SLICE = 4
"""The same on a CPU, whose caches hold distributions of so few."""


@dataclass(frozen=True)
class Distillation:
    """A teacher and how much it counts.

    loss = (1 - weight) * cross-entropy + weight * temperature^2 * KL(teacher || student)

    with both distributions softened by the temperature, over the tokens that count in the loss.
    Source: Hinton, Vinyals, Dean (arXiv 1503.02531).

    Args:
        teacher: usually the dense model. It is used where it is and as it is, on another device or in lower precision
            as well; it is not trained and not changed.
        weight: of the teacher, in (0, 1]; by default both count alike.
        temperature: above 0; higher ones show more of what the teacher holds possible. 1 softens nothing,
            and the default does so mildly.
    """

    teacher: Any
    weight: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            RecoveryError: a number makes no sense.
        """
        weight = number("weight", self.weight, above=0, most=1, error=RecoveryError)
        object.__setattr__(self, "weight", weight)
        temperature = number("temperature", self.temperature, above=0, error=RecoveryError)
        object.__setattr__(self, "temperature", temperature)

    def check(self, student: Any) -> None:
        """Refuse a student that the teacher cannot teach.

        Args:
            student: the model to train.

        Raises:
            RecoveryError: the teacher is no Hugging Face model, or the student itself; or the vocabularies of both
                differ in size.
        """
        instance("teacher", self.teacher, PreTrainedModel, "the dense model, one of transformers'", RecoveryError)
        sizes = [vocabulary_of(model) for model in (self.teacher, student)]
        if sizes[0] != sizes[1]:
            raise RecoveryError(
                f"the teacher knows {sizes[0]} tokens, the student {sizes[1]}",
                where="teacher",
                remedy="Distil from the dense model that was pruned, or from one with the same tokenizer",
            )
        if self.teacher is student:
            raise RecoveryError("the teacher is the student", where="teacher", remedy="Pass the dense model")

    def divergence_sum(self, inputs: dict[str, torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        """Return the sum of ``temperature^2 * KL`` over the counted tokens.

        Args:
            inputs: the student's: ids, mask and labels ``(samples, tokens)``.
            logits: the student's ``(samples, tokens, vocabulary)``.
        """
        device, mask = input_device(self.teacher), inputs.get("attention_mask")
        with torch.no_grad(), evaluating(self.teacher):
            theirs = self.teacher(
                input_ids=inputs["input_ids"].to(device),
                attention_mask=None if mask is None else mask.to(device),
                use_cache=False,
            ).logits
        counted = inputs["labels"][:, 1:] != IGNORED
        ours, theirs = logits[:, :-1][counted], theirs[:, :-1][counted.to(device)].to(logits.device)
        return distillation_sum(ours, theirs, self.temperature)


def distillation_sum(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return ``temperature^2`` times the sum of KL(teacher || student) over positions, in float32.

    Args:
        student: logits ``(positions, vocabulary)``.
        teacher: likewise; no gradient flows into it.
        temperature: divides both.
    """
    found: torch.Tensor = _DivergenceSum.apply(student, teacher, temperature)  # type: ignore[no-untyped-call]
    return found


class _DivergenceSum(torch.autograd.Function):
    """With its gradient written down, slice by slice: no distribution is kept, and each is read while it is at hand.

    With the softened probabilities ``p`` of the student and ``q`` of the teacher, the gradient of
    ``temperature^2 * KL`` by the student's logits is ``temperature * (p - q)``.
    """

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        size = _CPU_SLICE if student.device.type == "cpu" else _SLICE
        total, gradient = student.new_zeros((), dtype=torch.float32), torch.empty_like(student)
        parts = (tensor.split(size) for tensor in (student, teacher, gradient))
        for ours, theirs, change in zip(*parts, strict=True):
            said, wanted = _softened(ours, temperature), _softened(theirs, temperature)
            likely = wanted.exp()
            total += wanted.sub_(said).mul_(likely).sum()
            change.copy_(said.exp_().sub_(likely).mul_(temperature))
        ctx.save_for_backward(gradient)
        return total * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (change,) = ctx.saved_tensors
        return change * gradient, None, None


def _softened(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """The logarithms of probabilities, in float32."""
    return logits.to(torch.float32, copy=True).div_(temperature).log_softmax(-1)


def vocabulary_of(model: Any) -> int:
    """Return how many tokens a language model can say."""
    output = model.get_output_embeddings()
    if output is not None and getattr(output, "weight", None) is not None:
        return int(output.weight.shape[0])
    return int(model.config.get_text_config().vocab_size)


_WORSE_STEPS = 3
"""Logged steps in a row that must be bad before training counts as diverged: a single batch may be hard."""


class RecoveryTrainer(Trainer):
    """transformers' Trainer, whose loss is mixed with a teacher's where there is one."""

    def __init__(self, *args: Any, distillation: Distillation | None = None, **options: Any) -> None:
        """Keep the teacher beside the student, out of the reach of wrappers and checkpoints."""
        super().__init__(*args, **options)
        self.distillation = distillation

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return cross-entropy, mixed with the divergence from the teacher; cross-entropy alone on held-out samples."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.distillation is not None and model.training:
            weight = self.distillation.weight
            divergence = self._divergence(inputs, outputs["logits"], num_items_in_batch)
            # a cross-entropy that does not count is not differentiated
            loss = divergence if weight == 1 else (1 - weight) * loss + weight * divergence
        return (loss, outputs) if return_outputs else loss

    def _divergence(self, inputs: Any, logits: torch.Tensor, items: Any) -> torch.Tensor:
        """Return the mean over counted tokens, scaled for accumulation exactly as the cross-entropy is."""
        assert self.distillation is not None
        total: torch.Tensor = self.distillation.divergence_sum(inputs, logits)
        if items is None or not self.model_accepts_loss_kwargs:
            counted: torch.Tensor = (inputs["labels"][:, 1:] != IGNORED).sum()
            return total / counted.clamp(min=1)
        share = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        scaled: torch.Tensor = total * share / items
        return scaled


class _Watch(TrainerCallback):
    """Ends training when the held-out loss stops improving, and with an error when the loss runs away.

    Both are read from the log, which checkpoints carry: a resumed run decides as an uninterrupted one.
    """

    def __init__(self, settings: RecoverySettings, vocabulary: int) -> None:
        self.settings, self.vocabulary = settings, vocabulary

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._stop_early(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Judge and keep the last step as well."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._stop_early(state, control)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        newest = state.log_history[-1]
        for name in ("loss", "eval_loss"):
            if not math.isfinite(newest.get(name, 0.0)):
                raise self._diverged(f"the {_WORDS[name]} became {newest[name]}", state.global_step)
        # far above where it began, and worse than to guess every token alike, whose loss is log(vocabulary)
        worst = max(2 * losses[0], 1.2 * math.log(self.vocabulary)) if losses else math.inf
        if len(losses) > _WORSE_STEPS and min(losses[-_WORSE_STEPS:]) > worst:
            raise self._diverged(f"the training loss rose from {losses[0]:.2f} to {losses[-1]:.2f}", state.global_step)

    def _stop_early(self, state: Any, control: Any) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        if losses and len(losses) - 1 - losses.index(min(losses)) >= self.settings.patience:
            control.should_training_stop = True

    def _diverged(self, what: str, step: int) -> RecoveryError:
        rate, precision = self.settings.learning_rate, self.settings.precision
        further = "" if precision == "float32" else ", train in float32 (precision='float32')"
        return RecoveryError(
            f"training diverged: {what}",
            where=f"step {step}",
            remedy=f"Lower learning_rate (now {rate:g}; try {rate / 10:g}), lengthen warmup (now "
            f"{self.settings.warmup:g}){further}, and start in a new folder",
        )


class _Progress(TrainerCallback):
    """Shows how many of the steps are done."""

    def __init__(self, track: Track) -> None:
        self.track = track
        self.steps: Iterator[int] = iter(())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        left = range(state.global_step, state.max_steps)
        self.steps = iter(self.track(left, "training", len(left)))
        next(self.steps, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        next(self.steps, None)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End what is shown, also after fewer steps."""
        for _step in self.steps:
            pass


_WORDS = {"loss": "training loss", "eval_loss": "held-out loss"}


def make_trainer(
    model: Any,
    data: TrainingData,
    settings: RecoverySettings,
    folder: Path,
    *,
    padding: int,
    distillation: Distillation | None = None,
    arguments: Mapping[str, Any] | None = None,
    track: Track = no_progress,
) -> RecoveryTrainer:
    """Return a trainer of ``model``, ready to start or to resume.

    Args:
        model: with its trainable parameters marked.
        data: samples.
        settings: the recipe.
        folder: where checkpoints go.
        padding: id that fills short samples up.
        distillation: the teacher.
        arguments: for ``transformers.TrainingArguments``, over what the recipe says: ``fsdp``, ``deepspeed``,
            ``gradient_checkpointing``, ``report_to``, ``use_cpu``, ...
        track: shows how many steps are done, as ``track(items, what, total)``.

    Raises:
        RecoveryError: the batch cannot be divided over the devices, or an argument is not one.
    """
    try:
        training = TrainingArguments(**_arguments(settings, folder, len(data.train), dict(arguments or {})))
    except (TypeError, ValueError) as error:
        raise RecoveryError(
            f"transformers refuses them: {error}",
            where="arguments",
            remedy="Pass what transformers.TrainingArguments takes",
        ) from error
    if training.fp16:
        raise RecoveryError("fp16 loses small updates", where="arguments", remedy="Leave fp16 out; bf16 is used")
    vocabulary = vocabulary_of(model)
    trainer = RecoveryTrainer(
        model=model,
        args=training,
        train_dataset=list(data.train),
        eval_dataset=list(data.held_out),
        data_collator=lambda examples: collate(examples, padding),
        callbacks=[_Watch(settings, vocabulary), _Progress(track)],
        distillation=distillation,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(settings: RecoverySettings, folder: Path, samples: int, own: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe in the words of transformers, under the caller's own arguments."""
    device = _device(bool(own.get("use_cpu", False)))
    use_cpu = device.type == "cpu"
    micro, accumulated = _divided(settings, use_cpu)
    steps = max(1, math.ceil(math.ceil(samples / settings.batch) * settings.epochs))
    every = max(1, steps // settings.evaluations)
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": accumulated,
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": math.ceil(settings.warmup * steps),
        "max_grad_norm": settings.clip,
        "bf16": settings.precision == "bf16" or (settings.precision == "auto" and has_bf16(device)),
        "use_cpu": use_cpu,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps",
        "eval_steps": every,
        "prediction_loss_only": True,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,  # the best and the newest
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "report_to": [],
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": not use_cpu and torch.cuda.is_available(),
        **own,
    }


def _device(use_cpu: bool) -> torch.device:
    found = None if use_cpu or not torch.accelerator.is_available() else torch.accelerator.current_accelerator()
    return torch.device("cpu") if found is None else found


def _divided(settings: RecoverySettings, use_cpu: bool) -> tuple[int, int]:
    """Return samples of one forward pass on one device, and passes of one step, that make up the batch exactly."""
    alone = 1 if use_cpu else max(1, torch.cuda.device_count())
    devices = int(os.environ.get("WORLD_SIZE", alone))
    share, rest = divmod(settings.batch, devices)
    if rest or not share:
        raise RecoveryError(
            f"{settings.batch} samples do not divide over {devices} devices",
            where="batch",
            remedy=f"Choose a multiple of {devices}",
        )
    micro = max(size for size in range(1, min(settings.micro_batch, share) + 1) if share % size == 0)
    return micro, share // micro
