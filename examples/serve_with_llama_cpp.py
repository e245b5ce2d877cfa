"""Prune a model, export it as a GGUF file, and complete a sentence with llama.cpp.

Needs ``pip install xllamacpp``, which is llama.cpp as a Python package; any other build of it reads the file too.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import xllamacpp

import fxprune
from examples.models import load

PROMPT = "The capital of France is"


def main() -> None:
    """Prune, export and complete."""
    model, tokenizer = load()
    result = fxprune.prune(model, tokenizer=tokenizer, recipe="fast", ratio=0.2, round_to={"mlp": 32})
    print(f"{result.report.achieved:.1%} of the parameters removed")
    with tempfile.TemporaryDirectory() as folder:
        path = result.export(Path(folder) / "slim.gguf", tokenizer=tokenizer, quantization="f16")
        print(f"the file has {path.stat().st_size / 1e6:.1f} MB")
        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.verbosity = str(path), 128, 0
        server = xllamacpp.Server(settings)
        answer = server.handle_completions({"prompt": PROMPT, "n_predict": 16, "temperature": 0})
        print(PROMPT + answer["choices"][0]["text"])


if __name__ == "__main__":
    main()
