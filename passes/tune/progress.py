"""How far a tuning is, in memory and on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

__all__ = ["Progress", "read_progress", "write_progress"]

_FILE = "tuning.safetensors"


@dataclass(frozen=True, eq=False)
class Progress:
    """How far a tuning is.

    Args:
        step: steps done.
        misses: measurements in a row that did no better.
        first: held-out divergence at the start, in nats a position.
        best: the lowest so far.
        kept: the numbers it was measured with.
    """

    step: int
    misses: int
    first: float
    best: float
    kept: torch.Tensor


def write_progress(folder: str, mark: str, progress: Progress, numbers: torch.Tensor, adam: torch.optim.Adam) -> None:
    """Write all that is needed to go on, in place of what was written before.

    Args:
        folder: where to; it is made.
        mark: what tells this run from others.
        progress: how far it is.
        numbers: what is learned, as it is now.
        adam: the optimiser of ``numbers``.
    """
    state = adam.state[numbers]
    held = {"numbers": numbers.detach(), "kept": progress.kept}
    held.update({name: torch.as_tensor(state[name]) for name in ("step", "exp_avg", "exp_avg_sq")} if state else {})
    said = {"step": progress.step, "misses": progress.misses, "first": progress.first, "best": progress.best}
    path = Path(folder) / _FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in held.items()}
    save_file(tensors, new, metadata={"mark": mark, "progress": json.dumps(said)})
    new.replace(path)


def read_progress(folder: str, mark: str, numbers: torch.Tensor, adam: torch.optim.Adam) -> Progress | None:
    """Take up ``numbers`` and the state of ``adam`` again; None where the folder holds no run with this mark."""
    path = Path(folder) / _FILE
    if not folder or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            if said.get("mark") != mark:
                return None
            held = {name: file.get_tensor(name).to(numbers.device) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):  # half a file, or another one: begin anew
        return None
    with torch.no_grad():
        numbers.copy_(held["numbers"])
    if "exp_avg" in held:
        adam.state[numbers].update(step=held["step"].cpu(), exp_avg=held["exp_avg"], exp_avg_sq=held["exp_avg_sq"])
    return Progress(**json.loads(said["progress"]), kept=held["kept"])
