"""Ownership of what is trained: copies of models, their state afterwards, and folders of checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from fxprune.errors import RecoveryError, VerificationError
from fxprune.graph.attempts import clear_errors
from fxprune.graph.fork import fork
from fxprune.graph.tensors import get_tensor, names_by_identity, set_tensor, weights

if TYPE_CHECKING:
    from fxprune.result import Result

__all__ = ["as_before", "claim", "fingerprint", "last_checkpoint", "own", "run_folder"]

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
