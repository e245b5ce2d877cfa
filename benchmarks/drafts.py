"""Slim models as drafts of their dense model: `python -m benchmarks.drafts --data FOLDER`.

The demo model is pruned to drafts, tuned for equal predictions and for tokens that are accepted. The dense model then
continues beginnings of texts alone and with each draft, greedily, in transformers and in llama.cpp.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import torch
import typer

import fxprune
from benchmarks.common import RESULTS, load_demo_model, split_corpus, write_results
from benchmarks.engines.llama_cpp import LlamaServer
from fxprune.data.text import token_windows
from fxprune.evaluation import text_perplexity
from fxprune.recipes import read_recipe

_PROMPT, _NEW = 32, 48
"""Tokens that a continuation begins with, and that are generated."""

_WINDOWS = 60
"""Windows of 128 tokens that acceptance on text is measured on."""


@dataclass(frozen=True)
class Continued:
    """Continuation of a prompt, with its time and its counts of drafted and accepted tokens.

    Attributes:
        continuation: Generated token ids, or text.
        tokens: Their number.
        seconds: Wall clock without the prompt, where the engine tells it apart.
        drafted: Tokens that the draft proposed; None if unknown.
        accepted: Tokens of these that were accepted; None if unknown.
        runs: Runs of the dense model; None if unknown.
    """

    continuation: Any
    tokens: int
    seconds: float
    drafted: int | None = None
    accepted: int | None = None
    runs: int | None = None


def by_transformers(dense: Any, draft: Any, prompt: Sequence[int], new: int) -> Continued:
    """Continue a prompt greedily by transformers, with a draft or None."""
    ids, runs = torch.tensor([list(prompt)]), 0

    def counted(*_: Any) -> None:
        nonlocal runs
        runs += 1

    hook = dense.register_forward_pre_hook(counted)
    more = {} if draft is None else {"assistant_model": draft}
    begin = time.perf_counter()
    with torch.no_grad():
        found = dense.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new, **more
        )
    seconds = time.perf_counter() - begin
    hook.remove()
    return Continued(found[0, len(prompt) :].tolist(), new, seconds, runs=runs)


def by_llama_cpp(server: LlamaServer, prompt: Sequence[int], new: int) -> Continued:
    """Continue a prompt greedily by llama.cpp; the server has a draft or none."""
    options = {"samplers": ["top_k"], "top_k": 1, "ignore_eos": True, "cache_prompt": False}
    answer = server.complete(prompt, n_predict=new, **options)
    timings, continuation = answer["timings"], answer["choices"][0]["text"]
    drafted, accepted = timings.get("draft_n"), timings.get("draft_n_accepted")
    return Continued(continuation, timings["predicted_n"], timings["predicted_ms"] / 1e3, drafted, accepted)


def summary(alone: Sequence[Continued], helped: Sequence[Continued]) -> dict[str, Any]:
    """Figures of continuations with a draft beside those of the same prompts without."""
    speed = [one.seconds / other.seconds for one, other in zip(alone, helped, strict=True)]
    found: dict[str, Any] = {
        "same": fmean(one.continuation == other.continuation for one, other in zip(alone, helped, strict=True)),
        "tokens_per_s": [
            sum(one.tokens for one in runs) / sum(one.seconds for one in runs) for runs in (alone, helped)
        ],
        "speed_up": [median(speed), min(speed), max(speed)],
    }
    drafted = sum(one.drafted or 0 for one in helped)
    if drafted:
        found["accepted"] = sum(one.accepted or 0 for one in helped) / drafted
    runs = sum(one.runs or 0 for one in helped)
    if runs:
        found["tokens_per_run"] = sum(one.tokens for one in helped) / runs
    return found


def draft_of(dense: Any, tokenizer: Any, rows: Sequence[str], ratio: float, objective: str, folder: Path) -> Any:
    """A draft by the default recipe, tuned with an objective; the one in the folder if it is there."""
    if not folder.is_dir():
        recipe = read_recipe("balanced")
        recipe["tune"] = str(recipe["tune"][0]).replace("tune{", f"tune{{objective={objective}, ")
        wide: dict[str, Any] = {"recipe": recipe, "ratio": ratio, "round_to": {"mlp": 32}}  # blocks of quantised types
        result = fxprune.prune(dense, list(rows), tokenizer=tokenizer, eval=False, **wide)
        result.save_pretrained(folder, tokenizer)
    return fxprune.from_pretrained(folder)


def main(
    data: Annotated[Path, typer.Option(help="Folder with c4_sample.jsonl and wikitext2.")] = Path("data"),
    ratio: Annotated[list[float] | None, typer.Option(help="Fractions to remove; default 0.6.")] = None,
    objective: Annotated[list[str] | None, typer.Option(help="Aims of tuning; default both.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Beginnings of each text.")] = 6,
    kind: Annotated[str, typer.Option(help="Type of the weights in llama.cpp.")] = "q8_0",
    drafted: Annotated[int, typer.Option(min=1, help="Tokens that are drafted at once in llama.cpp.")] = 3,
    keep: Annotated[Path | None, typer.Option(help="Folder that drafts are kept in, and taken from.")] = None,
) -> None:
    """Write results/drafts.json."""
    dense, tokenizer = load_demo_model()
    rows, texts = split_corpus(data)
    kept = Path(tempfile.mkdtemp()) if keep is None else keep
    wanted = itertools.product(ratio or (0.6,), objective or ("divergence", "acceptance"))
    drafts = {
        f"{part:.0%} off, tuned by {aim}": draft_of(dense, tokenizer, rows, part, aim, kept / f"{part:g}-{aim}")
        for part, aim in wanted
    }
    beginnings = [
        window.tolist() for text in texts.values() for window in token_windows(tokenizer, text, _PROMPT)[::7][:prompts]
    ]
    accepted = {name: accepted_on(dense, draft, tokenizer, texts) for name, draft in drafts.items()}
    result = {
        "settings": {"prompts": len(beginnings), "prompt": _PROMPT, "new": _NEW, "type": kind, "drafted": drafted}
    }
    alone = [by_transformers(dense, None, prompt, _NEW) for prompt in beginnings]
    helped = {n: [by_transformers(dense, d, prompt, _NEW) for prompt in beginnings] for n, d in drafts.items()}
    with tempfile.TemporaryDirectory() as place:
        files = {}
        for i, (name, model) in enumerate({"dense": dense, **drafts}.items()):
            files[name] = fxprune.export_model(model, Path(place, f"{i}.gguf"), tokenizer=tokenizer, quantization=kind)
        engine = {name: _continued(files["dense"], files[name], beginnings, drafted) for name in drafts}
        single = _continued(files["dense"], None, beginnings, drafted)
    size = sum(one.numel() for one in dense.parameters())
    table = [
        {
            "draft": name,
            "share": sum(one.numel() for one in draft.parameters()) / size,
            "acceptance": accepted[name],
            "transformers": summary(alone, helped[name]),
            "llama.cpp": summary(single, engine[name]),
        }
        for name, draft in drafts.items()
    ]
    for row in table:
        print(row, flush=True)
    write_results(RESULTS / "drafts.json", {**result, "rows": table})


def accepted_on(dense: Any, draft: Any, tokenizer: Any, texts: Mapping[str, str]) -> dict[str, list[float]]:
    """Probability that a token drafted on each text is accepted, with its standard error."""
    found = {}
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: _WINDOWS * 128]
        measured = text_perplexity(draft, tokenizer, tokenizer.decode(ids), window=128, batch=4, reference=dense)
        divergence = measured.divergence
        assert divergence is not None and divergence.acceptance is not None and divergence.acceptance_error is not None
        found[name] = [divergence.acceptance, divergence.acceptance_error]
    return found


def _continued(dense: Path, draft: Path | None, beginnings: Sequence[Sequence[int]], drafted: int) -> list[Continued]:
    """Continuations by llama.cpp, each the faster of two runs."""
    server = LlamaServer(dense, context=256, narrow=True, threads=torch.get_num_threads(), draft=draft, drafted=drafted)
    runs = [[by_llama_cpp(server, prompt, _NEW) for prompt in beginnings] for _ in range(2)]
    return [min(pair, key=lambda one: one.seconds) for pair in zip(*runs, strict=True)]


if __name__ == "__main__":
    typer.run(main)
