"""Quality of a slim model beside the dense one, as numbers for a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

FAR = 1.5
"""Perplexity over that of the dense model, beyond its error, from which on a result is called far from it."""

Value = tuple[float, float]
"""A value and its standard error."""


@dataclass(frozen=True)
class TextQuality:
    """Predictions on a text, of the dense and of the slim model on the same windows.

    Args:
        text: the text, in words.
        windows: number of windows.
        window: tokens that a model sees at once.
        tokens: tokens predicted, of all windows.
        perplexity: of the dense model, and of the slim one.
        bits_per_byte: of both.
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
    def is_far(self) -> bool:
        """Whether the slim model predicts far worse than the dense one."""
        value, error = self.ratio
        return value - error > FAR

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
    """Quality of a slim model beside the dense one.

    Args:
        texts: predictions, text by text.
        answers: greedy answers, question by question.
    """

    texts: tuple[TextQuality, ...]
    answers: tuple[GreedyAnswer, ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Quality:
        """Return the quality from plain data with tuples for lists."""
        texts = tuple(TextQuality(**text) for text in data["texts"])
        return cls(texts, tuple(GreedyAnswer(**answer) for answer in data["answers"]))

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yield rows of text: a name, and the values of the dense and of the slim model."""
        for text in self.texts:
            for name, values in (
                (f"perplexity, {text.text}", text.perplexity),
                ("  bits per byte", text.bits_per_byte),
            ):
                digits = 3 if "bits" in name else 2
                dense, slim = (f"{value:.{digits}f} ± {error:.{digits}f}" for value, error in values)
                yield name, dense, slim
            yield "  perplexity over dense", "", "{:.3f} ± {:.3f}".format(*text.ratio)
            yield "  divergence, nats", "", "{:.3f} ± {:.3f}".format(*text.divergence)
            yield "  same first token", "", "{:.1%} ± {:.1%}".format(*text.agreement)

    def table(self) -> Table:
        """Return the table for a terminal."""
        table = Table("", title="quality")
        for name in ("dense", "slim"):
            table.add_column(name, justify="right")
        for row in self.rows():
            table.add_row(*row)
        return table

    @property
    def is_far(self) -> bool:
        """Whether the slim model predicts far worse than the dense one on a text."""
        return any(text.is_far for text in self.texts)
