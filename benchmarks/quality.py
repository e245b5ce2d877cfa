"""Recipes and their ingredients, one changed at a time, at several ratios: `python -m benchmarks.quality`.

Everything is calibrated and tuned on one text and measured on others, each once. With `--data` the texts are files of a
folder; without, they are built-in ones that share no paragraph. What was measured is in the file of results already and
is not measured again, so a run that was stopped goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import fxprune
from benchmarks.demo_model import load_named
from benchmarks.environment import environment
from benchmarks.memory import forget_peak, peak_bytes
from fxprune.data.files import calibration_text
from fxprune.data.text import offline_docstrings, offline_text, split_calibration_heldout, token_windows
from fxprune.evaluation import LocalTask, evaluate, perplexity
from fxprune.recipes import read_recipe

__all__ = ["ENTRIES", "Entry", "Protocol", "Row", "Texts", "app", "entries", "measure", "texts_of"]

RESULTS = Path(__file__).parent / "results" / "quality.json"

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Entry:
    """A prune to be measured.

    Attributes:
        name: What it is called in tables.
        options: Passed on to `fxprune.prune`.
        needs: Passes that have to be installed.
        samples: The most calibration samples it gets; None for all.
    """

    name: str
    options: dict[str, Any]
    needs: tuple[str, ...] = ()
    samples: int | None = None


TUNE = "tune{epochs=1, measurements=3"
HEADS = "select-by-ratio{kinds=[mlp, head], protect=[0.07, 0.04], ratio=%s}"
CHOSEN = "protect=[0.07, 0.04], first=[mlp], ratio=%s"
WHOLE = "select-by-ratio{first=[mlp], protect=[], ratio=%s}"

BEST = read_recipe("best").text
ONCE = BEST.replace("{copies=3, noise=0.2}", "").replace(", truth=0.2", "")
WRITTEN = ONCE.replace("record-teacher", "record-teacher{written=2048}")
SEARCHED = (
    ONCE.replace("wanda{samples=128}", "taylor{order=second, samples=128}")
    .replace("select-by-ratio", "select-by-search")
    .replace("least-squares{samples=128", "least-squares{samples=256")
    .replace("epochs=1", "epochs=2")
)

ENTRIES = (
    Entry("llm-pruner", {"recipe": "llm-pruner"}, samples=10),
    Entry("FLAP", {"recipe": "llm-pruner", "importance": "flap", "ranking": "global"}, ("flap",), samples=64),
    Entry("fast", {"recipe": "fast"}),
    Entry("balanced", {}),
    Entry("balanced, MLPs of multiples of 32", {"round_to": {"mlp": 32}}),
    Entry("best", {"recipe": "best"}),
    Entry("best, the text itself not counted", {"recipe": BEST.replace(", truth=0.2", "")}),
    Entry("best, each sample once", {"recipe": BEST.replace("{copies=3, noise=0.2}", "")}),
    Entry("best, each sample once, the text not counted", {"recipe": ONCE}),
    Entry("the same, and 2,048 samples of its own", {"recipe": WRITTEN}),
    Entry("the same, searched, fitted by 256 samples, read twice", {"recipe": SEARCHED}),
    Entry("balanced, neither fitted nor tuned", {"compensate": "none", "tune": "none"}),
    Entry("balanced, not tuned", {"tune": "none"}),
    Entry("balanced, not fitted", {"compensate": "none"}),
    Entry("balanced, heads too", {"select": HEADS, "tune": "none"}),
    Entry("balanced, no layer protected", {"select": WHOLE, "tune": "none"}),
    Entry("balanced, searched", {"select": f"select-by-search{{{CHOSEN}}}", "tune": "none"}),
    Entry("balanced, gates", {"select": f"select-by-gates{{{CHOSEN}}}", "tune": "none"}, samples=512),
    Entry("balanced, gates, tuned", {"select": f"select-by-gates{{{CHOSEN}}}"}, samples=512),
    Entry("balanced, one ridge", {"compensate": "least-squares{samples=64, reach=stream, damping=1}", "tune": "none"}),
    Entry("balanced, the stream not fitted", {"compensate": "least-squares{samples=64, reach=lost}", "tune": "none"}),
    Entry("balanced, rotation", {"compensate": "rotation{samples=64}", "tune": "none"}, ("rotation",)),
    Entry("balanced, tuned where inputs went", {"tune": f"{TUNE}, everywhere=False, rate=0.02}}"}),
    Entry("balanced, scales alone tuned", {"tune": f"{TUNE}}}"}),
    Entry("balanced, the weights tuned", {"tune": f"{TUNE}, weights=True}}"}),
    *(
        Entry(
            f"balanced, {name}",
            {"recipe": "balanced", "importance": spelled, "tune": "none"},
            (spelled.partition("{")[0],),
        )
        for name, spelled in (
            ("taylor mix", "taylor{order=mix, samples=32}"),
            ("taylor second", "taylor{order=second, samples=32}"),
            ("flap", "flap{samples=64}"),
            ("fisher", "fisher{samples=64}"),
            ("reconstruction", "reconstruction{samples=64}"),
        )
    ),
)
"""What is measured: recipes first, then the default one with a single thing changed; most without tuning, which evens
out differences between what it starts from and takes the most time."""


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
        questions: Of each task; 0 for no tasks.
    """

    model: str
    calibration: str
    samples: int
    tokens: int
    windows: int
    window: int
    questions: int

    def __str__(self) -> str:
        asked = f", {self.questions} questions of each task" if self.questions else ""
        return (
            f"{self.model}, calibrated on up to {self.samples} x {self.tokens} tokens of {self.calibration}; "
            f"perplexity on the first {self.windows} x {self.window} tokens of each text{asked}"
        )


