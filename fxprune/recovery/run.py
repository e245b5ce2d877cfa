"""Recovery in one call: train a slim model with LoRA, merge, and return it."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerState, set_seed

from fxprune.data.calibration import most_positions
from fxprune.data.samples import positions_note
from fxprune.data.text import unknown_token
from fxprune.errors import RecoveryError, UnsupportedModelError, VerificationError
from fxprune.graph.context import preserve_rng, quiet, wrap_errors
from fxprune.graph.facts import fork
from fxprune.graph.tensors import get_tensor, names_by_identity, set_tensor, weights
from fxprune.masking.compare import TOLERANCE
from fxprune.offload.atomic import LOCK, locked, wrap_disk_errors, write_file
from fxprune.offload.distributed import is_fully_sharded
from fxprune.offload.prefetch import has_bf16
from fxprune.offload.ranks import check_unsharded, run_on_first, world_size
from fxprune.pipeline.arguments import as_path, flag, function, instance, refuse
from fxprune.pipeline.contract import Track, check_track, no_progress
from fxprune.recovery.data import DataReport, TrainingData, collate, read_training_data
from fxprune.recovery.lora import Targets, attach_lora, find_targets, merge_lora
from fxprune.recovery.settings import RecoverySettings, settings_from
from fxprune.recovery.train import Distillation, make_trainer
from fxprune.removal.plan import Plan
from fxprune.report.report import Report
from fxprune.result import Result
from fxprune.trace.inputs import check_merged


@dataclass(frozen=True)
class Recovery:
    """A recovered model and the record of its training.

    Args:
        model: the slim model with its weights trained; same class, names and shapes.
        result: the prune's result with that model and a graph that shares its tensors, and a report without what was
            measured before the training; None if a model was passed.
        held_out: cross-entropy on held-out samples in nats per token, before and after.
        history: the trainer's log, step by step.
        steps: optimizer steps up to the weights that were kept.
        targets: the projections with updates.
        merge_error: change of the logits by merging, relative to the largest or 1.
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
        """All fields except the models, as plain data."""
        whole = dataclasses.asdict(dataclasses.replace(self, model=None, result=None))
        del whole["model"], whole["result"]
        return whole

    def to_json(self) -> str:
        """The data of :meth:`to_dict` as a JSON document."""
        return json.dumps(self.to_dict(), indent=2)


@wrap_errors("recover", "Check the settings, and that the model and its tokenizer belong together", RecoveryError)
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
    """Train low-rank updates of the pruned projections and merge them; names and shapes of the model stay the same.

    Under ``torchrun``, ``accelerate launch`` or ``deepspeed`` every process calls this function, and training is
    distributed as these tools are configured. A model that FSDP2 has sharded, and a teacher, stay so: no process
    holds more than its shards of their weights, and those of one block while it runs.

    Args:
        pruned: the result of :func:`fxprune.prune`, or a slim Hugging Face model; a sharded one with ``inplace=True``.
        data: a path (.json, .jsonl, .txt, .parquet), the id of a hub data set, a ``datasets.Dataset`` or a list of
            rows: instructions (``instruction``, ``input``, ``output``), chats (``messages``) or texts (``text``). None
            for the built-in text.
        plan: the plan of a prune, if a model is passed; without it all linear maps are trained.
        distil: the dense model as teacher, or a :class:`fxprune.recovery.Distillation` with the weight of a teacher.
        settings: the recipe; None for the paper's.
        folder: for checkpoints; a run that was stopped resumes from the last one. None for a temporary folder.
        inplace: train ``pruned`` itself instead of a copy.
        arguments: for ``transformers.TrainingArguments``.
        track: shows progress, as ``track(items, what, total)``.
        changes: single settings by name, over ``settings``: ``learning_rate=2e-4``, ``epochs=1``, ...

    Raises:
        DataError: no row can be used.
        RecoveryError: a setting, the teacher or the folder cannot be used, or training diverged.
        UnsupportedModelError: there is no Hugging Face model to train.
        VerificationError: merging changed the logits.
    """
    check_merged(pruned)
    chosen = settings_from(settings, changes)
    result = pruned if isinstance(pruned, Result) else None
    source: PreTrainedModel = pruned if result is None else result.model
    flag("inplace", inplace)
    _check_model(source, result, tokenizer, inplace)
    _check_options(plan, distil, folder, arguments)
    check_track(track)
    if isinstance(distil, PreTrainedModel):
        distil = Distillation(distil)
    if distil is not None:
        distil = distil.check(source, tokenizer)
    targets = find_targets(source, plan if result is None else result.plan)
    known = map(most_positions, (source, None if distil is None else distil.teacher))
    most = min((*filter(None, known), chosen.max_tokens))
    shortened = [positions_note(most)] if most < chosen.max_tokens else []
    chosen = dataclasses.replace(chosen, max_tokens=most)
    samples = read_training_data(data, tokenizer, chosen)
    _check_ids(source, samples)
    model, result = (source, result) if inplace else copy_for_training(source, result)
    with checkpoint_folder(folder) as path, restored_state(model), preserve_rng():
        # all that must be equal for a run to resume from a checkpoint
        identity = {
            "settings": dataclasses.asdict(chosen),
            "data": samples.report.digest,
            "targets": list(targets.modules),
            "weights": weight_sums(model),
            "distil": None if distil is None else [distil.weight, distil.temperature, weight_sums(distil.teacher)],
        }
        claim_folder(path, identity)
        outcome = _train(model, samples, targets, chosen, path, tokenizer, distil, arguments or {}, track)
    if result is not None:
        report = report_after_training(result.report)
        result = result if report is result.report else dataclasses.replace(result, report=report)
    notes = (*shortened, *samples.report.notes(), *outcome.pop("notes"))
    return Recovery(model, result, targets=targets, data=samples.report, settings=chosen, notes=notes, **outcome)


