"""Pipelines: passes one after the other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar

from markupsafe import Markup
from torch import fx

from fxprune.errors import FxpruneError, PassError
from fxprune.graph.context import default_modes, defer_gc, recompile_lazily
from fxprune.graph.facts import Change, Fact, facts_of
from fxprune.graph.tensors import has_meta_weights
from fxprune.offload.files import resume_scope
from fxprune.pipeline.arguments import argument, flag, function, read_steps, refuse
from fxprune.pipeline.contract import Kinds, Pass, PassResult, Track, check_track, run_apart, tracking
from fxprune.pipeline.registry import parse_pass


def html_table(title: str, rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    """HTML table of rows below a title; texts are escaped."""
    text = Markup('<table><caption style="text-align: left; caption-side: top"><b>{}</b></caption>').format(title)
    for tag, cells in [*([("th", head)] if head else []), *(("td", row) for row in rows)]:
        shown = (Markup('<{0} style="text-align: left">{1}</{0}>').format(tag, cell) for cell in cells)
        text += Markup("<tr>{}</tr>").format(Markup("").join(shown))
    return str(text + Markup("</table>"))


_WANTED = "passes, their names, or a text such as 'find-groups, l2, select-by-ratio'"

OnPass = Callable[[Pass], None]


@dataclass(frozen=True)
class Ran(Fact):
    """The stage, the spelling and the seconds of each pass of pipelines that ran on a graph, in order."""

    passes: tuple[tuple[str, str, float], ...] = ()


class PassSequence(Pass):
    """A pass made of others, which subclasses name; its facts and changes follow from theirs."""

    @property
    @abstractmethod
    def steps(self) -> tuple[Pass, ...]:
        """The passes, in order."""

    def leaves(self) -> Iterator[Pass]:
        """The steps that are not made of others, in order."""
        for step in self.steps:
            yield from step.leaves() if isinstance(step, PassSequence) else (step,)

    @property
    def changes(self) -> Change:  # type: ignore[override]
        """The most that one of the steps changes."""
        found = {step.changes for step in self.steps}
        return "graph" if "graph" in found else "weights" if "weights" in found else "nothing"

    @property
    def writes(self) -> bool:  # type: ignore[override]
        """Whether one of the steps writes to tensors."""
        return any(step.writes for step in self.steps if step.changes != "nothing")

    @property
    def needs(self) -> Kinds:  # type: ignore[override]
        """The facts that a step needs and no step before it gives."""
        return self._not_given("needs")

    @property
    def wants(self) -> Kinds:  # type: ignore[override]
        """The facts that a step reads if they are known, and no step before it gives."""
        return self._not_given("wants")

    def _not_given(self, declared: str) -> Kinds:
        given: set[type[Fact]] = set()
        found: dict[type[Fact], None] = {}
        for step in self.steps:
            found |= dict.fromkeys(kind for kind in getattr(step, declared) if kind not in given)
            given.update(step.gives)
        return tuple(found)

    @property
    def gives(self) -> Kinds:  # type: ignore[override]
        """The facts that a step gives and no later step drops."""
        given: dict[type[Fact], None] = {}
        for step in self.steps:
            given = {kind: None for kind in given if kind not in step.drops} | dict.fromkeys(step.gives)
        return tuple(given)

    @property
    def drops(self) -> Kinds:  # type: ignore[override]
        """The facts that a step drops and no later step gives."""
        return tuple(dict.fromkeys(kind for step in self.steps for kind in step.drops if kind not in self.gives))

    def __call__(self, graph_module: fx.GraphModule, *, inplace: bool = False) -> PassResult:
        """Run all steps on ``graph_module``, or on one copy of it if one of them changes something.

        The Python code of the graph is written when it is first read or run. Garbage of a graph without weights holds
        no storage, and is looked for once the steps are done.

        Raises:
            PassError: the order cannot work; nothing has been done then.
            FxpruneError: whatever a step raises, with a note that names the step.
        """
        with default_modes():
            flag("inplace", inplace)
            self.requires(graph_module)
            on_copy = self.changes != "nothing" and not inplace
            with recompile_lazily(), defer_gc() if has_meta_weights(graph_module) else nullcontext():
                return run_apart(self, self.call, graph_module) if on_copy else self.call(graph_module)

    def check_arguments(self) -> None:
        for step in self.leaves():
            step.check_arguments()

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise if a step lacks a fact when it runs, or the arguments of a step are incomplete."""
        self.check_arguments()
        facts = facts_of(graph_module)
        known = {type(fact) for fact in facts}
        dropped: dict[type[Fact], str] = {}
        leaves = tuple(self.leaves())
        for place, step in enumerate(leaves):
            for kind in step.wants:
                giver = next((one.name for one in leaves[place + 1 :] if kind in one.gives), None)
                if kind not in known and giver is not None:
                    what = f"reads the fact {kind.__name__}, which {giver} gives after it"
                    raise PassError(what, where=f"pass {step.name}", remedy=f"Run {giver} first")
            with _named(step):
                for kind in step.needs:
                    if kind not in known:
                        raise facts.missing(kind, where=f"pass {step.name}", by=dropped.get(kind, ""))
            dropped.update(dict.fromkeys(known.intersection(step.drops), step.name))
            known.difference_update(step.drops)
            known.update(step.gives)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        steps = _quick_first(self.steps)
        for number, (place, step) in enumerate(steps):
            result = self._run_step(place, step, graph_module)
            graph_module, modified = result.graph_module, modified or result.modified
            for _, later in steps[number + 1 :]:
                if later.changes != "nothing" or set(step.gives).intersection(later.gives):
                    break
                with _named(later):
                    later.foresee(graph_module, step.gives)
        return PassResult(graph_module, modified)

    def _run_step(self, place: int, step: Pass, graph_module: fx.GraphModule) -> PassResult:
        with _named(step), resume_scope(f"{place}-{step.name}"):
            return step(graph_module, inplace=True)


