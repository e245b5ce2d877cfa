"""What a rule may state, as types, and the collection of everything that was stated about a graph.

A rule never changes the graph. The output axes of an op start as fresh factors; a rule *adds equations*. What it
does not equate stays independent, so a rule must say everything that holds, and freeze what it cannot express.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from fxprune.axes import Expr, Freeze, Solver

__all__ = [
    "ActivationProduct",
    "AtLeast",
    "Average",
    "Axis",
    "Competition",
    "Coupling",
    "Held",
    "Lookup",
    "Positions",
    "Role",
    "SizeArgument",
    "Statements",
    "Statistic",
    "Sum",
    "TensorAxes",
]


class Role(StrEnum):
    """What an op uses an axis for. Kinds of groups are derived from these."""

    HEAD = "head"
    """Each unit is multiplied on its own: a batch axis of a product of two activations."""
    HEAD_DIM = "head_dim"
    """Passed on or summed over by a product of two activations."""
    SUMMED = "summed"
    """Summed over by a product of two activations."""
    SHARED_OUT = "shared out"
    """A softmax shares out a whole among the units."""
    SIDE_BY_SIDE = "weights side by side"
    """A batch axis of weights: each unit has a matrix of its own."""
    EXPERT = "expert"
    """Units are picked by positions that an op found, as a router does."""


class Axis(NamedTuple):
    """An axis of a tensor: parameter or buffer name, or name of the graph node."""

    tensor: str
    dim: int


@dataclass(frozen=True, eq=False)
class TensorAxes:
    """A tensor in the graph.

    Args:
        name: parameter or buffer name, or name of the node that makes it.
        axes: one expression per dimension.
        weight: whether it is made of parameters and buffers alone.
    """

    name: str
    axes: tuple[Expr, ...]
    weight: bool = False

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.axes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes as seen while tracing."""
        return tuple(axis.size for axis in self.axes)


@dataclass(frozen=True)
class Coupling:
    """Two axes that an op couples.

    Args:
        a: one axis.
        b: the other.
        node: name of the node.
        op: the op, as text.
    """

    a: Axis
    b: Axis
    node: str
    op: str


@dataclass(frozen=True)
class SizeArgument:
    """A number among the arguments of a node that is the size of an axis, to be rewritten when that axis shrinks.

    Args:
        node: name of the node that holds it.
        path: where in the node: ``("args", 1, 0)`` or ``("kwargs", "size", 0)``.
        expr: the expression whose size it is.
        offset: what is added to that size.
    """

    node: str
    path: tuple[Any, ...]
    expr: Expr
    offset: int = 0


@dataclass(frozen=True)
class Statistic:
    """An op takes one value out of all units of an axis, such as a mean: fewer units give another value.

    Args:
        expr: the axis.
        node: name of the node.
    """

    expr: Expr
    node: str


@dataclass(frozen=True)
class Average:
    """An op adds up over axes and divides by how many units they have, or works with what comes of that.

    Where masked units are zero there, the average of ``k`` kept ones of ``n`` is ``n / k`` times that of all.

    Args:
        node: name of the node.
        places: the axes, in its input.
        power: what the result has to be multiplied by to be that of all, as a power of ``n / k``.
        epsilon: where in the node a number stands that is added to the average, and has to be multiplied by ``n / k``
            for that; empty where there is none.
        weight: where in the node the tensor stands that multiplies the result; empty where there is none.
    """

    node: str
    places: tuple[Axis, ...]
    power: float
    epsilon: tuple[Any, ...] = ()
    weight: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Sum:
    """An op multiplies tensors and adds up over one axis: units that are zero in one of them can go.

    Args:
        node: name of the node.
        places: that axis in each of the tensors.
    """

    node: str
    places: tuple[Axis, ...]


@dataclass(frozen=True)
class Held:
    """What masked units hold along an axis of a result.

    Args:
        sources: axes of inputs.
        also: none if masked units are zero where they are zero along *all* sources, and nothing else is known. Else
            they hold what they hold along the sources, and these numbers as well.
    """

    sources: tuple[Axis, ...]
    also: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Positions:
    """The values of an integer tensor are positions along an axis.

    Args:
        tensor: the tensor that has the axis.
        dim: which of its axes.
    """

    tensor: TensorAxes
    dim: int

    @property
    def expr(self) -> Expr:
        """What the axis is made of, as far as it was known when this was stated."""
        return self.tensor.axes[self.dim]


@dataclass(frozen=True)
class Lookup:
    """Units along an axis are picked by the numbers in another tensor.

    Args:
        expr: the axis.
        index: name of the tensor of numbers.
        node: name of the node.
    """

    expr: Expr
    index: str
    node: str


@dataclass(frozen=True)
class Competition:
    """Units along an axis share out a whole, as in a softmax: fewer can where they are experts, else all stay.

    Args:
        expr: the axis.
        freeze: why it stays if its units are no experts.
    """

    expr: Expr
    freeze: Freeze


@dataclass(frozen=True)
class ActivationProduct:
    """An op multiplies two activations; the axes have these roles unless one of them holds experts.

    Args:
        roles: axes with their roles.
    """

    roles: tuple[tuple[Expr, Role], ...]


@dataclass(frozen=True)
class AtLeast:
    """An axis has to keep some units.

    Args:
        expr: the axis.
        count: how many.
    """

    expr: Expr
    count: int


@dataclass(eq=False)
class Statements:
    """Everything that the rules have stated about a graph so far.

    Args:
        solver: the equations between axes, the frozen ones and the roles.
        tensors: the axes of each tensor by the name of its node; several where a node makes several.
        couplings: pairs of axes that ops couple.
        size_arguments: numbers in the graph that are sizes.
        statistics: what runs over an axis and needs the kept units alone.
        averages: those that are averages, which can be told what they would be over all units.
        sums: what adds up over an axis.
        held: what masked units hold along axes of results, where the rule says so.
        positions: for integer tensors that hold positions along an axis, which axis.
        lookups: axes whose units are picked by numbers.
        picked: names of tensors that are matrices picked from weights.
        competitions: softmaxes; settled when all axes are solved.
        products: products of activations; settled when all axes are solved.
        at_least: axes that have to keep some units.
        unruled: names of nodes whose op has no rule that covers its use, with the op.
    """

    solver: Solver = field(default_factory=Solver)
    tensors: dict[str, TensorAxes | tuple[TensorAxes, ...]] = field(default_factory=dict)
    couplings: list[Coupling] = field(default_factory=list)
    size_arguments: list[SizeArgument] = field(default_factory=list)
    statistics: list[Statistic] = field(default_factory=list)
    averages: list[Average] = field(default_factory=list)
    sums: list[Sum] = field(default_factory=list)
    held: dict[Axis, Held] = field(default_factory=dict)
    positions: dict[str, Positions] = field(default_factory=dict)
    lookups: list[Lookup] = field(default_factory=list)
    picked: set[str] = field(default_factory=set)
    competitions: list[Competition] = field(default_factory=list)
    products: list[ActivationProduct] = field(default_factory=list)
    at_least: list[AtLeast] = field(default_factory=list)
    unruled: dict[str, str] = field(default_factory=dict)
