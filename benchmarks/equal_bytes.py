"""Quality and speed of quantised and pruned files side by side: `python -m benchmarks.equal_bytes --data FOLDER`.

The demo model, dense and with a part of its parameters removed, in several types of GGUF. llama.cpp itself predicts the
same pieces of text from each file, and decodes with each in turn.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any, TypeAlias

import torch
import typer
from transformers import AutoTokenizer

import fxprune
from benchmarks.common import RESULTS, load_demo_model, split_corpus, write_results
from benchmarks.engines.llama_cpp import LlamaServer
from benchmarks.vocabulary import pieces_of, ratio_of

TYPES = ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m")

_CONTEXT, _STEPS = 512, 32
"""Tokens of the cache, and tokens that a decoding time is a mean over."""

Measured: TypeAlias = Mapping[str, Any]
"""Findings on a file: its bytes, bits of each piece by text, and milliseconds a token round by round."""


def bits_of(server: Any, ids: Sequence[int]) -> float:
    """Bits of the cross-entropy of all tokens except the first."""
    nats = [float(server.log_probability(ids[:place], ids[place])) for place in range(1, len(ids))]
    return -sum(nats) / math.log(2)


def measure(
    files: Mapping[str, Path], texts: Mapping[str, Sequence[Sequence[int]]], rounds: int
) -> dict[str, dict[str, Any]]:
    """Findings on each file and the pieces of each text; files take turns in decoding, so that none is favoured."""
    found: dict[str, dict[str, Any]] = {}
    servers = {}
    for name, path in files.items():
        servers[name] = LlamaServer(path, context=_CONTEXT, narrow=True, threads=torch.get_num_threads())
        bits = {text: [bits_of(servers[name], ids) for ids in pieces] for text, pieces in texts.items()}
        found[name] = {"bytes": path.stat().st_size, "bits": bits, "decode_ms": []}
        print(name, {text: round(sum(each), 1) for text, each in bits.items()}, flush=True)
    prompt = next(iter(texts.values()))[0][:16]
    for _, (name, server) in itertools.product(range(rounds), servers.items()):
        done = server.complete(prompt, n_predict=_STEPS, ignore_eos=True, cache_prompt=False)
        found[name]["decode_ms"].append(float(done["timings"]["predicted_per_token_ms"]))
    return found


def rows_of(found: Mapping[str, Measured], sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Rows of the table, the largest file first: bits over those of the first file, and of its own model's first type.

    `sizes` are the bytes of UTF-8 of each text.
    """
    first = next(iter(found.values()))
    rows = []
    for name, one in found.items():
        model, _, kind = name.rpartition(" ")
        own = next(each for other, each in found.items() if other.rpartition(" ")[0] == model)
        texts = {}
        for text, bits in one["bits"].items():
            over, apart = (ratio_of(bits, other["bits"][text]) for other in (first, own))
            texts[text] = {"bits_per_byte": sum(bits) / sizes[text], "over_dense": over, "over_own": apart}
        speed = [slow / fast for slow, fast in zip(first["decode_ms"], one["decode_ms"], strict=True)]
        times = {"decode_ms": median(one["decode_ms"]), "speed_up": [median(speed), min(speed), max(speed)]}
        rows.append({"model": model, "type": kind, "bytes": one["bytes"], "texts": texts, **times})
    return sorted(rows, key=lambda row: -int(row["bytes"]))


def main(
    data: Annotated[Path, typer.Option(help="Folder with c4_sample.jsonl and wikitext2.")] = Path("data"),
    ratio: Annotated[list[float] | None, typer.Option(help="Fractions to remove; default 0.2.")] = None,
    recipe: Annotated[str, typer.Option(help="Recipe to prune by.")] = "fast",
    kind: Annotated[list[str] | None, typer.Option(help="Types of weights.")] = None,
    characters: Annotated[int, typer.Option(min=800, help="Characters of each text.")] = 4000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of decoding.")] = 7,
    slim: Annotated[list[Path] | None, typer.Option(help="Folders of slim models, in place of pruning.")] = None,
) -> None:
    """Write results/equal_bytes.json."""
    dense, tokenizer = load_demo_model()
    rows, given = split_corpus(data)
    pieces = {name: pieces_of(text, characters) for name, text in given.items()}
    texts = {name: tokenizer(each, verbose=False)["input_ids"] for name, each in pieces.items()}
    models: dict[str, Any] = {"dense": dense}
    for part in () if slim else (ratio or [0.2]):
        options: dict[str, Any] = {"recipe": recipe, "ratio": part, "round_to": {"mlp": 256}, "eval": False}
        result = fxprune.prune(dense, rows, tokenizer=tokenizer, **options)
        models[f"{result.report.achieved:.0%} off by {recipe}"] = result.model
    for folder in slim or ():
        models[folder.name] = fxprune.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as place:
        files: dict[str, Path] = {}
        for (name, model), each in itertools.product(models.items(), kind or TYPES):
            files[f"{name} {each}"] = Path(place) / f"{len(files)}.gguf"
            fxprune.export_model(model, files[f"{name} {each}"], tokenizer=tokenizer, quantization=each)
        found = measure(files, texts, rounds)
    sizes = {name: sum(len(piece.encode()) for piece in each) for name, each in pieces.items()}
    settings = {"pieces": {name: len(each) for name, each in pieces.items()}, "rounds": rounds}
    settings |= {"parameters": {name: sum(one.numel() for one in each.parameters()) for name, each in models.items()}}
    write_results(RESULTS / "equal_bytes.json", {"settings": settings, "rows": rows_of(found, sizes)})


if __name__ == "__main__":
    typer.run(main)
