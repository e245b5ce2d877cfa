"""Contents of GGUF files: architectures, layouts, tokenizers, types and quantisation; refusals with reasons."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import fxprune
from benchmarks.engines.llama_cpp import LlamaServer
from fxprune.checkpoint.read import read_header
from fxprune.errors import ArgumentError, DataError, ExportError, UnknownNameError
from fxprune.export.gguf import quantization, write
from fxprune.export.gguf.format import (
    Type,
    arch_named,
    candidate_archs,
    general_archs,
    layers_differ,
    names_in_format,
    place_of,
)
from fxprune.export.gguf.layout import LAYOUTS, TensorLayout, lay_out, read_decoder
from fxprune.export.gguf.quantization import (
    describe_fallbacks,
    quantization_named,
    quantize,
    row_multiple,
    tensor_types,
)
from fxprune.export.gguf.reference import find_contents, gguf_logits, input_importance
from fxprune.export.gguf.tokenizer import Entry, copy_tokenizer, describe_tokenizer
from fxprune.export.gguf.write import export_gguf, most_common_type
from fxprune.removal.budget import make_budget
from fxprune.removal.formats import TOKENIZER
from tests.export.small import even, tokenizer, uneven
from tests.models import VOCABULARY, token_ids
from tests.oracle import axes_of, discover
from tests.tiers import tiers


def test_every_architecture_is_one_of_the_format_and_can_be_reached() -> None:
    reached = {arch.name for family in ("llama", "qwen2", "none") for arch in candidate_archs(family)}
    assert reached == {"llama", "qwen2", "deci", "openelm"}
    for name in ("llama", "gemma2", "openelm", "phi3", "command-r"):
        assert gguf.MODEL_TENSOR.TOKEN_EMBD in arch_named(name).tensors
    assert place_of("model.layers.12.mlp.down_proj.weight") == (12, "model.layers.{bid}.mlp.down_proj")
    assert place_of("lm_head.weight") == (None, "lm_head")
    assert names_in_format("model.layers.{bid}.post_attention_layernorm", arch_named("llama"))[-1] == "ffn_norm"
    norms = names_in_format("model.layers.{bid}.post_attention_layernorm", arch_named("gemma2"))
    assert norms[-1] == "post_attention_norm"


def test_uniform_files_are_read_by_transformers_to_the_same_logits(tmp_path: Path) -> None:
    model = even("llama")
    export_gguf(model, tmp_path / "slim.gguf", tokenizer=tokenizer(), quantization="f32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="slim.gguf", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(token_ids()).logits, model(token_ids()).logits, atol=1e-5, rtol=1e-5)


def test_the_header_is_that_of_the_reader_of_the_format_unless_the_file_is_cut_off(tmp_path: Path) -> None:
    for model in (even("llama"), uneven("llama")):
        path = export_gguf(model, tmp_path / "slim.gguf", tokenizer=tokenizer(), quantization="f32")
        fields, header = gguf.GGUFReader(path).fields, read_header(path)
        assert header == {name: fields[name].contents() for name in header}
        assert set(header) == {name for name in fields if not name.startswith(("GGUF.", "tokenizer."))}
        assert layers_differ(header) == (header["general.architecture"] in general_archs())
    whole = path.read_bytes()
    for kept in (3, 6, 20, 40, 90):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match="too early"):
            read_header(path)
    path.write_bytes(b"GGUF" + bytes([9, 0, 0, 0]) + bytes(20))  # of a version to come
    assert read_header(path) == {}
    path.write_bytes(b"GGML" + bytes(20))
    with pytest.raises(ValueError, match="does not begin"):
        read_header(path)


@pytest.mark.parametrize(
    ("family", "reasons"),
    [
        (
            "qwen3",
            "architecture qwen3 has one number of heads for all blocks, and here are .6, 4, 2, 3..*"
            "architecture deci has no place for attn_q_norm.*architecture openelm has no place for output",
        ),
        ("gemma", "architecture deci computes something else"),
        ("starcoder2", "architecture deci has no bias for attn_norm"),
        ("olmo2", "architecture openelm has no place for post_ffw_norm"),
    ],
)
def test_a_model_that_no_architecture_expresses_is_refused_with_the_reason_of_each(
    family: str, reasons: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=f"the format cannot express this model.*{reasons}.*uniform=True"):
        export_gguf(uneven(family), tmp_path / "slim.gguf", tokenizer=tokenizer())


def test_models_of_other_kinds_are_refused(tmp_path: Path) -> None:
    odd, more, scaled = uneven("llama"), even("llama"), uneven("llama")
    odd.model.layers[1].input_layernorm.variance_epsilon = 1e-3
    more.model.layers[0].more = nn.Linear(2, 2)
    scaled.model.layers[2].self_attn.scaling *= 2  # the names and shapes of an architecture, and other logits
    for model, says in (
        (even("llama").to("meta"), "real weights instead of meta"),
        (odd, r"normalisations differ in epsilon: \[1e-06, 0.001\]"),
        (more, r"model\.layers\.0\.more\.weight: .*no name for such a tensor"),
        (scaled, r"architecture deci computes something else, by .*e-0\d"),
    ):
        with pytest.raises(ExportError, match=says):
            export_gguf(model, tmp_path / "slim.gguf", tokenizer=tokenizer())
    with pytest.raises(ExportError, match=r"holds its tokenizer.*Pass tokenizer=, or like="):
        export_gguf(even("llama"), tmp_path / "slim.gguf")
    assert list(tmp_path.iterdir()) == []


def test_layouts_of_fused_rows_are_found_by_trying_and_give_the_same_tensors() -> None:
    decoder, arch = read_decoder(uneven("phi3")), arch_named("deci")
    logits = [gguf_logits(lay_out(decoder, arch, layout), decoder.tokens) for layout in LAYOUTS[:2]]
    assert (logits[0] - decoder.logits).abs().max() < 1e-5 < 1e-3 < (logits[1] - decoder.logits).abs().max()
    tensors = dict(decoder.tensors)
    for name in [name for name in tensors if "qkv" in name]:
        pairs, key, _ = decoder.cached[int(name.split(".")[2])]
        queries, *others = tensors[name].split([len(tensors[name]) - 2 * pairs * key, pairs * key, pairs * key])
        groups = [part.unflatten(0, (pairs, -1)) for part in (queries, *others)]
        tensors[name] = torch.cat(groups, 1).flatten(0, 1)
    by_part = lay_out(decoder, arch, TensorLayout()).tensors
    by_group = lay_out(dataclasses.replace(decoder, tensors=tensors), arch, TensorLayout("groups")).tensors
    assert by_part.keys() == by_group.keys()
    assert all(torch.equal(by_part[name], by_group[name]) for name in by_part)
    for window, context in ((64, 64), (None, 256)):  # an architecture without windows limits the context instead
        contents = find_contents(read_decoder(uneven("mistral", sliding_window=window)), 1e-4)
        assert contents.keys["context_length"] == context


@pytest.mark.parametrize("quantization", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_files_of_every_type_give_nearly_the_same_logits(quantization: str, tmp_path: Path) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
    model, path = even("llama", **wide), tmp_path / "slim.gguf"
    fxprune.export_model(model, path, tokenizer=tokenizer(), quantization=quantization)
    assert most_common_type(path) == quantization
    ids = token_ids(1, 9)
    with torch.no_grad():
        want = model(ids).logits[0, -1].log_softmax(-1)
    error = (LlamaServer(path).log_probabilities(ids[0].tolist(), VOCABULARY) - want).abs().max()
    assert error < {"f16": 0.01, "bf16": 0.05, "q8_0": 0.05}.get(quantization, 0.6)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == ("Q8_0" if quantization[:2] in ("q4", "q5") else quantization.upper())


def test_rows_that_fill_no_blocks_name_the_multiple_that_would(tmp_path: Path) -> None:
    model = uneven("llama", hidden_size=96)
    with pytest.raises(ExportError) as caught:
        export_gguf(model, tmp_path / "slim.gguf", tokenizer=tokenizer(), quantization="q8_0")
    message = str(caught.value)
    assert "q8_0 stores blocks of 32 values along a row" in message
    assert "blk.3.attn_output.weight has rows of 48: round_to=2 for the kind head would do" in message
    assert "blk.0.ffn_down.weight has rows of 88: round_to=32 for the kind mlp would do" in message
    assert "channel" not in message and message.endswith("Or choose f16")
    for name, says in (("q8", "'q8'. Did you mean"), ("q4_k_x", "'q4_k_x'. Did you mean 'q4_k_s'")):
        with pytest.raises(UnknownNameError, match=f"unknown quantization {says}"):
            quantization_named(name)


WORDS = ("the cat sat", " Ωμέγα и кот", "  1234 x_y\n\n\tz", "漢字かな한글", "naïve … 😀", "ab<s>ab</s>")


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that has learned merges from a few words."""
    from tokenizers import trainers

    special = ["<unk>", "<s>", "</s>"]
    if kind == "fallback":
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, limit_alphabet=30)
    else:
        made = Tokenizer(models.BPE())
        steps = [pre_tokenizers.Digits(individual_digits=True)] if kind == "smollm" else []
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
        made.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator([*WORDS, "the cats sat on the cat"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "fallback"])
