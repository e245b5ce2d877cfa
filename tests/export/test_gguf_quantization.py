"""K-quants and i-quants: types of tensors, llama.cpp's quantiser, and importances of inputs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import fxprune
from benchmarks.engines.llama_cpp import LlamaServer
from fxprune.errors import ArgumentError, DataError, ExportError, UnknownNameError
from fxprune.export.gguf import quantization
from fxprune.export.gguf.format import Type
from fxprune.export.gguf.layout import read_decoder
from fxprune.export.gguf.quantization import quantization_named, quantize, row_multiple
from fxprune.export.gguf.reference import find_contents, input_importance
from fxprune.export.gguf.write import export_gguf, most_common_type
from tests.export.small import even, tokenizer, uneven
from tests.models import VOCABULARY, token_ids

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def wide() -> PreTrainedModel:
    """A model whose rows fill blocks of 256."""
    return even("llama", **WIDE)


def stored(path: Path) -> dict[str, Any]:
    """The tensors of a file by name."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def shapes(blocks: int, hidden: int, width: int, *, output: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a file."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (100, hidden), "output_norm.weight": (hidden,)}
    found |= {"output.weight": (100, hidden)} if output else {}
    for number in range(blocks):
        parts = {
            "attn_q": (hidden, hidden),
            "attn_v": (64, hidden),
            "ffn_up": (width, hidden),
            "ffn_down": (hidden, width),
        }
        found |= {f"blk.{number}.{name}.weight": shape for name, shape in parts.items()}
        found[f"blk.{number}.attn_norm.weight"] = (hidden,)
    return found


def test_a_mixture_gives_more_bits_to_the_ends_and_to_every_third_block() -> None:
    """As in the file of a dense model by llama-quantize, whose rows of 640 do not fill blocks of 256."""
    mixture = quantization_named("Q4_K_M")
    types = mixture.types(shapes(18, 640, 2048), 18)
    raised = [number for number in range(18) if types[f"blk.{number}.ffn_down.weight"] is Type.Q6_K]
    assert raised == [0, 1, 4, 7, 10, 13, 15, 16, 17]
    assert {types[f"blk.{number}.attn_v.weight"] for number in raised} == {Type.Q8_0}
    assert types["blk.2.ffn_down.weight"] is Type.Q4_K and types["blk.2.attn_v.weight"] is Type.Q5_0
    assert (types["token_embd.weight"], types["blk.0.attn_norm.weight"]) == (Type.Q8_0, Type.F32)
    fallbacks = mixture.describe_fallbacks(shapes(18, 640, 2048), types, 18)
    assert (
        fallbacks.startswith("55 of 73 matrices have rows that are not a multiple of 256 (640)")
        and "45 q5_0, 10 q8_0" in fallbacks
    )
    whole = shapes(18, 512, 2048, output=True)
    types = mixture.types(whole, 18)
    assert (types["token_embd.weight"], types["output.weight"]) == (Type.Q4_K, Type.Q6_K)
    assert mixture.describe_fallbacks(whole, types, 18) == ""


def test_widths_follow_the_blocks_of_the_type() -> None:
    found = {name: row_multiple(name) for name in ("f16", "q8_0", "q4_0", "iq4_nl", "q4_k", "q6_k", "iq3_s")}
    assert found == {"f16": 32, "q8_0": 32, "q4_0": 32, "iq4_nl": 32, "q4_k": 256, "q6_k": 256, "iq3_s": 256}


@pytest.mark.parametrize(("name", "error"), [("q4_k_m", 0.08), ("q6_k", 0.02), ("q2_k", 0.3), ("iq4_xs", 0.08)])
def test_the_engine_runs_what_its_quantiser_wrote(
    wide: PreTrainedModel, name: str, error: float, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"tokenizer": tokenizer(), "quantization": name, "calibration": token_ids(2, 20)}
    path = fxprune.export_model(wide, tmp_path / "slim.gguf", **options)
    assert most_common_type(path) == name
    tensor = stored(path)["blk.1.ffn_up.weight"]
    exact = wide.model.layers[1].mlp.up_proj.weight.detach().numpy()
    off = np.sqrt(np.square(gguf.quants.dequantize(tensor.data, tensor.tensor_type) - exact).mean()) / exact.std()
    assert 0 < off < error
    ids = token_ids(1, 9)
    with torch.no_grad():
        want = wide(ids).logits[0, -1].log_softmax(-1)
    assert (LlamaServer(path).log_probabilities(ids[0].tolist(), VOCABULARY) - want).abs().mean() < 8 * error


