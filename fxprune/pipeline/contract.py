"""The pass contract: facts needed and given, changes declared and checked.

A pass takes a graph module and returns torch's ``PassResult``. It declares the facts that it needs, gives and makes
stale, and what it changes; all of that is compared with what it did. A pass that changes something works on a copy
unless the caller asks for the work to be done in place, and what comes out then shares no tensor with what went in.
"""

from __future__ import annotations

import logging
import time
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, is_
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxprune.errors import PassError
from fxprune.graph.context import default_modes, wrap_errors
from fxprune.graph.facts import Change, Fact, Source, facts_of, fork, reading, unshare
from fxprune.graph.tensors import comparable, weights
from fxprune.offload.files import is_caching
from fxprune.offload.prefetch import use_prefetcher
from fxprune.offload.ranks import check_same
from fxprune.pipeline.arguments import Arguments, flag, function, spell
from fxprune.pipeline.sharing import remembered

__all__ = [
    "STAGES",
    "Pass",
    "PassCost",
    "PassResult",
    "Track",
    "check_track",
    "no_progress",
    "run_apart",
    "tracked",
    "tracking",
]

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Shows progress: ``track(items, what, total)`` yields the items."""


def no_progress(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    """Return ``items`` as they are, without showing progress."""
    return items


_TRACK: ContextVar[Track] = ContextVar("track", default=no_progress)


@contextmanager
def tracking(track: Track | None) -> Iterator[None]:
    """Show the progress of passes by ``track`` inside this context; None leaves it as it is."""
    token = _TRACK.set(_TRACK.get() if track is None else track)
    try:
        yield
    finally:
        _TRACK.reset(token)


def tracked(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    """Yield ``items`` and show their progress as the caller of the pass asked for."""
    return _TRACK.get()(items, what, total)


def check_track(track: Any, name: str = "track") -> None:
    """Raise :class:`~fxprune.errors.ArgumentError` unless ``track`` can be called."""
    function(name, track, "a function that is called as track(items, what, total) and yields the items")


STAGES = (
    *("prepare", "discover", "importance", "select", "teach", "compensate"),
    *("shrink", "tune", "emit", "report", "save"),
)
"""The stages of a prune, in the order in which they run."""

_LOGGER = logging.getLogger("fxprune")
"""Logs the duration of each pass, at level ``INFO``."""

Kinds = tuple[type[Fact], ...]

_REPORT = "This is a defect of the pass"

_CHECK = "Check that the model runs on the inputs and samples given, and the arguments of the pass"


@dataclass(frozen=True)
class PassCost:
    """Time and memory that a pass will take, estimated before any weight is read.

    Args:
        runs: samples run forward, or as much other work.
        batch: samples in memory at once.
        backward: whether all activations of these samples are kept, rather than those still to be read.
        outputs: copies of the model's outputs for these samples: logits, log-probabilities, their gradient.
        weights: memory kept for each weight, as a fraction of the bytes of the weights.
        recorded: samples that it records for training by a later pass.
    """

    runs: float = 0.0
    batch: int = 0
    backward: bool = False
    outputs: int = 1
    weights: float = 0.0
    recorded: int = 0


class Pass(Arguments, PassBase):
    """One step of the suite.

    Subclasses are frozen dataclasses (``@dataclass(frozen=True, eq=False)``: torch's ``PassManager`` compares passes)
    whose fields are the pass's arguments. They are called ``VerbNounPass`` and registered under :attr:`name`, the same
    in kebab-case. Arguments are declared by :func:`fxprune.argument`.
    """

    name: ClassVar[str]
    """The name under which it is registered."""
    stage: ClassVar[str] = ""
    """One of :data:`STAGES`."""
    changes: ClassVar[Change] = "graph"
    """The most that it may change: the graph, the weights, or nothing."""
    writes: ClassVar[bool] = True
    """Whether it writes to the memory of tensors. One that only puts others in their place is spared a copy of all."""
    needs: ClassVar[Kinds] = ()
    """Classes of the facts that must be known before."""
    preconditions: ClassVar[tuple[Callable[[fx.GraphModule, str], None], ...]] = ()
    """Further checks before it runs, as :func:`~fxprune.graph.tensors.require_weights`: of a graph, for a pass name."""
    wants: ClassVar[Kinds] = ()
    """Classes of the facts that are read if they are known."""
    gives: ClassVar[Kinds] = ()
    """Classes of the facts that are known after."""
    drops: ClassVar[Kinds] = ()
    """Classes of the facts that no longer hold after, whether or not anything changed."""
    prefetches: ClassVar[bool] = False
    """Whether it computes on the device of the prefetcher, if any: it reads weights only in runs of
    :mod:`fxprune.masking`, and the facts it gives are on the device of the weights."""
    keeps: ClassVar[Kinds] = ()
    """Classes of facts about the graph or weights that still hold after its change; all others are dropped."""

    def __call__(self, graph_module: fx.GraphModule, *, inplace: bool = False) -> PassResult:
        """Check the facts needed, run, and compare the outcome with the declarations.

        Args:
            inplace: change ``graph_module`` itself. By default a pass that changes something works on a copy, and one
                that only finds something out adds it to the facts about ``graph_module``.

        Raises:
            PassError: a fact is missing, a promised one was not given, something changed that was not declared, or the
                pass failed with what is no error of this package.
        """
        start = time.perf_counter()
        failed = wrap_errors(f"pass {self.name}", _CHECK, PassError)
        with default_modes(), use_prefetcher(self.prefetches), reading(self.name, None), failed:
            flag("inplace", inplace)
            self.check_arguments()
            self.requires(graph_module)
            check_same(partial(self._decisive, graph_module), where=f"pass {self.name}")
            apart = self.changes != "nothing" and not inplace
            run = run_apart if apart else remembered
            result = run(self, self._run, graph_module)
        _LOGGER.info("%s: %.1f s", self.name, time.perf_counter() - start)
        return result

    @abstractmethod
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Do the work on ``graph_module`` itself; ``modified`` says whether anything may have changed."""

    def __str__(self) -> str:
        """The spelling of the pass, as in ``select-by-ratio{ratio=0.3}``."""
        return spell(self.name, self)

    def cost(self, samples: int) -> PassCost:
        """Time and memory that it takes for a number of samples; next to nothing by default."""
        return PassCost()

    def check_arguments(self) -> None:
        """Raise if a required argument is missing; called before any pass runs."""

    def foresee_model(self, model: torch.nn.Module) -> None:
        """Raise what this pass will raise, as far as a Hugging Face model shows it before it is traced."""

    def foresee(self, graph_module: fx.GraphModule, given: Kinds) -> None:
        """Raise what this pass will raise, as far as facts show that an earlier pass of a pipeline just gave."""

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise :class:`~fxprune.errors.PassError` unless :attr:`needs` are known and :attr:`preconditions` hold."""
        facts = facts_of(graph_module)
        for kind in self.needs:
            if kind not in facts:
                raise facts.missing(kind, where=f"pass {self.name}")
        for check in self.preconditions:
            check(graph_module, self.name)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Raise :class:`~fxprune.errors.PassError` unless all of :attr:`gives` is known."""
        facts = facts_of(graph_module)
        for kind in self.gives:
            if kind not in facts:
                raise PassError(f"did not give {kind.__name__}", where=f"pass {self.name}", remedy=_REPORT)

    def _decisive(self, graph_module: fx.GraphModule) -> Mapping[str, Any]:
        """What processes that run this pass together must have in common, by its name in an error."""
        named = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights(graph_module)]
        return {"the pass": str(self), "the weights": named, "whether they can be resumed": is_caching()}

    def _run(self, graph_module: fx.GraphModule) -> PassResult:
        source = facts_of(graph_module).get(Source)
        before = _Print.of(graph_module, hold=source is None or not source.shares)
        held = {type(fact): fact for fact in facts_of(graph_module)}
        with reading(self.name, (*self.needs, *self.wants, *self.gives, *self.drops)):
            result = self.call(graph_module)
        changed = before.compare(result.graph_module)
        self._check(changed, result.modified)
        facts = facts_of(result.graph_module)
        new = tuple(kind for kind in self.gives if facts.get(kind) is not held.get(kind))
        for kind in self.drops:
            facts.drop(kind, self.name)
        for part in changed:
            facts.drop_about(part, self.name, but=(*self.keeps, *new))
        self.ensures(result.graph_module)
        return PassResult(result.graph_module, bool(changed))

    def _check(self, changed: frozenset[Change], said: bool) -> None:
        allowed = {"graph": {"graph", "weights"}, "weights": {"weights"}, "nothing": set[str]()}[self.changes]
        for part in sorted(changed - allowed):
            what = f"changed the {part}, and declares to change {self.changes}"
            raise PassError(what, where=f"pass {self.name}", remedy=_REPORT)
        if changed and not said:
            what = f"changed the {min(changed)} and says that it did not"
            raise PassError(what, where=f"pass {self.name}", remedy=_REPORT)


