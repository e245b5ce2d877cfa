"""A model run by vLLM, where it is installed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, ClassVar

from benchmarks.engines.base import Engine, Source, token_ids, vocabulary_of
from benchmarks.latency.work import Case

__all__ = ["VllmEngine"]

_STEPS = 24
"""Tokens that a decoding step is timed over."""


class VllmEngine(Engine):
    """vLLM, through its Transformers backend. A step is what each token more takes, the first left out."""

    name: ClassVar[str] = "vLLM"
    packages: ClassVar[tuple[str, ...]] = ("vllm",)

    def __init__(self, source: Source, device: str, largest: Case) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # gigabytes
        vllm: Any = import_module("vllm")
        self.vocabulary = vocabulary_of(source.folder)
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
        """All sequences at once."""
        given = token_ids(case.batch, case.tokens, self.vocabulary).tolist()
        prompts = [{"prompt_token_ids": ids} for ids in given]

        def seconds(count: int) -> float:
            asked = self.sampling(temperature=0, max_tokens=count, ignore_eos=True)
            begin = time.perf_counter()
            self.engine.generate(prompts, asked, use_tqdm=False)
            return time.perf_counter() - begin

        if case.phase == "prefill":
            return lambda: seconds(1)
        return lambda: (seconds(_STEPS + 1) - seconds(1)) / _STEPS
