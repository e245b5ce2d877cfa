"""Prune the demo model and compare it with the dense one, in a few minutes: `make demo`."""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fxprune
from benchmarks.common import load_demo_model, split_calibration_heldout
from fxprune.cli.console import keep_freed, widened
from fxprune.data.built_in import general_chats, offline_text
from fxprune.data.text import token_windows
from fxprune.evaluation import perplexity
from fxprune.evaluation.speed import time_interleaved, timed_call

PROMPT = "What is the capital of France?"


def demo_table(dense: Any, result: fxprune.Result, heldout: torch.Tensor, console: Console) -> Table:
    """Table of dense against slim: size, work, quality on held-out token ids `(windows, tokens)`, and speed."""
    report, slim = result.report, result.model or result.graph_module
    table = Table("", title="dense against slim")
    for heading in ("dense", "slim", "change"):
        table.add_column(heading, justify="right")
    _row(table, "parameters", *report.parameters, form=",.0f")
    _row(table, f"MACs at {report.tokens} tokens", *report.macs, form=",.0f")
    console.print("measuring perplexity ...")
    _row(table, "perplexity, held-out text", perplexity(dense, heldout), perplexity(slim, heldout), form=".1f")
    console.print("measuring latency ...")
    models = {"dense": dense, "slim": slim}
    for batch, tokens in ((1, 128), (1, 1)):
        ids = torch.randint(dense.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            jobs = {name: timed_call(partial(model, input_ids=ids)) for name, model in models.items()}
            seconds = time_interleaved(jobs, rounds=10)
        before, after = (1e3 * median(seconds[name]) for name in models)
        _row(table, f"latency ms, {batch} x {tokens} tokens", before, after, form=".1f")
    return table


def _row(table: Table, name: str, dense: float, slim: float, form: str) -> None:
    table.add_row(name, f"{dense:{form}}", f"{slim:{form}}", f"{slim / dense - 1:+.1%}")


def demo_samples(tokenizer: Any, samples: int, windows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids to calibrate on, `(samples, 128)`, a third of them chats, and held-out ones, `(windows, 256)`."""
    front, back = split_calibration_heldout(offline_text())
    chats = token_windows(tokenizer, general_chats(tokenizer), 128)[: max(1, samples // 3)]
    text = token_windows(tokenizer, front, 128)[: max(1, samples - len(chats))]
    return torch.cat([text, chats]), token_windows(tokenizer, back, 256)[:windows]


def _answer(model: Any, tokenizer: Any) -> str:
    """Answer of an instruct model to `PROMPT`, asked as a chat."""
    chat = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def main(
    ratio: Annotated[float, typer.Option(help="Fraction of the parameters to remove.")] = 0.2,
    samples: Annotated[
        int, typer.Option(min=1, help="Calibration samples of 128 tokens; more samples tune longer.")
    ] = 120,
    windows: Annotated[int, typer.Option(min=1, help="Held-out windows of 256 tokens.")] = 20,
    recipe: Annotated[str | None, typer.Option(help="A recipe other than the default.")] = None,
) -> None:
    """Prune SmolLM2-135M by the default recipe, on fewer samples than it can use, and compare it with the dense model.

    A third of the samples are chats, since the model is asked as a chat; the others are documentation of Python.
    """
    keep_freed()
    console = widened(Console())
    begin = time.perf_counter()
    console.print("loading SmolLM2-135M-Instruct ...")
    dense, tokenizer = load_demo_model()
    calibration, heldout = demo_samples(tokenizer, samples, windows)
    console.print(f"pruning {ratio:.0%} of the parameters, calibrated on {samples} x 128 tokens ...")
    result = fxprune.prune(dense, calibration, ratio=ratio, tokenizer=tokenizer, recipe=recipe, track=track, eval=False)
    report = result.report
    console.print(demo_table(dense, result, heldout, console))
    console.print(f"ratio requested {ratio:.2%}, achieved {report.achieved:.2%}")
    console.print(f"verification: slim and masked dense outputs differ by at most {report.verification_error:.1e}")
    for name, model in (("dense", dense), ("slim", result.model)):
        if model is not None:
            console.print(f"{name}, asked {PROMPT!r}: {_answer(model, tokenizer)!r}", markup=False)
    for reason in (*report.model_reasons, *report.notes):
        console.print(f"note: {reason}", markup=False)
    console.print(f"done in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    typer.run(main)