def run_apart(step: Pass, run: Callable[[fx.GraphModule], PassResult], graph_module: fx.GraphModule) -> PassResult:
    """Run a pass on a copy of a graph; the result shares no tensor with the original, and writes to it are errors."""
    work = fork(graph_module)
    if step.writes:
        unshare(work, graph_module)
    before = {name: _version(tensor) for name, tensor in weights(graph_module)}
    result = run(work)
    for name, tensor in weights(graph_module):
        if _version(tensor) != before[name]:
            what = f"wrote to {name} of the graph that it was given a copy of"
            raise PassError(what, where=f"pass {step.name}", remedy=_REPORT)
    unshare(result.graph_module, graph_module)
    return result


@dataclass(frozen=True)
class _Print:
    """The nodes of a graph module, and its tensors by name, as they were at one time."""

    nodes: _NodePrint
    tensors: Mapping[str, _TensorPrint]

    @classmethod
    def of(cls, graph_module: fx.GraphModule, *, hold: bool) -> _Print:
        """The print of a graph module; linear in the number of its nodes.

        ``hold`` keeps tensors alive to compare with. Without, a copy cannot be distinguished from a change once the
        original is gone, and counts as one; but in place dense tensors are freed as slim ones are made.
        """
        return cls(_nodes(graph_module), {name: _TensorPrint.of(t, hold=hold) for name, t in weights(graph_module)})

    def compare(self, after: fx.GraphModule) -> frozenset[Change]:
        changed: set[Change] = set()
        if not _same(self.nodes, _nodes(after)):
            changed.add("graph")
        if any(name in self.tensors and self.tensors[name].differs(tensor) for name, tensor in weights(after)):
            changed.add("weights")
        return frozenset(changed)


