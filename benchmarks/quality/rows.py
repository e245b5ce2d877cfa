"""Rows of the quality benchmark: prune, protocol and findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from fxprune.evaluation import Divergence, Perplexity

DENSE = "dense"
"""Name of the row that others are compared with."""

_BLOCKS = 60
"""Most losses that a row keeps of a text: means over as many runs of neighbouring windows."""


@dataclass(frozen=True)
class Protocol:
    """Settings of a measurement; rows compare if theirs are equal.

    Attributes:
        model: Name of the model.
        calibration: Name of the text to calibrate and tune on.
        samples: Most calibration samples.
        tokens: Tokens of a calibration sample.
        kept_back: Of how many rows of the calibration text one is measured on instead; 0 if none is.
        windows: Windows of the shortest length, from the start of each text; None for whole texts.
        lengths: Tokens of a window, in ascending order; windows do not overlap.
        fewest: Windows of the longer lengths, which cover the same tokens otherwise, at least.
        measured_in: Type that models are measured in.
    """

    model: str
    calibration: str
    samples: int
    tokens: int
    kept_back: int = 0
    windows: int | None = None
    lengths: tuple[int, ...] = (128,)
    fewest: int = 1
    measured_in: str = "float32"

    @property
    def calibrated(self) -> tuple[str, str, int, int, int]:
        """The part that decides what slim model a prune gives."""
        return self.model, self.calibration, self.samples, self.tokens, self.kept_back

    def text_tokens(self, length: int) -> int | None:
        """Tokens at the start of a text that are measured on in windows of a length; None for all."""
        if self.windows is None:
            return None
        least = self.fewest * length if length > self.lengths[0] else 0
        return max(self.windows * self.lengths[0], least)

    def __str__(self) -> str:
        least = f", at least {self.fewest} windows," if self.fewest > 1 and len(self.lengths) > 1 else ""
        part = f"the first {self.windows} x {self.lengths[0]} tokens{least}" if self.windows else "all"
        lengths = " and ".join(filter(None, (", ".join(map(str, self.lengths[:-1])), str(self.lengths[-1]))))
        return (
            f"{self.model}, calibrated on up to {self.samples} x {self.tokens} tokens of {self.calibration}; "
            f"measured on {part} of each text in windows of {lengths} tokens, in {self.measured_in}"
        )


@dataclass(frozen=True)
class QualityRow:
    """Measurement of one model.

    Attributes:
        entry: Name of the entry; :data:`DENSE` for the dense model.
        ratio: Requested fraction of all parameters; 0 for a model that was not pruned.
        draw: Seed of the draw of calibration samples, and of the passes that take one.
        protocol: Settings of the measurement.
        parameters: Parameters of the model.
        texts: For each text the findings at each length of window. Their losses are means over blocks of windows.
        seconds: Seconds of the prune: wall clock, or with one thread processor time, which excludes other work.
        peak_gb: Peak resident memory of the prune, in 10^9 bytes.
        passes: The pipeline as text.
        threads: Number of threads.
        cpu: Name of the processor.
        trained: What tuning trained; empty for nothing. None in rows that do not know it.
        trained_tokens: Most tokens that it was trained on, counted as often as they were read.
    """

    entry: str
    ratio: float
    draw: int
    protocol: Protocol
    parameters: int
    texts: Mapping[str, Sequence[Perplexity]]
    seconds: float = 0.0
    peak_gb: float = 0.0
    passes: str = ""
    threads: int = 0
    cpu: str = ""
    trained: str | None = ""
    trained_tokens: int = 0

    @property
    def key(self) -> tuple[str, float, int, Protocol]:
        """Key of a measurement, of which there is one row."""
        return self.entry, self.ratio, self.draw, self.protocol

    def at(self, length: int) -> dict[str, Perplexity]:
        """Findings in windows of a length, by text."""
        return {name: one for name, found in self.texts.items() for one in found if one.window == length}

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data, from which :func:`read_rows` reads it."""
        return asdict(self)


def blocks(losses: Sequence[float]) -> tuple[float, ...]:
    """Means of losses over runs of neighbouring windows, sixty at most, which are less alike than single windows."""
    count = min(_BLOCKS, len(losses))
    bounds = [i * len(losses) // count for i in range(count + 1)]
    return tuple(round(fmean(losses[start:end]), 4) for start, end in pairwise(bounds))


def compare(one: Perplexity, other: Perplexity) -> tuple[float, float | None]:
    """Ratio of two perplexities, and its standard error paired by window; None if windows differ or are too few."""
    ratio, apart = one.value / other.value, [a - b for a, b in zip(one.losses, other.losses, strict=False)]
    if len(one.losses) != len(other.losses) or len(apart) < 2:
        return ratio, None
    return ratio, ratio * stdev(apart) / len(apart) ** 0.5 / (one.predicted / one.windows)


def over_dense(found: Perplexity, dense: Perplexity) -> tuple[float, float | None] | None:
    """Perplexity over that of the dense model, and its standard error from the windows, if they were kept.

    None for a model with other tokens, whose perplexity does not compare.
    """
    apart = found.divergence
    if apart is not None:
        return apart.ratio, apart.ratio_error
    return None if found.losses and found != dense else compare(found, dense)


def read_rows(data: Mapping[str, Any]) -> list[QualityRow]:
    """Rows of a file of results."""
    return [_read_row(row) for row in data["rows"]]


def _read_row(row: Mapping[str, Any]) -> QualityRow:
    protocol = Protocol(**{**row["protocol"], "lengths": tuple(row["protocol"]["lengths"])})
    texts = {name: tuple(map(_read_perplexity, found)) for name, found in row["texts"].items()}
    return QualityRow(**{**row, "protocol": protocol, "texts": texts})


def _read_perplexity(found: Mapping[str, Any]) -> Perplexity:
    apart = found["divergence"]
    divergence = None if apart is None else Divergence(**apart)
    return Perplexity(**{**found, "divergence": divergence, "losses": tuple(found["losses"])})
