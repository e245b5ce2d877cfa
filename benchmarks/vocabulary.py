"""Quality of a model with fewer tokens, in bits per byte: `python -m benchmarks.vocabulary MODEL --data FOLDER`.

Four fifths of the calibration file are counted, and the rest is one of the texts. Perplexities over other tokens do
not compare, so each text is cut into the same pieces for all of them, which are measured in bits per byte.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch.nn.functional import cross_entropy

import fxprune
from benchmarks.common import RESULTS, load_named, split_corpus, write_results
from fxprune.data.text import opening_tokens
from fxprune.pipeline.arguments import VOCAB
from fxprune.recipes import Recipe
from fxprune.recipes.recipe import read_recipe
from fxprune.vocabulary.prune import measure_use, size_after, text_ids, trim

PIECE = 800
"""Characters that a model reads at once, about 200 tokens."""


def pieces_of(text: str, characters: int) -> list[str]:
    """Pieces of equal length of the first ``characters`` of a text."""
    return [text[start : start + PIECE] for start in range(0, min(characters, len(text) - PIECE + 1), PIECE)]


def bits_of(model: Any, tokenizer: Any, pieces: list[str]) -> list[float]:
    """Bits of the cross-entropy of each piece, after the tokens that the tokenizer puts before a text."""
    found = []
    for ids in text_ids(tokenizer, pieces):
        tokens = torch.tensor([*opening_tokens(tokenizer), *ids])
        with torch.inference_mode():
            logits = model(input_ids=tokens[None]).logits[0, :-1].float()
        found.append(float(cross_entropy(logits, tokens[1:], reduction="sum")) / math.log(2))
    return found


def ratio_of(bits: list[float], dense: list[float]) -> tuple[float, float]:
    """The ratio of two sums over the same pieces, and its standard error.

    Source: Cochran, Sampling Techniques (1977), equation 6.13, for an infinite population.
    """
    ratio, number = sum(bits) / sum(dense), len(bits)
    if number < 2:
        return ratio, 0.0
    rest = sum((one - ratio * other) ** 2 for one, other in zip(bits, dense, strict=True))
    return ratio, math.sqrt(rest * number / (number - 1)) / sum(dense)


def tuned_on(samples: int) -> Recipe:
    """The default recipe with some samples to tune on."""
    recipe = read_recipe("balanced")
    recipe.set_arguments("teach", {"samples": samples})
    return recipe


def main(
    model: Annotated[Path | None, typer.Argument(help="Folder or GGUF file; the demo model if left out.")] = None,
    data: Annotated[Path, typer.Option(help="Folder with c4_sample.jsonl, wiki_sample.txt, wikitext2.")] = Path("data"),
    ratio: Annotated[list[float] | None, typer.Option(help="Fractions of the parameters to remove.")] = None,
    characters: Annotated[int, typer.Option(help="Characters of each text.")] = 16_000,
    tune: Annotated[str, typer.Option(help="A pass that tunes what is left, such as 'tune{rank=8}'; else none.")] = "",
    samples: Annotated[int, typer.Option(min=1, help="Samples of 128 tokens that it is tuned on.")] = 288,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the weights.")] = "float32",
) -> None:
    """Prune the vocabulary of a model by each ratio, and write results/vocabulary-NAME.json."""
    dense, tokenizer, name = load_named(model)
    dense.to(getattr(torch, dtype))
    rows, texts = split_corpus(data, ("wiki_sample.txt", "wikitext2/test.txt"))
    pieces = {place: pieces_of(text, characters) for place, text in texts.items()}
    use = measure_use(dense, text_ids(tokenizer, ["\n\n".join(rows)]), opening_tokens(tokenizer))
    settings = {"model": name, "dtype": dtype, "piece": PIECE, "counted": sum(use.counts.values())}
    settings |= {"samples": samples if tune else 0}
    settings |= {"pieces": {place: len(each) for place, each in pieces.items()}}
    results: list[dict[str, Any]] = []
    whole: dict[str, list[float]] = {}
    parts = ratio or [0.4, 0.49]
    asked = [(0.0, ""), *((part, "") for part in parts), *((part, tune) for part in parts if tune)]
    for part, tuned_by in asked:
        slim, words, count = dense, tokenizer, sum(one.numel() for one in dense.parameters())
        if tuned_by:
            options: dict[str, Any] = {"kinds": VOCAB, "ratio": part, "tokenizer": tokenizer, "tune": tuned_by}
            pruned = fxprune.prune(dense, rows, recipe=tuned_on(samples), eval=False, **options)
            slim, words, count = pruned.model, pruned.tokenizer, pruned.report.parameters[1]
        elif part:
            found = trim(dense, tokenizer, use, size_after(dense, part), share=True)
            slim, words, count = found.model, found.tokenizer, found.report.parameters[1]
        row: dict[str, Any] = {"ratio": part, "tuned": tuned_by, "tokens": len(words), "parameters": count, "texts": {}}
        for place, each in pieces.items():
            bits = bits_of(slim, words, each)
            over, error = ratio_of(bits, whole.setdefault(place, bits))
            row["texts"][place] = {
                "bits_per_byte": sum(bits) / sum(len(piece.encode()) for piece in each),
                "over_dense": over,
                "error": error,
                "tokens": sum(map(len, text_ids(words, each))),
            }
        results.append(row)
        print(row, flush=True)
        write_results(RESULTS / f"vocabulary-{name}.json", {"settings": settings, "rows": results})


if __name__ == "__main__":
    typer.run(main)
