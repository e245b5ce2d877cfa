"""The registry of rules by op, rules as one line of text, and what may share memory.

    linear      input[*b, i], weight[o, i], bias[o]? -> out[*b, o]      sums i
    embedding   weight[r, w], indices[*i] -> out[*i, w]                 r by indices
    outer       self[i], vec2[j] -> out[i, j]

Names are the arguments of the op's schema; tensors that are not named do not matter. A letter is an axis, the same one
wherever it occurs; an axis of size 1 broadcasts. ``*b`` is any number of axes, matched from the right. ``n?`` is an
optional axis, ``?`` after the bracket marks an optional tensor. A letter of the inputs that is in no output needs a
clause:

* ``sums i, j``: contracted (multiplied and summed over);
* ``r by indices``: units are picked by the numbers in another tensor.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import fx

from fxprune.errors import FxpruneError, UnknownNameError
from fxprune.graph.compat import OpOverload, argument_names
from fxprune.pipeline.arguments import function, instance, refuse
from fxprune.rules.site import OpSite
from fxprune.rules.statements import TensorAxes

_SPARE_LETTERS = "stuvwxyzcdefghjklmnpqrabio"
"""Names for the further axes of a ``*b``, those usual for positions in a text first."""

Place = tuple[str, int]
"""A letter, and for one of the axes of a ``*b`` its distance from the right."""


class Letter(NamedTuple):
    """An axis in a bracket: its name, whether it stands for any number of axes, whether it is optional."""

    name: str
    several: bool
    optional: bool


@dataclass(frozen=True)
class TensorPattern:
    """A tensor in a notation: the argument it is passed as (any name for an output) and its axes."""

    name: str
    letters: tuple[Letter, ...]
    optional: bool = False

    def names(self) -> list[str]:
        return [letter.name for letter in self.letters]

    def places(self, rank: int, absent: Collection[str] = ()) -> list[Place]:
        """The letter of each of ``rank`` axes; optional letters in ``absent`` are left out.

        Raises:
            FxpruneError: the notation cannot have that many axes, or that few.
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
                remedy="Name that many axes in the notation, or any number of them with *",
            )
        return found

    def missing(self, rank: int) -> set[str]:
        """The optional letters that a tensor of ``rank`` axes lacks."""
        present = {name for name, _ in self.places(rank)}
        return {letter.name for letter in self.letters if letter.optional and letter.name not in present}


@dataclass(frozen=True)
class Notation:
    """A rule read from text.

    Args:
        sums: letters that are summed over.
        picked: letters whose units are picked, with the tensor of their numbers.
        multiplies: whether the inputs are multiplied.
    """

    inputs: tuple[TensorPattern, ...]
    outputs: tuple[TensorPattern, ...]
    sums: tuple[str, ...] = ()
    picked: dict[str, str] = field(default_factory=dict)
    multiplies: bool = False

    @property
    def added(self) -> str:
        """The input that is added to a sum of products; empty if none is."""
        plain = [x.name for x in self.inputs if not set(x.names()) & set(self.sums)]
        return plain[0] if self.multiplies and self.sums and plain else ""

    def state(self, op: OpSite) -> None:
        """Make the statements of the notation at ``op``."""
        passed = [(x, op.tensor(x.name) if x.optional else op.need(x.name)) for x in self.inputs]
        given = [(x, tensor) for x, tensor in passed if tensor is not None]
        absent = {name for x, tensor in given for name in x.missing(tensor.rank)}
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
        if self.multiplies and self.sums:
            self._state_roles(op, where)

    def _state_roles(self, op: OpSite, where: list[tuple[TensorPattern, TensorAxes, Place, int]]) -> None:
        """Letters that all factors of the product share, and that are not summed over, are batch axes."""
        factors = [x for x in self.inputs if set(x.names()) & set(self.sums)]
        batch = set.intersection(*(set(x.names()) for x in factors)) - set(self.sums) if len(factors) > 1 else set()
        axes = [(tensor, i, key[0] in batch) for x, tensor, key, i in where if x in factors]
        summed = [(tensor, i) for _, tensor, key, i in where if key[0] in self.sums]
        op.tag_product(axes, summed)


