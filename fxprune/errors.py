"""Errors raised on purpose, each with the problem, its place and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

_LISTED = 30
"""Names that a message lists: enough for all passes, not for all tensors of a model."""

_LONGEST = 80
"""Characters of a name that a message repeats."""

_LONGEST_PLACE = 400
"""Characters of a place from which on it is cut, to as many as a name has."""

_MARKED = re.compile(r"\$([a-z][a-z_]*)")
"""An argument named in a message."""


class FxpruneError(Exception):
    """Root of all errors of this package.

    ``what`` and ``remedy`` name arguments as ``$ratio``, so that each face of the package spells them its own way:
    ``ratio`` in Python, ``--ratio`` on the command line.

    Args:
        what: the problem.
        where: the node, parameter or argument concerned.
        remedy: the next step for the caller.
        shell: the same on the command line, where it is more than another spelling; empty if it is not.
        argument: the name of the argument at fault; empty if it is none.
        value: the value of that argument.
    """

    def __init__(
        self, what: str, *, where: str = "", remedy: str = "", shell: str = "", argument: str = "", value: Any = None
    ) -> None:
        what, where = (" ".join(part.splitlines()) for part in (what, where))
        if len(where) > _LONGEST_PLACE:  # a text that was passed as a path
            where = f"{where[:_LONGEST]}..."
        self.what = what if what.endswith("...") else what.removesuffix(".")
        self.where, self.remedy, self.argument, self.value = where, remedy, argument, value
        self.shell = shell or remedy
        super().__init__(self.render())

    def render(self, spell: Callable[[str], str] = str) -> str:
        """The message, with each argument spelled by ``spell``."""
        what, remedy = (_MARKED.sub(lambda found: spell(found[1]), part) for part in (self.what, self.remedy))
        where = spell(self.where) if self.argument and self.where == self.argument else self.where
        text = (
            f"{where}: {what}"
            if where and not what.startswith((f"{where} ", f"{where}=", f"unknown {where} "))
            else what
        )
        return f"{text}. {remedy}" if remedy else text


class ArgumentError(FxpruneError, ValueError):
    """An argument is of the wrong type, or out of range."""


class TraceError(FxpruneError):
    """The module cannot be traced to an ATen graph."""


class GraphInputError(FxpruneError, RuntimeError):
    """A graph was given an input for which the model it was traced from may compute something else."""


class UnsupportedModelError(FxpruneError, ValueError):
    """The module is in a state that pruning cannot work on (quantised, on two devices, ...)."""


class AxisMismatch(FxpruneError):
    """Two axis expressions cannot describe the same axis."""


class RatioError(FxpruneError, ValueError):
    """The ratio asked for is invalid or cannot be reached."""

    reachable: float | None = None
    """The largest ratio that can be reached, if known."""


class CheckpointError(FxpruneError, ValueError):
    """A checkpoint cannot be written, or a folder does not hold one that can be loaded."""


class DataError(FxpruneError, ValueError):
    """Text or training data is missing, empty, or has no usable row."""


class EvaluationError(FxpruneError, ValueError):
    """A measurement is impossible: an unknown task, a text too short, a missing package."""


class PositionsError(EvaluationError):
    """A model has fewer positions than the tokens that it is to read or write."""


class RecoveryError(FxpruneError, RuntimeError):
    """Training cannot start or go on: it diverged, or its folder belongs to another run."""


class ExportError(FxpruneError):
    """A graph cannot be written as a program of another kind."""


class PassError(FxpruneError):
    """A pass was run on a graph that does not meet its requirements, or broke its promise."""


class CalibrationError(PassError, ValueError):
    """The calibration data is missing, empty or does not fit the model."""


class PlanError(PassError, ValueError):
    """A plan does not belong to the model it is applied to."""


class VerificationError(FxpruneError):
    """The outputs of the slim module differ from those of the masked dense one."""


class UnknownNameError(FxpruneError, ValueError):
    """A name is not one of those known.

    Args:
        kind: the kind of name expected, for instance ``"importance"``.
        name: the value given.
        known: the valid names; the nearest one is suggested, and the first few are listed.
        argument: the name of the argument at fault; empty if it is none.
        why: what the name is instead, if that is known.
    """

    def __init__(self, kind: str, name: object, known: Iterable[str], *, argument: str = "", why: str = "") -> None:
        names, given = sorted(map(str, known)), str(name)
        near = difflib.get_close_matches(given[:_LONGEST], names, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        listed = f"Known: {', '.join(names[:_LISTED])}{more}" if names else f"There is no {kind} here"
        shown = repr(name) if len(given) <= _LONGEST else f"{given[:_LONGEST]!r}..."
        what = f"unknown {kind} {shown}{f': {why}' if why else ''}"
        super().__init__(what, where=kind, remedy=f"{hint}{listed}", argument=argument, value=name)
