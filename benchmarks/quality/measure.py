"""Measure a prune by its predictions on texts, and saved slim models by questions."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import fx

import fxprune
from benchmarks.common import cpu_name, local_tasks, memory_bytes, reset_peak_memory
from benchmarks.quality.entries import Entry, place_of_entry
from benchmarks.quality.reference import KeptReference, weights_digest
from benchmarks.quality.rows import DENSE, Protocol, QualityRow, blocks, over_dense, read_rows
from benchmarks.quality.texts import Texts, beginning
from fxprune.evaluation import Evaluation, LocalTask, Perplexity, TaskScore, text_perplexity, zero_shot
from fxprune.evaluation.comparison import Column, Comparison, as_column
from fxprune.evaluation.tasks import Task, named_tasks
from fxprune.graph.facts import facts_of
from fxprune.offload.atomic import atomic_path
from fxprune.offload.files import offload_to, trim_heap
from fxprune.pipeline.pipeline import Pipeline
from fxprune.removal.plan import Plan
from fxprune.removal.removal import Removal

_BATCH_TOKENS = 512
"""Tokens of the windows that run at once; a longer window runs alone."""

_ROW = "row.json"
"""File beside a kept slim model with its row, from which a later run takes the costs of the prune."""


class _Costs:
    """Time and peak memory of a prune, of the runs before it that were interrupted too.

    Args:
        work: Folder of the unfinished prune, where they are kept at each step; None to keep none.
        threads: Threads of the prune: the time of a single one is processor time.
    """

    def __init__(self, work: Path | None, threads: int) -> None:
        self._file = None if work is None else work / "costs.json"
        self._clock = time.process_time if threads == 1 else time.perf_counter
        there = self._file is not None and self._file.exists()
        seconds, peak = json.loads(self._file.read_text()) if self._file is not None and there else (0.0, 0.0)
        trim_heap()  # what an earlier prune freed would count as memory of this one
        reset_peak_memory()
        self._begin, self._peak = self._clock() - seconds, float(peak)

    def so_far(self) -> tuple[float, float]:
        """Seconds and gigabytes."""
        return self._clock() - self._begin, max(self._peak, memory_bytes("VmHWM") / 1e9)

    def track(self, items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
        """Keep the costs after each item."""
        for item in items:
            yield item
            if self._file is not None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self._file.write_text(json.dumps(self.so_far()))


@dataclass(frozen=True)
class Bench:
    """Setting of the benchmark: the dense model, its predictions, texts and protocol.

    Attributes:
        model: The dense model, in float32; it is not changed.
        tokenizer: Its tokenizer.
        texts: Texts to calibrate and to measure on.
        protocol: Settings of the measurement.
        reference: The dense model in the type of the measurement.
        keep: Folder that slim models are kept in, as subfolders; None to keep none.
    """

    model: Any
    tokenizer: Any
    texts: Texts
    protocol: Protocol
    reference: KeptReference
    keep: Path | None = None

    def dense(self) -> QualityRow:
        """Row of the dense model, which others are compared with."""
        return self.whole(DENSE, self.reference, self.model, self.tokenizer)

    def whole(self, name: str, run: Any, model: Any, tokenizer: Any) -> QualityRow:
        """Row of a model that is not pruned.

        Args:
            name: Name of the row.
            run: What is measured: the model, or a reference made of it.
            model: The model.
            tokenizer: Its tokenizer; predictions are compared with the dense model's if both have the same tokens.
        """
        same = run is not self.reference and tokenizer.get_vocab() == self.tokenizer.get_vocab()
        texts = self._measure(run, tokenizer, compared=same)
        count = sum(parameter.numel() for parameter in model.parameters())
        return QualityRow(name, 0.0, 0, self.protocol, count, texts, cpu=cpu_name(), threads=torch.get_num_threads())

    def pruned(self, entry: Entry, ratio: float, draw: int) -> QualityRow:
        """Row of a prune by an entry; a slim model that an equal prune left in the folder is only measured."""
        samples = self._samples(entry, draw)
        options = {**entry.options, "tokenizer": self.tokenizer, "ratio": ratio, "seed": draw}
        pipeline = fxprune.prune_pipeline(samples, **options)
        trained, read = trained_by(pipeline, 0 if samples is None else len(samples), self.protocol.tokens)
        begun = QualityRow(entry.name, ratio, draw, self.protocol, 0, {}, passes=str(pipeline), trained=trained,
                           trained_tokens=read, threads=torch.get_num_threads(), cpu=cpu_name())  # fmt: skip
        row, slim = self._kept(begun) or self._prune(begun, samples, options)
        if hasattr(slim, "config"):  # a graph keeps the type that it was traced in
            slim.to(self.reference.model.dtype)
        return replace(row, protocol=self.protocol, texts=self._measure(slim, self.tokenizer))

    def carried(self, row: QualityRow, entry: Entry) -> QualityRow | None:
        """A row of an earlier version of a recipe with the passes of today; None if these may give another model.

        They give the same one if they prepare and treat the same samples alike, and choose the same plan: scores and
        selection run for both, nothing else does.
        """
        samples = self._samples(entry, row.draw)
        options: Any = {"tokenizer": self.tokenizer, "ratio": row.ratio, "seed": row.draw}
        now = fxprune.prune_pipeline(samples, **{**entry.options, **options})
        try:
            earlier = fxprune.prune_pipeline(samples, recipe=row.passes, **options)
        except fxprune.FxpruneError:  # a pass or an argument that is no more
            return None
        if _around_the_plan(now) != _around_the_plan(earlier):
            return None
        graph_module = fxprune.trace(self.model).graph_module
        Pipeline([step for step in now.passes if step.stage in ("prepare", "discover")])(graph_module)
        same = _plan(now, graph_module) == _plan(earlier, graph_module)
        return replace(row, passes=str(now)) if same else None

    def _prune(
        self, row: QualityRow, samples: torch.Tensor | None, options: Mapping[str, Any]
    ) -> tuple[QualityRow, Any]:
        """Row of a prune with its time and memory, and the slim model, or its graph where there is none.

        Where slim models are kept, a prune that was interrupted resumes; its time is that of all its runs together.
        """
        work = None if self.keep is None else self.keep / f"unfinished-{self._digest(row)}"
        costs = _Costs(work, row.threads)
        with offload_to(None, work):
            result = fxprune.prune(self.model, samples, eval=False, track=costs.track, **options)
        seconds, peak = costs.so_far()
        row = replace(row, parameters=result.report.parameters[1], seconds=seconds, peak_gb=peak)
        if result.model is not None and self.keep is not None:
            folder = _folder_of(self.keep, row)
            result.save_pretrained(folder, self.tokenizer)
            (folder / _ROW).write_text(json.dumps(row.to_dict()), encoding="utf-8")
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        return row, result.graph_module if result.model is None else result.model

    def _digest(self, row: QualityRow) -> str:
        """Fingerprint of a prune's model, passes and samples, 16 hexadecimal digits."""
        about = (row.entry, row.ratio, row.draw, row.passes, row.protocol.calibrated, weights_digest(self.model))
        return hashlib.sha256(repr(about).encode()).hexdigest()[:16]

    def _samples(self, entry: Entry, draw: int) -> torch.Tensor | None:
        rows = self.texts.calibration
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(draw))
        most = self.protocol.samples
        count = most if entry.samples is None else min(most, entry.samples)
        return rows[order[:count]] if count else None

    def _kept(self, begun: QualityRow) -> tuple[QualityRow, Any] | None:
        """The row and the slim model that the same prune left in the folder."""
        folder = None if self.keep is None else _folder_of(self.keep, begun)
        if folder is None or not (folder / _ROW).exists():
            return None
        (row,) = read_rows({"rows": [json.loads((folder / _ROW).read_text(encoding="utf-8"))]})
        same = (row.passes, row.protocol.calibrated) == (begun.passes, begun.protocol.calibrated)
        return (row, fxprune.from_pretrained(folder)) if same else None

    def _measure(self, run: Any, tokenizer: Any, *, compared: bool = True) -> dict[str, tuple[Perplexity, ...]]:
        return {name: tuple(self._at_lengths(run, tokenizer, name, compared)) for name in self.texts.heldout}

    def _at_lengths(self, run: Any, tokenizer: Any, name: str, compared: bool) -> Iterator[Perplexity]:
        text = self.texts.heldout[name]
        for length in self.protocol.lengths:
            found = text_perplexity(
                run,
                tokenizer,
                beginning(tokenizer, text, self.protocol.text_tokens(length)),
                window=length,
                batch=max(1, _BATCH_TOKENS // length),
                reference=self.reference if compared else None,
            )
            yield replace(found, losses=blocks(found.losses))


def _folder_of(keep: Path, row: QualityRow) -> Path:
    return keep / f"{row.entry}-{row.ratio:g}-{row.draw}"


_CHOOSES = "importance", "select"
"""Stages that make the plan."""


def _around_the_plan(pipeline: Pipeline) -> list[str]:
    """Passes of a pipeline that neither score nor select, as text."""
    return [str(step) for step in pipeline.passes if step.stage not in _CHOOSES]


def _plan(pipeline: Pipeline, graph_module: fx.GraphModule) -> Plan:
    """The plan that a pipeline chooses for a graph whose samples and groups are known."""
    Pipeline([step for step in pipeline.passes if step.stage in _CHOOSES])(graph_module)
    return facts_of(graph_module)[Removal].plan


def trained_by(pipeline: Pipeline, samples: int, tokens: int) -> tuple[str, int]:
    """Parts that a pipeline trains, and the most tokens that it trains on, counted as often as they are read.

    `samples` is the number of those given to it; 0 for those that its first pass makes itself.
    """
    what, recorded, read = "", 0, 0.0
    for step in pipeline.leaves():
        known: Any = step  # the suite of passes is found by name, not imported
        if step.stage == "prepare":
            samples = step.cost(samples).given or samples or getattr(known, "substitutes", 0)
        elif step.stage == "teach":
            recorded = step.cost(samples).recorded
        elif step.stage == "tune":
            vectors = f"vectors, updates of rank {known.rank}" if known.rank else "vectors"
            what = "all weights" if known.weights else vectors
            read += known.epochs * recorded * tokens
    return what, round(read)


def describe(row: QualityRow, dense: QualityRow) -> str:
    """Describe a row in one line, by its shortest windows."""
    length = row.protocol.lengths[0]
    others = dense.at(length)
    pairs = [(name, one, over_dense(one, others[name])) for name, one in row.at(length).items()]
    found = [f"{name} {one.value:.1f}" + (f" (x{over[0]:.2f})" if over else "") for name, one, over in pairs]
    line = f"{row.entry}: {', '.join(found)}; {row.parameters:,} parameters"
    if not row.passes:
        return line
    cost = f"{row.seconds:.0f} s with {row.threads} thread(s), {row.peak_gb:.1f} GB"
    return f"{row.ratio:.0%}, draw {row.draw}: {line}, {cost}"


def saved_models(keep: Path, rows: Iterable[QualityRow]) -> dict[str, Path]:
    """Folders of saved slim models, by entry and ratio, in the order of tables; of several draws, the first."""
    found: dict[str, Path] = {}
    for row in sorted(rows, key=lambda row: (row.ratio, place_of_entry(row.entry), row.draw)):
        folder = _folder_of(keep, row)
        if folder.is_dir():
            found.setdefault(f"{row.entry}, {row.ratio:.0%}", folder)
    return found


def ask_questions(
    dense: Any,
    tokenizer: Any,
    models: Mapping[str, Path],
    files: Iterable[Path],
    questions: int | None,
    dtype: torch.dtype,
    keep: Path,
) -> Comparison:
    """Ask the dense model and slim models the same questions; an interrupted run resumes with the next task.

    Of a file of questions, and of a task, the most that are asked are of its second half; None for all of both halves.
    """
    half = "both" if questions is None else "second"
    given = list(files)
    tasks = {
        **local_tasks([path for path in given if path.suffix == ".jsonl"], half),
        **named_tasks([path for path in given if path.suffix == ".yaml"]),
    }
    settings = {
        "questions": questions,
        "half": half,
        "measured_in": str(dtype),
        "lm_eval": version("lm_eval"),
    }

    def column(name: str, model: Any) -> Column:
        folder = keep / "questions" / weights_digest(model)
        scores = {task: _answered(model, tokenizer, task, asked, settings, folder) for task, asked in tasks.items()}
        return as_column(name, model, Evaluation(tasks=scores))

    def columns() -> Iterator[Column]:
        yield column(DENSE, dense.to(dtype=dtype))
        for name, folder in models.items():
            slim: Any = fxprune.from_pretrained(folder)
            yield column(name, slim.to(dtype=dtype))

    return Comparison(tuple(columns()), settings)


def with_earlier(asked: dict[str, Any], path: Path) -> dict[str, Any]:
    """Columns of a comparison, and those in the file of models that were asked the same questions before.

    Slim models that a file has answers of need not be there any more.
    """
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"columns": []}
    if not before["columns"] or _questions_of(before) != _questions_of(asked):
        return asked
    columns = {column["name"]: column for column in (*before["columns"], *asked["columns"])}
    return {**asked, "columns": list(columns.values())}


def _questions_of(asked: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells the questions of a comparison from others: settings, tasks, and the dense model's scores."""
    tasks = asked["columns"][0]["evaluation"]["tasks"]
    return asked["settings"], {name: (score["samples"], score["value"]) for name, score in tasks.items()}


def _answered(
    model: Any, tokenizer: Any, name: str, task: Task, settings: Mapping[str, Any], folder: Path
) -> TaskScore:
    """Score of a model on a task: that in the folder, if the same was asked, or else a new one, which is put there."""
    path = task.path if isinstance(task, LocalTask) else task
    asked = [str(task), hashlib.sha256(Path(path).read_bytes()).hexdigest(), dict(settings)]
    file = folder / f"{name}.json"
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["asked"] == asked:
            return TaskScore(**kept["score"])
    score = zero_shot(model, tokenizer, {name: task}, limit=settings["questions"])[name]
    with atomic_path(file, parents=True) as new:
        new.write_text(json.dumps({"asked": asked, "score": asdict(score)}), encoding="utf-8")
    return score