def _check_model(model: Any, result: Result | None, tokenizer: Any, inplace: bool) -> None:
    """Refuse an object that is not a model to train, and one that is not a tokenizer."""
    if not isinstance(model, PreTrainedModel):
        reasons = "" if result is None else "; ".join(result.report.model_reasons[:3])
        what = f"there is no Hugging Face model to train{f': {reasons}' if reasons else ''}"
        remedy = "Pass the result of a prune that has one; train a graph in a loop of your own"
        raise UnsupportedModelError(what, where="pruned", remedy=remedy)
    if not is_fully_sharded(model):
        check_unsharded(model, "Pass the whole model, which arguments={'fsdp': True} shards for training")
        if any(parameter.is_meta for parameter in model.parameters()):
            raise UnsupportedModelError("its weights are on meta", where="pruned", remedy="Load the weights first")
    elif result is not None or not inplace:
        what = "it is sharded, and a copy, or the graph of a result, would hold whole weights"
        raise UnsupportedModelError(what, where="pruned", remedy="Pass the model, plan=result.plan and inplace=True")
    function("tokenizer", tokenizer, "the tokenizer of the model", RecoveryError)
    missing = [name for name in ("pad_token_id", "eos_token_id") if not hasattr(tokenizer, name)]
    if missing:
        raise RecoveryError(f"it has no {missing[0]}", where="tokenizer", remedy="Pass the tokenizer of the model")


def _check_ids(model: PreTrainedModel, samples: TrainingData) -> None:
    """Refuse token ids that the model has no embedding for."""
    embedding: Any = model.get_input_embeddings()
    rows = len(embedding.weight)
    largest = max(max(example.ids) for example in (*samples.train, *samples.held_out))
    if largest >= rows:
        raise unknown_token(largest, rows)


def _check_options(plan: Any, distil: Any, folder: Any, arguments: Any) -> None:
    if plan is not None:
        instance("plan", plan, Plan, "a Plan, as in result.plan, or None", RecoveryError)
    if distil is not None and not isinstance(distil, Distillation | PreTrainedModel):
        raise refuse("distil", distil, "the dense model, a Distillation, or None", RecoveryError)
    if folder is not None:
        path = Path(as_path("folder", folder, error=RecoveryError))
        if path.is_file():
            raise RecoveryError("it is a file", where=str(path), remedy="Name a folder, in which checkpoints are kept")
    named = isinstance(arguments, Mapping) and all(isinstance(name, str) for name in arguments)
    if arguments is not None and not named:
        raise refuse("arguments", arguments, "arguments of TrainingArguments by name, or None", RecoveryError)