def _name_axes(op: OpSite, where: list[tuple[Place, TensorAxes, int]]) -> None:
    """Name axes for printing: the first axis of a ``*b`` is b, the others get unused letters."""
    used = {letter for (letter, _), _, _ in where}
    free = (letter for letter in _SPARE_LETTERS if letter not in used)
    longest = {letter: max(place for (other, place), _, _ in where if other == letter) for letter in used}
    spelled = {
        (letter, place): letter if place in (0, longest[letter]) else next(free, letter)
        for letter, place in sorted({key for key, _, _ in where}, key=lambda key: (key[0], -key[1]))
    }
    for key, x, i in where:
        op.name_axis(x, i, spelled[key])


_TENSOR = re.compile(r"\s*(\w+)\s*\[([^\[\]]*)\]\s*(\??)\s*(?:,|$)")
_AXIS = re.compile(r"(\*?)([a-z])(\??)")
_LETTERS = r"[a-z](?:\s*,\s*[a-z]\b)*"
_CLAUSES = re.compile(
    rf"\s*(?:sums\s+(?P<sums>{_LETTERS})"
    r"|(?P<picked>[a-z])\s+by\s+(?P<index>\w+))(?:\s\s+|\s*;|\s*$)"
)


def read_notation(text: str, op: str, *, multiplies: bool = False) -> Notation:
    """Parse the notation ``text`` of an op; FxpruneError if it is not one, or leaves an axis undetermined."""
    inputs, arrow, rest = text.partition("->")
    if not arrow:
        raise _error(op, f"no -> in {text!r}")
    closing = rest.rfind("]") + 1  # an op may make no tensors at all
    clauses = _parse_clauses(rest[closing:], op)
    found = Notation(_parse_tensors(inputs, op), _parse_tensors(rest[:closing], op), *clauses, multiplies)
    _check_letters(found, op)
    _check_arguments(found, op)
    return found


def _error(op: str, what: str, remedy: str = "") -> FxpruneError:
    example = 'Write it like "input[*b, i], weight[o, i], bias[o]? -> out[*b, o]  sums i"'
    return FxpruneError(what, where=f"notation of {op}", remedy=remedy or example)


def _parse_tensors(text: str, op: str) -> tuple[TensorPattern, ...]:
    found, at, text = [], 0, text.strip()
    while at < len(text):
        match = _TENSOR.match(text, at)
        if match is None:
            raise _error(op, f"{text[at:].strip()!r} is not a tensor with its axes")
        letters: list[Letter] = []
        for item in (part.strip() for part in match[2].split(",") if match[2].strip()):
            axis = _AXIS.fullmatch(item)
            if axis is None or (axis[1] and axis[3]):
                raise _error(op, f"{item!r} is not an axis", "Write an axis as a letter, *letter or letter?")
            letters.append(Letter(axis[2], bool(axis[1]), bool(axis[3])))
        found.append(TensorPattern(match[1], tuple(letters), bool(match[3])))
        at = match.end()
    for x in found:
        if sum(letter.several for letter in x.letters) > 1:
            raise _error(op, f"{x.name} has more than one *", "Use * for one run of axes per tensor")
        if len(set(x.names())) < len(x.letters):
            raise _error(op, f"{x.name} has an axis twice", "Write the rule as a function")
    if len({x.name for x in found}) < len(found):
        raise _error(op, "a tensor occurs twice")
    return tuple(found)


def _parse_clauses(text: str, op: str) -> tuple[tuple[str, ...], dict[str, str]]:
    sums: list[str] = []
    picked: dict[str, str] = {}
    at = 0
    while text[at:].strip():
        match = _CLAUSES.match(text, at)
        if match is None:
            raise _error(op, f"{text[at:].strip()!r} is not a clause", 'A clause is "sums i" or "r by indices"')
        if match["sums"]:
            sums += re.findall("[a-z]", match["sums"])
        else:
            picked[match["picked"]] = match["index"]
        at = match.end()
    return tuple(sums), picked


