"""Every error the package raises on purpose: what is wrong, where, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArgumentError",
    "AxisMismatch",
    "CalibrationError",
    "CheckpointError",
    "DataError",
    "EvaluationError",
    "ExportError",
    "FxpruneError",
    "PassError",
    "PlanError",
    "RatioError",
    "RecoveryError",
    "TraceError",
    "UnknownNameError",
    "UnsupportedModelError",
    "VerificationError",
]


_LISTED = 30
"""Names that a message lists: all passes, and not all tensors of a model."""


_LONGEST = 80
"""Characters of a name that nothing is called by."""


class FxpruneError(Exception):
    """Root of all errors of this package.

    Args:
        what: what is wrong.
        where: the node, parameter or argument concerned.
        remedy: what the caller can do about it.
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        what, where = (" ".join(part.splitlines()) for part in (what, where))
        what = what if what.endswith("...") else what.removesuffix(".")
        self.what, self.where, self.remedy = what, where, remedy
        text = f"{where}: {what}" if where and not what.startswith(f"{where} ") else what
        super().__init__(f"{text}. {remedy}" if remedy else text)


class ArgumentError(FxpruneError, ValueError):
    """An argument is of the wrong type, or out of range."""


class TraceError(FxpruneError):
    """The module cannot be traced to an ATen graph."""


class UnsupportedModelError(FxpruneError, ValueError):
    """The module is in a state that pruning cannot work on (quantised, on two devices, ...)."""


class AxisMismatch(FxpruneError):
    """Two axis expressions cannot describe the same axis."""


class RatioError(FxpruneError, ValueError):
    """The ratio asked for is invalid or cannot be reached."""

    reachable: float | None = None
    """The largest ratio that can be reached, where that was found out."""


class CheckpointError(FxpruneError, ValueError):
    """A checkpoint cannot be written, or what is in a folder is not one that can be loaded."""


class DataError(FxpruneError, ValueError):
    """Text or training data is missing, empty, or holds no row that can be used."""


class EvaluationError(FxpruneError, ValueError):
    """What was asked for cannot be measured: an unknown task, a text too short, a package that is missing."""


class RecoveryError(FxpruneError, RuntimeError):
    """Training cannot start, or does not get anywhere: it diverged, or its folder belongs to another run."""


class ExportError(FxpruneError):
    """A graph cannot be written as a program of another kind."""


class PassError(FxpruneError):
    """A pass was run on a graph that does not meet its requirements, or broke its promise."""


class CalibrationError(PassError, ValueError):
    """The calibration data is missing, empty or does not fit the model."""


class PlanError(PassError, ValueError):
    """A plan does not belong to the model it is applied to."""


class VerificationError(FxpruneError):
    """The slim module does not compute what the masked dense one does."""


class UnknownNameError(FxpruneError, ValueError):
    """A name is not one of those known.

    Args:
        kind: what the name should have been, for instance ``"importance"``.
        name: what was given.
        known: the valid names; the nearest one is suggested, and the first few are listed.
    """

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        names, given = sorted(known), str(name)
        near = difflib.get_close_matches(given[:_LONGEST], names, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        listed = f"Known: {', '.join(names[:_LISTED])}{more}" if names else f"There is no {kind} here"
        shown = repr(name) if len(given) <= _LONGEST else f"{given[:_LONGEST]!r}..."
        super().__init__(f"unknown {kind} {shown}", remedy=f"{hint}{listed}")
        self.where = kind