@contextmanager
def _named(step: Pass) -> Iterator[None]:
    try:
        yield
    except FxpruneError as error:
        if not getattr(error, "__notes__", ()):
            error.add_note(f"in pass {step.name}")
        raise


def _quick_first(steps: Sequence[Pass]) -> list[tuple[int, Pass]]:
    """Steps with their places, a cheap one before a costly one in front of it that it does not depend on.

    So what it refuses, such as a ratio that cannot be reached, is reported before the work.
    """
    found = list(enumerate(steps))
    for i in range(len(found) - 1):
        slow, quick = found[i][1], found[i + 1][1]
        apart = {*slow.gives, *slow.drops}.isdisjoint((*quick.needs, *quick.wants, *quick.gives, *quick.drops))
        apart = apart and {*quick.gives, *quick.drops}.isdisjoint((*slow.needs, *slow.wants))
        if apart and slow.changes == quick.changes == "nothing" and slow.cost(1).runs and not quick.cost(1).runs:
            found[i], found[i + 1] = found[i + 1], found[i]
    return found


@dataclass(frozen=True, eq=False, init=False)
class Pipeline(PassSequence):
    """A sequence of passes, itself a pass.

    ``str()`` of it is its spelling, one pass a line, from which an equal one can be made.

    Args:
        passes: passes and spellings such as ``"taylor{order=mix, reduction=sum}"``, or one text with several, parted
            by commas or line breaks; a line that starts with ``#`` is a comment.
        on_pass: called with each pass before it runs.
        track: shows the progress of passes, as ``track(items, what, total)``.
    """

    name: ClassVar[str] = "pipeline"
    passes: tuple[Pass, ...] = ()
    on_pass: OnPass | None = argument(None, spelled=False)
    track: Track | None = argument(None, spelled=False)

    def __init__(
        self, passes: str | Sequence[Pass | str], on_pass: OnPass | None = None, track: Track | None = None
    ) -> None:
        if not isinstance(passes, str | Sequence):
            raise refuse("passes", passes, _WANTED)
        made: list[Pass] = []
        steps: Sequence[Any] = read_steps(passes) if isinstance(passes, str) else passes
        for step in steps:
            if isinstance(step, str):
                text = step.strip()
                step = Pipeline(text[1:-1]) if text.startswith("(") and text.endswith(")") else parse_pass(text)
            if not isinstance(step, Pass):
                wanted = "a pass, as in fxprune.load_pass(name), or the spelling of one"
                raise refuse("a step of the pipeline", step, wanted)
            made.append(step)
        if not made:
            raise PassError("there is no pass", where="pipeline", remedy=f"Pass {_WANTED}")
        if on_pass is not None:
            function("on_pass", on_pass, "a function that is called with each pass, or None")
        if track is not None:
            check_track(track)
        vars(self).update(passes=tuple(made), on_pass=on_pass, track=track)

    @property
    def steps(self) -> tuple[Pass, ...]:
        return self.passes

    def __str__(self) -> str:
        lines = ("(" + str(p).replace("\n", ", ") + ")" if isinstance(p, Pipeline) else str(p) for p in self.passes)
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(str(self).splitlines())!r})"

    def _repr_html_(self) -> str:
        def names(kinds: Iterable[type[Fact]]) -> str:
            return ", ".join(kind.__name__ for kind in kinds)

        rows = ((str(p), p.stage, p.changes, names(p.needs), names(p.gives)) for p in self.passes)
        return html_table("Pipeline", rows, ("pass", "stage", "changes", "needs", "gives"))

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        with tracking(self.track):
            return super().call(graph_module)

    def _run_step(self, place: int, step: Pass, graph_module: fx.GraphModule) -> PassResult:
        if self.on_pass is not None:
            self.on_pass(step)
        start = perf_counter()
        result = super()._run_step(place, step, graph_module)
        if not isinstance(step, Pipeline):
            facts, spelling, seconds = facts_of(result.graph_module), str(step), perf_counter() - start
            shown = spelling if len(spelling) <= 1000 else f"{step.name}{{...}}"  # a plan as text has many more
            facts.put(Ran((*(facts.get(Ran) or Ran()).passes, (step.stage, shown, seconds))))
        return result
