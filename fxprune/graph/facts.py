"""Facts about a graph, its source model and its repeated blocks, kept in ``GraphModule.meta``.

A stale fact is dropped: reading it is an error that names the pass that made it stale and one that gives it again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import fx, nn

from fxprune.errors import PassError
from fxprune.graph.context import setting
from fxprune.graph.tensors import CheckedGraph, as_parameter, copy_tensor, get_tensor, put, set_tensor, weights

Change = Literal["graph", "weights", "nothing"]
"""Effect of a pass: it changes the graph (its weights too), the weights alone, or nothing."""

_KEY = "fxprune"


class Fact:
    """Something known about a graph. Subclasses are frozen dataclasses."""

    about: ClassVar[Change] = "nothing"
    """Subject of the fact: ``graph`` or ``weights``, a change of which makes it stale, or ``nothing``."""
    missing_error: ClassVar[type[PassError]] = PassError
    """Class of the error if it is needed and missing."""
    open: ClassVar[bool] = False
    """Whether every pass may read the fact without declaring it."""
    remedy: ClassVar[str] = ""
    """Advice for that error, beside running the pass that gives it."""


F = TypeVar("F", bound=Fact)

_givers: list[Callable[[type[Fact]], tuple[str, ...]]] = []


def set_giver_lookup(find: Callable[[type[Fact]], tuple[str, ...]]) -> None:
    """Set the function that lists the passes giving a fact, for error messages; the registry of passes calls this."""
    _givers[:] = [find]


_readable: ContextVar[tuple[str, frozenset[type[Fact]]] | None] = ContextVar("readable", default=None)


def reading(name: str, kinds: Iterable[type[Fact]] | None) -> AbstractContextManager[None]:
    """Let only facts of ``kinds`` be read inside this context, the view of a pass ``name``; None for all facts."""
    return setting(_readable, None if kinds is None else (name, frozenset(kinds)))


class Facts:
    """The facts about one graph, by class."""

    def __init__(self) -> None:
        self._held: dict[type[Fact], Fact] = {}
        self._dropped: dict[type[Fact], str] = {}

    def __getitem__(self, kind: type[F]) -> F:
        """Return the fact of class ``kind``; if it is missing, the error names a pass that gives it."""
        found = self.get(kind)
        if found is None:
            raise self.missing(kind)
        return found

    def get(self, kind: type[F]) -> F | None:
        view = _readable.get()
        if view is not None and kind not in view[1] and not kind.open:
            raise PassError(
                f"reads the fact {kind.__name__}, and declares it in neither needs nor wants",
                where=f"pass {view[0]}",
                remedy="Declare it",
            )
        return self._held.get(kind)  # type: ignore[return-value]

    def __contains__(self, kind: object) -> bool:
        return kind in self._held

    def __iter__(self) -> Iterator[Fact]:
        return iter(tuple(self._held.values()))

    def put(self, fact: Fact) -> None:
        self._held[type(fact)] = fact
        self._dropped.pop(type(fact), None)

    def drop(self, kind: type[Fact], by: str) -> None:
        if self._held.pop(kind, None) is not None:
            self._dropped[kind] = by

    def drop_about(self, change: Change, by: str, but: tuple[type[Fact], ...] = ()) -> None:
        """Drop the facts that ``change`` makes stale: a change of the graph is also one of the weights."""
        stale = {"graph": ("graph", "weights"), "weights": ("weights",), "nothing": ()}[change]
        for kind in tuple(self._held):
            if kind.about in stale and kind not in but:
                self.drop(kind, by)

    def copy(self) -> Facts:
        twin = Facts()
        twin._held, twin._dropped = dict(self._held), dict(self._dropped)
        return twin

    def missing(self, kind: type[Fact], where: str = "", by: str = "") -> PassError:
        """Return the error for reading a missing fact; ``by`` is the pass that makes it stale, if not recorded."""
        by = by or self._dropped.get(kind, "")
        what = f"the fact {kind.__name__} is stale since pass {by}" if by else f"the fact {kind.__name__} is not known"
        *others, last = [name for find in _givers for name in find(kind)] or [""]
        givers = f"{', '.join(others)} or {last}" if others else last
        remedy = f"Run {givers} first" if givers else "Start from fxprune.trace(model).graph_module"
        return kind.missing_error(
            what, where=where or "graph_module", remedy=f"{remedy}. {kind.remedy}" if kind.remedy else remedy
        )


@dataclass(frozen=True)
class Notes(Fact):
    """Notes for the user about the prune: one sentence each, in order."""

    open: ClassVar[bool] = True

    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Runnable(Fact):
    """The graph can be run: the sizes written in it as numbers fit its tensors."""

    open: ClassVar[bool] = True


@dataclass(frozen=True)
class Shaped(Fact):
    """``node.meta["val"]`` has the shape and dtype of the value of each node."""

    open: ClassVar[bool] = True


def facts_of(graph_module: fx.GraphModule) -> Facts:
    """Return the facts about ``graph_module``, which must come from :func:`fxprune.trace`."""
    meta = getattr(graph_module, "meta", None)
    facts = meta.get(_KEY) if isinstance(meta, dict) else None
    if not isinstance(facts, Facts):
        raise PassError(
            f"nothing is known about this {type(graph_module).__name__}",
            where="graph_module",
            remedy="Start from fxprune.trace(model).graph_module",
        )
    return facts


def set_facts(graph_module: fx.GraphModule, facts: Facts) -> None:
    """Make ``facts`` the facts about ``graph_module``."""
    graph_module.meta[_KEY] = facts


def add_note(graph_module: fx.GraphModule, line: str) -> None:
    """Add ``line`` to the notes about ``graph_module`` unless it is there."""
    facts = facts_of(graph_module)
    lines = (facts.get(Notes) or Notes()).lines
    if line not in lines:
        facts.put(Notes((*lines, line)))


@dataclass(frozen=True)
class Blocks(Fact):
    """The repeated blocks of the model: their module paths, in order of definition."""

    open: ClassVar[bool] = True

    paths: tuple[str, ...] = ()


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Return the module paths of the outermost repeated blocks, in order of definition.

    A block is a child of a ``ModuleList`` or ``Sequential`` all of whose children are of one class and have
    children with parameters themselves: a list of plain linear layers is not a list of blocks. A ``ModuleList`` may mix
    a few classes that repeat, such as blocks with and without attention.
    """
    found: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or path in found or within(path, found):
            continue
        children = list(module)
        classes = len({type(child) for child in children})
        mixed = isinstance(module, nn.ModuleList) and 0 < classes < len(children)
        have_parts = (any(True for part in child.children() for _ in part.parameters()) for child in children)
        if (classes == 1 or mixed) and all(have_parts):
            found.extend(f"{path}.{name}" if path else name for name, _ in module.named_children())
    return tuple(found)


