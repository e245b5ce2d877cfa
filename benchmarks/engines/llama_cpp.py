"""llama.cpp: a GGUF file loaded in this process, timed as an engine, and compared with transformers.

    python -m benchmarks.engines.llama_cpp

prints the perplexity of `f16` and `q8_0` files of a slim demo model beside that of transformers on the same tokens, and
how many of the most likely tokens after a few prompts agree. `--slim FOLDER` names the slim model; without it the demo
model is pruned, to widths that fill the blocks of quantised types.
"""

from __future__ import annotations

import json
import math
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, ClassVar

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

import fxprune
from benchmarks.common import environment, load_demo_model, split_calibration_heldout
from benchmarks.engines.base import PROMPTS, Case, Engine, Source, greedy_tokens, load_model, token_ids, vocabulary_size
from fxprune.data.built_in import offline_text
from fxprune.data.text import read_text, token_windows

_STEPS = 16
"""Tokens that a decoding step is averaged over, by the clock of llama.cpp."""

console = Console(width=110)


class LlamaServer:
    """A GGUF file, loaded by llama.cpp.

    Args:
        path: The file.
        flash: Use flash attention.
        context: Tokens of the cache, of all sequences together.
        sequences: Sequences that run at once.
        batch: Tokens of prompts that run at once; None for the default of llama.cpp.
        narrow: Keep the cache in half precision, else in float32.
        threads: Number of threads.
        gpu: Run all layers on a GPU.
        draft: File of a model that drafts tokens; None for none.
        drafted: Tokens that are drafted at once.
    """

    def __init__(
        self,
        path: Path,
        *,
        flash: bool = True,
        context: int = 64,
        sequences: int = 1,
        batch: int | None = None,
        narrow: bool = False,
        threads: int = 1,
        gpu: bool = False,
        draft: Path | None = None,
        drafted: int = 3,
    ) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel, settings.n_threads_http = context, sequences, sequences
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.n_gpu_layers = 999 if gpu else 0
        settings.warmup = settings.fit_params = False
        settings.verbosity = 0
        if draft is not None:
            settings.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
            settings.speculative.draft.mparams.path, settings.speculative.draft.n_max = str(draft), drafted
            settings.speculative.draft.cpuparams.n_threads = threads
            settings.speculative.draft.cpuparams_batch.n_threads = threads
        if batch is not None:
            settings.n_batch = settings.n_ubatch = batch
        attention = xllamacpp.llama_flash_attn_type
        settings.flash_attn_type = (
            attention.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else attention.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        if not narrow:
            settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(settings)
        # The server's destructor waits for its loop, for ever if that never began: a token comes from one that runs.
        self.complete([0])

    def complete(self, tokens: Sequence[int], **more: Any) -> dict[str, Any]:
        """Completion of a prompt, as llama.cpp returns it.

        Raises:
            RuntimeError: llama.cpp returned an error.
        """
        request = {"prompt": list(tokens), "n_predict": 1, "temperature": 0, "samplers": [], "cache_prompt": True}
        answer: dict[str, Any] = self.server.handle_completions(request | more)
        if "error" in answer:
            raise RuntimeError(f"llama.cpp: {answer['error']}")
        return answer

    def log_probabilities(self, tokens: Sequence[int], vocabulary: int) -> torch.Tensor:
        """Log-probabilities of the next token, `(vocabulary,)`."""
        answer = self.complete(tokens, n_probs=vocabulary, logit_bias=[[tokens[0], 1000.0]])
        found = torch.full((vocabulary,), torch.nan)
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found

    def log_probability(self, tokens: Sequence[int], following: int) -> float:
        """Log-probability of one next token: a bias makes llama.cpp choose it and report its value without the bias."""
        answer = self.complete(tokens, n_probs=1, logit_bias=[[following, 1000.0]])
        (entry,) = answer["choices"][0]["logprobs"]["content"]
        if entry["id"] != following:
            raise RuntimeError(f"llama.cpp chose token {entry['id']}, not token {following}")
        return float(entry["logprob"])

    def perplexity(self, tokens: Sequence[int]) -> float:
        """Perplexity of all tokens except the first."""
        return math.exp(-fmean(self.log_probability(tokens[:i], tokens[i]) for i in range(1, len(tokens))))

    def greedy(self, tokens: Sequence[int], count: int, stop: int) -> list[int]:
        """Most likely `count` tokens after the prompt; token `stop` is never chosen."""
        answer = self.complete(
            tokens, n_predict=count, n_probs=1, samplers=["top_k"], top_k=1, logit_bias=[[stop, False]]
        )
        return [int(entry["id"]) for entry in answer["choices"][0]["logprobs"]["content"]]

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, special tokens included."""
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        url = self.server.listening_address.rstrip("/") + "/tokenize"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return [int(token) for token in json.loads(answer.read())["tokens"]]


class LlamaCppEngine(Engine):
    """llama.cpp in half precision, by its server, which runs several sequences at once."""

    name: ClassVar[str] = "llama.cpp f16"
    packages: ClassVar[tuple[str, ...]] = ("xllamacpp",)
    writes: ClassVar[bool] = True
    quantization: ClassVar[str] = "f16"
    weight_bytes: ClassVar[float] = 2

    def __init__(self, source: Source, device: str, largest: Case) -> None:
        self.server = LlamaServer(
            self.prepare(source),
            context=largest.batch * (largest.tokens + _STEPS + 8),
            sequences=largest.batch,
            batch=max(512, largest.batch * largest.tokens),
            narrow=True,
            threads=torch.get_num_threads(),
            gpu=device == "cuda",
        )
        self.vocabulary = vocabulary_size(source.folder)
        self.pool = ThreadPoolExecutor(largest.batch)

    @classmethod
    def prepare(cls, source: Source) -> Path:
        """Export a GGUF file of the type."""
        path = source.beside(f"{cls.quantization}.gguf")
        if not path.exists():
            model, tokenizer = load_model(source.folder), AutoTokenizer.from_pretrained(source.folder)
            fxprune.export_model(model, path, tokenizer=tokenizer, quantization=cls.quantization)
        return path

    @classmethod
    def number_bytes(cls, device: str) -> tuple[float, float]:
        """Bytes of the type, and a cache in half precision."""
        return cls.weight_bytes, 2

    def job(self, case: Case) -> Callable[[], float]:
        """Send all sequences at once; llama.cpp reports the time of the prompt or of a token."""
        prompts = token_ids(case.batch, case.tokens, self.vocabulary).tolist()
        decode = case.phase == "decode"

        def timings(ids: list[int]) -> Any:
            steps = _STEPS if decode else 1
            return self.server.complete(ids, n_predict=steps, ignore_eos=True, cache_prompt=False)["timings"]

        def measured() -> float:
            found = list(self.pool.map(timings, prompts))
            if decode:
                return fmean(each["predicted_per_token_ms"] for each in found) / 1e3
            return float(max(each["prompt_ms"] for each in found)) / 1e3

        return measured


class LlamaCppQuantisedEngine(LlamaCppEngine):
    """llama.cpp in eight bits: blocks of 32 weights with a 16-bit scale."""

    name: ClassVar[str] = "llama.cpp q8_0"
    quantization: ClassVar[str] = "q8_0"
    weight_bytes: ClassVar[float] = 34 / 32


def main(
    slim: Annotated[Path | None, typer.Option(help="Slim demo model; else the demo model is pruned.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text to calibrate on; else built-in text.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text for perplexity; else built-in text.")] = None,
    ratio: Annotated[float, typer.Option(help="Fraction of the parameters to remove.")] = 0.2,
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text.")] = 4,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens in each.")] = 128,
) -> None:
    """Compare llama.cpp with transformers on a slim demo model."""
    front, back = split_calibration_heldout(offline_text())
    dense, tokenizer = load_demo_model()
    with tempfile.TemporaryDirectory() as folder:
        place = slim or Path(folder) / "slim"
        if slim is None:
            source = front if calibration is None else read_text(calibration)
            samples = token_windows(tokenizer, source, 128)[:1024]
            result = fxprune.prune(dense, samples, tokenizer=tokenizer, ratio=ratio, round_to={"mlp": 32}, eval=False)
            result.save_pretrained(place, tokenizer)
        model = fxprune.from_pretrained(place)
        held = token_windows(tokenizer, back if text is None else read_text(text), tokens)[:windows]
        console.print(_comparison(model, tokenizer, held.tolist(), Path(folder)))
    console.print(environment(), soft_wrap=True)


def _comparison(model: Any, tokenizer: Any, held: Sequence[Sequence[int]], folder: Path) -> Table:
    """Table of perplexity and equal greedy tokens; writes the GGUF files into `folder`."""
    ids = torch.tensor(held)
    with torch.no_grad():
        log_probabilities = model(ids).logits[:, :-1].log_softmax(-1)
    expected = math.exp(-float(log_probabilities.gather(2, ids[:, 1:, None]).mean()))
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    wanted = greedy_tokens(model, prompts, 32, without=tokenizer.eos_token_id)
    table = Table("", "perplexity", "over transformers", f"same of {32 * len(prompts)} tokens", "MB")
    table.add_row("transformers", f"{expected:.2f}", "", "", "")
    for quantization in ("f16", "q8_0"):
        path = folder / f"{quantization}.gguf"
        fxprune.export_model(model, path, tokenizer=tokenizer, quantization=quantization)
        server = LlamaServer(path, context=len(held[0]) + 64, narrow=True, threads=torch.get_num_threads())
        found = math.exp(fmean(math.log(server.perplexity(window)) for window in held))
        given = [server.greedy(prompt, 32, tokenizer.eos_token_id) for prompt in prompts]
        same = sum(a == b for want, got in zip(wanted, given, strict=True) for a, b in zip(want, got, strict=False))
        size = path.stat().st_size / 1e6
        table.add_row(quantization, f"{found:.2f}", f"{found / expected - 1:+.2%}", str(same), f"{size:.0f}")
    return table


if __name__ == "__main__":
    typer.run(main)
