"""Greedy tokens of vLLM; runs in an environment that has vLLM and not this package.

python vllm_tokens.py FOLDER REQUEST.json ANSWER.json
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def answer(folder: str, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Most likely tokens after each prompt, by vLLM in float32.

    Returns:
        `tokens` of each prompt, and the `versions` of the packages.
    """
    vllm = importlib.import_module("vllm")
    engine = vllm.LLM(
        folder,
        model_impl="transformers",
        trust_remote_code=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=256,
    )
    greedy = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], greedy)
    versions = {name: importlib.import_module(name).__version__ for name in ("vllm", "torch", "transformers")}
    return {"tokens": [list(one.outputs[0].token_ids) for one in outputs], "versions": versions}


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    Path(sys.argv[3]).write_text(json.dumps(answer(sys.argv[1], **request)), encoding="utf-8")
