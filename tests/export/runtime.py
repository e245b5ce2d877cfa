"""GGUF files run by the engine that most people run them with, in this process."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import torch
import xllamacpp

__all__ = ["Engine"]


class Engine:
    """A loaded file.

    Args:
        path: of the file.
        flash: whether attention is computed in one go.
        context: tokens of the cache, which is float32 unless ``narrow``.
    """

    def __init__(self, path: Path, *, flash: bool = True, context: int = 64, narrow: bool = False) -> None:
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel, settings.n_threads_http = context, 1, 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.warmup = settings.fit_params = False
        settings.verbosity = 0
        attention = xllamacpp.llama_flash_attn_type
        settings.flash_attn_type = (
            attention.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else attention.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        if not narrow:
            settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(settings)

    def _complete(self, tokens: list[int], **more: Any) -> dict[str, Any]:
        asked = {"prompt": tokens, "n_predict": 1, "temperature": 0, "samplers": [], "cache_prompt": True}
        answer = self.server.handle_completions(asked | more)
        assert "error" not in answer, answer
        return answer

    def log_probabilities(self, tokens: list[int], vocabulary: int) -> torch.Tensor:
        """What follows the tokens, ``(vocabulary,)``."""
        answer = self._complete(tokens, n_probs=vocabulary, logit_bias=[[tokens[0], 1000.0]])
        found = torch.full((vocabulary,), torch.nan)
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found

    def log_probability(self, tokens: list[int], following: int) -> float:
        """That of one token to follow the others: it is made the likeliest one, and the engine tells what it was."""
        answer = self._complete(tokens, n_probs=1, logit_bias=[[following, 1000.0]])
        (entry,) = answer["choices"][0]["logprobs"]["content"]
        assert entry["id"] == following
        return float(entry["logprob"])

    def greedy(self, tokens: list[int], count: int, stop: int) -> list[int]:
        """The likeliest tokens, without the one that stops."""
        answer = self._complete(
            tokens, n_predict=count, n_probs=1, samplers=["top_k"], top_k=1, logit_bias=[[stop, False]]
        )
        return [entry["id"] for entry in answer["choices"][0]["logprobs"]["content"]]

    def tokenize(self, text: str) -> list[int]:
        """The numbers of the tokens of a text, special ones as well."""
        asked = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        where = self.server.listening_address.rstrip("/") + "/tokenize"
        request = urllib.request.Request(where, asked, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["tokens"]
