"""Arguments: declared once, as fields of a dataclass with constraint and doc; validated, and read from text.

A class of arguments is a frozen dataclass that derives from :class:`Arguments`; its fields are made by
:func:`argument`. The same declaration is applied when an instance is made, and read by the command line for options and
by the docs for tables.

Checks return the value as Python's own type, so that scalars of numpy and torch may be passed where they are exact. A
bool is no number, and no check takes NaN or an infinity.
"""

from __future__ import annotations

import ast
import errno
import math
import operator
import os
import re
import reprlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields
from fractions import Fraction
from functools import cache, partial
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from fxprune.errors import ArgumentError, FxpruneError, PassError, UnknownNameError

Kind = Literal["mlp", "head", "conv", "channel", "head_dim", "expert", "layer"]
Norm = Literal["sliced", "masked"]
Order = Literal["vector", "first", "second", "mix"]  # of the Taylor expansion of the loss
Ranking = Literal["local", "global", "auto"]  # scores are compared inside a group, over the whole model, or both
Reach = Literal["lost", "stream", "all"]  # products that lost inputs; or add to the stream; or all after the first
Memory = Literal["auto", "fast", "low"]
Precision = Literal["auto", "bf16", "float32"]  # without fp16, which loses small updates

KINDS: tuple[Kind, ...] = get_args(Kind)

VOCAB = "vocab"
"""The kind of rows of embedding and head, which are no group."""

EXACT = "exact-"
"""In front of a kind: only those of its groups that no norm or other statistic runs over."""

NORMS: tuple[Norm, ...] = get_args(Norm)
"""A norm over fewer units: an average over those that stay, or the dense norm with the others masked."""

MEMORY: tuple[Memory, ...] = get_args(Memory)
"""Memory for sums over samples."""

SUFFIXES = (".pt2", ".onnx", ".gguf")
"""Suffixes of the files that a model is exported to."""

MANIFEST = "fxprune.json"
"""The file that marks a folder as a checkpoint of this package."""

T = TypeVar("T")

_LARGEST_SEED = 2**64 - 1
"""The largest seed of a torch generator."""

_LONGEST = 60
"""Characters of a value or of a text that a message repeats."""

Check = Callable[[str, Any], Any]
"""Validates the value of the argument of a name, and returns it as it is stored."""


@dataclass(frozen=True)
class Argument:
    """The declaration of an argument, in the metadata of its field; see :func:`argument`.

    Args:
        default: the default of an option of a prune; that of a field is the field's own.
        limits: ``least``, ``most``, ``above``, ``below`` of a number, and ``error``, the class that is raised.
        panel: the panel of ``--help`` that the option stands in; empty for no option.
    """

    doc: str = ""
    default: Any = None
    check: Check | None = None
    limits: Mapping[str, Any] = field(default_factory=dict)
    spelled: bool = True
    panel: str = ""


def argument(
    default: Any = MISSING,
    doc: str = "",
    *,
    check: Check | None = None,
    spelled: bool = True,
    panel: str = "",
    **limits: Any,
) -> Any:
    """Declare an argument: a field of a class of :class:`Arguments`.

    The check follows from the annotation: ``int`` and ``float`` with ``least``, ``most``, ``above`` and ``below``,
    ``bool``, and ``Literal`` for words; ``| None`` lets None pass. Other types need a ``check``, or have none.

    Example::

        samples: int | None = argument(None, "Calibration samples; None for all.", least=1)

    Args:
        check: ``check(name, value)`` returns the value as it is stored, or raises.
        spelled: False for data and objects, which have no spelling as text.
    """
    if unknown := sorted(limits.keys() - {"least", "most", "above", "below", "error"}):
        remedy = "Limits are least, most, above and below; error is the class of errors"
        raise ArgumentError(f"it takes no {unknown[0]}", where="fxprune.argument", remedy=remedy)
    if not isinstance(doc, str):
        raise refuse("doc", doc, "a text that describes the argument")
    declaration = Argument(" ".join(doc.split()), default, check, limits, spelled, panel)
    return field(default=default, metadata={"argument": declaration})


class Arguments:
    """Base of dataclasses whose fields are arguments: validates all of them when an instance is made."""

    def __post_init__(self) -> None:
        """Replace the value of each argument by its validated form, or raise the class of errors that it names."""
        kind: Any = type(self)
        for name, check in _checks(kind).items():
            value = getattr(self, name)
            checked = check(name, value)
            if checked is not value:
                object.__setattr__(self, name, checked)


