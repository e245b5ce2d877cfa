"""Facts about a graph, its source model and its repeated blocks, kept in ``GraphModule.meta``.

A pass names the classes of the facts it needs, gives and makes stale. A stale fact is dropped, so that asking for it is
an error that says what made it stale and which pass finds it again. Facts are defined beside what makes them; here
are those that any graph may have.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import fx, nn

from fxprune.errors import PassError
from fxprune.graph.tensors import as_parameter, copy_tensor, get_tensor, set_tensor, weights

__all__ = [
    "Blocks",
    "Change",
    "Constants",
    "Cut",
    "Fact",
    "Facts",
    "Notes",
    "Runnable",
    "Shaped",
    "Source",
    "add_note",
    "facts_of",
    "find_blocks",
    "fork",
    "owner_block",
    "put_back",
    "set_facts",
    "tell_givers",
    "unshare",
    "within",
]

Change = Literal["graph", "weights", "nothing"]
"""What a pass changes: the graph (its weights too), the weights alone, or nothing."""

_KEY = "fxprune"


class Fact:
    """Something known about a graph. Subclasses are frozen dataclasses."""

    about: ClassVar[Change] = "nothing"
    """What the fact describes: ``graph`` or ``weights`` (then it is stale once these change), or ``nothing``."""
    missing_error: ClassVar[type[PassError]] = PassError
    """What is raised where it is needed and not known."""
    remedy: ClassVar[str] = ""
    """What else can be done then than to run the pass that gives it."""


F = TypeVar("F", bound=Fact)

_givers: list[Callable[[type[Fact]], tuple[str, ...]]] = []


def tell_givers(find: Callable[[type[Fact]], tuple[str, ...]]) -> None:
    """Let ``find`` name the passes that give a fact, for error messages; called by what knows the passes."""
    _givers[:] = [find]


class Facts:
    """The facts about one graph, by class."""

    def __init__(self) -> None:
        self._held: dict[type[Fact], Fact] = {}
        self._dropped: dict[type[Fact], str] = {}

    def __getitem__(self, kind: type[F]) -> F:
        """Return the fact of class ``kind``.

        Raises:
            PassError: it is not known; says which pass finds it, and what made it stale if it was known before.
        """
        found = self.get(kind)
        if found is None:
            raise self.missing(kind)
        return found

    def get(self, kind: type[F]) -> F | None:
        """Return the fact of class ``kind``; None where it is not known."""
        return self._held.get(kind)  # type: ignore[return-value]

    def __contains__(self, kind: object) -> bool:
        """Whether a fact of this class is known."""
        return kind in self._held

    def __iter__(self) -> Iterator[Fact]:
        """Yield all facts."""
        return iter(tuple(self._held.values()))

    def put(self, fact: Fact) -> None:
        """Add ``fact``, in place of an earlier one of its class."""
        self._held[type(fact)] = fact
        self._dropped.pop(type(fact), None)

    def drop(self, kind: type[Fact], by: str) -> None:
        """Forget the fact of class ``kind``, which the pass ``by`` made stale."""
        if self._held.pop(kind, None) is not None:
            self._dropped[kind] = by

    def drop_about(self, change: Change, by: str, but: tuple[type[Fact], ...] = ()) -> None:
        """Forget the facts that are stale after ``change``: a change of the graph is one of the weights as well."""
        stale = {"graph": ("graph", "weights"), "weights": ("weights",), "nothing": ()}[change]
        for kind in tuple(self._held):
            if kind.about in stale and kind not in but:
                self.drop(kind, by)

    def copy(self) -> Facts:
        """Return a copy for a second graph."""
        twin = Facts()
        twin._held, twin._dropped = dict(self._held), dict(self._dropped)
        return twin

    def missing(self, kind: type[Fact], where: str = "", by: str = "") -> PassError:
        """Return the error for a fact that is asked for and not known.

        Args:
            kind: what is asked for.
            where: who asks.
            by: the pass that makes it stale, where it is not this object that saw it.
        """
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
    """What the user should know about what was done, in words.

    Args:
        lines: one sentence each, in order.
    """

    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Runnable(Fact):
    """Holds of a graph that computes: the sizes written in it as numbers fit its tensors."""


@dataclass(frozen=True)
class Shaped(Fact):
    """Holds of a graph whose ``node.meta["val"]`` has the shape and dtype of what each node computes."""


def facts_of(graph_module: fx.GraphModule) -> Facts:
    """Return the facts about ``graph_module``.

    Raises:
        PassError: the module did not come from :func:`fxprune.trace`.
    """
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
    """Add ``line`` to the notes about ``graph_module``, once."""
    facts = facts_of(graph_module)
    lines = (facts.get(Notes) or Notes()).lines
    if line not in lines:
        facts.put(Notes((*lines, line)))


@dataclass(frozen=True)
class Blocks(Fact):
    """The repeated blocks of the model.

    Args:
        paths: their module paths, in order of definition.
    """

    paths: tuple[str, ...] = ()


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Return the module paths of the outermost repeated blocks, in order of definition.

    A block is a child of a ``ModuleList`` or ``Sequential`` all of whose children are of one class and have
    children with parameters themselves: a list of plain linears is not a list of blocks. A ``ModuleList`` may hold
    blocks of a few classes that repeat, as those with and without attention do.
    """
    found: list[str] = []
    for path, module in model.named_modules():
        inside = path in found or within(path, found)
        if isinstance(module, nn.ModuleList | nn.Sequential) and not inside and _are_blocks(module):
            found.extend(f"{path}.{name}" if path else name for name, _ in module.named_children())
    return tuple(found)