def test_the_engine_sees_the_tokens_that_the_tokenizer_sees(kind: str, tmp_path: Path) -> None:
    made = trained(kind)
    path = tmp_path / "slim.gguf"
    export_gguf(even("llama", vocab_size=len(made) + 3), path, tokenizer=made)
    engine = LlamaServer(path)
    assert {text: engine.tokenize(text) for text in WORDS[:5]} == {text: made(text)["input_ids"] for text in WORDS[:5]}


def test_a_tokenizer_is_copied_whole_from_another_file(tmp_path: Path) -> None:
    made = tokenizer()
    made.chat_template = "{{ messages[0].content }}"
    dense = export_gguf(even("llama"), tmp_path / "dense.gguf", tokenizer=made)
    made.chat_template = None
    slim = export_gguf(uneven("llama"), tmp_path / "slim.gguf", like=dense)
    before, after = gguf.GGUFReader(dense).fields, gguf.GGUFReader(slim).fields
    names = [name for name in before if name.startswith("tokenizer.")]
    assert {"tokenizer.chat_template", "tokenizer.ggml.tokens", "tokenizer.ggml.add_bos_token"} <= set(names)
    for name in names:
        assert before[name].contents() == after[name].contents() and before[name].types == after[name].types
    with pytest.raises(ExportError, match="has 131 tokens, and the model 140"):
        copy_tokenizer(dense, 140)
    (tmp_path / "none.gguf").write_bytes(np.zeros(8, np.uint8).tobytes())
    with pytest.raises(ExportError, match="cannot be read as a GGUF file"):
        copy_tokenizer(tmp_path / "none.gguf", 140)