def declared(field: Field[Any]) -> Argument:
    """The declaration of a field; an empty one if it was not made by :func:`argument`."""
    found = field.metadata.get("argument")
    return found if isinstance(found, Argument) else Argument()


def default_of(field: Field[Any]) -> Any:
    """The default of a field of a dataclass."""
    return field.default if field.default_factory is MISSING else field.default_factory()


@cache
def _checks(kind: Any) -> dict[str, Check]:
    hints = get_type_hints(kind)
    declared_here = [one for one in fields(kind) if one.init and "argument" in one.metadata]
    return {one.name: check_of(hints[one.name], declared(one)) for one in declared_here}


def check_of(hint: Any, declaration: Argument) -> Check:
    """The check of an argument: the one declared, or the one that follows from the annotation."""
    is_union = get_origin(hint) in (Union, types.UnionType)
    options = [one for one in get_args(hint) if one is not type(None)] if is_union else [hint]
    numeric: dict[Any, Check] = {int: whole_number, float: number}
    check = declaration.check
    if check is None and len(options) == 1:
        if get_origin(options[0]) is Literal:
            check = partial(one_of, known=get_args(options[0]))
        elif options[0] is bool:
            check = flag
        elif options[0] in numeric:
            check = partial(numeric[options[0]], **declaration.limits)
    optional = hint is Any or type(None) in get_args(hint)
    return lambda name, value: value if check is None or (optional and value is None) else check(name, value)


class Limits(NamedTuple):
    """The numbers that an argument accepts."""

    least: float | None = None
    above: float | None = None
    below: float | None = None
    most: float | None = None

    def hold(self, value: float | Fraction) -> bool:
        pairs = zip((operator.ge, operator.gt, operator.lt, operator.le), self, strict=True)
        return all(limit is None or holds(value, limit) for holds, limit in pairs)

    def __str__(self) -> str:
        least, above, below, most = self
        low, high = least if above is None else above, most if below is None else below
        if low is not None and high is not None:
            return f" in {'[' if above is None else '('}{low}, {high}{']' if below is None else ')'}"
        if low is not None:
            return f" of {low} or more" if above is None else f" above {low}"
        if high is not None:
            return f" of {high} or less" if below is None else f" below {high}"
        return ""


def number(name: str, value: Any, *, error: type[FxpruneError] = ArgumentError, **limits: float | None) -> float:
    """Return ``value`` as a float within :class:`Limits`.

    Raises:
        FxpruneError: of the class ``error``: it is not a number, is not finite or is out of range.
    """
    found, accepted = _scalar(value), Limits(**limits)
    if isinstance(found, int | float | Fraction) and not isinstance(found, bool) and accepted.hold(found):
        with suppress(OverflowError):
            as_float = float(found)
            if math.isfinite(as_float):
                return as_float
    wanted = f"a number{accepted}"
    if 1 in (accepted.below, accepted.most) and isinstance(found, int | float) and 1 < found <= 100:
        wanted = f"{wanted}; {found:g}% is {found / 100:g}"
    raise refuse(name, value, wanted, error)


def whole_number(name: str, value: Any, *, error: type[FxpruneError] = ArgumentError, **limits: int | None) -> int:
    """Return ``value`` as an int; see :func:`number`."""
    found, accepted = _scalar(value), Limits(**limits)
    if isinstance(found, int) and not isinstance(found, bool) and accepted.hold(found):
        return found
    raise refuse(name, value, f"a whole number{accepted}", error)


def as_seed(name: str, value: Any, *, most: int = _LARGEST_SEED, error: type[FxpruneError] = ArgumentError) -> int:
    """Return ``value`` as a seed of random numbers, a whole number from 0 to ``most``."""
    return whole_number(name, value, least=0, most=most, error=error)


def numbers(name: str, value: Any, wanted: str) -> tuple[int, ...]:
    """Return ``value`` as whole numbers of 0 or more; ``wanted`` describes them in the message."""
    if _is(value, "torch.Tensor", "numpy.ndarray") and value.ndim == 1:
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        with suppress(ArgumentError):
            return tuple(whole_number(name, item, least=0) for item in value)
    raise refuse(name, value, wanted)


def flag(name: str, value: Any) -> bool:
    """Return ``value`` as a bool; other values that count as true in Python, such as ``"no"``, are refused."""
    found = _scalar(value)
    if isinstance(found, bool):
        return found
    raise refuse(name, value, "True or False")


