"""Quality of a model with fewer tokens, in bits per byte: `python -m benchmarks.vocabulary MODEL --data FOLDER`.

A part of the calibration file is counted, the rest is one of the texts. Perplexities of models with other tokens do not
compare, so texts are measured in bits per byte, the same characters for all.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import RESULTS, load_named, write_results
from fxprune.data.text import calibration_texts, opening_tokens
from fxprune.evaluation.perplexity import load_corpus, text_perplexity
from fxprune.vocabulary.prune import measure_use, size_after, text_ids, trim

__all__ = ["main", "measure", "texts_of"]

WINDOW = 256
"""Tokens of a window."""


def texts_of(file: Path, others: list[Path], characters: int) -> tuple[str, dict[str, str]]:
    """The text to count, the first four fifths of a file; and those to measure by name, its rest and other files."""
    rows = calibration_texts(file)
    counted = 4 * len(rows) // 5
    held = {f"rest of {file.name}": "\n\n".join(rows[counted:])}
    held |= {
        other.name if other.name != "test.txt" else f"{other.parent.name}/test.txt": load_corpus(other)
        for other in others
    }
    return "\n\n".join(rows[:counted]), {name: text[:characters] for name, text in held.items()}


def measure(model: Any, tokenizer: Any, texts: dict[str, str]) -> dict[str, dict[str, float]]:
    """Bits per byte of each text, and the tokens that it takes."""
    found = {}
    for name, text in texts.items():
        result = text_perplexity(model, tokenizer, text, window=WINDOW, batch=1)
        (ids,) = text_ids(tokenizer, [text])
        found[name] = {"bits_per_byte": result.bits_per_byte, "error": result.bits_per_byte_error, "tokens": len(ids)}
    return found


def main(
    model: Annotated[
        Path | None, typer.Argument(help="Folder or GGUF file of a model; the demo model if left out.")
    ] = None,
    data: Annotated[
        Path, typer.Option(help="Folder with c4_sample.jsonl, wiki_sample.txt, wikitext2/test.txt.")
    ] = Path("data"),
    ratio: Annotated[list[float] | None, typer.Option(help="Fractions of the parameters to remove.")] = None,
    characters: Annotated[int, typer.Option(help="Characters of each text.")] = 16_000,
) -> None:
    """Prune the vocabulary of a model by each ratio, and write results/vocabulary-NAME.json."""
    dense, tokenizer, name = load_named(model)
    others = [data / "wiki_sample.txt", data / "wikitext2" / "test.txt"]
    counted, texts = texts_of(data / "c4_sample.jsonl", others, characters)
    started = time.perf_counter()
    use = measure_use(dense, text_ids(tokenizer, [counted]), opening_tokens(tokenizer))
    seconds = time.perf_counter() - started
    print(f"counted {sum(use.counts.values()):,} tokens in {seconds:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []
    for part in [0.0, *(ratio or [0.4, 0.49])]:
        slim, words = dense, tokenizer
        size, count = len(tokenizer), sum(one.numel() for one in dense.parameters())
        if part:
            found = trim(dense, tokenizer, use, size_after(dense, part), share=True)
            slim, words, size, count = found.model, found.tokenizer, found.report.rows[1], found.report.parameters[1]
        rows.append({"ratio": part, "tokens": size, "parameters": count, "texts": measure(slim, words, texts)})
        print(rows[-1], flush=True)
        settings = {"model": name, "characters": characters, "window": WINDOW, "counted": sum(use.counts.values())}
        write_results(RESULTS / f"vocabulary-{name}.json", {"settings": settings, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
