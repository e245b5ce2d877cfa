"""Base of selection passes: slots with a number of units to choose, and the plan that follows.

A slot is one group, or the groups of which just one may shrink (whole key/value groups, or query heads inside each;
experts of every group of a router, or whole groups), or all the layers that may go.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd, lcm
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
from torch import fx

from fxprune.axes import Factor, Keep, unit_index
from fxprune.checkpoint.stock import stock_test
from fxprune.discovery.dependency import AxisMap, Dependencies
from fxprune.discovery.explain import unruled
from fxprune.discovery.groups import DEFAULT_KINDS, Group, Groups, as_kinds, bare_kind
from fxprune.emit.epsilons import Places, find_places
from fxprune.errors import ArgumentError, FxpruneError, PassError, RatioError
from fxprune.evaluation.speed import read_widths
from fxprune.graph.facts import Change, Fact, Source, add_note, facts_of
from fxprune.graph.tensors import device_of
from fxprune.masking.compare import Expected
from fxprune.pipeline.arguments import RANKINGS, flag, numbers, one_of, refuse, whole_number
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.budget import Budget, by_kind, check_budget, make_budget
from fxprune.removal.plan import Plan, keep_of
from fxprune.removal.removal import Removal, scaled_numbers
from fxprune.removal.scores import Scores

__all__ = [
    "AUTO",
    "RANKINGS",
    "Choice",
    "Option",
    "Rounding",
    "SelectPass",
    "Selection",
    "Slot",
    "as_pairs",
    "default_protect",
    "make_keep",
    "make_slots",
    "of_kind",
    "protected_blocks",
    "read_by_kind",
    "removed_layers",
    "units_left",
]

T = TypeVar("T", int, float)


def read_by_kind(name: str, value: Any, read: Callable[[str, Any], T]) -> T | tuple[tuple[str, T], ...]:
    """Return a number, or pairs of a kind and its number: hashable, and with a spelling as ``[[mlp, 64], [head, 2]]``.

    Args:
        name: of the argument.
        value: a number; or a mapping from kinds to numbers, or pairs of both.
        read: checks one number, given a name for messages and the number.

    Raises:
        UnknownNameError: no such kind.
        ArgumentError: a kind comes twice, or it is something else.
    """
    if not isinstance(value, Mapping | tuple | list):
        return read(name, value)
    items = list(value.items() if isinstance(value, Mapping) else value)
    if not items or not all(isinstance(item, tuple | list) and len(item) == 2 for item in items):
        raise refuse(name, value, "a number, or numbers by kind as in {'mlp': .., 'head': ..}")
    pairs = tuple((as_kinds([kind])[0], read(f"{name}[{kind!r}]", number)) for kind, number in items)
    if len({bare_kind(kind) for kind, _ in pairs}) < len(pairs):
        raise ArgumentError("a kind comes twice", where=name, remedy="Give one number for each kind")
    return pairs


def as_pairs(value: T | tuple[tuple[str, T], ...]) -> dict[str, T] | None:
    """Return the numbers by kind; None where there is one for all."""
    return dict(value) if isinstance(value, tuple) else None


def of_kind(value: T | tuple[tuple[str, T], ...], kind: str, default: T) -> T:
    """Return the number for ``kind``, ``default`` where kinds have numbers and this one has none."""
    return {bare_kind(key): number for key, number in value}.get(kind, default) if isinstance(value, tuple) else value


AUTO = "auto"
"""Widths are multiples of what was measured to be worth it on the device."""


@dataclass(frozen=True)
class Rounding:
    """Which numbers of units may stay where some go.

    Args:
        round_to: one number: widths of parameters are multiples of it. Numbers by kind: so many *units* of the kind,
            so 2 for ``head`` means an even number of heads whatever their width. The number of experts is no width.
        tensor_parallel: devices that share each layer. MLP channels, query heads and key/value heads of a layer are
            multiples of it; fewer key/value heads than devices are held by several each, and stay as they are.
    """

    round_to: int | tuple[tuple[str, int], ...] = 1
    tensor_parallel: int = 1

    @classmethod
    def on(
        cls, graph_module: fx.GraphModule, round_to: int | str | tuple[tuple[str, int], ...], tensor_parallel: int
    ) -> Rounding:
        """Return what was asked for, with what the device of the weights wants where that is ``auto``.

        Raises:
            ArgumentError: nothing was measured on the device.
        """
        if isinstance(round_to, str):
            widths = read_widths(device_of(graph_module))
            round_to = widths.best()
            add_note(graph_module, f"round_to={AUTO} is {round_to}, as measured on {widths.device}")
        return cls(round_to, tensor_parallel)

    def step(self, group: Group) -> int:
        """Return the number whose multiples may stay; at most the size of the group."""
        return min(lcm(self._rounded(group), self._shared(group)), group.size)

    def _rounded(self, group: Group) -> int:
        if as_pairs(self.round_to) is not None:
            return of_kind(self.round_to, group.kind, 1)
        if group.kind == "expert" or group.factor is None:
            return 1
        span = min(int((unit_index(m.expr, group.factor) == 0).sum()) for m in group.parameters)
        number = of_kind(self.round_to, group.kind, 1)
        return number // gcd(number, span)

    def _shared(self, group: Group) -> int:
        devices = self.tensor_parallel
        if group.kind == "mlp":
            return devices
        if group.kind != "head":
            return 1
        if group.outer is not None:
            return devices // gcd(devices, group.outer.size)
        return devices if group.size >= devices else group.size


Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Option:
    """One way to shrink a slot.

    Args:
        size: number of units.
        step: kept counts are multiples of this many units.
        scores: score of the cheapest unit, the next cheapest, ..: ``(size,)``, averaged over outer units.
        group: what shrinks; None for layers.
    """

    size: int
    step: int
    scores: Array
    group: Group | None = None

    @property
    def fewest(self) -> int:
        """The smallest number of units that may stay: a multiple of ``step``."""
        least = 1 if self.group is None else self.group.least
        return -(-least // self.step) * self.step

    @property
    def most(self) -> int:
        """The largest number of units that may go."""
        return max(self.size - self.fewest, 0)

    def nearest(self, removed: float) -> int:
        """The allowed number of units nearest to ``removed``."""
        kept = max(round((self.size - removed) / self.step) * self.step, self.fewest)
        allowed = min(max(self.size - kept, 0), self.most)
        return allowed if removed >= allowed - removed else 0

    def below(self, removed: float) -> int:
        """The largest allowed number of units that is not above ``removed``."""
        allowed = self.nearest(removed)
        return allowed if allowed <= removed else self.less(allowed)

    def more(self, removed: int) -> int | None:
        """The next larger allowed number; None at the end."""
        if removed >= self.most:
            return None
        left = self.size - removed
        return removed + (left % self.step or self.step)

    def less(self, removed: int) -> int:
        """The next smaller allowed number; 0 at the end."""
        left = self.size - removed + self.step
        return 0 if left >= self.size else self.size - left


@dataclass(frozen=True)
class Slot:
    """A place where units go.

    Args:
        kind: kind of its groups.
        options: the ways to shrink it, of which one is chosen; the first is preferred where equally near.
        layers: for the slot of layers, the layer groups, cheapest first.
    """

    kind: str
    options: tuple[Option, ...]
    layers: tuple[Group, ...] = ()

    def choose(self, fraction: float) -> tuple[int, int]:
        """Option and number of units that come nearest to ``fraction``."""
        picks = [(i, option.nearest(fraction * option.size)) for i, option in enumerate(self.options)]
        return min(picks, key=lambda pick: (abs(pick[1] / self.options[pick[0]].size - fraction), pick[0]))


def default_protect(depth: int) -> tuple[int, int]:
    """The paper's protected layers, 4 at the front and 2 at the end of 32, scaled to ``depth``."""
    return round(depth * 4 / 32), round(depth * 2 / 32)


