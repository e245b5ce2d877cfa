"""Selection by a ratio of parameters, or of the units of every group."""

from __future__ import annotations

import itertools
import json
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import lcm
from typing import Any, ClassVar

from torch import fx, nn

from fxprune.data.calibration import Calibration, Sample, hold_out
from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Groups, as_kinds, bare_kind
from fxprune.emit.emitted import stock_check
from fxprune.errors import ArgumentError, RatioError
from fxprune.evaluation.speed import times_file
from fxprune.graph.context import attempt
from fxprune.graph.counting import count_parameters
from fxprune.graph.facts import Fact, Runnable, facts_of, fork
from fxprune.graph.tensors import device_of
from fxprune.masking.teacher import divergence_by_removal
from fxprune.offload.files import cached, resume_scope, uncache, write_cached
from fxprune.offload.ranks import world_size
from fxprune.pipeline.arguments import argument, number, refuse
from fxprune.pipeline.contract import Pass, PassCost
from fxprune.pipeline.registry import pass_argument
from fxprune.removal.budget import Budget, check_budget, make_budget
from fxprune.removal.formats import least_each
from fxprune.removal.removal import Removal
from fxprune.removal.target import (
    DEFAULT_RATIO,
    PHASES,
    Reached,
    Target,
    amount_below,
    check_target,
    parse_target,
)

from .base import (
    Choice,
    Selection,
    SelectPass,
    Slot,
    by_kind_or_one,
    listed,
    of_kind,
    removed_by,
)
from .solver import CLOSE, BudgetSolver, below_threshold, normalised

_INSIDE_BLOCKS = frozenset({"mlp", "head", "conv", "head_dim", "expert", "layer"})
"""Kinds of structures that embedding and output have no part in."""


_REMEDY = "Ask for less, protect fewer layers or allow more kinds"
_LARGER = "Ask for a larger model, protect fewer layers or allow more kinds"

_MEASURED = 16
"""Samples that a masked model is run on: differences between parts of the width are many times their error."""

_BLOCKS = 256, 32
"""Numbers in a block of a quantised file, along the width: a multiple of the first of them that fits stays one."""

_ROUNDS = 4
"""Iterations of the solver for the other kinds beside a given residual width: each corrects the error of the last."""

_ENOUGH = 0.85
"""Threshold above which the kinds not in ``first`` shrink too, as a fraction of the units of those in it.

What is left of a layer that loses more does little, and a few heads are then the smaller loss."""


@dataclass(frozen=True)
class WidthCandidate:
    """A selection to compare with others.

    Args:
        part: the share of residual width in the removed parameters.
        choices: the choice for each slot.
        notes: remarks on it, for the report.
    """

    part: float
    choices: list[Choice]
    notes: list[str]


def choose_uniform(selection: Selection, fraction_for: Callable[[Mapping[int, Choice], str], float]) -> list[Choice]:
    """The same choice for the same slot of each layer: the nearest to the fraction that the stock config accepts.

    Kinds with large units come first, so that the small ones make up for what rounding leaves. ``fraction_for``
    gives the fraction for the slots of a kind without a choice, given the others' choices.
    """
    slots, facts = selection.slots, facts_of(selection.graph_module)
    loads_as_stock = stock_check(selection.graph_module, facts[Dependencies].axes, facts[Groups].all)

    def accepts(choices: Mapping[int, Choice]) -> bool:
        return loads_as_stock(selection.removal_for([choices.get(n, (0, 0)) for n in range(len(slots))]).plan)

    fixed: dict[int, Choice] = {}
    for alike in _slots_over_layers(selection):
        slot = slots[alike[0]]
        fraction = fraction_for(fixed, slot.kind)
        for pick in (*_nearest(slot, fraction), (0, 0)):
            trial = {**fixed, **dict.fromkeys(alike, pick)}
            if pick[1] == 0 or accepts(trial):
                fixed = trial
                break
        if fixed[alike[0]][1] == 0 and fraction > 0:
            selection.note(f"{slot.kind} stays whole: no width near the ratio fits the stock config")
    return [fixed[index] for index in range(len(slots))]


