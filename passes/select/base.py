"""Base of selection passes: slots with a number of units to remove, and the plan that follows or is read.

A slot is one group, or several groups of which only one may shrink (whole key/value groups, or query heads inside each;
experts of every group of a router, or whole groups), or all the layers that may be removed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import gcd, lcm
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from torch import fx

from fxprune.axes import Factor, Freeze, Keep, Mask, unit_index
from fxprune.discovery.dependency import AxisMap, Dependencies
from fxprune.discovery.explain import frozen_in, unruled
from fxprune.discovery.groups import DEFAULT_KINDS, Group, Groups, as_kinds, bare_kind
from fxprune.emit.emitted import inexpressible
from fxprune.errors import ArgumentError, FxpruneError, PassError, PlanError, RatioError
from fxprune.evaluation.speed import read_widths
from fxprune.graph.facts import Change, Fact, Source, add_note, facts_of
from fxprune.graph.tensors import device_of
from fxprune.offload.ranks import broadcast_object, decide_on_first, world_size
from fxprune.pipeline.arguments import EXACT, Ranking, argument, instance, numbers, path_or_empty, refuse, whole_number
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.budget import Budget, by_kind, check_budget, make_budget
from fxprune.removal.plan import Plan, keep_of, other_model_note
from fxprune.removal.removal import Array, Removal, Scores
from fxprune.removal.target import Reached

T = TypeVar("T", int, float)

Choice = tuple[int, int]
"""The option taken of a slot, and the number of its units that are removed."""

AUTO = "auto"
"""Round widths to multiples that were measured to be fast on the device."""


def by_kind_or_one(name: str, value: Any, check: Callable[[str, Any], T]) -> T | tuple[tuple[str, T], ...]:
    """A number, or pairs of a kind and its number: hashable, and with a spelling as ``[[mlp, 64], [head, 2]]``.

    ``check`` validates one number, given a name for messages and the number.
    """
    if not isinstance(value, Mapping | tuple | list):
        return check(name, value)
    items = list(value.items() if isinstance(value, Mapping) else value)
    if not items or not all(isinstance(item, tuple | list) and len(item) == 2 for item in items):
        raise refuse(name, value, "a number, or numbers by kind as in {'mlp': .., 'head': ..}")
    pairs = tuple((as_kinds(name, [kind])[0], check(f"{name}[{kind!r}]", number)) for kind, number in items)
    if len({bare_kind(kind) for kind, _ in pairs}) < len(pairs):
        remedy = "Give one number for each kind"
        raise ArgumentError("a kind comes twice", where=name, remedy=remedy, argument=name, value=value)
    return pairs


def listed(value: Any) -> str:
    """The value of an argument in a message, as an option takes it: ``mlp,head``, or ``mlp=32``."""
    if not isinstance(value, tuple):
        return str(value)
    items = ("=".join(map(str, item)) if isinstance(item, tuple) else str(item) for item in value)
    return ",".join(items) or "none"


def of_kind(value: T | tuple[tuple[str, T], ...], kind: str, default: T) -> T:
    """The number for ``kind``; ``default`` if there are numbers by kind and none for this one."""
    return {bare_kind(key): number for key, number in value}.get(kind, default) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Rounding:
    """The numbers of units that a group may keep if it shrinks.

    Args:
        round_to: one number: widths of parameters are multiples of it. Numbers by kind: so many *units* of the kind,
            so 2 for ``head`` means an even number of heads whatever their width. The number of experts is no width.
        tensor_parallel: devices that share each layer. MLP channels, query heads and key/value heads of a layer are
            multiples of it; fewer key/value heads than devices are held by several each, and stay as they are.
        blocks: for some factors, a further number whose multiples of units may stay.
    """

    round_to: int | tuple[tuple[str, int], ...] = 1
    tensor_parallel: int = 1
    blocks: Mapping[Factor, int] = field(default_factory=dict)

    def step(self, group: Group) -> int:
        """The number whose multiples may stay; at most the size of the group."""
        rounded, devices, shared = 1, self.tensor_parallel, 1
        if isinstance(self.round_to, tuple):
            rounded = of_kind(self.round_to, group.kind, 1)
        elif group.kind != "expert" and group.factor is not None:
            widths = {int((unit_index(member.expr, group.factor) == 0).sum()) for member in group.parameters}
            rounded = lcm(*(self.round_to // gcd(self.round_to, width) for width in widths))
        if group.kind == "mlp":
            shared = devices
        elif group.kind == "head":
            shared = min(devices, group.size) if group.outer is None else devices // gcd(devices, group.outer.size)
        block = 1 if group.factor is None else self.blocks.get(group.factor, 1)
        return min(lcm(rounded, shared, block), group.size)


@dataclass(frozen=True)
class Option:
    """One way to shrink a slot.

    Args:
        step: kept counts are multiples of this many units.
        scores: score of the cheapest unit, the next cheapest, ..: ``(size,)``, averaged over outer units.
        group: the group that shrinks; None for layers.
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
        """The largest number of units that may be removed."""
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
    """A place where units can be removed.

    Args:
        options: the ways to shrink it, of which one is chosen; the first is preferred if equally near.
        layers: for the slot of layers, the layer groups, cheapest first.
    """

    kind: str
    options: tuple[Option, ...]
    layers: tuple[Group, ...] = ()

    def choose(self, fraction: float) -> Choice:
        picks = [(i, option.nearest(fraction * option.size)) for i, option in enumerate(self.options)]
        return min(picks, key=lambda pick: (abs(pick[1] / self.options[pick[0]].size - fraction), pick[0]))


