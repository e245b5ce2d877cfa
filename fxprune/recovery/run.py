"""Recovery in one call: train a slim model with LoRA, merge, and return it."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from transformers import PreTrainedModel

from fxprune.errors import DataError, RecoveryError, UnsupportedModelError, VerificationError
from fxprune.graph.context import clear_errors, own_randomness, quiet
from fxprune.graph.facts import fork
from fxprune.graph.tensors import get_tensor, names_by_identity, set_tensor, weights
from fxprune.masking.compare import TOLERANCE
from fxprune.offload.prefetch import has_bf16
from fxprune.offload.ranks import check_loaded
from fxprune.pipeline.arguments import as_path, flag, function, instance, refuse
from fxprune.pipeline.contract import Track, check_track, no_progress
from fxprune.recovery.data import DataReport, TrainingData, collate, read_training_data
from fxprune.recovery.lora import Targets, attach_lora, find_targets, merge_lora
from fxprune.recovery.settings import RecoverySettings, settings_from
from fxprune.recovery.train import Distillation
from fxprune.removal.plan import Plan

if TYPE_CHECKING:
    from fxprune.result import Result

__all__ = [
    "Recovery",
    "as_before",
    "check_ids",
    "check_options",
    "check_pruned",
    "claim",
    "fingerprint",
    "is_result",
    "last_checkpoint",
    "own",
    "padding_of",
    "recover",
    "run_folder",
]


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


_RUN = "recovery.json"


def own(source: PreTrainedModel, result: Result | None, inplace: bool) -> tuple[PreTrainedModel, Result | None]:
    """Return a model to train and the result it belongs to, whose graph shares its tensors; copies unless in place."""
    if inplace:
        return source, result
    model = copy.deepcopy(source)
    if result is None:
        return model, None
    names, graph_module = names_by_identity(source), fork(result.graph_module)
    for name, tensor in list(weights(graph_module)):
        if id(tensor) in names:
            set_tensor(graph_module, name, get_tensor(model, names[id(tensor)][0]))
    return model, dataclasses.replace(result, model=model, graph_module=graph_module)


@contextmanager
def as_before(model: PreTrainedModel) -> Iterator[None]:
    """Give a model its names, modes, flags, config and device back, whatever training does to it meanwhile.

    Raises:
        VerificationError: a parameter or buffer came or went, or changed its shape.
    """
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
        model.to(device=device)  # type: ignore[call-arg]
        model.zero_grad(set_to_none=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(name, True))
        for name, module in model.named_modules():
            module.training = modes.get(name, False)
    if {name: tensor.shape for name, tensor in model.state_dict().items()} != shapes:
        raise VerificationError(
            "training changed the model's names or shapes",
            where="merge",
            remedy="Please report the model's config and the settings",
        )


@contextmanager
def run_folder(folder: str | Path | None) -> Iterator[Path]:
    """Yield a folder for checkpoints: the caller's, or one that is gone afterwards.

    Raises:
        RecoveryError: several processes train, and have no folder in common.
    """
    if folder is not None:
        path = Path(folder).expanduser()
        with clear_errors(str(path), "Pass a folder that can be made and written to", RecoveryError):
            path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecoveryError("several processes need one folder", where="folder", remedy="Pass folder=")
    with tempfile.TemporaryDirectory(prefix="fxprune-recovery-") as temporary:
        yield Path(temporary)


def claim(folder: Path, run: Mapping[str, Any]) -> None:
    """Make a folder that of the run described, unless it belongs to another.

    Args:
        folder: the folder.
        run: what tells this run from others, as plain data.

    Raises:
        RecoveryError: it holds checkpoints of another run; the message says in what they differ.
    """
    if int(os.environ.get("RANK", "0")):
        return
    file, mine = folder / _RUN, json.loads(json.dumps(run))
    if last_checkpoint(folder) is not None:
        try:
            theirs: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            theirs = {}
        other = [name for name in mine if theirs.get(name) != mine[name]]
        if other:
            raise RecoveryError(
                f"holds checkpoints of another run: {', '.join(other)} differ",
                where=str(folder),
                remedy="Pass another folder, or empty this one to start anew",
            )
    file.write_text(json.dumps(mine, indent=2), encoding="utf-8")


def fingerprint(model: torch.nn.Module, names: tuple[str, ...]) -> list[float]:
    """Return two numbers that tell the weights of named modules from others of the same shape.

    They have six digits, so that sums taken in another order give the same.
    """
    tensors = [model.get_submodule(name)._parameters["weight"] for name in names]
    sums = [float(t.detach().double().abs().sum()) for t in tensors if t is not None]
    return [float(f"{sum(sums):.6g}"), float(f"{max(sums):.6g}")]


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end; None if there is none."""
    found = []
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and _complete(path):
            found.append((int(step), path))
    return max(found)[1] if found else None


def _complete(path: Path) -> bool:
    """Whether a checkpoint was written to its end: the state is what the trainer writes last."""
    try:
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


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