def padding_id(tokenizer: Any, model: Any) -> int:
    """A token id to pad with that the model has an embedding for; a tokenizer may have more ids than the model."""
    known, rows = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0), len(model.get_input_embeddings().weight)
    return int(next(token for token in known if token is not None and token < rows))


def copy_for_training(source: PreTrainedModel, result: Result | None) -> tuple[PreTrainedModel, Result | None]:
    """Copy a model and the result that it belongs to; the graph of the copy shares the tensors of the model."""
    model = copy.deepcopy(source)
    if result is None:
        return model, None
    names, graph_module = names_by_identity(source), fork(result.graph_module)
    for name, tensor in list(weights(graph_module)):
        if id(tensor) in names:
            set_tensor(graph_module, name, get_tensor(model, names[id(tensor)][0]))
    return model, dataclasses.replace(result, model=model, graph_module=graph_module)


def report_after_training(report: Report) -> Report:
    """The report of a prune without the figures that training changes."""
    if report.quality is None and not report.measured:
        return report
    return dataclasses.replace(report, quality=None, measured=(), unmeasured="it was trained after the prune")


@contextmanager
def restored_state(model: PreTrainedModel) -> Iterator[None]:
    """Restore attributes, modes, gradient flags, config and device after training; refuse changed names and shapes."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    attributes, config, device = set(vars(model)), copy.deepcopy(vars(model.config)), model.device
    try:
        yield
    finally:
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        vars(model.config).clear()
        vars(model.config).update(config)
        if not is_fully_sharded(model):  # that stays where its mesh is
            model.to(device=device)  # type: ignore[call-arg]
        model.zero_grad(set_to_none=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(name, True))
        for name, module in model.named_modules():
            module.training = modes.get(name, False)
    if {name: tensor.shape for name, tensor in model.state_dict().items()} != shapes:
        what = "training changed the model's names or shapes"
        raise VerificationError(what, where="merge", remedy="Please report the model's config and the settings")


@contextmanager
def checkpoint_folder(folder: str | Path | None) -> Iterator[Path]:
    """Yield a folder for checkpoints: the caller's, or a temporary one, which several processes cannot share."""
    if folder is not None:
        path = Path(folder).expanduser()
        with wrap_disk_errors(path, RecoveryError):
            path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:

            def reserve() -> None:
                stack.enter_context(locked(path / LOCK, RecoveryError))

            if world_size() > 1:
                run_on_first(reserve, RecoveryError)
            elif int(os.environ.get("RANK", "0")) == 0:  # of a group that is not made yet
                reserve()
            yield path
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        remedy = "Give $folder, one that all of them can write to"
        raise RecoveryError("several processes need one folder", where="folder", remedy=remedy, argument="folder")
    with tempfile.TemporaryDirectory(prefix="fxprune-recovery-") as temporary:
        yield Path(temporary)


def claim_folder(folder: Path, run: Mapping[str, Any]) -> None:
    """Record in a folder the run that its checkpoints belong to; refuse a folder with those of another run."""
    if int(os.environ.get("RANK", "0")):
        return
    file, ours = folder / "recovery.json", json.loads(json.dumps(run))
    if last_checkpoint(folder) is not None:
        try:
            theirs: dict[str, Any] = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            theirs = {}
        other = [name for name in ours if theirs.get(name) != ours[name]]
        if other:
            what = f"holds checkpoints of another run: {', '.join(other)} differ"
            raise RecoveryError(what, where=str(folder), remedy="Pass another folder, or empty this one to start again")
    write_file(file, json.dumps(ours, indent=2), RecoveryError)