def protected_blocks(blocks: Sequence[str], protect: tuple[float, float] | tuple[()] | None) -> frozenset[str]:
    """The blocks that stay whole: ``protect`` of them at the front and at the end, as numbers or fractions below 1.

    None stands for the paper's 4 at the front and 2 at the end of 32, scaled to the depth.
    """
    depth = len(blocks)
    wanted = (round(depth * 4 / 32), round(depth * 2 / 32)) if protect is None else protect or (0, 0)
    front, back = (int(part) if part >= 1 else round(part * depth) for part in wanted)
    return frozenset((*blocks[:front], *blocks[max(depth - back, 0) :]))


def make_slots(
    groups: Sequence[Group], scores: Scores, kinds: Sequence[str], protected: frozenset[str], rounding: Rounding
) -> list[Slot]:
    """The slots of ``kinds`` outside ``protected`` blocks."""
    chosen = [g for g in groups if g.is_of(kinds) and g.block not in protected and g.name in scores.units]
    shared: dict[tuple[str, object], list[Option]] = {}
    for group in chosen:
        if group.factor is None:
            continue
        key: object = group.factor
        if group.kind == "head" and group.outer is not None:
            key = group.outer
        elif group.kind == "expert":
            key = group.members[0].name, group.members[0].axis
        rows = np.sort(scores.units[group.name], axis=-1).reshape(-1, group.size)
        option = Option(group.size, rounding.step(group), rows.mean(axis=0), group)
        shared.setdefault((group.kind, key), []).append(option)
    for options in shared.values():  # those with a choice inside each outer unit last, those with more units first
        options.sort(key=lambda option: (option.group is not None and option.group.outer is not None, -option.size))
    slots = [Slot(kind, tuple(options)) for (kind, _), options in shared.items()]
    layers = sorted((g for g in chosen if g.kind == "layer"), key=lambda group: float(scores.units[group.name][0]))
    if layers:
        ordered = np.asarray([scores.units[group.name][0] for group in layers])
        slots.append(Slot("layer", (Option(len(layers), 1, ordered),), tuple(layers)))
    return [slot for slot in slots if any(option.most for option in slot.options)]


def _lies_in(path: str, part: str) -> bool:
    return not part or f".{part}." in f".{path}."


def removed_by(budget: Budget, slots: Sequence[Slot], choices: Sequence[tuple[int, float]]) -> float:
    """What choices for some slots remove of a budget, fractional numbers of units too."""
    return budget.removed(*left_by(slots, choices))


def left_by(
    slots: Sequence[Slot], choices: Sequence[tuple[int, float]]
) -> tuple[dict[Factor, float], dict[str, float]]:
    """The units left of each factor that shrinks, and the removed fraction of each block.

    A fractional number of layers is spread over all layers of the slot.
    """
    units: dict[Factor, float] = {}
    blocks: dict[str, float] = {}
    for slot, (i, removed) in zip(slots, choices, strict=True):
        group = slot.options[i].group
        if group is not None and group.factor is not None and removed:
            units[group.factor] = group.size - removed
        for number, layer in enumerate(slot.layers):
            share = removed / len(slot.layers) if removed != int(removed) else float(number < removed)
            if layer.block is not None and share:
                blocks[layer.block] = share
    return units, blocks


@dataclass(frozen=True)
class Selection:
    """The inputs of a selection.

    Args:
        sizes: the cost of the structures of each kind, protected ones too.
        removal_for: the removal that follows from choices for all slots.
    """

    slots: Sequence[Slot]
    budget: Budget
    sizes: Mapping[str, float]
    removal_for: Callable[[Sequence[Choice]], Removal]
    note: Callable[[str], None]
    graph_module: fx.GraphModule


