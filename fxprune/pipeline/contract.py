"""The pass contract: facts needed and given, changes declared and checked; findings that pipelines share.

A pass takes a graph module and returns torch's ``PassResult``. It declares the facts that it needs, gives and makes
stale, and what it changes; all of that is compared with what it did. A pass that changes something works on a copy
unless the caller asks for the work to be done in place, and what comes out then shares no tensor with what went in.
"""

from __future__ import annotations

import hashlib
import logging
import time
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import Field, dataclass, field, fields, is_dataclass
from operator import is_
from typing import Any, ClassVar, Self, TypeVar, get_args

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase
from torch.fx.passes.infra.pass_base import PassResult as PassResult

from fxprune.errors import PassError
from fxprune.graph.compat import tree_leaves
from fxprune.graph.context import default_modes, setting, wrap_errors
from fxprune.graph.facts import Change, Fact, Notes, Source, add_note, facts_of, fork, reading, unshare
from fxprune.graph.tensors import comparable, device_of, version_of, weights
from fxprune.offload.files import cache_folder, release_freed
from fxprune.offload.prefetch import free_bytes, use_prefetcher
from fxprune.offload.ranks import check_same
from fxprune.pipeline.arguments import Arguments, flag, format_value, function, spell

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Shows progress: ``track(items, what, total)`` yields the items."""


def no_progress(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    """Return ``items`` as they are, without showing progress."""
    return items


_TRACK: ContextVar[Track] = ContextVar("track", default=no_progress)


def tracking(track: Track | None) -> AbstractContextManager[None]:
    """Show the progress of passes by ``track`` inside this context; None leaves it as it is."""
    return setting(_TRACK, _TRACK.get() if track is None else track)


def tracked(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    """Yield ``items`` and show their progress as the caller of the pass asked for."""
    return _TRACK.get()(items, what, total)


def check_track(track: Any) -> None:
    """Raise :class:`~fxprune.errors.ArgumentError` unless ``track`` can be called."""
    function("track", track, "a function that is called as track(items, what, total) and yields the items")


STAGES = (
    *("prepare", "discover", "importance", "select", "teach", "compensate"),
    *("shrink", "tune", "emit", "report", "save"),
)
"""The stages of a prune, in the order in which they run."""

_LOGGER = logging.getLogger("fxprune")
"""Logs the duration of each pass, at level ``INFO``."""

Kinds = tuple[type[Fact], ...]

T = TypeVar("T")

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
        weights: float32 numbers kept for each weight.
        if_free: whether these are only kept where they take at most half of the free memory.
        recorded: samples that it records for training by a later pass.
        given: samples that it gives to later passes; 0 for those that there were.
        sweeps: times that all weights are read again and again, where they are in files.
        updates: steps that read and write each weight and two moments of it in float32, where they are in files.
    """

    runs: float = 0.0
    batch: int = 0
    backward: bool = False
    outputs: int = 1
    weights: float = 0.0
    if_free: bool = False
    recorded: int = 0
    given: int = 0
    sweeps: float = 0.0
    updates: float = 0.0


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
    """Whether it writes to tensors in place. A pass that only replaces tensors is spared a copy of all of them."""
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

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Refuse a class with arguments that is no dataclass: nothing would check them."""
        if any(isinstance(value, Field) for value in vars(cls).values()):
            remedy = "Decorate it with @dataclass(frozen=True, eq=False)"
            where = f"pass {getattr(cls, 'name', cls.__name__)}"
            raise PassError("its class is no dataclass", where=where, remedy=remedy)
        made = super().__new__(cls)
        if not is_dataclass(cls):  # which calls no `__post_init__`
            made._check_declarations()
        return made

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_declarations()

    def _check_declarations(self) -> None:
        if not isinstance(getattr(self, "name", None), str):
            remedy = "Give its class a `name`, as in `name: ClassVar[str] = 'my-pass'`"
            raise PassError("it has no name", where=type(self).__name__, remedy=remedy)
        where = f"pass {self.name}"
        for word, known in (("stage", ("", *STAGES)), ("changes", get_args(Change))):
            if getattr(self, word) not in known:
                remedy = f"Write one of {', '.join(filter(None, known))}"
                raise PassError(f"`{word}` is {format_value(getattr(self, word))}", where=where, remedy=remedy)
        for word in ("needs", "wants", "gives", "drops", "keeps"):
            kinds = getattr(self, word)
            are_kinds = isinstance(kinds, tuple | list) and all(isinstance(one, type) for one in kinds)
            if not are_kinds or not all(issubclass(one, Fact) for one in kinds):
                remedy = "Write classes of facts in a tuple, as in (fxprune.Groups,)"
                raise PassError(f"`{word}` is {format_value(kinds)}", where=where, remedy=remedy)

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
            check_same(lambda: self._shared(graph_module), where=f"pass {self.name}")
            run = run_apart if self.changes != "nothing" and not inplace else remembered
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
        """Refuse early what this pass would refuse, as far as a Hugging Face model shows it before the trace."""

    def foresee(self, graph_module: fx.GraphModule, given: Kinds) -> None:
        """Refuse early what this pass would refuse, as far as the facts show that an earlier pass just gave."""

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

    def _shared(self, graph_module: fx.GraphModule) -> dict[str, Any]:
        """Values that must be equal in all processes that run this pass together, by name."""
        named = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights(graph_module)]
        return {"the pass": str(self), "the weights": named, "whether they can be resumed": cache_folder() is not None}

    def _run(self, graph_module: fx.GraphModule) -> PassResult:
        source = facts_of(graph_module).get(Source)
        changes_in = _watch(graph_module, hold=source is None or not source.shares)
        held = {type(fact): fact for fact in facts_of(graph_module)}
        with reading(self.name, (*self.needs, *self.wants, *self.gives, *self.drops)):
            result: Any = self.call(graph_module)
        if not (isinstance(result, PassResult) and isinstance(result.graph_module, fx.GraphModule)):
            remedy = "Return fxprune.PassResult(graph_module, modified)"
            raise PassError(f"`call` returned {format_value(result)}", where=f"pass {self.name}", remedy=remedy)
        release_freed()
        changed = changes_in(result.graph_module)
        allowed = {"graph": {"graph", "weights"}, "weights": {"weights"}, "nothing": set[str]()}[self.changes]
        for part in sorted(changed - allowed):
            what = f"changed the {part}, and declares to change {self.changes}"
            raise PassError(what, where=f"pass {self.name}", remedy=_REPORT)
        if changed and not result.modified:
            what = f"changed the {min(changed)} and says that it did not"
            raise PassError(what, where=f"pass {self.name}", remedy=_REPORT)
        facts = facts_of(result.graph_module)
        new = tuple(kind for kind in self.gives if facts.get(kind) is not held.get(kind))
        for kind in self.drops:
            facts.drop(kind, self.name)
        for part in changed:
            facts.drop_about(part, self.name, but=(*self.keeps, *new))
        self.ensures(result.graph_module)
        return PassResult(result.graph_module, bool(changed))


def run_apart(step: Pass, run: Callable[[fx.GraphModule], PassResult], graph_module: fx.GraphModule) -> PassResult:
    """Run a pass on an independent copy of a graph, and raise an error if it wrote to a tensor of the original."""
    work = fork(graph_module)
    if step.writes:
        unshare(work, graph_module)
    before = {name: version_of(tensor) for name, tensor in weights(graph_module)}
    result = run(work)
    for name, tensor in weights(graph_module):
        if version_of(tensor) != before[name]:
            what = f"wrote to {name} of the graph that it was given a copy of"
            raise PassError(what, where=f"pass {step.name}", remedy=_REPORT)
    unshare(result.graph_module, graph_module)
    return result


def _watch(graph_module: fx.GraphModule, *, hold: bool) -> Callable[[fx.GraphModule], set[Change]]:
    """Take a snapshot of a graph module, and return a function that lists the changes in a later one.

    ``hold`` keeps tensors alive to compare with. Without, a copy cannot be distinguished from a change once the
    original is gone, and counts as one; but in place dense tensors are freed as slim ones are made.
    """

    def nodes_of(module: fx.GraphModule) -> list[tuple[Any, ...]]:
        return [(node, node.target, node.args, node.kwargs) for node in module.graph.nodes]

    def spelled(node: fx.Node, target: Any, args: Any, kwargs: Any) -> tuple[object, ...]:
        return node.name, node.op, target, comparable(args), comparable(kwargs)

    def reference(tensor: torch.Tensor) -> Callable[[], torch.Tensor | None]:
        return (lambda: tensor) if hold else weakref.ref(tensor)

    nodes = nodes_of(graph_module)
    tensors = {name: (reference(one), version_of(one), one.shape) for name, one in weights(graph_module)}

    def differs(name: str, after: torch.Tensor) -> bool:
        """Whether a tensor holds other values, as far as is known: a copy does not."""
        known, version, shape = tensors[name]
        before = known()
        if before is after or shape != after.shape:
            return shape != after.shape or version != version_of(after)
        if before is None or version != version_of(before):
            return True
        return not before.is_meta and not torch.equal(before, after)

    def changes_in(after: fx.GraphModule) -> set[Change]:
        later = nodes_of(after)
        same = len(nodes) == len(later) and all(
            all(map(is_, old, new)) or spelled(*old) == spelled(*new) for old, new in zip(nodes, later, strict=True)
        )
        changed: set[Change] = set() if same else {"graph"}
        if any(name in tensors and differs(name, tensor) for name, tensor in weights(after)):
            changed.add("weights")
        return changed

    return changes_in


@dataclass
class _Findings:
    """Results of passes by their keys (pass, facts read, weights), and the digests that keys are made of."""

    given: dict[Any, tuple[tuple[Fact, ...], tuple[str, ...], Any]] = field(default_factory=dict)
    shared: dict[Any, tuple[Any, Any]] = field(default_factory=dict)
    bytes: int = 0
    digests: dict[int, tuple[weakref.ref[torch.Tensor], int, str]] = field(default_factory=dict)

    def graph_key(self, graph_module: fx.GraphModule) -> tuple[Any, ...]:
        """Cache key of a graph: a hash of its node names, and a digest of each weight."""
        digests = []
        for _, tensor in weights(graph_module):
            known = self.digests.get(id(tensor))  # while the tensor stays as it is
            if known is None or known[0]() is not tensor or known[1] != version_of(tensor):
                known = weakref.ref(tensor), version_of(tensor), digest_of(tensor)
                self.digests[id(tensor)] = known
            digests.append(known[2])
        return hash(tuple(node.name for node in graph_module.graph.nodes)), tuple(digests)


_FINDINGS: ContextVar[_Findings | None] = ContextVar("findings", default=None)


def sharing() -> AbstractContextManager[None]:
    """Share findings about the dense model among the prunes inside this context."""
    return setting(_FINDINGS, _Findings())


def remembered(step: Any, run: Callable[[fx.GraphModule], PassResult], graph_module: fx.GraphModule) -> PassResult:
    """Run a pass, or reuse the facts of an earlier run that read the same."""
    findings = _FINDINGS.get()
    costly = ("prepare", "discover", "importance", "teach")  # stages that serve selections of all sizes
    if findings is None or step.changes != "nothing" or step.stage not in costly:
        return run(graph_module)
    with reading("", None):
        facts = facts_of(graph_module)
        read = tuple(facts.get(kind) for kind in (*step.needs, *step.wants))
        key = _identity(step), _identity(read), *findings.graph_key(graph_module)
        if key in findings.given:
            given, notes, _ = findings.given[key]
            for kind in step.drops:
                facts.drop(kind, step.name)
            for fact in given:
                facts.put(fact)
            for line in notes:
                add_note(graph_module, line)
            return PassResult(graph_module, False)
        before = (facts.get(Notes) or Notes()).lines
    result = run(graph_module)
    with reading("", None):
        new = tuple(line for line in (facts.get(Notes) or Notes()).lines if line not in before)
        findings.given[key] = tuple(facts[kind] for kind in step.gives), new, (step, read)
    return result


def shared(graph_module: fx.GraphModule | None, key: Any, make: Callable[[], T]) -> T:
    """A finding about a dense model that is made once inside :func:`sharing`.

    Args:
        graph_module: its graph, or another with the same nodes and weights; None if ``key`` alone identifies it.
        key: values, and objects by identity, in tuples.
        make: computes the finding; a large one consists of tensors and tuples of them.
    """
    findings = _FINDINGS.get()
    if findings is None:
        return make()
    with reading("", None):
        place = _identity(key), None if graph_module is None else findings.graph_key(graph_module)
    if place in findings.shared:
        known: T = findings.shared[place][0]
        return known
    value = make()
    if claim(value, torch.device("cpu") if graph_module is None else device_of(graph_module)):
        findings.shared[place] = value, key
    return value


def claim(value: Any, device: torch.device) -> bool:
    """Whether a finding may be kept for later: all of them take at most a quarter of the memory of the device."""
    findings = _FINDINGS.get()
    if findings is None:
        return False
    size = sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
    fits = findings.bytes + size <= (free_bytes(device) + findings.bytes) / 4
    findings.bytes += size if fits else 0
    return fits


def digest_of(tensor: torch.Tensor) -> str:
    """A digest of the values of a tensor."""
    content = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(content.data, digest_size=16).hexdigest()


def _identity(value: Any) -> Any:
    """A key of a value: the fields of passes and facts, the identity of other objects."""
    if isinstance(value, Fact | PassBase):
        return type(value), *(_identity(getattr(value, one.name)) for one in fields(value))  # type: ignore[arg-type]
    if isinstance(value, tuple):
        return tuple(map(_identity, value))
    return value if value is None or isinstance(value, str | int | float) else (id(value),)
