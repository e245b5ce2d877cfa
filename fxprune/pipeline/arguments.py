"""Arguments: validation by kind, with errors that name argument and value.

Each returns the value as Python's own type, so that scalars of numpy and torch may be passed where they are exact. A
bool is no number, and no check takes NaN or an infinity. It needs no torch: who passes a tensor has imported it.
"""

from __future__ import annotations

import math
import os
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, TypeVar

import numpy as np

from fxprune.errors import ArgumentError, FxpruneError, UnknownNameError

if TYPE_CHECKING:
    import torch

__all__ = [
    "EXACT",
    "KINDS",
    "LARGEST_SEED",
    "MANIFEST",
    "MEMORY",
    "NORMS",
    "ORDERS",
    "PRECISIONS",
    "RANKINGS",
    "REACHES",
    "SUFFIXES",
    "Kind",
    "as_path",
    "as_seed",
    "flag",
    "function",
    "instance",
    "number",
    "numbers",
    "one_of",
    "refuse",
    "told",
    "whole_number",
]

Kind = Literal["mlp", "head", "channel", "head_dim", "expert", "layer"]

KINDS: tuple[Kind, ...] = ("mlp", "head", "channel", "head_dim", "expert", "layer")

EXACT = "exact-"
"""In front of a kind: only those of its groups that no norm or other statistic runs over."""

NORMS = ("sliced", "masked")
"""What becomes of a norm over fewer units: an average of those that stay, or what it is with the others masked."""

ORDERS = ("vector", "first", "second", "mix")
"""Of the Taylor expansion of the loss."""

RANKINGS = ("local", "global")
"""Whether scores are compared inside a group, or anywhere."""

REACHES = ("lost", "stream", "all")
"""Which products are fitted: those that lost inputs; and those whose output is added to a value that changed; and all
in blocks behind the first that lost inputs."""

SUFFIXES = (".pt2", ".onnx", ".gguf")
"""How names of files end that a model is exported to."""

MANIFEST = "fxprune.json"
"""The file that says of a folder that it is a checkpoint of this package."""


T = TypeVar("T")

MEMORY = ("auto", "fast", "low")
"""Words for how much memory sums over samples take."""

PRECISIONS = ("auto", "bf16", "float32")
"""Without fp16, which loses small updates."""

LARGEST_SEED = 2**64 - 1
"""What a generator of torch takes."""

_LONGEST = 60
"""Characters of a value that a message repeats."""


def number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
    error: type[FxpruneError] = ArgumentError,
) -> float:
    """Return ``value`` as a float.

    Args:
        name: of the argument.
        value: what was passed.
        least: it may be this or more.
        above: it has to be more than this.
        below: it has to be less than this.
        most: it may be this or less.
        error: what is raised.

    Raises:
        FxpruneError: of the class ``error``: it is no number, is not finite or is out of range.
    """
    found = _scalar(value)
    if isinstance(found, int | float | Fraction) and not isinstance(found, bool):
        inside = _inside(found, least=least, above=above, below=below, most=most)
        if inside and math.isfinite(as_float := _as_float(found)):
            return as_float
    wanted = f"a number{_range(least=least, above=above, below=below, most=most)}"
    if 1 in (below, most) and isinstance(found, int | float) and 1 < found <= 100:
        wanted = f"{wanted}; {found:g}% is {found / 100:g}"
    raise refuse(name, value, wanted, error)


def whole_number(
    name: str,
    value: Any,
    *,
    least: int | None = None,
    most: int | None = None,
    error: type[FxpruneError] = ArgumentError,
) -> int:
    """Return ``value`` as an int; see :func:`number`.

    Raises:
        FxpruneError: of the class ``error``: it is no whole number or is out of range.
    """
    found = _scalar(value)
    if isinstance(found, int) and not isinstance(found, bool) and _inside(found, least=least, most=most):
        return found
    raise refuse(name, value, f"a whole number{_range(least=least, most=most)}", error)


def as_seed(name: str, value: Any, *, most: int = LARGEST_SEED, error: type[FxpruneError] = ArgumentError) -> int:
    """Return ``value`` as a seed of random numbers.

    Raises:
        FxpruneError: of the class ``error``: it is no whole number of 0 to ``most``.
    """
    return whole_number(name, value, least=0, most=most, error=error)


