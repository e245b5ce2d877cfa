"""Recovery in one call: train a slim model a little, and give it back with the shape it had."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from fxprune.errors import RecoveryError
from fxprune.graph.attempts import clear_errors
from fxprune.graph.precision import has_bf16
from fxprune.graph.silence import quiet
from fxprune.graph.surroundings import own_randomness
from fxprune.masking.compare import TOLERANCE
from fxprune.pipeline.progress import Track, check_track, no_progress
from fxprune.recovery.checks import check_ids, check_options, check_pruned, is_result, padding_of
from fxprune.recovery.data import DataReport, TrainingData, collate, read_training_data
from fxprune.recovery.distil import Distillation
from fxprune.recovery.lora import Targets, attach_lora, find_targets, merge_lora
from fxprune.recovery.ownership import as_before, claim, fingerprint, last_checkpoint, own, run_folder
from fxprune.recovery.settings import RecoverySettings, settings_from
from fxprune.removal.plan import Plan

if TYPE_CHECKING:
    from fxprune.result import Result

__all__ = ["Recovery", "recover"]


@dataclass(frozen=True)
class Recovery:
    """A recovered model, and how it came about.

    Args:
        model: the slim model with its weights trained; same class, names and shapes.
        result: the prune's result with that model and a graph that shares its tensors; None where a model was passed.
        held_out: cross-entropy on held-out samples in nats a token, before and after.
        history: what the trainer logged, step by step.
        steps: optimizer steps in the model that came out.
        trained: parameters of the updates.
        targets: the projections they were added to.
        data: what became of the rows.
        settings: the recipe.
        merge_error: by how much merging moved the logits, relative to the largest or 1.
        notes: what else the user should know.
    """

    model: Any
    result: Result | None
    held_out: tuple[float, float]
    history: tuple[Mapping[str, float], ...]
    steps: int
    trained: int
    targets: Targets
    data: DataReport
    settings: RecoverySettings
    merge_error: float
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the model, as plain data."""
        whole = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("model", "result")}
        return {
            name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
            for name, value in whole.items()
        }

    def to_json(self) -> str:
        """Return :meth:`to_dict` as a JSON document."""
        return json.dumps(self.to_dict(), indent=2)


@clear_errors("recover", "Check the settings, and that the model and its tokenizer belong together", RecoveryError)
def recover(
    pruned: Any,
    data: Any = None,
    tokenizer: Any = None,
    *,
    plan: Plan | None = None,
    distil: Distillation | PreTrainedModel | None = None,
    settings: RecoverySettings | None = None,
    folder: str | Path | None = None,
    inplace: bool = False,
    arguments: Mapping[str, Any] | None = None,
    track: Track = no_progress,
    **changes: Any,
) -> Recovery:
    """Train low-rank updates of the pruned projections and merge them: no parameter more, the same names.

    Under ``torchrun``, ``accelerate launch`` or ``deepspeed`` each process calls this, and training is spread as these
    tools say.

    Args:
        pruned: the result of :func:`fxprune.prune`, or a slim Hugging Face model.
        data: a path (.json, .jsonl, .txt, .parquet), the id of a hub data set, a ``datasets.Dataset`` or a list of
            rows: instructions (``instruction``, ``input``, ``output``), chats (``messages``) or texts (``text``). None
            for the built-in text.
        tokenizer: the model's.
        plan: what was removed, where a model is passed; without it all linear maps are trained.
        distil: the dense model as teacher, or a :class:`fxprune.recovery.Distillation` that also says how much.
        settings: the recipe; the paper's where None.
        folder: for checkpoints; a run that was stopped goes on from the last one there. None for a temporary folder.
        inplace: train ``pruned`` itself; else a copy.
        arguments: for ``transformers.TrainingArguments``.
        track: shows progress, as ``track(items, what, total)``.
        changes: single settings by name, over ``settings``: ``learning_rate=2e-4``, ``epochs=1``, ...

    Raises:
        DataError: no row can be used.
        RecoveryError: a setting, the teacher or the folder does not fit, or training diverged.
        UnsupportedModelError: there is no Hugging Face model to train.
        VerificationError: merging changed what the model computes.
    """
    chosen = settings_from(settings, changes)
    result = pruned if is_result(pruned) else None
    check_pruned(pruned, result, tokenizer)
    check_options(plan, distil, folder, inplace, arguments)
    check_track(track)
    if isinstance(distil, PreTrainedModel):
        distil = Distillation(distil)
    source: PreTrainedModel = pruned if result is None else result.model
    if distil is not None:
        distil.check(source)
    targets = find_targets(source, plan if result is None else result.plan)
    samples = read_training_data(data, tokenizer, chosen)
    check_ids(samples, source)
    model, result = own(source, result, inplace)
    with run_folder(folder) as path, as_before(model), own_randomness():
        job = _Job(model, samples, targets, chosen, path, tokenizer, distil, dict(arguments or {}), track)
        claim(path, job.identity())
        outcome = job.run()
    notes = (*samples.report.notes(), *outcome.pop("notes"))
    return Recovery(model, result, targets=targets, data=samples.report, settings=chosen, notes=notes, **outcome)