def protected_blocks(blocks: Sequence[str], protect: tuple[float, float] | tuple[()] | None) -> frozenset[str]:
    """The blocks that stay whole: ``protect`` of them at the front and at the end; of one below 1 that fraction."""
    wanted = default_protect(len(blocks)) if protect is None else protect or (0, 0)
    front, back = (int(part) if part >= 1 else round(part * len(blocks)) for part in wanted)
    return frozenset((*blocks[:front], *blocks[max(len(blocks) - back, 0) :]))


def make_slots(
    groups: Sequence[Group], scores: Scores, kinds: Sequence[str], protected: frozenset[str], rounding: Rounding
) -> list[Slot]:
    """The slots of ``kinds`` outside ``protected`` blocks."""
    chosen = [g for g in groups if g.is_of(kinds) and g.block not in protected and g.name in scores.units]
    shared: dict[tuple[str, object], list[Option]] = {}
    for group in chosen:
        if group.factor is not None:
            shared.setdefault((group.kind, _place(group)), []).append(_option(group, scores, rounding))
    slots = [Slot(kind, tuple(sorted(options, key=_preference))) for (kind, _), options in shared.items()]
    layers = [group for group in chosen if group.kind == "layer"]
    if layers:
        layers.sort(key=lambda group: float(scores.units[group.name][0]))
        ordered = np.asarray([scores.units[group.name][0] for group in layers])
        slots.append(Slot("layer", (Option(len(layers), 1, ordered),), tuple(layers)))
    return [slot for slot in slots if any(option.most for option in slot.options)]