def test_an_importance_is_the_mean_square_of_an_input_of_the_model() -> None:
    """In a model with uneven blocks, one of them without any active channel but one."""
    model = uneven("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[1:] = 0
    seen: dict[int, list[torch.Tensor]] = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, given, n=number: seen.setdefault(n, []).append(given[0])
        )
    contents = find_contents(read_decoder(model), 1e-4)
    seen.clear()
    samples = [token_ids(1, 9), token_ids(1, 5)]
    found = input_importance(contents, samples)
    with torch.no_grad():
        for ids in samples:
            model(ids)
    for number, inputs in seen.items():
        want = torch.cat([one.flatten(0, 1) for one in inputs]).square().mean(0)
        got = found[f"blk.{number}.ffn_down.weight"]
        torch.testing.assert_close(got, want + 1e-6 * want.mean(), rtol=1e-3, atol=0)
        assert bool((got > 0).all())
    assert input_importance(contents, []) == {}


def test_inputs_of_more_importance_are_stored_more_exactly() -> None:
    values = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    importance = np.ones(256, np.float32)
    importance[::8] = 100
    off = []
    for weights in (None, importance):
        made = gguf.quants.dequantize(quantize(values, Type.Q4_K, weights), Type.Q4_K)
        off.append(float(np.square(made - values)[:, ::8].mean()))
    assert off[1] < 0.8 * off[0]


def test_rows_decide_on_blocks_of_32_with_a_warning_or_are_refused(tmp_path: Path) -> None:
    model = even("llama", **{**WIDE, "intermediate_size": 96})
    with pytest.warns(UserWarning, match=r"q4_k_m: 2 of 16 matrices have rows that are not a multiple of 256 \(96\)"):
        export_gguf(model, tmp_path / "slim.gguf", tokenizer=tokenizer(), quantization="q4_k_m")
    assert stored(tmp_path / "slim.gguf")["blk.0.ffn_down.weight"].tensor_type.name in ("Q5_0", "Q8_0")
    with pytest.raises(ExportError, match=r"stores blocks of 32 .*rows of 88: round_to=32 for the kind mlp"):
        export_gguf(uneven("llama"), tmp_path / "uneven.gguf", tokenizer=tokenizer(), quantization="q4_k_m")


def test_a_type_without_its_samples_or_engine_is_refused(
    wide: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExportError, match=r"iq2_xs can be written only with an importance.*Pass calibration"):
        export_gguf(wide, tmp_path / "slim.gguf", tokenizer=tokenizer(), quantization="iq2_xs")
    with pytest.raises(ExportError, match="text needs the tokenizer"):
        fxprune.export_model(wide, tmp_path / "a.gguf", like="x.gguf", quantization="q4_k_m", calibration=["a text"])
    with pytest.raises(ExportError, match="calibration is for GGUF files"):
        fxprune.export_model(wide, tmp_path / "slim.pt2", calibration=token_ids(1, 9))
    with pytest.raises((ArgumentError, DataError, ValueError), match="calibration"):
        fxprune.export_model(wide, tmp_path / "a.gguf", tokenizer=tokenizer(), quantization="q6_k", calibration=3)
    known = quantization.load_data("quantizations")
    without = {**known, "engine": {**known["engine"], "packages": {}}}
    real = quantization.load_data
    monkeypatch.setattr(quantization, "load_data", lambda name: without if name == "quantizations" else real(name))
    quantization._library.cache_clear()
    try:
        with pytest.raises(ExportError, match=r"q4_k_m is written by the code of llama.cpp.*fxprune\[llama\].*q8_0"):
            quantization_named("q4_k")
        assert quantization_named("q8_0").name == "q8_0"
        with pytest.raises(UnknownNameError, match="Did you mean 'q4_k_m'"):
            quantization_named("q4km")
    finally:
        quantization._library.cache_clear()
    assert list(tmp_path.iterdir()) == []


def test_a_result_is_quantised_by_the_samples_of_its_prune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def importance(contents: Any, samples: Any) -> dict[str, torch.Tensor]:
        seen.extend(samples)
        return input_importance(contents, seen)

    monkeypatch.setattr("fxprune.export.gguf.write.input_importance", importance)
    ids = token_ids(3, 9)
    options: dict[str, Any] = {"recipe": "llm-pruner", "ratio": 0.1, "kinds": "mlp", "round_to": {"mlp": 256}}
    result = fxprune.prune(even("llama", **WIDE), ids, importance="wanda", protect=(1, 0), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result.export(tmp_path / "slim.gguf", tokenizer=tokenizer(), quantization="q5_k_m")
    assert torch.equal(torch.cat(seen), ids)
    assert stored(tmp_path / "slim.gguf")["blk.1.ffn_down.weight"].tensor_type is Type.Q6_K