def numbers(name: str, value: Any, wanted: str) -> tuple[int, ...]:
    """Return ``value`` as whole numbers of 0 or more.

    Args:
        name: of the argument.
        value: what was passed.
        wanted: what it has to be, for the message.

    Raises:
        ArgumentError: it is no list, tuple or array of such numbers.
    """
    if (_is_tensor(value) or isinstance(value, np.ndarray)) and value.ndim == 1:
        value = value.tolist()
    try:
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            return tuple(whole_number(name, item, least=0) for item in value)
    except ArgumentError as error:
        raise refuse(name, value, wanted) from error
    raise refuse(name, value, wanted)


def flag(name: str, value: Any) -> bool:
    """Return ``value`` as a bool; what is merely true in Python, such as ``"no"``, is none.

    Raises:
        ArgumentError: it is neither True nor False.
    """
    found = _scalar(value)
    if isinstance(found, bool):
        return found
    raise refuse(name, value, "True or False")


def one_of(kind: str, value: Any, known: Iterable[str]) -> str:
    """Return ``value``, one of the names ``known``.

    Raises:
        UnknownNameError: it is none of them; the nearest is suggested.
        ArgumentError: it is no name at all.
    """
    names = tuple(known)
    if not isinstance(value, str):
        raise refuse(kind, value, f"one of {', '.join(sorted(names))}")
    if value not in names:
        raise UnknownNameError(kind, value, names)
    return value


def function(name: str, value: Any, wanted: str, error: type[FxpruneError] = ArgumentError) -> Callable[..., Any]:
    """Return ``value``, which can be called and is no class.

    Raises:
        FxpruneError: of the class ``error``: it cannot.
    """
    if callable(value) and not isinstance(value, type):
        return value  # type: ignore[no-any-return]
    raise refuse(name, value, wanted, error)


def instance(name: str, value: Any, kind: type[T], wanted: str, error: type[FxpruneError] = ArgumentError) -> T:
    """Return ``value``, which is of class ``kind``.

    Raises:
        FxpruneError: of the class ``error``: it is not.
    """
    if isinstance(value, kind):
        return value
    raise refuse(name, value, wanted, error)


def as_path(name: str, value: Any, *, error: type[FxpruneError] = ArgumentError) -> str:
    """Return ``value`` as the path of a file or folder.

    Raises:
        FxpruneError: of the class ``error``: it is no path, or an empty one.
    """
    found = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if isinstance(found, str) and found and "\0" not in found:
        return found
    raise refuse(name, value, "a path", error)


def refuse(name: str, value: Any, wanted: str, error: type[FxpruneError] = ArgumentError) -> FxpruneError:
    """Return the error that says what an argument is and what it has to be.

    Args:
        name: of the argument.
        value: what was passed.
        wanted: what it has to be.
        error: its class.
    """
    return error(f"{name} is {told(value)}", where=name, remedy=f"Pass {wanted}")


def told(value: Any) -> str:
    """Return a value in few words: itself where it is short, else what it is."""
    value = _scalar(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if _is_tensor(value) or isinstance(value, np.ndarray):
        kind = "tensor" if _is_tensor(value) else "array"
        return f"{_article(str(value.dtype))} {kind} of shape {tuple(value.shape)}"
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | list | tuple | set | Mapping):
        text = _REPR.repr(value)
        return text if len(text) <= _LONGEST and "\n" not in text and " object at 0x" not in text else _kind(value)
    return _kind(value)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = _LONGEST


def _kind(value: Any) -> str:
    return _article(type(value).__name__)


def _article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeio' else 'a'} {name}"


def _is_tensor(value: Any) -> TypeGuard[torch.Tensor]:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _scalar(value: Any) -> Any:
    """``value``, or what Python has for it where it is a scalar of numpy or torch."""
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
        return value.item()
    if _is_tensor(value) and value.ndim == 0 and not value.is_meta:
        return value.item()
    return value


def _as_float(value: float | Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _inside(
    value: float | Fraction,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> bool:
    return (
        (least is None or value >= least)
        and (above is None or value > above)
        and (below is None or value < below)
        and (most is None or value <= most)
    )


def _range(
    *, least: float | None = None, above: float | None = None, below: float | None = None, most: float | None = None
) -> str:
    """Return in words which numbers are taken."""
    low, high = (least if above is None else above), (most if below is None else below)
    if low is not None and high is not None:
        return f" in {'[' if above is None else '('}{low}, {high}{']' if below is None else ')'}"
    if low is not None:
        return f" of {low} or more" if above is None else f" above {low}"
    if high is not None:
        return f" of {high} or less" if below is None else f" below {high}"
    return ""
