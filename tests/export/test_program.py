"""Exported programs compute the same without this package; one file by its suffix."""

import importlib.util
import json
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import gguf
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.fx import GraphModule

import fxprune
import fxprune.export.program
from fxprune.errors import ExportError, UnknownNameError, VerificationError
from fxprune.export.model import check_options, export_model
from fxprune.graph.tensors import set_tensor, weights
from tests.export.small import tokenizer
from tests.models import FAMILIES, tiny, token_ids
from tests.oracle import Net
from tests.tiers import tiers

SIZES = ((1, 1), (1, 7), (3, 20))

LONELY = """
import sys
for package in ("fxprune", "passes", "transformers"):
    sys.modules[package] = None  # whoever imports it gets an ImportError
import torch
from safetensors.torch import load_file, save_file

for path in sys.argv[1:]:
    program = torch.export.load(path).module()
    inputs = load_file(path + ".inputs")
    save_file({size: program(input_ids=ids)["logits"].contiguous() for size, ids in inputs.items()}, path + ".outputs")
"""


def slim(name: str) -> fxprune.Result:
    """A pruned model of a family, of two layers; what follows the comma says what is special about it."""
    family, _, what = name.partition(", ")
    layers = "n_layer" if "n_layer" in FAMILIES[family] else "num_hidden_layers"
    model = tiny(family, **{layers: 2}, **({"tie_word_embeddings": True} if what == "tied" else {}))
    result = fxprune.prune(model, ratio=0.2, importance="l2", protect=())
    if what == "bfloat16":
        result.graph_module.to(torch.bfloat16)
    return result


@pytest.fixture(scope="module")
def llama() -> fxprune.Result:
    return slim("llama, tied")


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [("llama, tied",), ("llama, bfloat16", "gemma3_text", "bloom")],
    ids=" and ".join,
)
def test_programs_run_without_the_package(names: tuple[str, ...], tmp_path: Path) -> None:
    results = {str(tmp_path / f"{number}.pt2"): slim(name) for number, name in enumerate(names)}
    for path, result in results.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # an axis that is fixed
            result.export(path)
        save_file({f"{b}x{s}": token_ids(b, s) for b, s in SIZES}, f"{path}.inputs")
    subprocess.run([sys.executable, "-c", LONELY, *results], check=True, cwd=tmp_path)
    for name, (path, result) in zip(names, results.items(), strict=True):
        got = load_file(f"{path}.outputs")
        for batch, tokens in SIZES:
            with torch.no_grad():
                want = result(token_ids(batch, tokens)).logits
            logits = got[f"{batch}x{tokens}"]
            assert logits.dtype == (torch.bfloat16 if "bfloat16" in name else torch.float32)
            torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)


def test_program_holds_the_weights_and_no_more(llama: fxprune.Result, tmp_path: Path) -> None:
    llama(token_ids()).logits.sum().backward()
    path = llama.export(tmp_path / "slim.pt2")
    archive = zipfile.ZipFile(path)
    sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    stored = sum(size for name, size in sizes.items() if "/weights/weight_" in name)
    tensors = {id(tensor): tensor for _, tensor in weights(llama.graph_module)}
    assert stored == sum(tensor.nbytes for tensor in tensors.values()), "tied weights are stored once, gradients never"
    (listed,) = (name for name in sizes if name.endswith("/data/weights/model_weights_config.json"))
    config = json.loads(archive.read(listed))["config"]
    assert len(config) == len(tensors) + 1, "and both names of the tied one are known"
    assert not any(entry["use_pickle"] for entry in config.values())
    program = torch.export.load(path)
    assert not any(parameter.requires_grad for parameter in program.parameters())
    assert program.example_inputs is None
    assert str(Path(torch.__file__).parents[1]).encode() not in path.read_bytes(), "traces name files of this machine"


def test_parts_of_a_larger_storage_are_stored_alone(tmp_path: Path) -> None:
    net = nn.Linear(5, 3)
    net.weight = nn.Parameter(torch.randn(1000, 5)[:3])
    graph = fxprune.trace(net, {"input": torch.randn(4, 5)}).graph_module
    path = fxprune.export_graph(graph, tmp_path / "net.pt2")
    assert path.stat().st_size < 1000 * 5 * 4
    x = torch.randn(6, 5)
    torch.testing.assert_close(torch.export.load(path).module()(input=x), net(x))
    graph = fxprune.trace(nn.Linear(5, 3).bfloat16(), {"input": torch.randn(4, 5).bfloat16()}).graph_module
    with pytest.warns(UserWarning, match="not checked: onnxruntime does not run bfloat16"):
        assert fxprune.export_graph(graph, tmp_path / "net.onnx").stat().st_size > 0


def recurrent(net: Any, x: torch.Tensor) -> torch.Tensor:
    """A loop over the tokens, which tracing unrolls."""
    state, embedded = torch.zeros(6), net.embed(x)
    for t in range(x.shape[1]):
        state = state + net.down(torch.relu(net.up(state + embedded[:, t])))
    return state