def _check_protect(name: str, value: Any) -> tuple[float, ...]:
    wanted = "(first, last) with the numbers of layers kept whole or fractions of them, () for none, or None"
    parts = isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(part, float | int) for part in value)
    if parts and any(isinstance(part, float) for part in value) and all(0 <= part < 1 for part in value):
        return tuple(map(float, value))
    found = numbers(name, value, wanted)
    if len(found) not in (0, 2):
        raise refuse(name, value, wanted)
    return found


def _check_round_to(name: str, value: Any) -> int | str | tuple[tuple[str, int], ...]:
    is_auto = isinstance(value, str) and value == AUTO
    return AUTO if is_auto else by_kind_or_one(name, value, partial(whole_number, least=1))


@dataclass(frozen=True, eq=False)
class SelectPass(Pass):
    """Chooses which units stay."""

    kinds: tuple[str, ...] = argument(DEFAULT_KINDS, "Kinds of groups that may shrink.", check=as_kinds)
    part: str = argument(
        "",
        """Name of the only module that loses units, as in ``language_model``; the rest of the model stays whole and
        counts in the ratio. The whole model by default.""",
        check=partial(instance, kind=str, wanted="the name of a module"),
    )
    ranking: Ranking = argument(
        "local",
        """``local``: the same fraction of every group; ``global``: the lowest scores anywhere, normalised within groups
        of the same kind; ``auto``: as ``global``, with the score of each unit divided by the fraction of its group that
        is left when its turn comes, which keeps groups from being emptied; ``local`` with ``uniform``.""",
    )
    protect: tuple[float, float] | tuple[()] | None = argument(
        None,
        """Number of blocks kept whole at the front and at the end; None for the paper's 4 and 2 of 32, scaled to the
        depth; ``()`` for none. Fractions, as in ``(0.07, 0.04)``, are of the depth.""",
        check=_check_protect,
    )
    round_to: int | str | tuple[tuple[str, int], ...] = argument(
        1,
        """Widths of parameters that shrink stay multiples of this; the number of experts is not a width. Numbers by
        kind, as in ``{"mlp": 64, "head": 2}``, count units of that kind. ``auto``: the finest multiple that is about as
        fast as any, as measured on the device by :func:`fxprune.evaluation.measure_widths`.""",
        check=_check_round_to,
    )
    uniform: bool = argument(False, "The same widths in all layers, accepted by the stock config if there is one.")
    tensor_parallel: int = argument(
        1,
        """Devices that will share each layer: numbers of MLP channels, query heads and key/value heads that shrink stay
        multiples of it in each layer.""",
        least=1,
    )
    budget: str = argument(
        "params",
        """Quantity that a ratio is a fraction of: ``params``, ``macs``, ``kv`` for bytes of the key-value cache,
        ``bytes@q8_0`` and the like for bytes of a GGUF file in a format, or time, as in ``decode@times.json``: see
        :func:`fxprune.removal.budget.make_budget`.""",
        check=check_budget,
    )

    stage: ClassVar[str] = "select"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Dependencies, Groups, Scores)
    wants: ClassVar[tuple[type[Fact], ...]] = (Source,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Removal,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.uniform and (any(self.protect or ()) or self.ranking == "global"):
            what = f"the same widths in all layers exclude $protect {listed(self.protect)} and $ranking {self.ranking}"
            remedy = "Leave out $protect and $ranking"
            raise FxpruneError(what, where="uniform", remedy=remedy, argument="uniform", value=True)

    def foresee(self, graph_module: fx.GraphModule, given: tuple[type[Fact], ...]) -> None:
        """Refuse, before any is scored, what cannot be removed whatever the scores are."""
        if Groups in given:
            groups = facts_of(graph_module)[Groups].all
            made_up = Scores({group.name: np.arange(group.size, dtype=float) for group in groups})
            with _obstacles_named(graph_module, self.kinds):
                self.require_reachable(self._selection(graph_module, made_up))

    def require_reachable(self, selection: Selection) -> None:
        """Raise :class:`~fxprune.errors.RatioError` if the ratio is out of reach."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        facts = facts_of(graph_module)
        groups, scores = facts[Groups], facts[Scores]
        for group in groups.of_kinds(self.kinds):
            if group.name not in scores.units and group.kind not in self.optional_kinds:
                what = f"there are no scores for {group.name}, of the kind {group.kind!r} that may shrink"
                remedy = f"Score it: run an importance pass with kinds=[{', '.join(self.kinds)}]"
                raise PassError(what, where=f"pass {self.name}", remedy=remedy)
        whole = dict[str, str]()
        with _obstacles_named(graph_module, self.kinds):
            while True:
                notes: list[str] = []  # those of the last round
                selection = replace(self._selection(graph_module, scores), note=notes.append)
                removal = _of_first(selection.removal_for(self.choose(selection)))
                kinds = (*DEFAULT_KINDS, *self.optional_kinds)
                refused = {} if self.uniform else inexpressible(graph_module, removal, kinds)
                if not refused:
                    break
                whole |= refused
                scores = Scores({name: row for name, row in scores.units.items() if name not in refused}, scores.source)
            facts.put(replace(removal, reached=self.reached(selection, removal)))
        for line in (*notes, *_left_whole(whole)):
            add_note(graph_module, line)
        return PassResult(graph_module, False)

    def reached(self, selection: Selection, removal: Removal) -> Reached | None:
        """The target of the pass and its outcome; None without a target."""
        return None

    @property
    def optional_kinds(self) -> tuple[str, ...]:
        """Kinds that stay whole where nothing scored them, or the classes of the model cannot express fewer units."""
        return ()

    def budget_of(self, graph_module: fx.GraphModule) -> str:
        """The name of the budget of a graph."""
        return self.budget

    def slots_of(self, slots: list[Slot], budget: Budget) -> list[Slot]:
        """The slots to choose from: all by default."""
        return slots

    def _selection(self, graph_module: fx.GraphModule, scores: Scores) -> Selection:
        axes, groups = facts_of(graph_module)[Dependencies].axes, facts_of(graph_module)[Groups]

        def is_inside(group: Group) -> bool:
            paths = [group.block or ""] if group.factor is None else [member.name for member in group.parameters]
            return all(_lies_in(path, self.part) for path in paths)

        inside = Groups(tuple(filter(is_inside, groups.all)))
        if self.part and not inside.of_kinds(self.kinds):
            what = f"no group of $kinds {listed(self.kinds)} lies in {self.part!r}"
            remedy = "Name a module that the samples reach, as in language_model"
            raise PassError(what, where=f"pass {self.name}", remedy=remedy, argument="part", value=self.part)
        blocks = [block for block in axes.blocks if _lies_in(block, self.part)]
        protected = protected_blocks(blocks, () if self.uniform else self.protect)
        round_to = self.round_to
        if isinstance(round_to, str):
            widths = decide_on_first(lambda: read_widths(device_of(graph_module)), FxpruneError)
            round_to = widths.best()
            add_note(graph_module, f"round_to={AUTO} is {round_to}, as measured on {widths.device}")
        budget = make_budget(self.budget_of(graph_module), graph_module, axes)
        rounding = Rounding(round_to, self.tensor_parallel, budget.blocks)
        slots = self.slots_of(make_slots(inside.all, scores, self.kinds, protected, rounding), budget)

        def removal_for(choices: Sequence[Choice]) -> Removal:
            units: dict[Factor, Mask] = {}
            outer: dict[Factor, Factor] = {}
            removed_blocks: list[str] = []
            for slot, (i, removed) in zip(slots, choices, strict=True):
                removed_blocks += [layer.block for layer in slot.layers[:removed] if layer.block is not None]
                group = slot.options[i].group
                if group is None or group.factor is None or not removed:
                    continue
                lowest = np.argsort(scores.units[group.name], axis=-1, kind="stable")[..., :removed]
                units[group.factor] = stays = np.ones_like(scores.units[group.name], dtype=bool)
                np.put_along_axis(stays, lowest, False, axis=-1)
                if group.outer is not None:
                    outer[group.factor] = group.outer
            return Removal(axes, groups.all, Keep(units, outer), tuple(removed_blocks), self.asked, scores)

        sizes = by_kind(budget, inside.of_kinds(self.kinds))
        return Selection(slots, budget, sizes, removal_for, partial(add_note, graph_module), graph_module)

    @property
    @abstractmethod
    def asked(self) -> dict[str, float]:
        """The requested ratio, for the report."""

    @abstractmethod
    def choose(self, selection: Selection) -> list[Choice]:
        """A choice for each slot."""


def _of_first(removal: Removal) -> Removal:
    """The removal that the first process chose: measurements on other machines may round differently."""
    plan = None if world_size() == 1 else broadcast_object(removal.plan)
    if plan is None or plan == removal.plan:
        return removal
    keep = keep_of(removal.axes, removal.groups, plan)
    return replace(removal, keep=keep, removed_blocks=plan.removed_blocks)


def _left_whole(reasons: Mapping[str, str]) -> Iterator[str]:
    """Yield notes about the groups that stay whole since the classes of the model cannot express fewer units."""
    by_kind: dict[str, list[str]] = {}
    for name in reasons:
        by_kind.setdefault(name.rpartition("/")[2].partition(".")[0], []).append(name)
    for kind, names in by_kind.items():
        more = f" and {len(names) - 1} more groups" if len(names) > 1 else ""
        yield f"{names[0]}{more} of kind {kind} left whole: the model's class cannot express it: {reasons[names[0]]}"


@contextmanager
def _obstacles_named(graph_module: fx.GraphModule, kinds: Sequence[str]) -> Iterator[None]:
    """Name in a ``RatioError`` an op that no rule covers, or the reason why there are no groups of ``kinds``."""
    try:
        yield
    except RatioError as error:
        axes, groups = facts_of(graph_module)[Dependencies].axes, facts_of(graph_module)[Groups]
        frozen, remedy = unruled(axes), error.remedy
        if frozen:
            reason, names = max(frozen.items(), key=lambda item: len(item[1]))
            others = f"; {len(frozen) - 1} more reasons" if len(frozen) > 1 else ""
            cause = f"{_first_axis(names)}: {reason}{others}"
            remedy += "; or state what the op does to axes, with fxprune.rule"
        elif groups.of_kinds(kinds):
            raise
        elif groups.all:
            renormalised = " (renormalised)"  # what only the prefix leaves out
            found = {group.kind + renormalised * (f"{EXACT}{group.kind}" in kinds) for group in groups}
            cause = f"the model has groups of kind {', '.join(sorted(found))} alone"
        else:
            cause, remedy = _reasons(axes), "Change the code of the model there, or leave the model whole"
        what = f"{error.what}; {cause}"
        named_error = RatioError(what, where=error.where, remedy=remedy, argument=error.argument, value=error.value)
        named_error.reachable = error.reachable
        raise named_error from error


_REASONS = 3
"""Most reasons that a refusal lists."""


def _reasons(axes: AxisMap) -> str:
    """The reasons that froze most axes of parameters, each with the first of these."""
    frozen: dict[Freeze, list[str]] = {}
    for axis, freeze in frozen_in(axes).items():
        frozen.setdefault(freeze, []).append(axis)
    if not frozen:
        return "no axis of a weight has two units"
    ends = ("an input of the model", "an output of the model")  # these stay in every model
    found = sorted(frozen.items(), key=lambda item: (item[0].reason in ends, -len(item[1])))
    listed = (f"{_first_axis(names)}: {reason}" for reason, names in found[:_REASONS])
    return f"all units stay, of {', of '.join(listed)}"


def _first_axis(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more axes"


@dataclass(frozen=True, eq=False)
class PlanFromJsonPass(Pass):
    """Takes the units that stay and the blocks that are removed from a plan."""

    name: ClassVar[str] = "plan-from-json"
    stage: ClassVar[str] = "select"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Dependencies, Groups)
    gives: ClassVar[tuple[type[Fact], ...]] = (Removal,)

    text: str = argument(
        "",
        "The output of :meth:`fxprune.Plan.to_json`.",
        check=partial(instance, kind=str, wanted="what Plan.to_json wrote", error=PlanError),
    )
    file: str = argument(
        "", "In its place, the path of a file with such text.", check=partial(path_or_empty, error=PlanError)
    )

    def check_arguments(self) -> None:
        if not self.text and not self.file:
            remedy = "Pass text, or file with the path of what Plan.to_json wrote"
            raise PlanError("no plan", where=f"pass {self.name}", remedy=remedy)

    def foresee(self, graph_module: fx.GraphModule, given: tuple[type[Fact], ...]) -> None:
        """Refuse a plan for another model before samples are made and read."""
        if Groups in given:
            self._removal(graph_module, self._plan())

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        facts, plan = facts_of(graph_module), self._plan()
        facts.put(self._removal(graph_module, plan))
        note = other_model_note(facts[Dependencies].axes, plan)
        if note is not None:
            add_note(graph_module, note)
        return PassResult(graph_module, False)

    def _plan(self) -> Plan:
        try:
            text = self.text or Path(self.file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            what, remedy = f"cannot be read: {error}", "Pass text, or the path of a plan"
            raise PlanError(what, where=self.file, remedy=remedy) from error
        return Plan.from_json(text)

    def _removal(self, graph_module: fx.GraphModule, plan: Plan) -> Removal:
        facts = facts_of(graph_module)
        axes, groups = facts[Dependencies].axes, facts[Groups].all
        return Removal(axes, groups, keep_of(axes, groups, plan), plan.removed_blocks)