def one_of(name: str, value: Any, known: Iterable[str]) -> str:
    """Return ``value``, one of the names ``known``; the error suggests the nearest."""
    names = tuple(known)
    if not isinstance(value, str):
        raise refuse(name, value, f"one of {', '.join(sorted(names))}")
    if value not in names:
        raise UnknownNameError(name.replace("_", " "), value, names, argument=name)
    return value


def function(name: str, value: Any, wanted: str, error: type[FxpruneError] = ArgumentError) -> Callable[..., Any]:
    """Return ``value``, which must be callable and not a class."""
    if callable(value) and not isinstance(value, type):
        return value  # type: ignore[no-any-return]
    raise refuse(name, value, wanted, error)


def instance(name: str, value: Any, kind: type[T], wanted: str, error: type[FxpruneError] = ArgumentError) -> T:
    """Return ``value``, which must be an instance of ``kind``."""
    if isinstance(value, kind):
        return value
    raise refuse(name, value, wanted, error)


def as_path(name: str, value: Any, wanted: str = "a path", *, error: type[FxpruneError] = ArgumentError) -> str:
    """Return ``value`` as the path of a file or folder, which need not exist; ``wanted`` describes the valid ones.

    ``~`` is the home of the user.
    """
    found = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if isinstance(found, str) and found:
        path = os.path.expanduser(found)
        try:
            os.stat(path)  # the file system may not allow it: a text is too long for a path, or has bytes that are 0
            return path
        except (OSError, ValueError) as reason:
            if isinstance(reason, OSError) and reason.errno != errno.ENAMETOOLONG:
                return path
    raise refuse(name, value, wanted, error)


def path_or_empty(name: str, value: Any, *, error: type[FxpruneError] = ArgumentError) -> str:
    """Return ``value`` as a path; an empty text stands for none."""
    return "" if value == "" else as_path(name, value, error=error)


def refuse(name: str, value: Any, wanted: str, error: type[FxpruneError] = ArgumentError) -> FxpruneError:
    """The error of class ``error`` for an invalid value of an argument; ``wanted`` describes the valid ones."""
    what = f"${name} is {format_value(value)}"
    return error(what, where=name, remedy=f"Pass {wanted}", argument=name, value=value)


def invalid(name: str, value: Any, what: str, remedy: str) -> ArgumentError:
    """The error for a value of an argument that does not go with something else, in words of its own."""
    return ArgumentError(what, where=name, remedy=remedy, argument=name, value=value)


def format_value(value: Any) -> str:
    """A value in few words: itself if it is short, else its type."""
    value = _scalar(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    if _is(value, "torch.Tensor", "numpy.ndarray"):
        kind = "tensor" if _is(value, "torch.Tensor") else "array"
        name = f"{value.dtype} {kind} of shape {tuple(value.shape)}"
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes | list | tuple | set | Mapping):
        text = re.sub(r"\n\s*", " ", _REPR.repr(value))  # tensors in it have lines, which may be cut out or not
        if len(text) <= _LONGEST and " object at 0x" not in text:
            return text
    return f"{'an' if name[:1].lower() in 'aeio' else 'a'} {name}"


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = _LONGEST


def _is(value: Any, *kinds: str) -> bool:
    # without an import: whoever holds a tensor has imported torch, and the command line prints its help without it
    places = (kind.split(".") for kind in kinds)
    return any(place in sys.modules and isinstance(value, getattr(sys.modules[place], name)) for place, name in places)


def _scalar(value: Any) -> Any:
    """``value``, or its Python equivalent if it is a scalar of numpy or torch."""
    is_scalar = _is(value, "numpy.generic", "numpy.ndarray", "torch.Tensor") and value.ndim == 0
    return value.item() if is_scalar and not getattr(value, "is_meta", False) else value


