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

from fxprune.data.calibration import IGNORED, has_stalled
from fxprune.data.text import unknown_token
from fxprune.errors import RecoveryError
from fxprune.graph.context import eval_mode
from fxprune.offload.distributed import is_fully_sharded, reshard
from fxprune.offload.prefetch import has_bf16
from fxprune.offload.ranks import input_device
from fxprune.pipeline.arguments import Arguments, argument, instance
from fxprune.pipeline.contract import Track, no_progress
from fxprune.recovery.data import TrainingData, collate
from fxprune.recovery.settings import RecoverySettings
from fxprune.vocabulary.alignment import common_ids, has_other_tokens, retokenised

_SLICE = 512
"""Positions compared at once: two float32 distributions over 128,000 tokens then take half a gigabyte."""

_CPU_SLICE = 4
"""The same on a CPU: distributions of this many positions fit its caches."""


@dataclass(frozen=True)
class Distillation(Arguments):
    """A teacher and its weight in the loss.

    loss = (1 - weight) * cross-entropy + weight * temperature^2 * KL(teacher || student)

    with both distributions softened by the temperature, over the tokens that count in the loss.
    Source: Hinton, Vinyals, Dean (arXiv 1503.02531).

    Args:
        teacher: usually the dense model. It may be on another device or in lower precision; it is not changed.
        weight: weight of the teacher, in (0, 1]; by default both terms count equally.
        temperature: above 0; higher values bring out the teacher's less likely tokens, 1 softens nothing.
        tokenizer: of the teacher, if it has other tokens: it then teaches where a token of each ends, which of the
            tokens follows that both have. None for that of the student.
    """

    teacher: Any
    weight: float = argument(0.5, above=0, most=1, error=RecoveryError)
    temperature: float = argument(2.0, above=0, error=RecoveryError)
    tokenizer: Any = None

    def check(self, student: Any, tokenizer: Any = None) -> Distillation:
        """The distillation by which a student is trained, given its tokenizer.

        A teacher is refused that is not a Hugging Face model, the student itself, or of another vocabulary.
        """
        instance("teacher", self.teacher, PreTrainedModel, "the dense model, one of transformers'", RecoveryError)
        if self.tokenizer is not None and has_other_tokens(tokenizer, self.tokenizer):
            if is_fully_sharded(self.teacher):
                what = "it is sharded and has other tokens, so that processes would run it at different times"
                raise RecoveryError(what, where="teacher", remedy="Pass it whole")
            return AlignedDistillation(**vars(self), words=tokenizer, common=common_ids(tokenizer, self.tokenizer))
        sizes = [vocabulary_of(model) for model in (self.teacher, student)]
        if self.tokenizer is None and sizes[0] != sizes[1]:  # with the same tokens, some rows are of none
            what = f"the teacher knows {sizes[0]} tokens, the student {sizes[1]}"
            remedy = "Pass Distillation(teacher, tokenizer=...) with the tokenizer of the teacher"
            shell = "Save the tokenizer of the teacher in its folder"
            raise RecoveryError(what, where="teacher", remedy=remedy, shell=shell)
        if self.teacher is student:
            raise RecoveryError("the teacher is the student", where="teacher", remedy="Pass the dense model")
        return self

    def divergence_sum(self, inputs: dict[str, torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        """Sum of ``temperature^2 * KL`` over the counted tokens; logits are ``(samples, tokens, vocabulary)``."""
        device, mask = input_device(self.teacher), inputs.get("attention_mask")
        with torch.no_grad(), eval_mode(self.teacher):
            theirs = self.teacher(
                input_ids=inputs["input_ids"].to(device),
                attention_mask=None if mask is None else mask.to(device),
                use_cache=False,
            ).logits
        reshard(self.teacher)
        counted = inputs["labels"][:, 1:] != IGNORED
        shared = min(logits.shape[-1], theirs.shape[-1])
        ours, theirs = logits[:, :-1][counted], theirs[:, :-1][counted.to(device)].to(logits.device)
        return distillation_sum(ours[:, :shared], theirs[:, :shared], self.temperature)


@dataclass(frozen=True)
class AlignedDistillation(Distillation):
    """Distillation from a teacher with other tokens.

    Args:
        words: tokenizer of the student.
        common: ids of the tokens that both have, of the student and of the teacher.
    """

    words: Any = None
    common: tuple[torch.Tensor, torch.Tensor] = ()  # type: ignore[assignment]

    def divergence_sum(self, inputs: dict[str, torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        device, total = input_device(self.teacher), logits.new_zeros((), dtype=torch.float32)
        ours, theirs = (each.to(logits.device) for each in self.common)
        for row, (ids, labels) in enumerate(zip(inputs["input_ids"], inputs["labels"], strict=True)):
            length = len(ids) if "attention_mask" not in inputs else int(inputs["attention_mask"][row].sum())
            found = retokenised(ids[:length].tolist(), self.words, self.tokenizer)
            if found is None:
                continue
            other, places = found
            if (largest := int(other.max())) >= (rows := len(self.teacher.get_input_embeddings().weight)):
                raise unknown_token(largest, rows)
            next_is_counted = labels[places.ours.clamp(max=length - 1).to(labels.device)].cpu() != IGNORED
            used = next_is_counted & (places.ours > 0) & (places.theirs > 0) & (places.ours < length)
            with torch.no_grad(), eval_mode(self.teacher):
                wanted = self.teacher(input_ids=other[None].to(device), use_cache=False).logits[0]
            wanted = wanted[places.theirs[used].to(device) - 1].to(logits.device)[:, theirs]
            mine = logits[row, places.ours[used].to(logits.device) - 1][:, ours]
            total = total + distillation_sum(mine, wanted, self.temperature)
        return total


def distillation_sum(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sum of ``temperature^2 * KL(teacher || student)`` over positions, in float32.

    Logits are ``(positions, vocabulary)``; no gradient flows into those of the teacher.
    """
    found: torch.Tensor = _DivergenceSum.apply(student, teacher, temperature)  # type: ignore[no-untyped-call]
    return found


class _DivergenceSum(torch.autograd.Function):
    """The divergence and its gradient, computed together slice by slice, so that no distribution is kept in memory.

    With the softened probabilities ``p`` of the student and ``q`` of the teacher, the gradient of
    ``temperature^2 * KL`` with respect to the student's logits is ``temperature * (p - q)``.
    """

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        size = _CPU_SLICE if student.device.type == "cpu" else _SLICE
        total, gradient = student.new_zeros((), dtype=torch.float32), torch.empty_like(student)
        parts = (tensor.split(size) for tensor in (student, teacher, gradient))
        for ours, theirs, change in zip(*parts, strict=True):
            log_p, log_q = (
                logits.to(torch.float32, copy=True).div_(temperature).log_softmax(-1) for logits in (ours, theirs)
            )
            q = log_q.exp()
            total += log_q.sub_(log_p).mul_(q).sum()
            change.copy_(log_p.exp_().sub_(q).mul_(temperature))
        ctx.save_for_backward(gradient)
        return total * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (change,) = ctx.saved_tensors
        return change * gradient, None, None


def vocabulary_of(model: Any) -> int:
    """Size of the vocabulary of a language model."""
    output = model.get_output_embeddings()
    if output is not None and getattr(output, "weight", None) is not None:
        return int(output.weight.shape[0])
    return int(model.config.get_text_config().vocab_size)


_WORSE_STEPS = 3
"""Bad steps in a row after which training counts as diverged; a single batch may just be hard."""


class RecoveryTrainer(Trainer):
    """The trainer of transformers, with the loss of a teacher mixed in if there is one."""

    def __init__(self, *args: Any, distillation: Distillation | None = None, **options: Any) -> None:
        """Keep the teacher outside the student, so that it is neither wrapped nor saved."""
        super().__init__(*args, **options)
        self.distillation = distillation

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy, mixed with the divergence from the teacher; only cross-entropy on held-out samples."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.distillation is not None and model.training:
            weight = self.distillation.weight
            divergence = self.distillation.divergence_sum(inputs, outputs["logits"])
            if num_items_in_batch is None or not self.model_accepts_loss_kwargs:
                divergence = divergence / (inputs["labels"][:, 1:] != IGNORED).sum().clamp(min=1)
            else:  # scaled for accumulation exactly as the cross-entropy is
                share = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
                divergence = divergence * share / num_items_in_batch
            # with weight 1 the cross-entropy is left out, not multiplied by 0, to save its backward pass
            loss = divergence if weight == 1 else (1 - weight) * loss + weight * divergence
        return (loss, outputs) if return_outputs else loss


class _EarlyStopping(TrainerCallback):
    """Ends training when the held-out loss stops improving, and with an error when the loss diverges.

    Both are decided from the log, which checkpoints contain, so that a resumed run decides as an uninterrupted one.
    """

    def __init__(self, settings: RecoverySettings, vocabulary: int) -> None:
        self.settings, self.vocabulary = settings, vocabulary

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluate and save the last step as well."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        if has_stalled(losses, self.settings.patience):
            control.should_training_stop = True

    on_train_begin = on_evaluate  # a resumed run may have been about to stop

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        newest = state.log_history[-1]
        for name in ("loss", "eval_loss"):
            if not math.isfinite(newest.get(name, 0.0)):
                kind = "training" if name == "loss" else "held-out"
                raise self._diverged(f"the {kind} loss became {newest[name]}", state.global_step)
        # far above its start, and worse than guessing uniformly, whose loss is log(vocabulary)
        worst = max(2 * losses[0], 1.2 * math.log(self.vocabulary)) if losses else math.inf
        if len(losses) > _WORSE_STEPS and min(losses[-_WORSE_STEPS:]) > worst:
            raise self._diverged(f"the training loss rose from {losses[0]:.2f} to {losses[-1]:.2f}", state.global_step)

    def _diverged(self, what: str, step: int) -> RecoveryError:
        rate, precision = self.settings.learning_rate, self.settings.precision
        further = "" if precision == "float32" else ", train with $precision=float32"
        return RecoveryError(
            f"training diverged: {what}",
            where=f"step {step}",
            remedy=f"Lower $learning_rate (now {rate:g}; try {rate / 10:g}), lengthen $warmup (now "
            f"{self.settings.warmup:g}){further}, and start in a new folder",
        )


class _Progress(TrainerCallback):
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
        """Finish the progress bar, also after fewer steps."""
        for _step in self.steps:
            pass


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
    """A trainer of the parameters of ``model`` that require a gradient, ready to start or to resume.

    ``arguments`` are for ``transformers.TrainingArguments``, over those of the recipe: ``fsdp``, ``deepspeed``, ...

    Raises:
        RecoveryError: the batch cannot be divided over the devices, or an argument is unknown or invalid.
    """
    chosen = _training_arguments(settings, folder, len(data.train), dict(arguments or {}))
    is_sharded = is_fully_sharded(model)
    if is_sharded:  # the trainer then leaves the shards alone, and averages the gradients of the updates
        model.is_distributed_loading_by_transformers = chosen["save_only_model"] = True
    try:
        training = TrainingArguments(**chosen)
    except (TypeError, ValueError) as error:
        remedy = "Pass arguments of transformers.TrainingArguments"
        raise RecoveryError(f"transformers refuses them: {error}", where="arguments", remedy=remedy) from error
    if training.fp16:
        raise RecoveryError("fp16 loses small updates", where="arguments", remedy="Leave fp16 out; bf16 is used")
    trainer = RecoveryTrainer(
        model=model,
        args=training,
        train_dataset=list(data.train),
        eval_dataset=list(data.held_out),
        data_collator=lambda examples: collate(examples, padding),
        callbacks=[_EarlyStopping(settings, vocabulary_of(model)), _Progress(track)],
        distillation=distillation,
    )
    training.save_only_model = training.save_only_model and not is_sharded  # it refuses to resume for the weights' sake
    trainer.remove_callback(PrinterCallback)
    return trainer


def _training_arguments(
    settings: RecoverySettings, folder: Path, samples: int, overrides: dict[str, Any]
) -> dict[str, Any]:
    """The recipe as arguments of transformers, overridden by the caller's."""
    device = torch.device("cpu")
    if not overrides.get("use_cpu", False) and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator() or device
    use_cpu = device.type == "cpu"
    micro, accumulated = divide_batch(settings, use_cpu)
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
        **overrides,
    }


def divide_batch(settings: RecoverySettings, use_cpu: bool) -> tuple[int, int]:
    """Samples per forward pass on one device and passes per step, whose product over all devices is the batch."""
    devices = int(os.environ.get("WORLD_SIZE", 1 if use_cpu else max(1, torch.cuda.device_count())))
    share, rest = divmod(settings.batch, devices)
    if rest or not share:
        what = f"{settings.batch} samples do not divide over {devices} devices"
        raise RecoveryError(what, where="batch", remedy=f"Choose a multiple of {devices}")
    micro = max(size for size in range(1, min(settings.micro_batch, share) + 1) if share % size == 0)
    return micro, share // micro
