"""Quality of a slim model beside the dense one, as numbers for a report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Column, Table

FAR = 1.5
"""Perplexity over that of the dense model, beyond its error, from which on a result is called far from it."""

Value = tuple[float, float]
"""A value and its standard error."""


@dataclass(frozen=True)
class TextQuality:
    """Predictions on a text, of the dense and of the slim model on the same windows.

    Args:
        text: the text, in words.
        window: tokens that a model sees at once.
        tokens: tokens predicted, of all windows.
        perplexity: of the dense model, and of the slim one, as is ``bits_per_byte``.
        ratio: perplexity over that of the dense model.
        divergence: mean Kullback-Leibler divergence from the dense model, in nats.
        agreement: fraction of tokens for which both rank the same token first.
    """

    text: str
    windows: int
    window: int
    tokens: int
    perplexity: tuple[Value, Value]
    bits_per_byte: tuple[Value, Value]
    ratio: Value
    divergence: Value
    agreement: Value

    @property
    def data(self) -> str:
        """The data that was measured on, in words."""
        return f"{self.text}: {self.windows:,} windows of {self.window:,} tokens, {self.tokens:,} tokens predicted"

    def __str__(self) -> str:
        """Perplexities in a line."""
        (dense, _), (slim, _) = self.perplexity
        return f"perplexity, {self.text}: {dense:.1f} to {slim:.1f}"


@dataclass(frozen=True)
class GreedyAnswer:
    """Greedy answers to a question."""

    question: str
    dense: str
    slim: str


@dataclass(frozen=True)
class Quality:
    """Quality of a slim model beside the dense one: predictions on texts, and greedy answers to questions.

    ``notes`` say what was measured otherwise than asked, or left out.
    """

    texts: tuple[TextQuality, ...]
    answers: tuple[GreedyAnswer, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Quality:
        """The quality from plain data with tuples for lists."""
        texts = tuple(TextQuality(**text) for text in data["texts"])
        return cls(texts, tuple(GreedyAnswer(**answer) for answer in data["answers"]), data.get("notes", ()))

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yield rows of text: a name, and the values of the dense and of the slim model."""
        for text in self.texts:
            dense, slim = ("{:.2f} ± {:.2f}".format(*value) for value in text.perplexity)
            yield f"perplexity, {text.text}", dense, slim
            dense, slim = ("{:.3f} ± {:.3f}".format(*value) for value in text.bits_per_byte)
            yield "  bits per byte", dense, slim
            yield "  perplexity over dense", "", "{:.3f} ± {:.3f}".format(*text.ratio)
            yield "  divergence, nats", "", "{:.3f} ± {:.3f}".format(*text.divergence)
            yield "  same first token", "", "{:.1%} ± {:.1%}".format(*text.agreement)

    def table(self) -> Table:
        """The table for a terminal."""
        return figures_table(("", "dense", "slim"), self.rows(), "quality")

    @property
    def is_far(self) -> bool:
        """Whether the slim model predicts far worse than the dense one on a text."""
        return any(value - error > FAR for value, error in (text.ratio for text in self.texts))


def figures_table(head: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> Table:
    """A table of figures for a terminal: names at the left, figures at the right."""
    table = Table(head[0], *(Column(name, justify="right") for name in head[1:]), title=title or None)
    for row in rows:
        table.add_row(*row)
    return table


def figures_markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same table in Markdown."""
    first, *rest = (f"| {' | '.join(row)} |" for row in (head, *rows))
    return "\n".join([first, "|---" + "|---:" * (len(head) - 1) + "|", *rest]) + "\n"