VOCAB = tokenizer().get_vocab()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (models.BPE(VOCAB, []), "has no merges"),
        (models.WordLevel(VOCAB, unk_token="<pad>"), "is of the kind WordLevel"),
        (models.WordPiece(VOCAB, unk_token="<pad>"), "is of the kind WordPiece"),
        (models.Unigram([(token, -1.0) for token in VOCAB], unk_id=0), "is of the kind Unigram"),
    ],
    ids=["bytes", "words", "pieces", "unigram"],
)
def test_a_tokenizer_without_merges_is_refused_before_the_file_is_begun(
    kind: models.Model, reason: str, tmp_path: Path
) -> None:
    """Byte pair encoding without merges ended in "Empty array", once half of the file was written."""
    made = Tokenizer(kind)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    path = tmp_path / "new" / "slim.gguf"
    with pytest.raises(ExportError, match=f"tokenizer: {reason}"):
        export_gguf(even("llama"), path, tokenizer=PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>"))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_list_in_a_file_to_copy_from_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array, text = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING
    monkeypatch.setattr(write, "copy_tokenizer", lambda *_: [Entry("tokenizer.ggml.merges", [], array, text)])
    with pytest.raises(ExportError, match="tokenizer: has no merges"):
        export_gguf(even("llama"), tmp_path / "slim.gguf", like="dense.gguf")
    assert list(tmp_path.iterdir()) == []


def test_tokenizers_that_have_no_name_in_the_format_are_refused() -> None:
    with pytest.raises(ExportError, match=r"has 131 tokens, and the model 100"):
        describe_tokenizer(tokenizer(), 100)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    with pytest.raises(ExportError, match=r"is of the kind WordLevel.*like='dense.gguf'"):
        describe_tokenizer(PreTrainedTokenizerFast(tokenizer_object=words), 10)
    odd = trained("gpt-2")
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(ExportError, match=r"splits text in a way that has no name here.*Punctuation"):
        describe_tokenizer(odd, 400)
    with pytest.raises(ExportError, match="object is not a fast tokenizer"):
        describe_tokenizer(object(), 10)


@pytest.mark.parametrize("kind", ["gpt-2", "fallback"])
def test_a_tokenizer_that_changes_a_text_first_is_refused(kind: str) -> None:
    """Engines read the file as that of a tokenizer which does not."""
    made = trained(kind)
    known = made.backend_tokenizer.normalizer
    for step in (normalizers.Lowercase(), normalizers.Replace("a", "b")):
        made.backend_tokenizer.normalizer = normalizers.Sequence([*([] if known is None else [known]), step])
        with pytest.raises(ExportError, match=rf"changes a text before it is split.*: {type(step).__name__}\."):
            describe_tokenizer(made, 400)
    made.backend_tokenizer.normalizer = known or normalizers.NFC()
    assert describe_tokenizer(made, 400)
    if kind == "gpt-2":
        made.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        with pytest.raises(ExportError, match=r"changes a text before it is split.*: add_prefix_space"):
            describe_tokenizer(made, 400)


WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def wide() -> PreTrainedModel:
    """A model whose rows fill blocks of 256."""
    return even("llama", **WIDE)


def stored(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def shapes(blocks: int, hidden: int, width: int, *, output: bool = False) -> dict[str, tuple[int, ...]]:
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
    types = tensor_types(mixture, shapes(18, 640, 2048), 18)
    raised = [number for number in range(18) if types[f"blk.{number}.ffn_down.weight"] is Type.Q6_K]
    assert raised == [0, 1, 4, 7, 10, 13, 15, 16, 17]
    assert {types[f"blk.{number}.attn_v.weight"] for number in raised} == {Type.Q8_0}
    assert types["blk.2.ffn_down.weight"] is Type.Q4_K and types["blk.2.attn_v.weight"] is Type.Q5_0
    assert (types["token_embd.weight"], types["blk.0.attn_norm.weight"]) == (Type.Q8_0, Type.F32)
    fallbacks = describe_fallbacks(mixture, shapes(18, 640, 2048), types, 18)
    assert (
        fallbacks.startswith("55 of 73 matrices have rows that are not a multiple of 256 (640)")
        and "45 q5_0, 10 q8_0" in fallbacks
    )
    whole = shapes(18, 512, 2048, output=True)
    types = tensor_types(mixture, whole, 18)
    assert (types["token_embd.weight"], types["output.weight"]) == (Type.Q4_K, Type.Q6_K)
    assert describe_fallbacks(mixture, whole, types, 18) == ""


def test_mixtures_are_those_of_the_engine_by_block_and_part() -> None:
    """As src/llama-quant.cpp has them: by the number of the block, not by its share of the depth, for values."""

    def by_block(name: str, part: str, width: int = 512) -> list[str]:
        types = tensor_types(quantization_named(name), shapes(32, 512, width), 32)
        return [types[f"blk.{number}.{part}.weight"].name for number in range(32)]

    assert by_block("q3_k_m", "attn_v") == ["Q5_K"] * 2 + ["Q4_K"] * 30
    assert by_block("q3_k_m", "ffn_down") == ["Q5_K"] * 2 + ["Q4_K"] * 30
    assert by_block("q4_k_s", "attn_v") == by_block("q4_k_s", "ffn_down") == ["Q5_K"] * 4 + ["Q4_K"] * 28
    assert by_block("q2_k", "attn_v") == by_block("q2_k", "ffn_down") == ["Q3_K"] * 32
    assert by_block("q2_k", "ffn_down", 288) == by_block("q3_k_s", "ffn_down", 288) == ["Q4_0"] * 32
    assert by_block("q6_k", "ffn_down", 288) == ["Q8_0"] * 32 and by_block("iq3_s", "ffn_down", 288) == ["IQ4_NL"] * 32
    deep = tensor_types(quantization_named("q4_k_s"), shapes(64, 512, 512), 64)
    assert [deep[f"blk.{number}.{part}.weight"].name for number in (4, 7) for part in ("attn_v", "ffn_down")] == [
        *("Q4_K", "Q5_K", "Q4_K", "Q5_K")
    ]


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


@pytest.mark.parametrize("family", ["llama", "phi3"])  # phi3 has fused queries, keys and values
@pytest.mark.parametrize("name", tiers(["q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_m", "q8_0"], "q3_k_m"))
def test_the_size_of_a_file_is_known_before_it_is_written(name: str, family: str, tmp_path: Path) -> None:
    """Targets had a table of types of their own, with others for fused products, odd rows and Q3_K_M."""
    widths = {
        "num_hidden_layers": 6,
        "intermediate_size": 288,
        "pad_token_id": None,
    }  # rows of 288 fill no block of 256
    model = even(family, **{**WIDE, **widths})
    options: dict[str, Any] = {"tokenizer": tokenizer(), "quantization": name, "calibration": token_ids(1, 9)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = fxprune.export_model(model, tmp_path / "dense.gguf", **options)
    held = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)
    graph = discover(model)
    assert make_budget(f"bytes@{name}", graph, axes_of(graph)).total == held + TOKENIZER * VOCABULARY


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