def weight_sums(model: torch.nn.Module) -> list[float]:
    """Fingerprint of the weights of a model: the total and the largest sum of absolute values.

    They are rounded to six digits, so that sums taken in another order are equal. Quantised weights, which are tensors
    of a class of their own, do not count.
    """
    tensors = [parameter.detach() for parameter in model.parameters()]
    plain = [tensor for tensor in tensors if type(tensor) is torch.Tensor or hasattr(tensor, "full_tensor")]
    totals: list[Any] = [tensor.double().abs().sum() for tensor in plain]
    sums = [float(total.full_tensor() if hasattr(total, "full_tensor") else total) for total in totals]
    return [float(f"{sum(sums):.6g}"), float(f"{max(sums, default=0.0):.6g}")]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder; None if there is none."""
    found = []
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))  # the trainer writes it last
        except (OSError, ValueError, RecursionError):
            continue
        if step.isdigit():
            found.append((int(step), path))
    return max(found)[1] if found else None


def _without_fp16(model: PreTrainedModel) -> list[str]:
    """Cast a model with parameters in fp16 to a wider dtype, as loading a checkpoint does; returns a note of it.

    Buffers that are not persistent, such as the frequencies of positions, keep theirs.
    """
    if all(parameter.dtype != torch.float16 for parameter in model.parameters()):
        return []
    dtype = torch.bfloat16 if has_bf16(model.device) else torch.float32
    saved = model.state_dict().keys()
    kept = {name: buffer for name, buffer in model.named_buffers() if name not in saved}
    model.to(dtype=dtype)  # type: ignore[call-arg]
    for name, buffer in kept.items():
        set_tensor(model, name, buffer)
    return [f"the weights were fp16 and are {str(dtype).removeprefix('torch.')} now: fp16 loses small updates"]


def _train(
    model: PreTrainedModel,
    samples: TrainingData,
    targets: Targets,
    settings: RecoverySettings,
    folder: Path,
    tokenizer: Any,
    distillation: Distillation | None,
    arguments: Mapping[str, Any],
    track: Track,
) -> dict[str, Any]:
    """Train and merge; the outcome by field of :class:`Recovery`."""
    set_seed(settings.seed)
    notes = [f"{name} is not trained: {why}" for name, why in targets.skipped.items()] + _without_fp16(model)
    launched = any(os.environ.get(name) == "true" for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))
    sharded = launched or bool(arguments.get("fsdp") or arguments.get("deepspeed"))
    if sharded and is_fully_sharded(model):
        remedy = "Leave fsdp and deepspeed out, and start with torchrun"
        raise RecoveryError("the model is sharded already", where="arguments", remedy=remedy)
    padding = padding_id(tokenizer, model)
    with quiet(logging.WARNING):
        wrapped = attach_lora(copy.deepcopy(model) if sharded else model, targets, settings)
    try:
        trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        start = last_checkpoint(folder)
        trainer = make_trainer(
            wrapped,
            samples,
            settings,
            folder,
            padding=padding,
            distillation=distillation,
            arguments={"eval_on_start": start is None, **arguments},
            track=track,
        )
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
        wrapped = trainer.accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        if sharded:  # the whole model, with updates that were trained in shards on several devices
            from peft import PeftModel

            trainer.save_model(str(folder / "adapter"))
            trainer.accelerator.wait_for_everyone()
            wrapped = PeftModel.from_pretrained(model, str(folder / "adapter"), is_trainable=False)
        inputs = collate(samples.held_out[:2], padding)  # with two, padding is compared as well
        del inputs["labels"]
        _, error = merge_lora(wrapped, inputs)
    except BaseException:  # even an interrupt must not leave updates in the caller's model
        if not sharded:
            wrapped.unload()
        raise
    if error > TOLERANCE:
        notes.append(f"merging rounded the weights and moved the logits by {error:.1e} of the largest")
    if start is not None:
        notes.append(f"resumed at step {start.name.rpartition('-')[2]}")
    return {**_course(trainer.state, notes), "trained": trained, "merge_error": error}


def _course(state: TrainerState, notes: Sequence[str]) -> dict[str, Any]:
    """Losses, log, steps and notes of a finished training, by field of :class:`Recovery`; its notes come last."""
    before = next(entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry)
    best, step = state.best_metric, state.best_global_step
    assert best is not None and step is not None, "the trainer always evaluates the last step"
    found = list(notes)
    if state.global_step < state.max_steps:
        found.append(f"stopped early at step {state.global_step} of {state.max_steps}")
    if best >= before:
        found.append(
            f"the held-out loss did not fall: {before:.3f} before, {best:.3f} after; "
            "try another learning_rate, more data or more epochs"
        )
    return {"held_out": (before, best), "history": tuple(state.log_history), "steps": step, "notes": tuple(found)}
