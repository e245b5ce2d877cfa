"""The kinds of statements that a rule may make, and the collection of all statements about a graph.

A rule never changes the graph. The output axes of an op start as fresh factors; a rule *adds equations*. Axes that it
does not equate stay independent, so a rule must state every equation that holds, and freeze what it cannot express.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple

from fxprune.axes import Expr, Freeze, Solver


class Role(StrEnum):
    """The use of an axis in an op. Kinds of groups are derived from roles."""

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
    """Units are picked by positions that an op computed, as a router does."""
    CONVOLVED = "convolved"
    """Made or summed over by a convolution that mixes channels."""


class Axis(NamedTuple):
    """An axis of a tensor: parameter or buffer name, or name of the graph node."""

    tensor: str
    dim: int


@dataclass(frozen=True, eq=False)
class TensorAxes:
    """A tensor in the graph, with one expression per dimension.

    Args:
        name: parameter or buffer name, or name of the node that makes it.
        weight: whether it is computed from parameters and buffers alone.
    """

    name: str
    axes: tuple[Expr, ...]
    weight: bool = False

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.axes)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Sizes as seen while tracing."""
        return tuple(axis.size for axis in self.axes)


class Coupling(NamedTuple):
    """Two axes that the op ``op`` (as text), at the node named ``node``, couples."""

    a: Axis
    b: Axis
    node: str
    op: str


@dataclass(frozen=True)
class SizeArgument:
    """A number among the arguments of a node that is the size of ``expr`` plus ``offset``, to be rewritten with it.

    Its ``path`` in the node is like ``("args", 1, 0)`` or ``("kwargs", "size", 0)``.
    """

    node: str
    path: tuple[Any, ...]
    expr: Expr
    offset: int = 0


@dataclass(frozen=True)
class Statistic:
    """An op computes one value from all units of an axis, such as a maximum: fewer units give another value."""

    expr: Expr
    node: str


@dataclass(frozen=True)
class Average:
    """An op computes a mean over axes of its input (``places``), or something derived from one.

    If masked units are zero, the mean of the ``k`` kept ones of ``n`` is ``n / k`` times that of all.

    Args:
        power: the power of ``n / k`` that the result must be multiplied by to equal that of all units.
        epsilon: path of a number in the node that is added to the mean, and must be multiplied by ``n / k`` too.
        weight: path of the tensor in the node that multiplies the result; like ``epsilon`` empty if there is none.
    """

    node: str
    places: tuple[Axis, ...]
    power: float
    epsilon: tuple[Any, ...] = ()
    weight: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Held:
    """The values of masked units along an axis of a result.

    If ``also`` is None, they are zero where they are zero along *all* ``sources``, and nothing else is known. Else they
    hold their values along the sources, and these numbers as well.
    """

    sources: tuple[Axis, ...]
    also: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Positions:
    """The values of an integer tensor are positions along axis ``dim`` of ``tensor``."""

    tensor: TensorAxes
    dim: int

    @property
    def expr(self) -> Expr:
        """The expression of the axis when this was stated."""
        return self.tensor.axes[self.dim]


@dataclass(frozen=True)
class Lookup(Positions):
    """Units along axis ``dim`` of ``tensor`` are picked by the numbers in the tensor named ``index``."""

    index: str
    node: str


@dataclass(frozen=True)
class Competition:
    """Units along an axis compete, as in a softmax: experts may be removed, any other axis is frozen by ``freeze``."""

    expr: Expr
    freeze: Freeze


@dataclass(frozen=True)
class AtLeast:
    """An axis must keep at least ``count`` units."""

    expr: Expr
    count: int


@dataclass(eq=False)
class Statements:
    """Everything that the rules have stated about a graph so far.

    Args:
        tensors: the tensors that each node makes, one or several, by the name of the weight or node.
        sums: the axes that each node sums over, perhaps of a product of tensors: for each its places in the tensors.
            Units that are zero in one of them can be removed.
        held: values of masked units along axes of results, if the rule states them.
        positions: the axis that an integer tensor holds positions along, by the name of the tensor.
        picked: names of tensors that are matrices picked from weights.
        competitions: softmaxes; like ``products`` settled when all axes are solved.
        products: for each product of activations, the roles of the axes unless one of them holds experts.
        at_least: axes that must keep a number of units.
        unruled: the op of each node, by name, that no rule covers.
    """

    solver: Solver = field(default_factory=Solver)
    tensors: dict[str, tuple[TensorAxes, ...]] = field(default_factory=dict)
    couplings: list[Coupling] = field(default_factory=list)
    size_arguments: list[SizeArgument] = field(default_factory=list)
    statistics: list[Statistic] = field(default_factory=list)
    averages: list[Average] = field(default_factory=list)
    sums: dict[str, list[tuple[Axis, ...]]] = field(default_factory=dict)
    held: dict[Axis, Held] = field(default_factory=dict)
    positions: dict[str, Positions] = field(default_factory=dict)
    lookups: list[Lookup] = field(default_factory=list)
    picked: set[str] = field(default_factory=set)
    competitions: list[Competition] = field(default_factory=list)
    products: list[tuple[tuple[Expr, Role], ...]] = field(default_factory=list)
    at_least: list[AtLeast] = field(default_factory=list)
    unruled: dict[str, str] = field(default_factory=dict)
