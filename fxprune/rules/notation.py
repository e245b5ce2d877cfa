"""Rules as one line of text, near to how einsum is written::

    linear      input[*b, i], weight[o, i], bias[o]? -> out[*b, o]      sums i
    embedding   weight[r, w], indices[*i] -> out[*i, w]                 r by indices
    outer       self[i], vec2[j] -> out[i, j]

Names are the arguments of the op's schema; tensors that are not named do not matter. A letter is an axis, and the same
axis wherever it stands; an axis of size 1 broadcasts. ``*b`` is any number of axes, matched from the right. ``n?`` is
an axis that may not be there. ``?`` after the bracket marks a tensor that may not be given. A letter of the inputs that
is in no output needs a clause that says what becomes of it:

* ``sums i, j``: multiplied and added up over;
* ``r by indices``: units are picked by the numbers in another tensor;
* ``c zero with weight, bias`` is for letters that stay: masked units are zero where they are in all of these tensors.
"""

from __future__ import annotations

import re

import torch

from fxprune.errors import FxpruneError
from fxprune.graph.compat import argument_names
from fxprune.rules.patterns import Letter, Notation, TensorPattern

__all__ = ["read_notation"]

_TENSOR = re.compile(r"\s*(\w+)\s*\[([^\[\]]*)\]\s*(\??)\s*(?:,|$)")
_AXIS = re.compile(r"(\*?)([a-z])(\??)")
_LETTERS = r"[a-z](?:\s*,\s*[a-z]\b)*"
_CLAUSES = re.compile(
    rf"\s*(?:sums\s+(?P<sums>{_LETTERS})"
    r"|(?P<picked>[a-z])\s+by\s+(?P<index>\w+)"
    r"|(?P<zero>[a-z])\s+zero\s+with\s+(?P<sources>\w+(?:\s*,\s*\w+)*))(?:\s\s+|\s*;|\s*$)"
)


def read_notation(text: str, op: str, *, multiplies: bool = False) -> Notation:
    """The rule that ``text`` says for ``op``.

    Args:
        text: the notation.
        op: full name of the op.
        multiplies: whether the op multiplies its inputs.

    Raises:
        FxpruneError: it is no notation, or one that leaves open what becomes of an axis.
    """
    inputs, arrow, rest = text.partition("->")
    if not arrow:
        raise _error(op, f"no -> in {text!r}")
    closing = rest.rfind("]") + 1  # an op may make no tensors at all
    found = Notation(
        _tensors(inputs, op),
        _tensors(rest[:closing], op),
        **_clauses(rest[closing:], op),  # type: ignore[arg-type]
        multiplies=multiplies,
    )
    _check_letters(found, op)
    _check_arguments(found, op)
    return found


def _error(op: str, what: str, remedy: str = "") -> FxpruneError:
    example = 'Write it like "input[*b, i], weight[o, i], bias[o]? -> out[*b, o]  sums i"'
    return FxpruneError(what, where=f"notation of {op}", remedy=remedy or example)


def _tensors(text: str, op: str) -> tuple[TensorPattern, ...]:
    found, at, text = [], 0, text.strip()
    while at < len(text):
        match = _TENSOR.match(text, at)
        if match is None:
            raise _error(op, f"{text[at:].strip()!r} is no tensor with its axes")
        found.append(TensorPattern(match[1], _axes(match[2], op), bool(match[3])))
        at = match.end()
    for x in found:
        if sum(letter.several for letter in x.letters) > 1:
            raise _error(op, f"{x.name} has more than one *", "Axes that are any number can stand at one place")
        if len(set(x.names())) < len(x.letters):
            raise _error(op, f"{x.name} has an axis twice", "Write a function: a letter is one axis of a tensor")
    if len({x.name for x in found}) < len(found):
        raise _error(op, "a tensor is there twice")
    return tuple(found)


def _axes(text: str, op: str) -> tuple[Letter, ...]:
    found = []
    for item in (part.strip() for part in text.split(",") if text.strip()):
        match = _AXIS.fullmatch(item)
        if match is None or (match[1] and match[3]):
            raise _error(op, f"{item!r} is no axis", "An axis is a letter, *letter or letter?")
        found.append(Letter(match[2], bool(match[1]), bool(match[3])))
    return tuple(found)


def _clauses(text: str, op: str) -> dict[str, object]:
    sums: list[str] = []
    picked: dict[str, str] = {}
    zero: dict[str, tuple[str, ...]] = {}
    at = 0
    while text[at:].strip():
        match = _CLAUSES.match(text, at)
        if match is None:
            raise _error(op, f"{text[at:].strip()!r} is no clause", 'A clause is "sums i" or "r by indices"')
        if match["sums"]:
            sums += re.findall("[a-z]", match["sums"])
        elif match["picked"]:
            picked[match["picked"]] = match["index"]
        else:
            zero[match["zero"]] = tuple(re.findall(r"\w+", match["sources"]))
        at = match.end()
    return {"sums": tuple(sums), "picked": picked, "zero": zero}


def _check_letters(found: Notation, op: str) -> None:
    kinds = {(letter.name, letter.several) for x in (*found.inputs, *found.outputs) for letter in x.letters}
    names = {name for name, _ in kinds}
    if len(kinds) > len(names):
        raise _error(op, "a letter is one axis here and any number of axes there")
    before = {name for x in found.inputs for name in x.names()}
    after = {name for x in found.outputs for name in x.names()}
    if after - before:
        raise _error(op, f"nothing says where {', '.join(sorted(after - before))} comes from", "Write a function")
    gone = {*found.sums, *found.picked}
    if gone & after or gone - before:
        wrong = ", ".join(sorted((gone & after) | (gone - before)))
        raise _error(op, f"{wrong}: what is summed or picked is in the inputs and not in the output")
    if found.outputs and before - after - gone:
        left = ", ".join(sorted(before - after - gone))
        raise _error(op, f"nothing says what becomes of {left}", f'Add a clause such as "sums {left[0]}"')
    inputs = {x.name for x in found.inputs}
    named = {*found.picked.values(), *(name for names in found.zero.values() for name in names)}
    if named - inputs or set(found.zero) - after:
        raise _error(op, f"a clause names {', '.join(sorted((named - inputs) | (set(found.zero) - after)))}")


def _check_arguments(found: Notation, op: str) -> None:
    """Refuse names that no overload of the op has; an op that is not there yet cannot be asked."""
    namespace, _, rest = op.partition("::")
    name, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if packet is None:
        return
    overloads = [overload] if overload else packet.overloads()
    known = [{arg for arg, _, _ in argument_names(getattr(packet, each))} for each in overloads]
    wanted = {x.name for x in found.inputs}
    if not any(wanted <= names for names in known):
        nearest = min(known, key=lambda names: len(wanted - names))
        unknown = ", ".join(sorted(wanted - nearest))
        raise _error(op, f"the op has no argument {unknown}", f"Its arguments are {', '.join(sorted(nearest))}")