def named_kinds(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """The kinds that options of a prune name, by ``kinds`` or by a ratio for each."""
    kinds, ratio = values.get("kinds"), values.get("ratio")
    named = (kinds,) if isinstance(kinds, str) else tuple(kinds) if isinstance(kinds, Iterable) else ()
    return (*named, *(ratio if isinstance(ratio, Mapping) else ()))


def has_vocab(values: Mapping[str, Any]) -> bool:
    """Whether the vocabulary is among the kinds that options of a prune name."""
    return VOCAB in named_kinds(values)


_FORM = "Write it as name{key=value, key=value}"
_BARE = re.compile(r"[A-Za-z_][\w.\-]*")
_DEEPEST = 20
"""Brackets in brackets: a list in the arguments of a pass in a pipeline takes four."""
_CLOSING = {"{": "}", "[": "]", "(": ")"}


def split(text: str, parting: str) -> Iterator[str]:
    """Yield the parts of ``text`` between characters of ``parting`` outside brackets and quotes, which must close."""
    expected: list[str] = []
    quote, part = "", ""
    for before, sign in zip(f" {text}", text, strict=False):
        if quote:
            quote = "" if sign == quote and before != "\\" else quote
        elif sign in "\"'":
            quote = sign
        elif sign in _CLOSING:
            expected.append(_CLOSING[sign])
            if len(expected) > _DEEPEST:
                raise PassError("brackets are nested too deep", where=f"{text[:_LONGEST]}...", remedy=_FORM)
        elif expected and sign == expected[-1]:
            expected.pop()
        elif sign in parting and not expected:
            yield part.strip()
            part = ""
            continue
        part += sign
    if quote or expected:
        missing = {"}": "no closing brace"}.get(expected[-1] if expected else "", "a bracket or quote is not closed")
        raise PassError(missing, where=text, remedy=_FORM)
    yield part.strip()


def read_spelling(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a pass spelled ``name`` or ``name{key=value, key=value}``.

    Values are numbers, strings in quotes, bare words, ``True``, ``False``, ``None``, passes with their arguments, and
    lists or tuples of these. A key alone is True. Arguments are separated by commas, blanks, or both.

    Raises:
        PassError: the text is not of that form.
    """
    for _ in split(text, ""):
        pass  # it is checked on the way that all brackets are closed
    name, brace, rest = text.strip().partition("{")
    if brace and not rest.endswith("}"):
        raise PassError("something stands behind the closing brace", where=text, remedy=_FORM)
    arguments: dict[str, Any] = {}
    for item in split(rest[:-1], ", \t\n") if brace else ():
        key, equals, value = item.partition("=")
        if item and not (_BARE.fullmatch(item) or (equals and key and value)):
            raise PassError(f"{item!r} is not key=value", where=text, remedy=_FORM)
        key = key.replace("-", "_")
        if key in arguments:
            raise PassError(f"{key} is given twice", where=text, remedy="Give each argument once")
        if item:
            arguments[key] = _value(value, item) if equals else True
    return name.strip(), arguments


def read_steps(text: str) -> list[str]:
    """The steps of a pipeline in text, as they are spelled: a pass each, or a pipeline in brackets."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return [part for part in split(lines, ",\n;") if part]


def _value(text: str, where: str) -> Any:
    if _is_bare(text):
        return text
    if text[0] in "[(":
        return tuple(_value(item, where) for item in split(text[1:-1], ",") if item)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        remedy = "Put text that is not one word, such as a path, in quotes"
        raise PassError(f"{text!r} is no value", where=where, remedy=remedy) from error


def _is_bare(text: str) -> bool:
    """Whether a text stands without quotes: a word, or the spelling of a pass."""
    word, brace, _ = text.partition("{")
    closed = text.endswith("}") if brace else text not in ("True", "False", "None")
    return closed and _BARE.fullmatch(word) is not None


def spelled_fields(made: object) -> tuple[Field[Any], ...]:
    """The fields of a pass, or of a class of passes, that are arguments."""
    return tuple(field for field in fields(made) if field.init)  # type: ignore[arg-type]


def spell(name: str, made: object) -> str:
    """The text for a pass: its name, and the arguments that are not the default and have a spelling."""
    said = []
    for one in spelled_fields(made):
        value = getattr(made, one.name)
        text = spelled_value(value) if declared(one).spelled else None
        if text is not None and value != default_of(one):
            said.append(one.name if value is True else f"{one.name}={text}")
    return f"{name}{{{', '.join(said)}}}" if said else name


def spelled_value(value: Any) -> str | None:
    """The text for the value of an argument; None if it is not plain data."""
    if isinstance(value, tuple | list):
        texts = [text for text in map(spelled_value, value) if text is not None]
        return f"[{', '.join(texts)}]" if len(texts) == len(value) else None
    if isinstance(value, str):
        return value if _is_bare(value) else repr(value)
    if isinstance(value, Arguments):
        return str(value)
    return repr(value) if value is None or isinstance(value, int | float) else None
