"""Measure a prune by perplexity, and saved slim models by questions."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fxprune
from benchmarks.common import cpu_name, local_tasks, memory_bytes, reset_peak_memory
from benchmarks.quality.entries import Entry, place_of_entry
from fxprune.data.built_in import general_text, offline_text
from fxprune.data.text import calibration_text, split_calibration_heldout, token_windows
from fxprune.evaluation import perplexity
from fxprune.evaluation.comparison import Column, Comparison, measure_model

__all__ = [
    "Protocol",
    "QualityRow",
    "Texts",
    "ask_questions",
    "describe",
    "measure",
    "measure_dense",
    "read_texts",
    "saved_models",
    "with_ratio",
]


@dataclass(frozen=True)
class Protocol:
    """Settings shared by all rows.

    Attributes:
        model: Name of the model.
        calibration: Name of the text to calibrate and tune on.
        samples: Most calibration samples.
        tokens: Tokens of a calibration sample.
        windows: Windows of each text to measure on, from its start.
        window: Tokens of a window; windows do not overlap.
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
    """Token ids to calibrate and to measure on.

    Attributes:
        calibration: All samples of the text: `(samples, tokens)`.
        heldout: Windows of each text, by name: `(windows, window)`.
    """

    calibration: torch.Tensor
    heldout: dict[str, torch.Tensor]


@dataclass(frozen=True)
class QualityRow:
    """Measurement of one prune.

    Attributes:
        entry: Name of the entry; `dense` for the dense model.
        ratio: Requested fraction of all parameters.
        draw: Seed of the draw of calibration samples.
        parameters: Parameters of the slim model.
        perplexities: Perplexity by name of the text.
        seconds: Seconds of the prune: wall clock, or with one thread processor time, which excludes other work.
        peak_gb: Peak resident memory of the prune, in 10^9 bytes.
        passes: The pipeline as text.
        threads: Number of threads.
        cpu: Name of the processor.
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


def read_texts(tokenizer: Any, data: Path | None, calibration: str, protocol: Protocol) -> Texts:
    """Read and tokenize the texts.

    Args:
        tokenizer: Turns text into ids.
        data: Folder of texts, `*.txt` and `*/test.txt` of which are measured on; None for built-in text.
        calibration: Name of the file in the folder to calibrate on.
        protocol: Sizes of samples and windows.
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
) -> QualityRow:
    """Prune by an entry and measure the slim model.

    Args:
        model: The dense model; it is not changed.
        tokenizer: Its tokenizer.
        texts: Texts to calibrate and to measure on.
        entry: The prune.
        ratio: Fraction of all parameters to remove.
        draw: Seed of the draw of calibration samples.
        protocol: Sizes of samples and windows.
        keep: Folder to save the slim model in, as a subfolder.
    """
    order = torch.randperm(len(texts.calibration), generator=torch.Generator().manual_seed(draw))
    count = protocol.samples if entry.samples is None else min(protocol.samples, entry.samples)
    samples = texts.calibration[order[:count]] if count else None
    options = {key: with_ratio(value, ratio) for key, value in entry.options.items()}
    passes = str(fxprune.prune_pipeline(samples, tokenizer=tokenizer, ratio=ratio, **options))
    threads = torch.get_num_threads()
    clock = time.process_time if threads == 1 else time.perf_counter
    reset_peak_memory()
    begin = clock()
    result = fxprune.prune(model, samples, tokenizer=tokenizer, ratio=ratio, **options)
    seconds, peak = clock() - begin, memory_bytes("VmHWM") / 1e9
    if keep is not None:
        result.save_pretrained(_folder_of(keep, entry.name, ratio, draw), tokenizer)
    perplexities = _perplexities(result.model or result.graph_module, texts)
    parameters = result.report.parameters[1]
    return QualityRow(entry.name, ratio, draw, parameters, perplexities, seconds, peak, passes, threads, cpu_name())


def _folder_of(keep: Path, entry: str, ratio: float, draw: int) -> Path:
    return keep / f"{entry}-{ratio:g}-{draw}"


def with_ratio(value: Any, ratio: float) -> Any:
    """Insert the ratio into an option that spells a selection."""
    return value % ratio if isinstance(value, str) and "%s" in value else value


def _perplexities(model: Any, texts: Texts) -> dict[str, float]:
    return {name: float(perplexity(model, ids)) for name, ids in texts.heldout.items()}


def measure_dense(model: Any, texts: Texts) -> QualityRow:
    """Measure the dense model, as the row that others are compared with."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return QualityRow("dense", 0.0, 0, count, _perplexities(model, texts), 0.0, 0.0, "", 0, cpu_name())


def describe(row: QualityRow, dense: QualityRow) -> str:
    """Describe a row in one line."""
    texts = [
        f"{name} {value:.1f} (x{value / dense.perplexities[name]:.2f})" for name, value in row.perplexities.items()
    ]
    line = f"{row.entry}: {', '.join(texts)}; {row.parameters:,} parameters"
    if not row.passes:
        return line
    cost = f"{row.seconds:.0f} s with {row.threads} thread(s), {row.peak_gb:.1f} GB"
    return f"{row.ratio:.0%}, draw {row.draw}: {line}, {cost}"


def saved_models(keep: Path, rows: Iterable[QualityRow]) -> dict[str, Path]:
    """Folders of saved slim models, by entry and ratio, in the order of tables; of several draws, the first.

    Args:
        keep: Folder that slim models were saved in.
        rows: Rows of these models.
    """
    found: dict[str, Path] = {}
    for row in sorted(rows, key=lambda row: (row.ratio, place_of_entry(row.entry), row.draw)):
        folder = _folder_of(keep, row.entry, row.ratio, row.draw)
        if folder.is_dir():
            found.setdefault(f"{row.entry}, {row.ratio:.0%}", folder)
    return found


def ask_questions(
    dense: Any,
    tokenizer: Any,
    models: Mapping[str, Path],
    files: Iterable[Path],
    questions: int,
    dtype: torch.dtype,
) -> Comparison:
    """Ask the dense model and slim models the same questions, from the second half of each file.

    Args:
        dense: The dense model; it is converted to `dtype`.
        tokenizer: Tokenizer of all models.
        models: Folders of slim models, by name.
        files: JSONL of questions.
        questions: Most questions of a file.
        dtype: Type of the models.
    """
    tasks = local_tasks(files, "second")

    def columns() -> Iterator[Column]:
        yield measure_model("dense", dense.to(dtype=dtype), tokenizer, texts=(), tasks=tasks, questions=questions)
        for name, folder in models.items():
            slim: Any = fxprune.from_pretrained(folder)
            yield measure_model(name, slim.to(dtype=dtype), tokenizer, texts=(), tasks=tasks, questions=questions)

    settings = {"questions": questions, "half": "second", "measured_in": str(dtype)}
    return Comparison(tuple(columns()), settings)