def owner_block(name: str, blocks: Collection[str]) -> str | None:
    """Return the block that ``name`` (a module path or tensor name) is or lies in; None if it is in none."""
    return next((path for path in (name, *_ancestors(name)) if path in blocks), None)


def within(name: str, paths: Iterable[str]) -> bool:
    """Whether ``name`` (a module path or tensor name) lies below one of the modules at ``paths``."""
    return not _ancestors(name).isdisjoint(paths)


@lru_cache(1 << 16)
def _ancestors(name: str) -> Set[str]:
    return {name[:end] for end, sign in enumerate(name) if sign == "."}


@dataclass(frozen=True, eq=False)
class Cut:
    """Pieces cut off a tensor of the model, to restore it; with the slim tensor they take the memory of the whole.

    Args:
        pieces: for each cut axis, in order, the kept positions, the removed ones and the values removed.
        whole: the tensor before the cut, if the cut also changed kept values; there are no pieces then.
    """

    names: tuple[str, ...]
    pieces: tuple[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor], ...]
    whole: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Source(Fact):
    """The model that a graph was traced from.

    Args:
        names: for each tensor the graph reads, all its names in the model; none for constants made by its code.
        example_inputs: the keyword inputs that the caller traced with; None if they were made up.
        shares: whether the graph still reads the model's own tensors, so that writing to one writes to the other. A
            copy of the graph does not count as sharing: its tensors are replaced before they are written to.
        dense: a copy of the model on ``meta`` from before its own tensors were cut; None while it is whole.
        cut: pieces cut off the model's own tensors, to restore it if the removal fails.
        known: findings about how its classes are built, kept from one emission to the next.
    """

    model: nn.Module
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    example_inputs: Mapping[str, Any] | None = None
    shares: bool = True
    dense: nn.Module | None = None
    cut: tuple[Cut, ...] = ()
    known: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Constants(Fact):
    """The tensors a graph reads that its code makes: no parameters or buffers of the model, in order of first use."""

    open: ClassVar[bool] = True

    names: tuple[str, ...] = ()


def restore_cut(source: Source) -> None:
    """Restore the tensors of a model that were cut in place."""
    for cut in source.cut:
        slim = get_tensor(source.model, cut.names[0])
        if any(slim.shape[axis] != kept.shape[-1] for axis, kept, _, _ in cut.pieces):
            continue  # stopped before the slim tensor was set
        value = slim.detach()
        for axis, kept, gone, piece in reversed(cut.pieces):
            shape = [*value.shape[:axis], kept.shape[-1] + gone.shape[-1], *value.shape[axis + 1 :]]
            value = put(put(value.new_empty(shape), axis, kept, value), axis, gone, piece)
        whole = as_parameter(value, slim) if cut.whole is None else cut.whole
        for name in cut.names:
            set_tensor(source.model, name, whole)


def fork(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Copy the graph, with its node names, and the facts of a graph module; the copy shares its tensors."""
    twin = CheckedGraph(dict(weights(graph_module)), copy.deepcopy(graph_module.graph))
    twin.train(graph_module.training)
    facts = facts_of(graph_module).copy()
    with reading("", None):  # whichever facts the pass that forks may read
        source = facts.get(Source)
    if source is not None:
        facts.put(replace(source, shares=False))
    set_facts(twin, facts)
    return twin


def unshare(graph_module: fx.GraphModule, other: fx.GraphModule) -> None:
    """Copy the tensors that ``graph_module`` shares with ``other``; tied ones stay tied."""
    shared = {id(tensor) for _, tensor in weights(other)}
    copies = dict[int, torch.Tensor]()
    for name, tensor in list(weights(graph_module)):
        if id(tensor) in shared:
            if id(tensor) not in copies:
                copies[id(tensor)] = copy_tensor(tensor)
            set_tensor(graph_module, name, copies[id(tensor)])
