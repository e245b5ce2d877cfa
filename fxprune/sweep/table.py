"""The table of a sweep: size against quality, the Pareto front, and a recommendation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fxprune.evaluation.comparison import new_figure
from fxprune.pipeline.arguments import number
from fxprune.report.quality import Value, figures_markdown, figures_table

_HEAD = ("", "parameters", "left", "MB", "perplexity over dense", "divergence, nats", "same first token", "decode", "")


@dataclass(frozen=True)
class SweepRow:
    """One prune of a sweep.

    Args:
        name: recipe and ratio, and the name of its folder.
        key: digest of the model, the samples, the passes and their arguments.
        ratio: fraction of the parameters that was asked for.
        parameters: number of parameters, dense and slim.
        memory: bytes of the parameters, dense and slim.
        ratio_of_perplexity: perplexity over that of the dense model, and its standard error.
        divergence: mean divergence from the dense model in nats, and its standard error.
        agreement: fraction of tokens for which both rank the same token first, and its standard error.
        measured_on: the text of these figures, in words.
        decode_ms: milliseconds for each generated token, dense and slim; None if not measured.
        seconds: time of the prune, without what it shares with those before it.
    """

    name: str
    key: str
    recipe: str
    ratio: float
    parameters: tuple[int, int]
    memory: tuple[int, int]
    ratio_of_perplexity: Value
    divergence: Value
    agreement: Value
    measured_on: str
    decode_ms: tuple[float, float] | None
    seconds: float

    @property
    def costs(self) -> tuple[float, ...]:
        """The costs compared: parameters, bytes, perplexity and, if measured, time per token."""
        times = () if self.decode_ms is None else (self.decode_ms[1] / self.decode_ms[0],)
        return self.parameters[1], self.memory[1], self.ratio_of_perplexity[0], *times


@dataclass(frozen=True)
class Sweep:
    """The prunes of a sweep, in the order in which they were asked for, and the folder that they are in."""

    folder: Path
    rows: tuple[SweepRow, ...]

    @property
    def best(self) -> tuple[SweepRow, ...]:
        """The Pareto front: rows that no other row matches in everything and beats in something."""
        return tuple(row for row in self.rows if not any(_beats(other, row) for other in self.rows))

    def recommend(self, at_most: float) -> SweepRow | None:
        """The smallest row whose perplexity is at most this multiple of the dense model's; None if there is none.

        Raises:
            ArgumentError: ``at_most`` is no number above 0.
        """
        most = number("at_most", at_most, above=0)
        fitting = [row for row in self.rows if row.ratio_of_perplexity[0] <= most]
        return min(fitting, key=lambda row: (row.parameters[1], row.ratio_of_perplexity[0]), default=None)

    def lines(self) -> Iterator[tuple[str, ...]]:
        """Yield the rows of the table as text, with a star for those that nothing beats."""
        for row in self.rows:
            dense, slim = row.parameters
            yield (
                row.name,
                f"{slim:,}",
                f"{slim / dense:.1%}",
                f"{row.memory[1] / 1e6:.1f}",
                "{:.3f} ± {:.3f}".format(*row.ratio_of_perplexity),
                "{:.3f} ± {:.3f}".format(*row.divergence),
                "{:.1%} ± {:.1%}".format(*row.agreement),
                "" if row.decode_ms is None else f"{row.decode_ms[0] / row.decode_ms[1]:.2f} x",
                "*" if row in self.best else "",
            )

    def table(self) -> Table:
        """The table for a terminal."""
        return figures_table(_HEAD, self.lines(), "sweep")

    def to_markdown(self) -> str:
        """The table in Markdown, with the texts that were measured."""
        texts = dict.fromkeys(row.measured_on for row in self.rows)
        notes = [*(f"Measured on {text}." for text in texts), "A value after ± is one standard error; nothing beats *."]
        return "\n".join([figures_markdown(_HEAD, self.lines()), *notes]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """All rows as plain data."""
        best = self.best
        return {"rows": [asdict(row) | {"best": row in best} for row in self.rows]}

    def plot(self, path: Path) -> None:
        """Draw perplexity against parameters, bytes and, if measured, speed; lines join the Pareto front.

        Raises:
            EvaluationError: matplotlib is missing.
        """
        panels: dict[str, dict[SweepRow, float]] = {
            "parameters left": {row: row.parameters[1] / row.parameters[0] for row in self.rows},
            "bytes left": {row: row.memory[1] / row.memory[0] for row in self.rows},
            "time of a token": {row: row.decode_ms[1] / row.decode_ms[0] for row in self.rows if row.decode_ms},
        }
        panels = {name: places for name, places in panels.items() if places}
        figure = new_figure(4 * len(panels), 3.5)
        drawn = figure.subplots(1, len(panels), squeeze=False)[0]
        for panel, (name, places) in zip(drawn, panels.items(), strict=True):
            for recipe in dict.fromkeys(row.recipe for row in places):
                rows = [row for row in places if row.recipe == recipe]
                values, errors = zip(*(row.ratio_of_perplexity for row in rows), strict=True)
                panel.errorbar([places[row] for row in rows], values, errors, fmt="o", capsize=2, label=recipe)
            front = sorted((places[row], row.ratio_of_perplexity[0]) for row in self.best if row in places)
            panel.plot(*zip(*front, strict=True), color="gray", linewidth=0.8, zorder=0)
            panel.set_xlabel(name)
            panel.set_ylabel("perplexity over dense")
            panel.spines[["top", "right"]].set_visible(False)
            panel.legend(frameon=False, fontsize="small")
        figure.savefig(path)


def row_of(data: Mapping[str, Any]) -> SweepRow:
    """A row from plain data, as JSON has it."""
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    return SweepRow(**{name: value for name, value in values.items() if name != "best"})


def _beats(one: SweepRow, other: SweepRow) -> bool:
    pairs = list(zip(one.costs, other.costs, strict=False))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