@dataclass(frozen=True)
class _Job:
    """One training, from the adapter to the merge."""

    model: PreTrainedModel
    samples: TrainingData
    targets: Targets
    settings: RecoverySettings
    folder: Path
    tokenizer: Any
    distillation: Distillation | None
    arguments: dict[str, Any]
    track: Track

    def identity(self) -> dict[str, Any]:
        """Return what tells this training from others: it goes on from a checkpoint only where all of it is equal."""
        teacher = self.distillation
        return {
            "settings": dataclasses.asdict(self.settings),
            "data": self.samples.report.digest,
            "targets": list(self.targets.modules),
            "weights": fingerprint(self.model, self.targets.modules),
            "distil": None if teacher is None else [teacher.weight, teacher.temperature],
        }

    def run(self) -> dict[str, Any]:
        """Train and merge; return what is known then, by field of :class:`Recovery`."""
        from transformers import set_seed

        from fxprune.recovery.train import make_trainer

        set_seed(self.settings.seed)
        notes = [f"no update of {name}: {why}" for name, why in self.targets.skipped.items()]
        notes += _leave_fp16(self.model)
        sharded, padding = _is_sharded(self.arguments), padding_of(self.tokenizer, self.model)
        with quiet(logging.WARNING):
            wrapped = attach_lora(copy.deepcopy(self.model) if sharded else self.model, self.targets, self.settings)
        try:
            trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
            start = last_checkpoint(self.folder)
            trainer = make_trainer(
                wrapped,
                self.samples,
                self.settings,
                self.folder,
                padding=padding,
                distillation=self.distillation,
                arguments={"eval_on_start": start is None, **self.arguments},
                track=self.track,
            )
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
            plain = trainer.accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
            wrapped = self._gathered(trainer) if sharded else plain
            inputs = collate(self.samples.held_out[:2], padding)  # two tell if padding matters
            del inputs["labels"]
            _, error = merge_lora(wrapped, inputs)
        except BaseException:  # an interrupt, too, must not leave updates in the caller's model
            if not sharded:
                wrapped.unload()
            raise
        history = tuple(trainer.state.log_history)
        if error > TOLERANCE:
            notes.append(f"merging rounded the weights and moved the logits by {error:.1e} of the largest")
        if start is not None:
            notes.append(f"resumed at step {start.name.rpartition('-')[2]}")
        losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        best, step = trainer.state.best_metric, trainer.state.best_global_step
        assert best is not None and step is not None, "the last step is always judged"
        notes += _judged(losses[0], best, trainer.state)
        return {
            "held_out": (losses[0], best),
            "history": history,
            "steps": step,
            "trained": trained,
            "merge_error": error,
            "notes": tuple(notes),
        }

    def _gathered(self, trainer: Any) -> Any:
        """Return the whole model with the updates that were trained in pieces on several devices."""
        from peft import PeftModel

        adapter = self.folder / "adapter"
        trainer.save_model(str(adapter))
        trainer.accelerator.wait_for_everyone()
        return PeftModel.from_pretrained(self.model, str(adapter), is_trainable=False)


def _leave_fp16(model: PreTrainedModel) -> list[str]:
    """Turn weights in fp16, which loses small updates, into bfloat16 where the device has it, else float32."""
    if not any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        return []
    dtype = torch.bfloat16 if has_bf16(model.device) else torch.float32
    model.to(dtype=dtype)  # type: ignore[call-arg]
    return [f"the weights were fp16 and are {str(dtype).removeprefix('torch.')} now: fp16 loses small updates"]


def _is_sharded(arguments: Mapping[str, Any]) -> bool:
    launched = any(os.environ.get(name) == "true" for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))
    return launched or bool(arguments.get("fsdp") or arguments.get("deepspeed"))


def _judged(before: float, after: float, state: Any) -> list[str]:
    notes = []
    if state.global_step < state.max_steps:
        notes.append(f"stopped early at step {state.global_step} of {state.max_steps}")
    if after >= before:
        notes.append(
            f"the held-out loss did not fall: {before:.3f} before, {after:.3f} after; "
            "try another learning_rate, more data or more epochs"
        )
    return notes