@dataclass(frozen=True)
class _TensorPrint:
    """A tensor at one time."""

    tensor: Callable[[], torch.Tensor | None]
    version: int
    shape: torch.Size

    @classmethod
    def of(cls, tensor: torch.Tensor, *, hold: bool) -> _TensorPrint:
        """Tensors made in inference mode count no versions."""
        return cls((lambda: tensor) if hold else weakref.ref(tensor), _version(tensor), tensor.shape)

    def differs(self, after: torch.Tensor) -> bool:
        """Whether ``after`` holds other values, as far as is known: a copy does not."""
        before = self.tensor()
        if before is after or self.shape != after.shape:
            return self.shape != after.shape or self.version != _version(after)
        if before is None or self.version != _version(before):
            return True
        return not before.is_meta and not torch.equal(before, after)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


_NodePrint = tuple[tuple[Any, ...], ...]
"""Of all nodes, in order, these themselves, their targets, their arguments, and those by name."""


def _nodes(graph_module: fx.GraphModule) -> _NodePrint:
    nodes = tuple(graph_module.graph.nodes)
    return nodes, *(tuple(map(attrgetter(part), nodes)) for part in ("target", "args", "kwargs"))


def _same(before: _NodePrint, after: _NodePrint) -> bool:
    """Whether two graphs have the same nodes, in name, op, target and arguments."""
    if len(before[0]) != len(after[0]):
        return False
    if all(all(map(is_, old, new)) for old, new in zip(before, after, strict=True)):  # as after most passes
        return True
    nodes = zip(zip(*before, strict=True), zip(*after, strict=True), strict=True)
    return all(all(map(is_, old, new)) or _spelled(old) == _spelled(new) for old, new in nodes)


def _spelled(node: tuple[Any, ...]) -> tuple[object, ...]:
    own, target, args, kwargs = node
    return own.name, own.op, target, comparable(args), comparable(kwargs)