def owner_block(name: str, blocks: tuple[str, ...]) -> str | None:
    """Return the block that ``name`` (a module path or tensor name) is or lies in; None if it is in none."""
    around = {name, *_around(name)}
    return next((block for block in blocks if block in around), None)


def within(name: str, paths: Iterable[str]) -> bool:
    """Whether ``name`` (a module path or tensor name) lies below one of the modules at ``paths``."""
    return not _around(name).isdisjoint(paths)


def _around(name: str) -> set[str]:
    """Return the paths of all modules that ``name`` lies below."""
    found, end = set[str](), name.find(".")
    while end >= 0:
        found.add(name[:end])
        end = name.find(".", end + 1)
    return found


def _are_blocks(module: nn.ModuleList | nn.Sequential) -> bool:
    children = list(module)
    classes = len({type(child) for child in children})
    if classes != 1 and not (isinstance(module, nn.ModuleList) and 0 < classes < len(children)):
        return False
    return all(any(True for part in child.children() for _ in part.parameters()) for child in children)


@dataclass(frozen=True, eq=False)
class Cut:
    """What a cut took off a tensor of the model: with what is left it takes no more memory than the whole.

    Args:
        names: the names of the tensor in the model.
        pieces: for each axis that was cut, in turn, the kept positions, those that went, and what stood there.
        whole: the tensor as it was, where what is left of it has other values; there are no pieces then.
    """

    names: tuple[str, ...]
    pieces: tuple[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor], ...]
    whole: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Source(Fact):
    """The model that a graph was traced from.

    Args:
        model: the model.
        names: for each tensor the graph reads, all its names in the model; none for what the model's code makes.
        example_inputs: the keyword inputs the caller traced with; None where they were made.
        shares: whether the graph still reads the model's own tensors, so that writing to one writes to the other. A
            copy of the graph does not count as sharing: its tensors are replaced before they are written to.
        dense: a copy of the model without storage, as it was before its own tensors were cut; None while it is whole.
        cut: what was cut off the model's own tensors, to be put back should the removal fail.
    """

    model: nn.Module
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    example_inputs: Mapping[str, Any] | None = None
    shares: bool = True
    dense: nn.Module | None = None
    cut: tuple[Cut, ...] = ()


@dataclass(frozen=True)
class Constants(Fact):
    """The tensors a graph reads that are no parameter or buffer of the model: its code makes them.

    Args:
        names: in order of first use.
    """

    names: tuple[str, ...] = ()


def put_back(source: Source) -> None:
    """Make the model whole again of which tensors were cut in place."""
    for cut in source.cut:
        slim = get_tensor(source.model, cut.names[0])
        if any(slim.shape[axis] != len(kept) for axis, kept, _, _ in cut.pieces):
            continue  # stopped before the slim tensor was there
        value = slim.detach()
        for axis, kept, gone, piece in reversed(cut.pieces):
            shape = [*value.shape[:axis], len(kept) + len(gone), *value.shape[axis + 1 :]]
            value = value.new_empty(shape).index_copy_(axis, kept, value).index_copy_(axis, gone, piece)
        whole = as_parameter(value, slim) if cut.whole is None else cut.whole
        for name in cut.names:
            set_tensor(source.model, name, whole)


def fork(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph module with a graph and facts of its own that shares tensors with ``graph_module``.

    Node names are kept. Replacing a tensor of one does not change the other.
    """
    twin = fx.GraphModule(dict(weights(graph_module)), copy.deepcopy(graph_module.graph))
    twin.train(graph_module.training)
    facts = facts_of(graph_module).copy()
    source = facts.get(Source)
    if source is not None:
        facts.put(replace(source, shares=False))
    set_facts(twin, facts)
    return twin


def unshare(graph_module: fx.GraphModule, other: fx.GraphModule) -> None:
    """Give ``graph_module`` copies of its own of the tensors that it shares with ``other``; tied ones stay tied."""
    shared = {id(tensor) for _, tensor in weights(other)}
    copies = dict[int, torch.Tensor]()
    for name, tensor in list(weights(graph_module)):
        if id(tensor) in shared:
            if id(tensor) not in copies:
                copies[id(tensor)] = copy_tensor(tensor)
            set_tensor(graph_module, name, copies[id(tensor)])