@dataclass(frozen=True)
class Texts:
    """Token ids and tasks.

    Attributes:
        calibration: `(samples, tokens)`, all there are.
        heldout: By name, `(windows, window)`.
        tasks: By name.
    """

    calibration: torch.Tensor
    heldout: dict[str, torch.Tensor]
    tasks: dict[str, LocalTask] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """What was measured of one prune.

    Attributes:
        entry: Name of the entry; `dense` for the dense model.
        ratio: Fraction of all parameters asked for.
        draw: Which samples were drawn.
        parameters: That are left.
        perplexities: By name of the text.
        tasks: Accuracy by name of the task.
        seconds: The prune took: wall clock, or with one thread the processor's time, which other work is no part of.
        peak_gb: Largest resident memory while it ran, in 10^9 bytes.
        passes: The pipeline, as it is spelled.
        threads: It ran with.
    """

    entry: str
    ratio: float
    draw: int
    parameters: int
    perplexities: dict[str, float]
    tasks: dict[str, float]
    seconds: float
    peak_gb: float
    passes: str
    threads: int


def entries(names: Sequence[str] = ()) -> list[Entry]:
    """The entries whose passes are installed; of those whose name is one of `names` where there are any."""
    known = fxprune.pass_names()
    found = [entry for entry in ENTRIES if all(name in known for name in entry.needs)]
    return [entry for entry in found if not names or entry.name in names]


def texts_of(tokenizer: Any, data: Path | None, calibration: str, protocol: Protocol) -> Texts:
    """What is calibrated and measured on.

    Args:
        tokenizer: Turns text into ids.
        data: A folder: text files, those with `test` in their path or at the top of it are measured on, and
            `zeroshot/*.jsonl` are tasks. None for built-in text.
        calibration: Name of the file in it that is calibrated on.
        protocol: Sizes.
    """
    if data is None:
        front, back = split_calibration_heldout(offline_text())
        held = {"Python's reference": back, "Python's docstrings": offline_docstrings()}
    else:
        front = calibration_text(data / calibration)
        files = [*sorted(data.glob("*.txt")), *sorted(data.glob("*/test.txt"))]
        held = {str(path.relative_to(data)): calibration_text(path) for path in files}
    tasks = sorted((data / "zeroshot").glob("*.jsonl")) if data is not None and protocol.questions else []
    return Texts(
        token_windows(tokenizer, front, protocol.tokens),
        {name: token_windows(tokenizer, text, protocol.window, limit=protocol.windows) for name, text in held.items()},
        {path.stem: LocalTask(path) for path in tasks},
    )


def measure(model: Any, tokenizer: Any, texts: Texts, entry: Entry, ratio: float, draw: int, protocol: Protocol) -> Row:
    """One prune, and what it left.

    Args:
        model: The dense model, which stays as it is.
        tokenizer: Its tokenizer.
        texts: What is calibrated and measured on.
        entry: The prune.
        ratio: Fraction of all parameters.
        draw: Seed of the draw of calibration samples.
        protocol: Sizes.
    """
    order = torch.randperm(len(texts.calibration), generator=torch.Generator().manual_seed(draw))
    samples = texts.calibration[order[: min(protocol.samples, entry.samples or protocol.samples)]]
    options = {key: _with_ratio(value, ratio) for key, value in entry.options.items()}
    passes = str(fxprune.prune_pipeline(samples, tokenizer=tokenizer, ratio=ratio, **options))
    threads = torch.get_num_threads()
    clock = time.process_time if threads == 1 else time.perf_counter
    forget_peak()
    begin = clock()
    result = fxprune.prune(model, samples, tokenizer=tokenizer, ratio=ratio, **options)
    seconds, peak = clock() - begin, peak_bytes() / 1e9
    slim = result.model or result.graph_module
    perplexities, tasks = _worth(slim, tokenizer, texts, protocol)
    left = result.report.parameters[1]
    return Row(entry.name, ratio, draw, left, perplexities, tasks, seconds, peak, passes, threads)


