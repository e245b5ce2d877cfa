"""What time a model takes by what it has to do, read from a table of measurements."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxprune.errors import FxpruneError, UnknownNameError

__all__ = ["PHASES", "Timing", "read_timing"]

PHASES = ("prefill", "decode")
"""What is timed: reading a prompt, and giving one more token."""

_FORMS = "the table that `make bench` writes, or what `fxprune bench DENSE SLIM --json` prints"


@dataclass(frozen=True)
class Timing:
    """How long a model takes that has to do a share of the work of the dense one.

    That is ``seconds * (fixed + (1 - fixed) * share)``: what every call costs whatever the widths, and what goes with
    them.

    Args:
        seconds: of the dense model, in the first case measured.
        fixed: the part of them that no narrower model saves, 0 to 1.
        what: what was measured, in words.
    """

    seconds: float
    fixed: float
    what: str


def read_timing(phase: str, place: str) -> Timing:
    """Read how time follows work from models that were measured, the dense one and slim ones.

    Times and work are in units of the dense model's, case by case; the fixed part is what fits all of them best in the
    least squares sense.

    Args:
        phase: one of :data:`PHASES`.
        place: a JSON file, and behind a colon the engine where the file tells of several.

    Raises:
        FxpruneError: no such file, or no such table in it; or no slim model in it, without which there is no telling.
        UnknownNameError: it tells of other engines, or of several and none is named.
    """
    path, engine = _parts(place)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else f"it cannot be read: {error}"
        raise FxpruneError(what, where=str(path), remedy=f"Name {_FORMS}") from error
    if not isinstance(table, Mapping):
        raise FxpruneError("it holds no measurements", where=str(path), remedy=f"Name {_FORMS}")
    try:
        rows = list(_of_bench(table, phase, engine) if "rows" in table else _of_command(table, phase))
    except UnknownNameError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise FxpruneError("it holds no measurements", where=str(path), remedy=f"Name {_FORMS}") from error
    slim = [(1 - work, 1 - time) for work, time, _ in rows if work < 1]
    if not slim:
        raise FxpruneError(
            f"there is no slim model with a {phase} time in it: how time follows work cannot be told",
            where=str(path),
            remedy="Measure the dense model and one that was pruned by any recipe",
        )
    slope = sum(work * time for work, time in slim) / sum(work * work for work, _ in slim)
    dense = next((seconds for work, _, seconds in rows if work == 1), rows[0][2])
    return Timing(dense, 1 - min(max(slope, 0.0), 1.0), f"{phase} time{f' in {engine}' if engine else ''}")


def _parts(place: str) -> tuple[Path, str]:
    """The file, and the engine if one is named; a colon may be part of the file's own name."""
    whole = Path(place)
    if whole.is_file() or ":" not in place:
        return whole, ""
    path, _, engine = place.rpartition(":")
    return Path(path), engine.strip()


def _of_bench(table: Mapping[str, Any], phase: str, engine: str) -> Iterator[tuple[float, float, float]]:
    """Shares of work and of time, and seconds, of each row of a phase."""
    rows = [row for row in table["rows"] if row["case"]["phase"] == phase]
    engines = sorted({row["engine"] for row in rows})
    if engine not in engines and (engine or len(engines) > 1):
        raise UnknownNameError("engine", engine, engines)
    rows = [row for row in rows if row["engine"] == (engine or row["engine"])]
    dense = {str(row["case"]): row["seconds"] for row in rows if row["candidate"] == "dense"}
    for row in rows:
        yield 1 / row["ideal"], row["seconds"] / dense[str(row["case"])], row["seconds"]


def _of_command(table: Mapping[str, Any], phase: str) -> Iterator[tuple[float, float, float]]:
    """The same of models side by side, the dense one first; work is taken to go with the parameters."""
    models = list(table.values())
    for model in models:
        seconds, first = model[f"{phase}_ms"] / 1000, models[0][f"{phase}_ms"] / 1000
        yield model["parameters"] / models[0]["parameters"], seconds / first, seconds
