"""What is known about a graph: facts of different classes, at most one of each, kept in ``GraphModule.meta``.

A pass names the classes of the facts it needs, gives and makes stale. A stale fact is dropped, so that asking for it is
an error that says what made it stale and which pass finds it again. Facts are defined beside what makes them; here
are those that any graph may have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

from torch import fx

from fxprune.errors import PassError

__all__ = [
    "Change",
    "Fact",
    "Facts",
    "Notes",
    "Runnable",
    "Shaped",
    "add_note",
    "facts_of",
    "set_facts",
    "tell_givers",
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