def _with_ratio(value: Any, ratio: float) -> Any:
    """A selection spelled out gets its ratio."""
    return value % ratio if isinstance(value, str) and "%s" in value else value


def _worth(model: Any, tokenizer: Any, texts: Texts, protocol: Protocol) -> tuple[dict[str, float], dict[str, float]]:
    found = {name: float(perplexity(model, ids)) for name, ids in texts.heldout.items()}
    if not texts.tasks:
        return found, {}
    scores = evaluate(model, tokenizer, texts=(), tasks=texts.tasks, questions=protocol.questions).tasks
    return found, {name: score.value for name, score in scores.items()}


def _dense(model: Any, tokenizer: Any, texts: Texts, protocol: Protocol) -> Row:
    count = sum(parameter.numel() for parameter in model.parameters())
    return Row("dense", 0.0, 0, count, *_worth(model, tokenizer, texts, protocol), 0.0, 0.0, "", 0)


def told(row: Row, dense: Row) -> str:
    """A row in one line."""
    texts = [
        f"{name} {value:.1f} (x{value / dense.perplexities[name]:.2f})" for name, value in row.perplexities.items()
    ]
    tasks = [f"{name} {value:.3f} ({dense.tasks[name]:.3f})" for name, value in row.tasks.items()]
    took = f"{row.seconds:.0f} s with {row.threads} thread(s), {row.peak_gb:.1f} GB" if row.passes else "as it is"
    where = f"{row.ratio:.0%}, draw {row.draw}: " if row.passes else ""
    return f"{where}{row.entry}: {', '.join(texts + tasks)}; {row.parameters:,} parameters, {took}"


def _missing(
    done: Sequence[Row], ratios: Sequence[float], draws: int, names: Sequence[str]
) -> Iterator[tuple[Any, ...]]:
    """What is not measured yet, the first draw of everything first."""
    seen = {(row.entry, row.ratio, row.draw) for row in done}
    for draw in range(draws):
        for ratio in ratios:
            for entry in entries(names):
                if (entry.name, ratio, draw) not in seen:
                    yield entry, ratio, draw


def _read(path: Path, protocol: Protocol) -> list[Row]:
    """Rows measured before under the same protocol."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return [Row(**row) for row in found["rows"]] if found.get("protocol") == asdict(protocol) else []


def _write(path: Path, protocol: Protocol, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(), "protocol": asdict(protocol), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@app.command()
def main(
    data: Annotated[Path | None, typer.Option(help="Folder of texts and zeroshot/*.jsonl; else built-in text.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a model; else the demo model.")] = None,
    calibration: Annotated[str, typer.Option(help="File of the folder to calibrate on.")] = "c4_sample.jsonl",
    ratio: Annotated[list[float] | None, typer.Option(help="Fractions of the parameters; 0.2, 0.35 and 0.5.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Names of entries; all of them without.")] = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws of calibration samples.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="The most calibration samples.")] = 1024,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of one.")] = 128,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each text to measure on.")] = 60,
    window: Annotated[int, typer.Option(min=2, help="Tokens of one.")] = 128,
    questions: Annotated[int, typer.Option(min=0, help="Questions of each task; 0 for none.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help=f"Keep results in results/{RESULTS.name}.")] = False,
) -> None:
    """Prune by every recipe, and by the default one with one thing changed, and measure what is left."""
    console = Console(soft_wrap=True)
    dense, tokenizer, name = load_named(model)
    source = "the standard library's own text" if data is None else calibration
    protocol = Protocol(name, source, samples, tokens, windows, window, questions)
    texts = texts_of(tokenizer, data, calibration, protocol)
    say: Callable[[str], None] = lambda line: console.print(line, markup=False, highlight=False)  # noqa: E731
    say(str(protocol))
    rows = _read(RESULTS, protocol) if json_ else []
    rows = rows or [_dense(dense, tokenizer, texts, protocol)]
    for row in rows:
        say(told(row, rows[0]))
    for entry, part, draw in _missing(rows, ratio or (0.2, 0.35, 0.5), draws, only or ()):
        try:
            rows.append(measure(dense, tokenizer, texts, entry, part, draw, protocol))
        except fxprune.FxpruneError as error:
            say(f"{part:.0%}, draw {draw}: {entry.name}: {error}")
            continue
        say(told(rows[-1], rows[0]))
        if json_:
            _write(RESULTS, protocol, rows)


if __name__ == "__main__":
    app()
