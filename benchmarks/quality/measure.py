"""One prune, and what it left."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fxprune
from benchmarks.environment import cpu_name
from benchmarks.memory import forget_peak, peak_bytes
from benchmarks.quality.entries import Entry
from fxprune.data.built_in import general_text, offline_text
from fxprune.data.text import calibration_text, split_calibration_heldout, token_windows
from fxprune.evaluation import perplexity

__all__ = ["Protocol", "Row", "Texts", "kept_in", "measure", "measure_dense", "texts_of", "told", "with_ratio"]


@dataclass(frozen=True)
class Protocol:
    """How everything is measured.

    Attributes:
        model: Name of the model.
        calibration: The text that is calibrated and tuned on.
        samples: The most calibration samples.
        tokens: Of a calibration sample.
        windows: Of each text that is measured on, from its start.
        window: Tokens of such a window; windows do not overlap.
    """

    model: str
    calibration: str
    samples: int
    tokens: int
    windows: int
    window: int

    def __str__(self) -> str:
        return (
            f"{self.model}, calibrated on up to {self.samples} x {self.tokens} tokens of {self.calibration}; "
            f"perplexity on the first {self.windows} x {self.window} tokens of each text"
        )


@dataclass(frozen=True)
class Texts:
    """Token ids.

    Attributes:
        calibration: `(samples, tokens)`, all there are.
        heldout: By name, `(windows, window)`.
    """

    calibration: torch.Tensor
    heldout: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """What was measured of one prune.

    Attributes:
        entry: Name of the entry; `dense` for the dense model.
        ratio: Fraction of all parameters asked for.
        draw: Which samples were drawn.
        parameters: That are left.
        perplexities: By name of the text.
        seconds: The prune took: wall clock, or with one thread the processor's time, which other work is no part of.
        peak_gb: Largest resident memory while it ran, in 10^9 bytes.
        passes: The pipeline, as it is spelled.
        threads: It ran with.
        cpu: It ran on.
    """

    entry: str
    ratio: float
    draw: int
    parameters: int
    perplexities: dict[str, float]
    seconds: float
    peak_gb: float
    passes: str
    threads: int
    cpu: str


def texts_of(tokenizer: Any, data: Path | None, calibration: str, protocol: Protocol) -> Texts:
    """What is calibrated and measured on.

    Args:
        tokenizer: Turns text into ids.
        data: A folder of text files: those at the top of it, and `*/test.txt`, are measured on. None for built-in text.
        calibration: Name of the file in it that is calibrated on.
        protocol: Sizes.
    """
    if data is None:
        front, back = split_calibration_heldout(general_text(), calibration=0.75)
        held = {"the rest of the general text": back, "Python's reference": offline_text()}
    else:
        front = calibration_text(data / calibration)
        files = [*sorted(data.glob("*.txt")), *sorted(data.glob("*/test.txt"))]
        held = {str(path.relative_to(data)): calibration_text(path) for path in files}
    return Texts(
        token_windows(tokenizer, front, protocol.tokens),
        {name: token_windows(tokenizer, text, protocol.window, limit=protocol.windows) for name, text in held.items()},
    )


def measure(
    model: Any,
    tokenizer: Any,
    texts: Texts,
    entry: Entry,
    ratio: float,
    draw: int,
    protocol: Protocol,
    keep: Path | None = None,
) -> Row:
    """One prune, and what it left.

    Args:
        model: The dense model, which stays as it is.
        tokenizer: Its tokenizer.
        texts: What is calibrated and measured on.
        entry: The prune.
        ratio: Fraction of all parameters.
        draw: Seed of the draw of calibration samples.
        protocol: Sizes.
        keep: Folder that the slim model is saved into, in one of its own.
    """
    order = torch.randperm(len(texts.calibration), generator=torch.Generator().manual_seed(draw))
    most = protocol.samples if entry.samples is None else min(protocol.samples, entry.samples)
    samples = texts.calibration[order[:most]] if most else None
    options = {key: with_ratio(value, ratio) for key, value in entry.options.items()}
    passes = str(fxprune.prune_pipeline(samples, tokenizer=tokenizer, ratio=ratio, **options))
    threads = torch.get_num_threads()
    clock = time.process_time if threads == 1 else time.perf_counter
    forget_peak()
    begin = clock()
    result = fxprune.prune(model, samples, tokenizer=tokenizer, ratio=ratio, **options)
    seconds, peak = clock() - begin, peak_bytes() / 1e9
    if keep is not None:
        result.save_pretrained(kept_in(keep, entry.name, ratio, draw), tokenizer)
    perplexities = _perplexities(result.model or result.graph_module, texts)
    left, cpu = result.report.parameters[1], cpu_name()
    return Row(entry.name, ratio, draw, left, perplexities, seconds, peak, passes, threads, cpu)


def kept_in(keep: Path, entry: str, ratio: float, draw: int) -> Path:
    """The folder of a slim model among those that are kept."""
    return keep / f"{entry}-{ratio:g}-{draw}"


def with_ratio(value: Any, ratio: float) -> Any:
    """A selection spelled out gets its ratio."""
    return value % ratio if isinstance(value, str) and "%s" in value else value


def _perplexities(model: Any, texts: Texts) -> dict[str, float]:
    return {name: float(perplexity(model, ids)) for name, ids in texts.heldout.items()}


def measure_dense(model: Any, texts: Texts) -> Row:
    """What the dense model is worth, as a row to compare the others with.

    Args:
        model: The dense model.
        texts: What is measured on.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    return Row("dense", 0.0, 0, count, _perplexities(model, texts), 0.0, 0.0, "", 0, cpu_name())


def told(row: Row, dense: Row) -> str:
    """A row in one line."""
    texts = [
        f"{name} {value:.1f} (x{value / dense.perplexities[name]:.2f})" for name, value in row.perplexities.items()
    ]
    took = f"{row.seconds:.0f} s with {row.threads} thread(s), {row.peak_gb:.1f} GB" if row.passes else "as it is"
    where = f"{row.ratio:.0%}, draw {row.draw}: " if row.passes else ""
    return f"{where}{row.entry}: {', '.join(texts)}; {row.parameters:,} parameters, {took}"