def _slots_over_layers(selection: Selection) -> list[list[int]]:
    """The numbers of slots that differ only in their layer, those with the largest units first."""
    slots, found = selection.slots, dict[object, list[int]]()
    for index, slot in enumerate(slots):
        names = []
        for option in slot.options:
            group = option.group
            place = "" if group is None or group.block is None else group.name.removeprefix(group.block)
            names.append((place or (group.name if group is not None else ""), option.size, option.step))
        found.setdefault((slot.kind, tuple(names)), []).append(index)

    def unit_cost(alike: list[int]) -> float:
        same = [slots[i] for i in alike]
        return removed_by(selection.budget, same, [(0, slot.options[0].more(0) or 0) for slot in same])

    return sorted(found.values(), key=lambda alike: -unit_cost(alike))


def _nearest(slot: Slot, fraction: float) -> Iterator[Choice]:
    found: list[tuple[float, int, int]] = []
    for i, option in enumerate(slot.options):
        removed: int | None = 0
        while removed is not None:
            found.append((abs(removed / option.size - fraction), i, removed))
            removed = option.more(removed)
    # each builds the model on ``meta``, and if any fits, one of the nearest few does
    for _, i, removed in sorted(found)[:40]:
        yield i, removed


def _check_parts(name: str, value: Any) -> tuple[float, ...]:
    wanted = "fractions above 0 and at most 1, in rising order"
    if not isinstance(value, tuple | list):
        raise refuse(name, value, wanted)
    found = tuple(float(number(name, one, above=0, most=1)) for one in value)
    if list(found) != sorted({*found}):
        raise refuse(name, value, wanted)
    return found


_check_ratio = partial(by_kind_or_one, check=partial(number, least=0, below=1, error=RatioError))


