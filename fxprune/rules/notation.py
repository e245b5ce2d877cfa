"""Rules as one line of text, close to einsum.

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
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fxprune.errors import FxpruneError
from fxprune.graph.compat import argument_names
from fxprune.rules.site import OpSite
from fxprune.rules.statements import Role, TensorAxes

__all__ = ["Letter", "Notation", "TensorPattern", "read_notation", "state_product_roles"]

_MORE = "stuvwxyzcdefghjklmnpqrabio"
"""Letters for further axes, the usual ones for positions in a text first."""

Place = tuple[str, int]
"""A letter, and for one of several axes how far it is from the right."""


class Letter(NamedTuple):
    """An axis in a bracket: its name, whether it stands for any number of axes, whether it may not be there."""

    name: str
    several: bool
    optional: bool


@dataclass(frozen=True)
class TensorPattern:
    """A tensor in a notation.

    Args:
        name: the argument it is passed as; anything for an output.
        letters: its axes.
        optional: whether it may not be given.
    """

    name: str
    letters: tuple[Letter, ...]
    optional: bool = False

    def names(self) -> list[str]:
        """Its letters."""
        return [letter.name for letter in self.letters]

    def places(self, rank: int, absent: Collection[str] = ()) -> list[Place]:
        """What each of ``rank`` axes is; those ``absent`` are not there where they need not be.

        Raises:
            FxpruneError: no use of the notation has so many axes, or so few.
        """
        letters = [letter for letter in self.letters if not (letter.optional and letter.name in absent)]
        spare = rank - sum(not letter.several for letter in letters)
        missing = max(0, -spare)
        found: list[Place] = []
        for letter in letters:
            if letter.several:
                found += [(letter.name, i) for i in range(spare, 0, -1)]
            elif letter.optional and missing:
                missing -= 1
            else:
                found.append((letter.name, 0))
        if len(found) != rank:
            raise FxpruneError(
                f"{rank} axes do not match {', '.join(self.names())}",
                where=self.name,
                remedy="Let the notation name as many axes, or as many as there are with *",
            )
        return found

    def lacks(self, rank: int) -> set[str]:
        """The letters that are not there in a tensor of ``rank`` axes."""
        there = {name for name, _ in self.places(rank)}
        return {letter.name for letter in self.letters if letter.optional and letter.name not in there}


@dataclass(frozen=True)
class Notation:
    """A rule read from text.

    Args:
        inputs: the tensors it takes.
        outputs: the tensors it makes, in order.
        sums: letters that are added up over.
        picked: letters whose units are picked, with the tensor that names them.
        zero: letters whose masked units are zero where they are in all of some tensors.
        multiplies: whether the inputs are multiplied.
    """

    inputs: tuple[TensorPattern, ...]
    outputs: tuple[TensorPattern, ...]
    sums: tuple[str, ...] = ()
    picked: dict[str, str] = field(default_factory=dict)
    zero: dict[str, tuple[str, ...]] = field(default_factory=dict)
    multiplies: bool = False

    @property
    def added(self) -> str:
        """The input that is added to a sum of products; empty if none is."""
        plain = [x.name for x in self.inputs if not set(x.names()) & set(self.sums)]
        return plain[0] if self.multiplies and self.sums and plain else ""

    def state(self, op: OpSite) -> None:
        """State at ``op`` what the text says."""
        given = [(x, found) for x in self.inputs if (found := _given(op, x)) is not None]
        absent = {name for x, tensor in given for name in x.lacks(tensor.rank)}
        made = list(zip(self.outputs, op.outs, strict=False))
        results = {key: (out, j) for x, out in made for j, key in enumerate(x.places(out.rank, absent))}
        where = [(x, tensor, key, i) for x, tensor in given for i, key in enumerate(x.places(tensor.rank, absent))]
        _name_axes(op, [(key, tensor, i) for _, tensor, key, i in where] + [(k, *at) for k, at in results.items()])
        first: dict[Place, tuple[TensorAxes, int]] = {}
        for _, tensor, key, i in where:
            other = results.get(key) or first.setdefault(key, (tensor, i))
            if tensor.sizes[i] != 1 and other != (tensor, i):
                op.tie(tensor, i, *other)
        for letter in self.sums:
            op.add_up(*((tensor, i) for _, tensor, key, i in where if key[0] == letter))
        for letter, index in self.picked.items():
            for _, tensor, key, i in where:
                if key[0] == letter and not op.picks(op.need(index), tensor, i):
                    op.freeze(tensor, i, "rows are looked up by number")
        self._state_zeros(op, where, results)
        if self.multiplies and self.sums:
            self._state_roles(op, where)

    def _state_zeros(
        self,
        op: OpSite,
        where: list[tuple[TensorPattern, TensorAxes, Place, int]],
        results: dict[Place, tuple[TensorAxes, int]],
    ) -> None:
        for letter, names in self.zero.items():
            sources = [(tensor, i) for x, tensor, key, i in where if x.name in names and key[0] == letter]
            if len(sources) == len(names):
                op.keep_zeros(*results[letter, 0], *sources)

    def _state_roles(self, op: OpSite, where: list[tuple[TensorPattern, TensorAxes, Place, int]]) -> None:
        """Axes of all factors and the output are batch axes."""
        factors = [x for x in self.inputs if set(x.names()) & set(self.sums)]
        shared = set.intersection(*(set(x.names()) for x in factors)) - set(self.sums) if len(factors) > 1 else set()
        axes = [(tensor, i, key[0] in shared) for x, tensor, key, i in where if x in factors]
        summed = [(tensor, i) for _, tensor, key, i in where if key[0] in self.sums]
        state_product_roles(op, axes, summed)


def state_product_roles(
    op: OpSite, axes: list[tuple[TensorAxes, int, bool]], summed: list[tuple[TensorAxes, int]]
) -> None:
    """Batch axes of two activations are heads, what is summed or passed is inside a head; weights have neither.

    Args:
        op: the op.
        axes: operand and axis, and whether it is a batch axis.
        summed: operand and axis for what is summed over.
    """
    if not any(op.is_weight(x) for x, _, _ in axes):
        roles = [(x, i, Role.HEAD if batch else Role.HEAD_DIM) for x, i, batch in axes]
        op.multiply_activations(*roles, *((x, i, Role.SUMMED) for x, i in summed))
    for x, i, batch in axes:
        if batch and op.is_weight(x):
            op.tag(x, i, Role.SIDE_BY_SIDE)


def _name_axes(op: OpSite, where: list[tuple[Place, TensorAxes, int]]) -> None:
    """Letters for printing: of several axes named b the first is b, the others have letters that are free."""
    used = {letter for (letter, _), _, _ in where}
    free = (letter for letter in _MORE if letter not in used)
    longest = {letter: max(place for (other, place), _, _ in where if other == letter) for letter in used}
    spelled = {
        (letter, place): letter if place in (0, longest[letter]) else next(free, letter)
        for letter, place in sorted({key for key, _, _ in where}, key=lambda key: (key[0], -key[1]))
    }
    for key, x, i in where:
        op.name_axis(x, i, spelled[key])


def _given(op: OpSite, x: TensorPattern) -> TensorAxes | None:
    return op.tensor(x.name) if x.optional else op.need(x.name)


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
