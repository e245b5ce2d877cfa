"""The demo model, pruned by the default recipe, in llama.cpp: is it the model that transformers runs?

    python -m benchmarks.engines.llama_quality

Perplexity of `f16` and `q8_0` files beside that of transformers on the same tokens, and the likeliest tokens after a
few prompts. With `--slim FOLDER` a model that is there is taken; else the demo model is pruned, with widths that fill
the blocks of quantised types.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import fxprune
from benchmarks.demo_model import load_demo_model
from benchmarks.engines.llama_server import LlamaServer
from benchmarks.engines.vllm_serve import PROMPTS, greedy_tokens
from benchmarks.environment import environment
from fxprune.data.built_in import offline_text
from fxprune.data.text import read_text, split_calibration_heldout, token_windows

__all__ = ["app", "transformers_perplexity"]

app = typer.Typer(add_completion=False)
console = Console(width=110)


@app.command()
def main(
    slim: Annotated[Path | None, typer.Option(help="Folder of a slim demo model; else one is made.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text to calibrate on; else built-in text.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text for perplexity; else built-in text.")] = None,
    ratio: Annotated[float, typer.Option(help="Fraction of the parameters that goes.")] = 0.2,
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text.")] = 4,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens in each.")] = 128,
) -> None:
    """Compare llama.cpp with transformers."""
    front, back = split_calibration_heldout(offline_text())
    dense, tokenizer = load_demo_model()
    with tempfile.TemporaryDirectory() as folder:
        place = slim or Path(folder) / "slim"
        if slim is None:
            samples = token_windows(
                tokenizer, front if calibration is None else read_text(calibration), 128, limit=1024
            )
            result = fxprune.prune(dense, samples, tokenizer=tokenizer, ratio=ratio, round_to={"mlp": 32})
            result.save_pretrained(place, tokenizer)
        model = fxprune.from_pretrained(place)
        held = token_windows(tokenizer, back if text is None else read_text(text), tokens, limit=windows)
        console.print(_table(model, tokenizer, held.tolist(), Path(folder)))
    console.print(environment(), soft_wrap=True)


def _table(model: Any, tokenizer: Any, held: Sequence[Sequence[int]], folder: Path) -> Table:
    want = transformers_perplexity(model, held)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    said = greedy_tokens(model, prompts, 32, without=tokenizer.eos_token_id)
    table = Table("", "perplexity", "over transformers", f"same of {32 * len(prompts)} tokens", "MB")
    table.add_row("transformers", f"{want:.2f}", "", "", "")
    for quantization in ("f16", "q8_0"):
        path = folder / f"{quantization}.gguf"
        fxprune.export_model(model, path, tokenizer=tokenizer, quantization=quantization)
        server = LlamaServer(path, context=len(held[0]) + 64, narrow=True, threads=torch.get_num_threads())
        found = math.exp(sum(math.log(server.perplexity(window)) for window in held) / len(held))
        following = [server.greedy(ids, 32, tokenizer.eos_token_id) for ids in prompts]
        same = sum(a == b for one, two in zip(said, following, strict=True) for a, b in zip(one, two, strict=False))
        size = path.stat().st_size / 1e6
        table.add_row(quantization, f"{found:.2f}", f"{found / want - 1:+.2%}", str(same), f"{size:.0f}")
    return table


def transformers_perplexity(model: Any, held: Sequence[Sequence[int]]) -> float:
    """Of all tokens but the first of each window."""
    with torch.no_grad():
        told = model(torch.tensor(held)).logits[:, :-1].log_softmax(-1)
    return math.exp(-float(told.gather(2, torch.tensor(held)[:, 1:, None]).mean()))


if __name__ == "__main__":
    app()