def make_keep(slots: Sequence[Slot], choices: Sequence[tuple[int, int]], scores: Scores) -> Keep:
    """Keep all but the lowest scores, as many as chosen in each slot."""
    units: dict[Factor, npt.NDArray[np.bool_]] = {}
    outer: dict[Factor, Factor] = {}
    for slot, (i, removed) in zip(slots, choices, strict=True):
        group = slot.options[i].group
        if group is None or group.factor is None or not removed:
            continue
        rank = np.argsort(np.argsort(scores.units[group.name], axis=-1, kind="stable"), axis=-1)
        units[group.factor] = rank >= removed
        if group.outer is not None:
            outer[group.factor] = group.outer
    return Keep(units, outer)


def removed_layers(slots: Sequence[Slot], choices: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """Blocks that go as a whole."""
    picked = [g for slot, (_, n) in zip(slots, choices, strict=True) for g in slot.layers[:n]]
    return tuple(group.block for group in picked if group.block is not None)


def units_left(slots: Sequence[Slot], fractions: Mapping[int, tuple[int, float]]) -> dict[Factor, float]:
    """Units left of each factor, for each slot number an option and a (possibly fractional) number removed."""
    left: dict[Factor, float] = {}
    for slot, (i, removed) in fractions.items():
        group = slots[slot].options[i].group
        if group is not None and group.factor is not None and removed:
            left[group.factor] = group.size - removed
    return left


def _place(group: Group) -> object:
    """What groups of one slot have in common."""
    if group.kind == "head" and group.outer is not None:
        return group.outer
    return (group.members[0].name, group.members[0].axis) if group.kind == "expert" else group.factor


def _preference(option: Option) -> tuple[bool, int]:
    """Those with a choice in each outer unit come last, those with more units first."""
    return option.group is not None and option.group.outer is not None, -option.size


def _option(group: Group, scores: Scores, rounding: Rounding) -> Option:
    table = np.sort(scores.units[group.name], axis=-1)
    return Option(group.size, rounding.step(group), table.reshape(-1, group.size).mean(axis=0), group)


Choice = tuple[int, int]
"""Of a slot, the option taken and how many of its units go."""


@dataclass(frozen=True)
class Selection:
    """What a selection works on.

    Args:
        slots: places where units go.
        scores: of all units.
        budget: counts what the ratio is of.
        sizes: what the structures of each kind cost, protected ones too.
        removal_for: the removal that choices for all slots make.
        accepts: whether a stock config can say what a plan leaves; always true where there is no stock class to ask.
        note: tells the user something.
        graph_module: the dense graph.
        by: the same with other scores.
    """

    slots: Sequence[Slot]
    scores: Scores
    budget: Budget
    sizes: Mapping[str, float]
    removal_for: Callable[[Sequence[Choice]], Removal]
    accepts: Callable[[Plan], bool]
    note: Callable[[str], None]
    graph_module: fx.GraphModule
    by: Callable[[Scores], Selection]


@dataclass(frozen=True, eq=False)
class SelectPass(Pass):
    """Chooses which units stay.

    Args:
        kinds: kinds of groups that may shrink.
        ranking: ``local``: the same fraction in every group; ``global``: the lowest scores anywhere, normalised
            within groups of the same kind.
        protect: number of blocks kept whole at the front and at the end; None for the paper's 4 and 2 of 32, scaled
            to the depth; ``()`` for none. Fractions, as in ``(0.07, 0.04)``, are of the depth.
        round_to: widths of parameters stay multiples of this where they shrink; the number of experts is no width.
            Numbers by kind, as in ``{"mlp": 64, "head": 2}``, count units of that kind. ``auto``: the finest multiple
            that is about as fast as any, by what :func:`fxprune.evaluation.measure_widths` measured on the device.
        tensor_parallel: devices that are to share each layer: MLP channels, query heads and key/value heads of each
            stay multiples of it where they shrink.
        uniform: the same widths in all layers, such that the stock config takes them where there is one.
        budget: what a ratio is a fraction of: ``params``, ``macs``, ``kv`` for the bytes of the key-value cache,
            ``bytes@q8_0`` and the like for bytes at a quantisation, or time, as ``decode@times.json``: see
            :func:`fxprune.removal.budget.make_budget`.
    """

    kinds: tuple[str, ...] = DEFAULT_KINDS
    ranking: str = "local"
    protect: tuple[float, float] | tuple[()] | None = None
    round_to: int | str | tuple[tuple[str, int], ...] = 1
    uniform: bool = False
    tensor_parallel: int = 1
    budget: str = "params"

    stage: ClassVar[str] = "select"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Dependencies, Groups, Scores)
    gives: ClassVar[tuple[type[Fact], ...]] = (Removal,)
    drops: ClassVar[tuple[type[Fact], ...]] = (Expected,)

    def __post_init__(self) -> None:
        """Refuse nonsense before any work is done."""
        object.__setattr__(self, "kinds", as_kinds(self.kinds))
        one_of("ranking", self.ranking, RANKINGS)
        width = partial(whole_number, least=1)
        if not (isinstance(self.round_to, str) and self.round_to == AUTO):
            object.__setattr__(self, "round_to", read_by_kind("round_to", self.round_to, width))
        object.__setattr__(self, "tensor_parallel", width("tensor_parallel", self.tensor_parallel))
        object.__setattr__(self, "uniform", flag("uniform", self.uniform))
        check_budget(self.budget)
        if self.protect is not None:
            object.__setattr__(self, "protect", _protect(self.protect))
        if self.uniform and (any(self.protect or ()) or self.ranking != "local"):
            raise FxpruneError(
                f"the same widths in all layers cannot be had with protect={self.protect} and ranking={self.ranking!r}",
                where="uniform",
                remedy="Leave out protect and ranking",
            )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Decide on a removal.

        Raises:
            PassError: there are no scores for a kind that may shrink.
        """
        facts = facts_of(graph_module)
        axes, groups, scores = facts[Dependencies].axes, facts[Groups], facts[Scores]
        self._check_scores(groups.of_kinds(self.kinds), scores)
        protected = protected_blocks(axes.blocks, () if self.uniform else self.protect)
        rounding = Rounding.on(graph_module, self.round_to, self.tensor_parallel)
        budget = make_budget(self.budget, graph_module, axes)
        sizes = by_kind(budget, groups.of_kinds(self.kinds))
        accepts = _stock_test(graph_module, axes, groups.all) if self.uniform else lambda _: True
        note = partial(add_note, graph_module)

        def selection_by(scores: Scores) -> Selection:
            slots = make_slots(groups.all, scores, self.kinds, protected, rounding)

            def removal(choices: Sequence[Choice]) -> Removal:
                keep = make_keep(slots, choices, scores)
                return Removal(axes, groups.all, keep, removed_layers(slots, choices), self.asked, scores)

            return Selection(slots, scores, budget, sizes, removal, accepts, note, graph_module, selection_by)

        try:
            facts.put(self.decide(selection_by(scores)))
        except RatioError as error:
            frozen = unruled(axes)
            if not frozen:
                raise
            raise _with_unruled(error, frozen) from error
        return PassResult(graph_module, False)

    def decide(self, selection: Selection) -> Removal:
        """Return what goes: by default the lowest scores, as many as are chosen."""
        return selection.removal_for(self.choose(selection))

    def _check_scores(self, groups: Sequence[Group], scores: Scores) -> None:
        for group in groups:
            if group.name not in scores.units:
                raise PassError(
                    f"there are no scores for {group.name}, of the kind {group.kind!r} that may shrink",
                    where=f"pass {self.name}",
                    remedy=f"Score it: run an importance pass with kinds=[{', '.join(self.kinds)}]",
                )

    @property
    @abstractmethod
    def asked(self) -> dict[str, float]:
        """What the report says was asked for."""

    @abstractmethod
    def choose(self, selection: Selection) -> list[Choice]:
        """Return a choice for each slot."""


def _stock_test(graph_module: fx.GraphModule, axes: AxisMap, groups: tuple[Group, ...]) -> Callable[[Plan], bool]:
    """Return a test of plans: would the slim model load in stock transformers from its config alone?"""
    source = facts_of(graph_module).get(Source)

    def epsilons(plan: Plan) -> Places:
        if source is None or not axes.norms:
            return Places()
        return find_places(graph_module.graph, source.model, scaled_numbers(axes, keep_of(axes, groups, plan)))

    return stock_test(source, epsilons)


def _with_unruled(error: RatioError, frozen: Mapping[str, Sequence[str]]) -> RatioError:
    """Return an error that names ops without a rule, where such froze what might have gone."""
    op, axes = max(frozen.items(), key=lambda item: len(item[1]))
    others = f" and {len(frozen) - 1} more ops" if len(frozen) > 1 else ""
    more = f" and {len(axes) - 1} more axes" if len(axes) > 1 else ""
    told = RatioError(
        f"{error.what}; {op}{others} has no rule and froze {axes[0]}{more}",
        where=error.where,
        remedy=f"{error.remedy}; or say what the op does to axes, with fxprune.rule",
    )
    told.reachable = error.reachable
    return told


def _protect(value: Any) -> tuple[float, ...]:
    """Return how many blocks, or what fractions of them, stay whole at the front and at the end; nothing for none.

    Raises:
        ArgumentError: it is neither.
    """
    wanted = "(first, last) with the numbers of layers kept whole or fractions of them, () for none, or None"
    parts = isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(part, float | int) for part in value)
    if parts and any(0 < part < 1 for part in value) and all(0 <= part < 1 for part in value):
        return tuple(map(float, value))
    found = numbers("protect", value, wanted)
    if len(found) not in (0, 2):
        raise refuse("protect", value, wanted)
    return found
