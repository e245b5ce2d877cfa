"""How far a tuning is, in memory and on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fxprune.data.ranks import rank

__all__ = ["Progress", "digest", "read_progress", "write_progress"]


@dataclass(frozen=True, eq=False)
class Progress:
    """How far a tuning is.

    Args:
        step: steps done.
        misses: measurements in a row that did no better.
        first: held-out divergence at the start, in nats a position.
        best: the lowest so far.
        kept: the numbers it was measured with; none where nothing was better than the start.
    """

    step: int
    misses: int
    first: float
    best: float
    kept: tuple[torch.Tensor, ...]


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """Return what tells these tensors, in this order, from others: by their types, shapes and values."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def write_progress(folder: str, mark: str, progress: Progress, adam: torch.optim.Adam) -> None:
    """Write all that is needed to go on, in place of what was written before.

    Args:
        folder: where to; it is made.
        mark: what tells this run from others.
        progress: how far it is.
        adam: the optimiser of what is learned.
    """
    held = {f"kept.{i}": tensor for i, tensor in enumerate(progress.kept)}
    for i, numbers in enumerate(_learned(adam)):
        held[f"numbers.{i}"] = numbers.detach()
        held.update({f"{name}.{i}": torch.as_tensor(value) for name, value in adam.state[numbers].items()})
    said = {"step": progress.step, "misses": progress.misses, "first": progress.first, "best": progress.best}
    path = _file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in held.items()}
    save_file(tensors, new, metadata={"mark": mark, "progress": json.dumps(said)})
    new.replace(path)


def read_progress(folder: str, mark: str, adam: torch.optim.Adam) -> Progress | None:
    """Take up the state of ``adam`` and what it learns again; None where the folder holds no run with this mark."""
    path = _file(folder)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            if said.get("mark") != mark:
                return None
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):  # half a file, or another one: begin anew
        return None
    learned, kept = _learned(adam), []
    states: dict[int, dict[str, torch.Tensor]] = {}
    for i, numbers in enumerate(learned):
        with torch.no_grad():
            numbers.copy_(held.pop(f"numbers.{i}"))
        if f"kept.{i}" in held:  # none where nothing was better yet
            kept.append(held.pop(f"kept.{i}").to(numbers.device))
    for key, value in held.items():
        name, _, i = key.rpartition(".")
        states.setdefault(int(i), {})[name] = value
    adam.load_state_dict({"state": states, "param_groups": adam.state_dict()["param_groups"]})
    return Progress(**json.loads(said["progress"]), kept=tuple(kept))


def _file(folder: str) -> Path:
    """Several processes all do the same, each with a file of its own: none reads or renames half of another's."""
    return Path(folder) / (f"tuning.{rank()}.safetensors" if rank() else "tuning.safetensors")


def _learned(adam: torch.optim.Adam) -> list[torch.Tensor]:
    return [numbers for group in adam.param_groups for numbers in group["params"]]
