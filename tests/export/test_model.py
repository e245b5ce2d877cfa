"""One file by its suffix, from a model and from a result, with the arguments that belong to it."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

import fxprune
from fxprune.errors import ExportError, UnknownNameError
from fxprune.export.model import check_options, export_model
from tests.export.small import tokenizer
from tests.models import tiny, token_ids


@pytest.fixture(scope="module")
def result() -> fxprune.Result:
    options = {"importance": "l2", "ratio": 0.15, "protect": (1, 0), "kinds": ("mlp", "head")}
    return fxprune.prune(tiny("llama", num_hidden_layers=2), verify=False, **options)


def test_a_model_becomes_a_gguf_file_or_a_program(result: fxprune.Result, tmp_path: Path) -> None:
    path = result.export(tmp_path / "deep" / "slim.gguf", tokenizer=tokenizer(), quantization="f32")
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "deci"
    assert reader.fields["deci.feed_forward_length"].contents()[0] == 88
    held = sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert held == sum(parameter.numel() for parameter in result.model.parameters())
    assert [file.name for file in path.parent.iterdir()] == ["slim.gguf"]
    model = result.model.eval()
    program = torch.export.load(export_model(model, tmp_path / "slim.pt2")).module()
    with torch.no_grad():
        torch.testing.assert_close(program(input_ids=token_ids())["logits"], model(token_ids()).logits)


def test_arguments_of_other_files_are_refused(result: fxprune.Result, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown suffix '\.bin'.*\.gguf"):
        result.export(tmp_path / "slim.bin")
    with pytest.raises(ExportError, match=r"slim\.pt2: quantization is for GGUF files"):
        result.export(tmp_path / "slim.pt2", quantization="f16")
    with pytest.raises(ExportError, match="like is for GGUF files"):
        check_options(Path("slim.onnx"), cache=True, like="dense.gguf")
    with pytest.raises(ExportError, match="a GGUF file has no forward pass of its own"):
        check_options(Path("slim.gguf"), cache=True)
    for name, cache in (("slim.gguf", False), ("slim.onnx", True)):
        with pytest.raises(ExportError, match=rf"{name}: example_inputs are for a program without a cache"):
            result.export(
                tmp_path / name, tokenizer=tokenizer(), cache=cache, example_inputs={"input_ids": token_ids()}
            )
    bare = fxprune.Result(result.graph_module, None, result.plan, result.report)
    with pytest.raises(ExportError, match=r"there is no slim model.*as \.pt2 or \.onnx"):
        bare.export(tmp_path / "slim.gguf", tokenizer=tokenizer())
    with pytest.raises(ExportError, match="there is no slim model"):
        bare.export(tmp_path / "slim.onnx", cache=True)