def _check_letters(found: Notation, op: str) -> None:
    kinds = {(letter.name, letter.several) for x in (*found.inputs, *found.outputs) for letter in x.letters}
    names = {name for name, _ in kinds}
    if len(kinds) > len(names):
        raise _error(op, "a letter stands both for one axis and for any number of axes")
    before = {name for x in found.inputs for name in x.names()}
    after = {name for x in found.outputs for name in x.names()}
    if after - before:
        unknown = ", ".join(sorted(after - before))
        raise _error(op, f"the output axes {unknown} are not in the inputs", "Write the rule as a function")
    gone = {*found.sums, *found.picked}
    if gone & after or gone - before:
        wrong = ", ".join(sorted((gone & after) | (gone - before)))
        raise _error(op, f"{wrong}: a summed or picked axis must be in the inputs and not in the output")
    if found.outputs and before - after - gone:
        left = ", ".join(sorted(before - after - gone))
        raise _error(op, f"no clause determines {left}", f'Add a clause such as "sums {left[0]}"')
    unread = {*found.picked.values()} - {x.name for x in found.inputs}
    if unread:
        raise _error(op, f"a clause names {', '.join(sorted(unread))}, which the notation does not have")


def _check_arguments(found: Notation, op: str) -> None:
    """Refuse names that no overload of the op has; an op that is not registered yet is not checked."""
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


Decorated = TypeVar("Decorated")


class Values(StrEnum):
    """Effect of an op on the values of its inputs."""

    MOVED = "moved"
    """Results hold the values of the first tensor, or list of tensors, at other places; repeats are allowed."""
    PICKED = "picked"
    """Results hold values of the first tensor, at the places that another tensor gives."""
    CAST = "cast"
    """Each element by itself, as another type or on another device; positions stay positions."""
    POINTWISE = "pointwise"
    """Each element by itself. Whether zeros stay zero is found by calling the op."""
    COMPARED = "compared"
    """Pointwise, with a result that is the same for the new positions of two units as for the old ones."""
    SHAPE = "shape"
    """Reads shapes alone."""
    PRODUCT = "product"
    """A product or a sum of products: zero where one factor and the added tensor are zero."""
    REDUCED = "reduced"
    """Maps zeros to zeros; nothing is known of other numbers."""


@dataclass(frozen=True)
class Rule:
    """The rule of an op, which makes the statements about one use of it, and the properties given to :func:`rule`."""

    state: Callable[[OpSite], None]
    values: Values | None = None
    added: str = ""
    may_alias: bool = False
    regroups: bool = False
    adds: bool = False


_RULES: dict[str, Rule] = {}

_TAGGED = "aten::mul"
"""The op whose rule applies to every op that torch itself marks as pointwise."""


def rule(
    *names: str,
    notation: str | None = None,
    values: Values | str | None = None,
    added: str = "",
    may_alias: bool = False,
    regroups: bool = False,
    adds: bool = False,
) -> Callable[[Decorated], Decorated]:
    """Register a rule for the ops ``names``: the decorated function, or ``notation``, with which nothing is decorated.

    Args:
        names: ``"namespace::op"`` or ``"namespace::op.overload"``; a name without namespace is one of ATen's.
        notation: the rule as text.
        values: the effect of the op on values, one of :class:`Values`; None if unknown.
        added: for a product, the argument that is added to it; derived from a notation.
        may_alias: whether the op may return its input itself although its schema does not declare it.
        regroups: whether the op regroups axes, which a view cannot do for every memory layout.
        adds: whether the op is the sum of its first two arguments.

    Raises:
        ArgumentError: there is no name, or an argument is of the wrong type.
        FxpruneError: the notation is not valid.
        UnknownNameError: ``values`` is not one of :class:`Values`.
    """
    given: tuple[Any, ...] = names
    if not given or not all(isinstance(name, str) and name for name in given):
        raise refuse("names", names[0] if len(names) == 1 else names, "names of ops, such as 'mylib::turn'")
    if notation is not None:
        instance("notation", notation, str, "text such as 'x[*b, i, j] -> out[*b, j, i]'")
    if values is not None and values not in tuple(Values):
        raise UnknownNameError("values", str(values), tuple(Values))
    effect = None if values is None else Values(values)
    make: Callable[..., Rule] = partial(Rule, values=effect, may_alias=may_alias, regroups=regroups, adds=adds)
    if notation is not None:
        for name in map(_qualified, names):
            read = read_notation(notation, name, multiplies=effect is Values.PRODUCT)
            _RULES[name] = make(read.state, added=added or read.added)

    def decorate(decorated: Decorated) -> Decorated:
        if notation is None:
            function("rule", decorated, "a function of an OpSite, or a notation")
            _RULES.update((name, make(decorated, added=added)) for name in map(_qualified, names))
        return decorated

    return decorate