@dataclass(frozen=True, eq=False)
class SelectByRatioPass(SelectPass):
    """Removes the fraction ``ratio`` of the model's parameters.

    Local ranking solves for the one fraction of units that removes it, rounds the kinds with large units first, solves
    again for the rest, and settles the remainder unit by unit where it costs least.
    """

    name: ClassVar[str] = "select-by-ratio"
    ratio: float | tuple[tuple[str, float], ...] = argument(
        DEFAULT_RATIO,
        """Fraction of all parameters to remove, in [0, 1). By kind, as in ``{"mlp": 0.3, "head": 0.1}``: the fraction
        of the parameters in structures of that kind, over all layers; only these kinds then shrink.""",
        check=_check_ratio,
    )
    first: tuple[str, ...] = argument(
        (),
        """Only these kinds shrink as long as at most 85% of their units have to go; beyond that the other ``kinds``
        lose the rest. All shrink alike if that does not suffice, and in models without such units.""",
        check=lambda name, value: as_kinds(name, value) if value != () else (),
    )
    target: str = argument(
        "",
        """In place of ratio and budget, the size or speed of the slim model: ``100M`` parameters, ``80MB`` of weights,
        ``80MB@q4_k_m`` for a GGUF file, ``6GB`` of memory with a ``context``, or a part of the dense model, as in
        ``0.8x params``, ``0.5x macs``, ``0.5x kv``, and of its speed, as in ``1.3x decode`` by the times that
        ``fxprune bench --sweep`` measured, or ``1.3x decode@times.json``.""",
        check=check_target,
    )
    context: int = argument(0, "Tokens of context, for a target of memory; 0 for none.", least=0)
    width: tuple[float, ...] = argument(
        (),
        """Candidate shares of residual width in the removed parameters, in rising order, tried if ``channel`` is one of
        several ``kinds`` and has scores. Starting from no share, the masked model is run on calibration samples with
        each, as long as its divergence from the dense model falls. A model with a large vocabulary has many parameters
        there, and can lose more of its width. A width that is a multiple of 256, or else of 32, as the blocks of
        quantised files are, stays one unless ``round_to`` says otherwise. Empty: it shrinks as other kinds do. Without
        samples it stays whole, and where the classes of the model cannot express less.""",
        check=_check_parts,
    )
    compensate: Pass | None = argument(
        None,
        """The fit of candidates of ``width``, on other samples than they are then run on. If the masked model is better
        with less width, further shares are tried as long as the divergence of the fitted one falls, or else the shares
        before: a fit makes up for more of some removals than of others. None to compare masked models alone.""",
        check=pass_argument("compensate"),
    )
    wants: ClassVar[tuple[type[Fact], ...]] = (*SelectPass.wants, Calibration, Runnable)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.ratio, tuple):
            object.__setattr__(self, "kinds", tuple(kind for kind, _ in self.ratio))
        if self._target is None:
            if self.context:
                raise self._conflict("context", "there is no target for it")
            return
        for name in ("ratio", "budget"):
            if getattr(self, name) != getattr(SelectByRatioPass, name):
                raise self._conflict(name, "a target states both quantity and amount")
        if self._target.budget not in PHASES:
            check_budget("target", self._target.budget)

    def _conflict(self, name: str, why: str) -> ArgumentError:
        value = getattr(self, name)
        what, remedy = f"${name}={value} beside $target={self.target!r}: {why}", f"Leave ${name} or $target out"
        return ArgumentError(what, where=name, remedy=remedy, argument=name, value=value)

    @property
    def _target(self) -> Target | None:
        return parse_target(self.target, self.context or None) if self.target else None

    @property
    def asked(self) -> dict[str, float]:
        by_target = isinstance(self.ratio, tuple) or self.budget != "params" or self.target
        return {} if by_target else {"ratio": self.ratio}  # type: ignore[dict-item]

    @property
    def optional_kinds(self) -> tuple[str, ...]:
        """Residual width, if it is measured how far it goes."""
        beside = {*map(bare_kind, self.kinds)} - {"channel"}
        return ("channel",) if self.width and beside and not isinstance(self.ratio, tuple) else ()

    def budget_of(self, graph_module: fx.GraphModule) -> str:
        if self._target is None:
            return self.budget
        name = self._target.budget
        if name not in PHASES:
            return name
        place = times_file(count_parameters(graph_module), device_of(graph_module))
        if not place.is_file():
            what = f"$target is {self.target!r}, and this model was not timed on this device"
            remedy = "Run `fxprune bench MODEL --sweep` first, or name a table, as in '1.3x decode@times.json'"
            raise ArgumentError(what, where="target", remedy=remedy, argument="target", value=self.target)
        return f"{name}@{place}"

    def slots_of(self, slots: list[Slot], budget: Budget) -> list[Slot]:
        """Options that shrink the budget, and at least half as much as the best one of their slot.

        So no MLP goes for a smaller cache, and of heads those of keys and values. Residual width goes in blocks.
        """
        slots = [self._in_blocks(slot) for slot in slots]
        if self.budget == "params" and not self.target:
            return slots
        found = []
        for slot in slots:
            gains = [removed_by(budget, [slot], [(i, option.size)]) for i, option in enumerate(slot.options)]
            pairs = zip(slot.options, gains, strict=True)
            options = tuple(option for option, gain in pairs if gain > 0 and gain >= max(gains) / 2)
            found += [replace(slot, options=options)] if options else []
        return found

    def _in_blocks(self, slot: Slot) -> Slot:
        """The slot, with steps of blocks if it is of a measured residual width that ``round_to`` says nothing of."""
        rounded = self.round_to != 1 if not isinstance(self.round_to, tuple) else "channel" in dict(self.round_to)
        if rounded or slot.kind not in self.optional_kinds:
            return slot
        return replace(slot, options=tuple(replace(one, step=lcm(one.step, _block(one.size))) for one in slot.options))

    def without_target(self, graph_module: fx.GraphModule) -> SelectByRatioPass:
        """The same with a ratio that removes as much as the target asks for."""
        if self._target is None:
            return self
        name = self.budget_of(graph_module)
        budget = make_budget(name, graph_module, facts_of(graph_module)[Dependencies].axes)
        return replace(self, target="", context=0, budget=name, ratio=self._ratio(budget))

    def reached(self, selection: Selection, removal: Removal) -> Reached | None:
        target, budget = self._target, selection.budget
        if target is None:
            return None
        return Reached(target.text, budget.word, target.of(budget.total), budget.total, budget.left(removal))

    def foresee_model(self, model: nn.Module) -> None:
        target = self._target
        name, _, file_format = (self.budget if target is None else target.budget).partition("@")
        if isinstance(self.ratio, tuple) or name not in ("params", "bytes") or (target is None and name != "params"):
            return
        if target is not None and target.part and file_format:
            return  # a part of a size that the graph will show
        # embedding and output are all that may stay; of a file, whose types are not known yet, with the least bytes
        held: Any = model
        ends = [attempt(held.get_input_embeddings), attempt(held.get_output_embeddings)]
        inside = {bare_kind(kind) for kind in self.kinds} <= _INSIDE_BLOCKS
        stay = {parameter for end in ends if inside and isinstance(end, nn.Module) for parameter in end.parameters()}
        each = least_each(file_format) if file_format else 0.0

        def size(parameters: Iterable[nn.Parameter]) -> float:
            sizes = ((p.numel(), p.element_size()) for p in parameters)
            return float(sum(number * (1 if name == "params" else each or width) for number, width in sizes))

        dense, least = float("inf") if file_format else size(model.parameters()), size(stay)
        word = "parameters" if name == "params" else "bytes"
        wanted = (1 - self.ratio + CLOSE) * dense if target is None else amount_below(self.target, target, dense, word)
        if wanted < least:
            what = f"embedding and output, which $kinds {listed(self.kinds)} leave whole, are {least:,.0f} {word}"
            if target is None:
                what = f"the largest reachable ratio is below {1 - least / dense:.1%}: {what} of {dense:,.0f}"
            raise self._refuse(what)

    def _refuse(self, what: str) -> RatioError:
        name = "target" if self.target else "ratio"
        remedy = _LARGER if self.target else _REMEDY
        value = getattr(self, name)
        return RatioError(f"${name} is {value!r}: {what}", where=name, remedy=remedy, argument=name, value=value)

    def _ratio(self, budget: Budget) -> float:
        """The fraction of the budget to remove."""
        if self._target is None:
            return self.ratio  # type: ignore[return-value]
        return 1 - amount_below(self.target, self._target, budget.total, budget.word) / budget.total

    def cost(self, samples: int) -> PassCost:
        """The dense model and every masked one, if residual width may go.

        Fits of candidates are left out: only models that do better with less width come to them.
        """
        if not self.width or "channel" not in map(bare_kind, self.kinds):
            return PassCost()
        measured = self._measured(samples)
        return PassCost(runs=(2 + len(self.width)) * measured, batch=min(4, measured), outputs=4)

    def require_reachable(self, selection: Selection) -> None:
        next(self._trials(selection))  # numbers of units that can be reached do not depend on scores

    def _out_of_reach(self, selection: Selection, ratio: float, largest: float) -> RatioError:
        """The refusal of a ratio, by the largest that can be reached."""
        names, word = ("part", "protect", "round_to", "tensor_parallel"), selection.budget.word
        changed = [name for name in names if getattr(self, name) != getattr(type(self), name)]
        limits = ", ".join(f"${name} {listed(getattr(self, name))}" for name in ("kinds", *changed))
        if self.target:
            error = self._refuse(f"with {limits} at least {(1 - largest) * selection.budget.total:,.0f} {word} stay")
        else:
            reachable = f"with {limits} the largest reachable ratio is {largest:.1%}"
            what = f"{ratio:.1%} of the {word} cannot be removed: {reachable}"
            error = RatioError(what, where="ratio", remedy=_REMEDY, argument="ratio", value=self.ratio)
        error.reachable = largest
        return error

    def choose(self, selection: Selection) -> list[Choice]:
        trials = self._trials(selection)
        chosen = next(trials)
        known = facts_of(selection.graph_module).get(Calibration)
        if known is not None and self._width_is_measured(selection):
            chosen = self._narrowed(selection, known.samples, chosen, trials)
        for line in chosen.notes:
            selection.note(line)
        return chosen.choices

    def _narrowed(
        self, selection: Selection, samples: Sequence[Sample], whole: WidthCandidate, narrower: Iterator[WidthCandidate]
    ) -> WidthCandidate:
        """The candidate that models lead to by their divergence: masked ones, and from there on fitted ones.

        Fitted ones may also lead back: a fit makes up for more of some removals than of others.
        """
        candidates, at, changes = [whole], 0, list[str]()

        def candidate(place: int) -> WidthCandidate | None:
            if place == len(candidates):
                candidates.extend(itertools.islice(narrower, 1))
            return candidates[place] if 0 <= place < len(candidates) else None

        if candidate(1) is None:
            return whole
        for name, measure in self._measures(selection, samples):
            before, least = at, measure(candidates[at].choices)
            first = least
            for step in (1, -1):
                while (one := candidate(at + step)) is not None and (found := measure(one.choices)) < least:
                    least, at = found, at + step
                if at != before:
                    shares = f"{least:.2f} at {candidates[at].part:.0%}, {first:.2f} at {candidates[before].part:.0%}"
                    changes.append(f"divergence of the {name} model {shares}")
                    break
            if not at:  # fits take much longer than runs, and changed nothing there where it was tried
                break
        if changes:
            part = candidates[at].part
            selection.note(f"residual width is {part:.0%} of what is removed: {'; '.join(changes)}")
        return candidates[at]

    def _measures(
        self, selection: Selection, samples: Sequence[Sample]
    ) -> Iterator[tuple[str, Callable[[Sequence[Choice]], float]]]:
        """Yield functions that give the divergence of the masked model: as it is, and after a fit on other samples."""
        graph_module = selection.graph_module
        measured, others = hold_out(samples, self._measured(len(samples)))
        divergence = divergence_by_removal(graph_module, measured, self.name)

        def fitted(choices: Sequence[Choice]) -> float:
            assert self.compensate is not None
            removal, work = selection.removal_for(choices), fork(graph_module)
            name = f"candidate-{removal.plan.digest}"
            known = cached(f"{name}.json")
            if known is not None:
                return float(json.loads(known.read_text("utf-8")))
            facts = facts_of(work)
            facts.put(removal)
            facts.put(replace(facts[Calibration], samples=others))
            with resume_scope(name):
                found = divergence(removal, self.compensate(work, inplace=True).graph_module)
            write_cached(f"{name}.json", lambda file: file.write_text(json.dumps(found), encoding="utf-8"))
            uncache(name)  # as large as the weights
            return found

        yield "masked", lambda choices: divergence(selection.removal_for(choices))
        if self.compensate is not None and others and len(others) >= world_size():
            yield "fitted", fitted

    def _measured(self, samples: int) -> int:
        """The number of samples that candidates are run on; they are fitted on none of them."""
        return min(_MEASURED, samples if self.compensate is None else max(1, samples // 2))

    def _width_is_measured(self, selection: Selection) -> bool:
        """Whether residual width is one of several kinds that may shrink, and ``width`` says how far."""
        kinds = {slot.kind for slot in selection.slots}
        return bool(self.width) and not isinstance(self.ratio, tuple) and "channel" in kinds and len(kinds) > 1

    def _trials(self, selection: Selection) -> Iterator[WidthCandidate]:
        """Yield candidates by rising share of residual width.

        Raises:
            RatioError: the ratio is out of reach with every share.
        """
        if not self._width_is_measured(selection):
            notes: list[str] = []
            yield WidthCandidate(0.0, self._choose_all(replace(selection, note=notes.append)), notes)
            return
        whole, total = [(0, 0)] * len(selection.slots), selection.budget.total
        wanted, others = self._ratio(selection.budget) * total, {slot.kind for slot in selection.slots} - {"channel"}
        tried, refused = list[list[Choice]](), None
        for part in (0.0, *self.width):
            decided = self._solve_of(selection, ("channel",), whole, part * wanted) if part else whole
            if decided is None:
                break
            if decided in tried:  # the same width after rounding
                continue
            notes = []
            rest = replace(_of_kinds(selection, others, decided), note=notes.append)
            left = wanted - removed_by(selection.budget, selection.slots, decided)
            try:
                # an element in the row of a channel and in that of another unit counts once
                for _ in range(_ROUNDS if part else 1):
                    notes.clear()
                    choices = _merged(selection, others, decided, self._choose_rest(rest, max(left, 0.0) / total))
                    left += wanted - removed_by(selection.budget, selection.slots, choices)
                self._check(replace(selection, note=notes.append), choices, wanted / total, total)
            except RatioError as error:
                refused = error
            else:
                tried.append(decided)
                yield WidthCandidate(part, choices, notes)
        if not tried and refused is not None:
            if refused.reachable is None:
                raise refused
            raise self._out_of_reach(selection, wanted / total, self._largest(selection))

    def _largest(self, selection: Selection) -> float:
        """The largest ratio that can be reached with some share of the width, to a thousandth."""

        def reaches(ratio: float, part: float) -> bool:
            decided = self._solve_of(selection, ("channel",), whole, part * ratio * total) if part else whole
            if decided is None:
                return False
            choices = _merged(selection, others, decided, most)
            return removed_by(selection.budget, selection.slots, choices) >= ratio * total

        whole, total = [(0, 0)] * len(selection.slots), selection.budget.total
        others = {slot.kind for slot in selection.slots} - {"channel"}
        most = BudgetSolver(_of_kinds(selection, others, whole), 0.0).most()
        thousandths = range(1000)
        found = bisect_left(thousandths, 1, key=lambda n: not any(reaches(n / 1000, one) for one in (0.0, *self.width)))
        return max(found - 1, 0) / 1000

    def _choose_all(self, selection: Selection) -> list[Choice]:
        """Choices for all slots, whatever ``width`` says."""
        if not isinstance(self.ratio, tuple):
            ratio = self._ratio(selection.budget)
            choices = self._choose_rest(selection, ratio)
            self._check(selection, choices, ratio, selection.budget.total)
            return choices
        whole = [(0, 0)] * len(selection.slots)
        for spelled, ratio in self.ratio:
            kind = bare_kind(spelled)
            part, size = _of_kinds(selection, (kind,), whole), selection.sizes.get(kind, 0.0)
            choices = self._choose(part, ratio, size)
            self._check(part, choices, ratio, size)
            whole = _merged(selection, (kind,), whole, choices)
        return whole

    def _choose_rest(self, selection: Selection, ratio: float) -> list[Choice]:
        """Choices that remove a fraction of the budget, by the kinds in ``first`` if they suffice."""
        whole, total = [(0, 0)] * len(selection.slots), selection.budget.total
        own = sum(selection.sizes.get(kind, 0.0) for kind in self.first)
        for_memory = bool(self.context) and own < sum(selection.sizes.values()) - own  # of which they are a small part
        if for_memory or not any(slot.kind in self.first for slot in selection.slots):
            return self._choose(selection, ratio, total)
        part = _of_kinds(selection, self.first, whole)
        if BudgetSolver(part, ratio * total).fraction({}) <= _ENOUGH:
            return _merged(selection, self.first, whole, self._choose(part, ratio, total))
        # the other kinds lose what is left beyond that, and come first, since their units are larger
        enough = removed_by(part.budget, part.slots, [(0, _ENOUGH * slot.options[0].most) for slot in part.slots])
        others = {slot.kind for slot in selection.slots} - {*self.first}
        if decided := self._solve_of(selection, others, whole, ratio * total - enough):
            left = ratio * total - removed_by(selection.budget, selection.slots, decided)
            if choices := self._solve_of(selection, self.first, decided, left):
                return choices
        return self._choose(selection, ratio, total)  # all kinds alike where they do not suffice

    def _solve_of(
        self, selection: Selection, kinds: Collection[str], decided: Sequence[Choice], target: float
    ) -> list[Choice] | None:
        """Choices with those for the slots of some kinds solved for; None if they cannot lose so much."""
        part = _of_kinds(selection, kinds, decided)
        solver = BudgetSolver(part, target)
        if solver.removed(solver.most()) < target:
            return None
        return _merged(selection, kinds, decided, self._solve(part, solver))

    def _choose(self, selection: Selection, ratio: float, whole: float) -> list[Choice]:
        """Choices that remove a fraction of ``whole``."""
        solver = BudgetSolver(selection, ratio * whole)
        largest = solver.removed(solver.most()) / max(whole, 1)
        if not ratio <= largest + CLOSE:
            raise self._out_of_reach(selection, ratio, largest)
        return self._solve(selection, solver)

    def _solve(self, selection: Selection, solver: BudgetSolver) -> list[Choice]:
        if self.uniform:
            return choose_uniform(selection, lambda fixed, _: solver.fraction(fixed))
        local = self.ranking == "local"
        return solver.repair(solver.local() if local else solver.globally(by_rest=self.ranking == "auto"))

    def _check(self, selection: Selection, choices: Sequence[Choice], ratio: float, whole: float) -> None:
        """Note what is removed of ``whole``, and whether that misses a ratio; refuse uniform choices far below it."""
        word, achieved = selection.budget.word, removed_by(selection.budget, selection.slots, choices) / max(whole, 1)
        if self.uniform and ratio - achieved > 0.05:
            accepted = f"with $kinds {listed(self.kinds)} the stock config accepts {achieved:.1%}"
            what = f"{ratio:.1%} of the {word} cannot be removed with the same widths in all layers: {accepted}"
            remedy = "Leave out $uniform; the checkpoint then has a modelling file of its own"
            raise RatioError(what, where="uniform", remedy=remedy, argument="uniform", value=True)
        if self.budget != "params":  # what became of a target has a line of its own
            selection.note(f"removed {achieved:.1%} of {whole:,.0f} {word}")
        if abs(achieved - ratio) > CLOSE:
            what = "the target is missed: removed" if self.target else "ratio"
            selection.note(f"{what} {achieved:.2%} instead of {ratio:.2%}: the units are too large to come nearer")


def _block(width: int) -> int:
    """The size of the blocks that a width is a multiple of, the larger one if it is of both; 1 if of none."""
    return next((block for block in _BLOCKS if width % block == 0), 1)


def _merged(
    selection: Selection, kinds: Collection[str], decided: Sequence[Choice], choices: Iterable[Choice]
) -> list[Choice]:
    """Choices for all slots: new ones for the slots of ``kinds``, ``decided`` ones for the others."""
    found, pairs = iter(choices), zip(selection.slots, decided, strict=True)
    return [next(found) if slot.kind in kinds else choice for slot, choice in pairs]


def _of_kinds(selection: Selection, kinds: Collection[str], decided: Sequence[Choice]) -> Selection:

    def removal_for(choices: Sequence[Choice]) -> Removal:
        return selection.removal_for(_merged(selection, kinds, decided, choices))

    return replace(selection, slots=[s for s in selection.slots if s.kind in kinds], removal_for=removal_for)


@dataclass(frozen=True, eq=False)
class SelectByGroupRatioPass(SelectPass):
    """Removes the fraction ``group_ratio`` of the units of every group, rounded to the nearest number.

    Source: LLM-Pruner's ``--pruning_ratio``. With ``global`` ranking it is the fraction of all units of a kind, and
    ``auto`` is ``local``.
    """

    name: ClassVar[str] = "select-by-group-ratio"
    group_ratio: float | tuple[tuple[str, float], ...] = argument(
        0.25,
        """Fraction of the units of each group to remove, in [0, 1); also by kind, as in ``{"mlp": 0.3, "head": 0.1}``:
        only these kinds then shrink.""",
        check=_check_ratio,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.group_ratio, tuple):
            object.__setattr__(self, "kinds", tuple(kind for kind, _ in self.group_ratio))

    @property
    def asked(self) -> dict[str, float]:
        return {} if isinstance(self.group_ratio, tuple) else {"group_ratio": self.group_ratio}

    def choose(self, selection: Selection) -> list[Choice]:
        ratio = {slot.kind: of_kind(self.group_ratio, slot.kind, 0.0) for slot in selection.slots}
        if self.uniform:
            return choose_uniform(selection, lambda _, kind: ratio[kind])
        if self.ranking != "global":
            return [slot.choose(ratio[slot.kind]) for slot in selection.slots]
        values = normalised(selection.slots)
        thresholds: dict[str, float] = {}
        for kind in ratio:
            pairs = zip(selection.slots, values, strict=True)
            pool = sorted(value for slot, row in pairs if slot.kind == kind for value in row)
            index = round(ratio[kind] * len(pool))
            thresholds[kind] = pool[index] if index < len(pool) else float("inf")
        return below_threshold(selection.slots, values, thresholds.__getitem__)
