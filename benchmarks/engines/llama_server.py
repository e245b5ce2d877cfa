"""llama.cpp in this process: a GGUF file is loaded, and asked what comes next."""

from __future__ import annotations

import json
import math
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["LlamaServer"]


class LlamaServer:
    """A loaded file.

    Args:
        path: Of the file.
        flash: Whether attention is computed in one go.
        context: Tokens of the cache, those of all sequences together.
        sequences: That run at once.
        batch: Tokens of prompts that run at once; None for as many as the engine takes by itself.
        narrow: The cache is in half precision, else in float32.
        threads: Of the engine.
        gpu: Whether all layers are on a GPU.
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
    ) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel, settings.n_threads_http = context, sequences, sequences
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.n_gpu_layers = 999 if gpu else 0
        settings.warmup = settings.fit_params = False
        settings.verbosity = 0
        if batch is not None:
            settings.n_batch = settings.n_ubatch = batch
        attention = xllamacpp.llama_flash_attn_type
        settings.flash_attn_type = (
            attention.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else attention.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        if not narrow:
            settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(settings)

    def complete(self, tokens: Sequence[int], **more: Any) -> dict[str, Any]:
        """The answer to a prompt, as the engine gives it.

        Raises:
            RuntimeError: It gives an error; holds what it said.
        """
        asked = {"prompt": list(tokens), "n_predict": 1, "temperature": 0, "samplers": [], "cache_prompt": True}
        answer: dict[str, Any] = self.server.handle_completions(asked | more)
        if "error" in answer:
            raise RuntimeError(f"llama.cpp: {answer['error']}")
        return answer

    def log_probabilities(self, tokens: Sequence[int], vocabulary: int) -> torch.Tensor:
        """What follows the tokens, `(vocabulary,)`."""
        answer = self.complete(tokens, n_probs=vocabulary, logit_bias=[[tokens[0], 1000.0]])
        found = torch.full((vocabulary,), torch.nan)
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found

    def log_probability(self, tokens: Sequence[int], following: int) -> float:
        """That of one token to follow the others: it is made the likeliest one, and the engine tells what it was."""
        answer = self.complete(tokens, n_probs=1, logit_bias=[[following, 1000.0]])
        (entry,) = answer["choices"][0]["logprobs"]["content"]
        if entry["id"] != following:
            raise RuntimeError(f"llama.cpp gave token {entry['id']}, and not the one that was made likeliest")
        return float(entry["logprob"])

    def perplexity(self, tokens: Sequence[int]) -> float:
        """Of all tokens but the first, each after those before it."""
        told = [self.log_probability(tokens[:place], tokens[place]) for place in range(1, len(tokens))]
        return math.exp(-sum(told) / len(told))

    def greedy(self, tokens: Sequence[int], count: int, stop: int) -> list[int]:
        """The likeliest tokens, without the one that stops."""
        answer = self.complete(
            tokens, n_predict=count, n_probs=1, samplers=["top_k"], top_k=1, logit_bias=[[stop, False]]
        )
        return [int(entry["id"]) for entry in answer["choices"][0]["logprobs"]["content"]]

    def tokenize(self, text: str) -> list[int]:
        """The numbers of the tokens of a text, special ones as well."""
        asked = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        where = self.server.listening_address.rstrip("/") + "/tokenize"
        request = urllib.request.Request(where, asked, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return [int(token) for token in json.loads(answer.read())["tokens"]]
