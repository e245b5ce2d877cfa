"""GGUF files as folders of safetensors, a block at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import fxprune
from fxprune.checkpoint.low_memory import unpack
from tests.export.small import tokenizer
from tests.models import tiny


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a file of rounded weights."""
    path = tmp_path_factory.mktemp("models") / "dense.gguf"
    fxprune.export_model(tiny("llama"), path, tokenizer=tokenizer(), quantization="f16")
    return path


def test_a_gguf_file_is_read_a_block_at_a_time(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[int]()

    def load(path: str, tensors: bool, model: PreTrainedModel) -> Any:
        found = load_gguf_checkpoint(path, tensors, model)
        read.append(len(found["tensors"]))
        return found

    monkeypatch.setattr("fxprune.checkpoint.low_memory.load_gguf_checkpoint", load)
    true_reader = gguf.GGUFReader
    unpack(file, tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).state_dict()
    assert sum(read) == len(whole) and max(read) == 9, "a block has nine weights"
    assert gguf.GGUFReader is true_reader
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(tiny("llama"))
    for name, value in again.state_dict().items():
        assert torch.equal(value, whole[name])


def test_what_transformers_reads_is_as_before_where_it_fails(file: Path, tmp_path: Path) -> None:
    true_reader = gguf.GGUFReader
    with pytest.raises(SafetensorError):
        unpack(file, tmp_path / "none")
    assert gguf.GGUFReader is true_reader