def _qualified(name: str) -> str:
    return (name if "::" in name else f"aten::{name}").removesuffix(".default")


def registered_rules() -> dict[str, Rule]:
    """All rules by the full name of their op."""
    return dict(_RULES)


def find_rule(target: object) -> Rule | None:
    """The rule for an op: its overload's, else its own, else the pointwise rule if torch marks the op as such."""
    if not isinstance(target, OpOverload):
        return _RULES.get(f"python::{getattr(target, '__name__', '')}")
    found = _find(target.name())
    if found is None and not target._schema.is_mutable and torch.Tag.pointwise in target.tags:
        return _RULES[_TAGGED]
    return found


def _find(name: str) -> Rule | None:
    return _RULES.get(name) or _RULES.get(name.split(".")[0])


def values_of(node: fx.Node) -> Values | None:
    """The effect of a node on values; None if it is unknown, or the node calls no op."""
    found = find_rule(node.target)
    return None if found is None else found.values


def moves_values(op: str) -> bool:
    """Whether an op, as text such as ``aten.view.default``, only moves or casts values."""
    is_getitem = op == str(operator.getitem)
    name = "python::getitem" if is_getitem else op.replace(".", "::", 1).removesuffix(".default")
    found = _find(name)
    return found is not None and found.values in (Values.MOVED, Values.CAST)


def is_sum(node: fx.Node) -> bool:
    """Whether ``node`` adds two values, neither of them scaled."""
    found = find_rule(node.target)
    return found is not None and found.adds and bool(node.kwargs.get("alpha", 1) == 1)


def may_alias(node: fx.Node) -> bool:
    """Whether the result of ``node`` may share memory with its first input, whether its schema declares it or not."""
    if not isinstance(node.target, OpOverload):
        return node.target is operator.getitem
    rule = find_rule(node.target)
    undeclared = rule is not None and rule.may_alias
    return undeclared or any(result.alias_info is not None for result in node.target._schema.returns)


def regroups(node: fx.Node) -> bool:
    """Whether ``node`` regroups axes, which a view cannot do for every memory layout."""
    rule = find_rule(node.target)
    return rule is not None and rule.regroups


def writes(node: fx.Node) -> bool:
    """Whether ``node`` writes to one of its inputs."""
    return isinstance(node.target, OpOverload) and bool(node.target._schema.is_mutable)


def alias_roots(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For each node, the first node whose memory it may share."""
    root: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        first = node.args[0] if node.args else None
        root[node] = root[first] if isinstance(first, fx.Node) and may_alias(node) else node
    return root


def written_sources(graph: fx.Graph, besides: Container[OpOverload] = ()) -> set[str]:
    """Names of the inputs and weights of a graph that some op writes to, directly or through a view.

    Args:
        besides: ops whose writes do not count.
    """
    root = alias_roots(graph)
    written: set[str] = set()
    for node in filter(writes, graph.nodes):
        if node.target in besides:
            continue
        for value in written_arguments(node.target, node.args, node.kwargs):
            if isinstance(value, fx.Node) and root[value].op in ("placeholder", "get_attr"):
                written.add(str(root[value].target))
    return written


def written_arguments(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that a call of ``op`` writes to."""
    return [
        args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