@pytest.mark.slow
def test_an_axis_that_tracing_fixed_is_reported(tmp_path: Path) -> None:
    """Counting multiply-accumulates and making inputs once took such an axis for one that varies, and crashed."""
    example = {"x": torch.randint(20, (2, 5))}
    net = Net(recurrent, embed=nn.Embedding(20, 6), up=nn.Linear(6, 12), down=nn.Linear(12, 6))
    result = fxprune.prune(net, importance="l2", ratio=0.2, protect=(), example_inputs=example)
    assert result.report.parameters[1] < result.report.parameters[0]
    for suffix in ("pt2", "onnx"):
        with pytest.warns(UserWarning, match="x: axis 1 is fixed; the program runs only at 5"):
            path = result.export(tmp_path / f"net.{suffix}", example_inputs=None)
    ids = torch.randint(20, (3, 5))
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape == ["batch", 5]
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": ids.numpy()})[0]), result(ids).detach())


@pytest.mark.slow
def test_onnx_runs_at_any_batch_and_length(llama: fxprune.Result, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        path = llama.export(tmp_path / "deep" / "slim.onnx")
    session = onnxruntime.InferenceSession(path)
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("input_ids", ["batch", "sequence"])]
    for batch, tokens in SIZES:
        got = session.run(["logits"], {"input_ids": token_ids(batch, tokens).numpy()})[0]
        with torch.no_grad():
            want = llama(token_ids(batch, tokens)).logits
        assert (torch.from_numpy(got) - want).abs().max() <= 1e-4 * max(1, want.abs().max())
    assert [file.name for file in path.parent.iterdir()] == ["slim.onnx"]


@pytest.mark.slow
def test_large_onnx_models_keep_their_weights_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A tied weight is there once, unless so small that the optimiser folds its transpose: hence the vocabulary."""
    model = tiny("llama", num_hidden_layers=2, tie_word_embeddings=True, vocab_size=400)
    graph = fxprune.trace(model).graph_module
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    caplog.set_level("WARNING")
    path = fxprune.export_graph(graph, tmp_path / "slim.onnx")
    assert [record for record in caplog.records if record.levelname != "DEBUG"] == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["slim.onnx", "slim.onnx.data"]
    sizes = {id(tensor): tensor.nbytes for _, tensor in weights(graph)}
    assert 0.95 < (tmp_path / "slim.onnx.data").stat().st_size / sum(sizes.values()) < 1.05
    logits = onnxruntime.InferenceSession(path).run(None, {"input_ids": token_ids().numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(logits), graph(token_ids()).logits.detach(), atol=1e-3, rtol=1e-4)


def test_wrong_arguments_are_refused_before_anything_is_written(
    llama: fxprune.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExportError, match="real weights instead of meta"):
        fxprune.export_graph(fxprune.trace(tiny("llama").to("meta")).graph_module, tmp_path / "slim.pt2")
    with pytest.raises(ExportError, match=r"cannot be exported: .*The cause has the details") as caught:
        llama.export(tmp_path / "slim.pt2", example_inputs={"input_ids": torch.randn(2, 7)})
    assert caught.value.__cause__ is not None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"ONNX needs onnx, onnxscript, onnxruntime.*pip install 'fxprune\[onnx\]'"):
        llama.export(tmp_path / "slim.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", tiers(["pt2", "onnx"], "pt2"))
def test_a_program_that_differs_is_not_written(
    suffix: str, llama: fxprune.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = fxprune.export.program._for_inference

    def spoiled(graph_module: GraphModule) -> GraphModule:
        work = prepare(graph_module)
        *_, (name, tensor) = weights(work)
        set_tensor(work, name, nn.Parameter(tensor * 2))
        return work

    monkeypatch.setattr(fxprune.export.program, "_for_inference", spoiled)
    path = tmp_path / f"slim.{suffix}"
    path.write_text("what was there")
    with pytest.raises(VerificationError, match="the exported program differs from the graph"):
        llama.export(path)
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]


class Several(nn.Module):
    """Takes a list of tensors and a number, and returns a tensor and a tuple by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(3, 4)

    def forward(self, parts: list[torch.Tensor], times: int = 2) -> dict[str, Any]:
        return {
            "sum": self.first(parts[0]) + self.second(parts[1]),
            "others": (self.second(parts[1]) * times, parts[0] + 1),
        }


def test_inputs_and_outputs_keep_their_structure(tmp_path: Path) -> None:
    net, example = Several(), {"parts": [torch.randn(4, 5), torch.randn(4, 3)], "times": 3}
    graph = fxprune.trace(net, example).graph_module
    parts = [torch.randn(7, 5), torch.randn(7, 3)]
    want = net(parts, 3)
    program = torch.export.load(fxprune.export_graph(graph, tmp_path / "net.pt2")).module()
    torch.testing.assert_close(program(parts=parts, times=3), want)
    session = onnxruntime.InferenceSession(fxprune.export_graph(graph, tmp_path / "net.onnx"))
    names = [entry.name for entry in session.get_inputs()]
    assert names[:2] == ["parts_0", "parts_1"]
    assert [entry.name for entry in session.get_outputs()] == ["sum", "others_0", "others_1"]
    feeds = dict(zip(names, (part.numpy() for part in parts), strict=False))
    got = [torch.from_numpy(value) for value in session.run(None, feeds)]
    torch.testing.assert_close(got, [want["sum"], *want["others"]])


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
