"""The demo model, loaded with its tokenizer; `fxprune.cli.demo` says where it comes from."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fxprune.cli.demo import demo_checkpoint, demo_name

__all__ = ["load_demo_model", "load_named"]


def load_demo_model(
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The demo model is loaded in evaluation mode, with its tokenizer, as plain trainable weights.

    Args:
        dtype: The type of the parameters; the file's blocks are dequantised in float32 first.

    Raises:
        FxpruneError: The package that carries the model is not installed.
    """
    folder = demo_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_named(folder: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """A model, its tokenizer and its name: those in a folder, or the demo model where there is none."""
    if folder is None:
        return *load_demo_model(), demo_name()
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), folder.name
