"""The progress of a whole run as one bar in a terminal or a notebook."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fxprune.pipeline.contract import Pass


class RunBar:
    """A bar over the steps of a run, by their names in order, each as long as its share of the work."""

    def __init__(self, names: Sequence[str], work: Sequence[float], progress: Progress) -> None:
        self._names, self._work, self._progress = names, work, progress
        self._begun: list[int] = []
        self._loops = 0
        self._task = progress.add_task("", total=sum(work))

    def begin(self, name: str) -> None:
        """Go on to the step of a name; quick steps may come before slow ones in front of them."""
        place = next((i for i, each in enumerate(self._names) if each == name and i not in self._begun), None)
        if place is not None:
            self._begun.append(place)
            self._show(name, 0.0)

    def track(self, items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
        """Yield items and move the bar; loops inside other loops do not move it."""
        self._loops += 1
        outermost = self._loops == 1
        try:
            for done, item in enumerate(items):
                if outermost:
                    self._show(what, done / max(total, 1))
                yield item
        finally:
            self._loops -= 1

    def _show(self, what: str, part: float) -> None:
        """Show a part of the step that began last; the bar never goes back."""
        *over, now = (self._work[place] for place in self._begun)
        at = max(sum(over) + part * now, self._progress.tasks[0].completed)
        text = f"step {len(self._begun)} of {len(self._names)}: {what}"
        self._progress.update(self._task, description=text, completed=at)


@contextmanager
def run_bar(passes: Sequence[Pass], first: Sequence[str] = (), last: Sequence[str] = ()) -> Iterator[RunBar | None]:
    """A bar for passes and the steps before and after them; None where nobody looks: no terminal and no notebook."""
    console = Console(file=sys.stderr)  # what is silenced while a model is traced does not stop the bar
    if not (console.is_terminal or console.is_jupyter):
        yield None
        return
    runs = [step.cost(100).runs for step in passes]  # the work is compared for as many samples
    least = max(sum(runs) / 20, 1.0)  # steps without runs of the model take time as well
    work = [least] * len(first) + [least / 4 + each for each in runs] + [least] * len(last)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        yield RunBar([*first, *(step.name for step in passes), *last], work, progress)
