"""A model run by llama.cpp, from a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from transformers import AutoTokenizer

import fxprune
from benchmarks.engines.base import Engine, Source, load_model, token_ids, vocabulary_of
from benchmarks.engines.llama_server import LlamaServer
from benchmarks.latency.work import Case

__all__ = ["LlamaCppEngine", "LlamaCppQuantisedEngine"]

_STEPS = 16
"""Tokens that a decoding step is timed over, by the engine's own clock."""


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
        self.vocabulary = vocabulary_of(source.folder)
        self.pool = ThreadPoolExecutor(largest.batch)

    @classmethod
    def prepare(cls, source: Source) -> Path:
        """The file of its type."""
        path = source.beside(f"{cls.quantization}.gguf")
        if not path.exists():
            model, tokenizer = load_model(source.folder), AutoTokenizer.from_pretrained(source.folder)
            fxprune.export_model(model, path, tokenizer=tokenizer, quantization=cls.quantization)
        return path

    @classmethod
    def number_bytes(cls, device: str) -> tuple[float, float]:
        """The cache is in half precision."""
        return cls.weight_bytes, 2

    def job(self, case: Case) -> Callable[[], float]:
        """All sequences asked for at once; the engine says how long it took for the prompt or for a token."""
        prompts = token_ids(case.batch, case.tokens, self.vocabulary).tolist()
        decode = case.phase == "decode"

        def measured() -> float:
            said = list(self.pool.map(lambda ids: self._ask(ids, _STEPS if decode else 1), prompts))
            if decode:
                return fmean(timing["predicted_per_token_ms"] for timing in said) / 1e3
            return float(max(timing["prompt_ms"] for timing in said)) / 1e3

        return measured

    def _ask(self, ids: list[int], steps: int) -> dict[str, Any]:
        answer = self.server.complete(ids, n_predict=steps, ignore_eos=True, cache_prompt=False)
        timings: dict[str, Any] = answer["timings"]
        return timings


class LlamaCppQuantisedEngine(LlamaCppEngine):
    """The same in eight bits: blocks of 32 with a scale of 16 bits."""

    name: ClassVar[str] = "llama.cpp q8_0"
    quantization: ClassVar[str] = "q8_0"
    weight_bytes: ClassVar[float] = 34 / 32
