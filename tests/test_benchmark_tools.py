"""The benchmark tools measure what they say."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from benchmarks import latency
from benchmarks.latency import LatencyRow, latency_rows, latency_table, write_json
from benchmarks.paired import Paired, paired_latency
from benchmarks.perplexity import perplexity
from benchmarks.text import offline_text, read_text, split_calibration_heldout, token_windows


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


class _Bytes:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


# Text


def test_offline_text_is_long_and_repeats_no_paragraph():
    text = offline_text()
    paragraphs = text.split("\n\n")
    assert len(text) > 300_000
    assert len(set(paragraphs)) == len(paragraphs)
    assert offline_text() == text


def test_split_parts_share_no_paragraph():
    text = offline_text()
    front, rest = split_calibration_heldout(text, calibration=0.3)
    assert not set(front.split("\n\n")) & set(rest.split("\n\n"))
    assert text.startswith(front)
    assert text.endswith(rest)
    assert len(front) + len("\n\n") + len(rest) == len(text)
    assert 0.29 < len(front) / len(text) < 0.32


def test_split_drops_heldout_paragraphs_that_calibration_has():
    assert split_calibration_heldout("a\n\nb\n\na\n\nc", calibration=0.5) == ("a\n\nb", "c")


@pytest.mark.parametrize(("text", "fraction"), [("one paragraph", 0.5), ("a\n\na", 0.5), ("a\n\nb", 0), ("a\n\nb", 1)])
def test_split_refuses_what_leaves_a_part_empty(text, fraction):
    with pytest.raises(ValueError):
        split_calibration_heldout(text, calibration=fraction)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\n\ntwo"),
        ("a.jsonl", '{"text": "one"}\n\n{"text": "two"}\n'),
        ("a.json", '["one", {"text": "two"}]'),
        ("b.json", '{"text": "one\\n\\ntwo"}'),
    ],
)
def test_read_text_reads_each_format(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    assert read_text(path) == "one\n\ntwo"


@pytest.mark.parametrize(("name", "content"), [("a.csv", "text"), ("a.jsonl", '{"body": "one"}')])
def test_read_text_names_the_file_it_refuses(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=name):
        read_text(path)


def test_token_windows_follow_the_text_without_overlap():
    text = "abcdefghij"
    windows = token_windows(_Bytes(), text, tokens=3)
    assert windows.dtype == torch.int64
    assert ["".join(map(chr, window)) for window in windows.tolist()] == ["abc", "def", "ghi"]
    assert torch.equal(token_windows(_Bytes(), text, tokens=3, limit=2), windows[:2])
    assert token_windows(_Bytes(), text, tokens=3, limit=9).shape == (3, 3)


@pytest.mark.parametrize(("tokens", "limit"), [(11, None), (0, None), (3, 0)])
def test_token_windows_refuse_what_holds_no_window(tokens, limit):
    with pytest.raises(ValueError):
        token_windows(_Bytes(), "abcdefghij", tokens=tokens, limit=limit)


# Perplexity


def _brute_force_perplexity(model: nn.Module, ids: torch.Tensor) -> float:
    """exp of the mean negative log-probability, one prediction at a time, each from its own prefix."""
    losses = []
    for window in ids:
        for position in range(1, len(window)):
            with torch.no_grad():
                logits = model(input_ids=window[None, :position]).logits[0, -1].double()
            losses.append(-logits.log_softmax(-1)[window[position]].item())
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_perplexity_is_that_of_a_brute_force_computation(tiny, batch):
    ids = torch.randint(50, (5, 7), generator=torch.Generator().manual_seed(1))
    assert perplexity(tiny, ids, batch=batch) == pytest.approx(_brute_force_perplexity(tiny, ids), rel=1e-5)


def test_perplexity_of_uniform_logits_is_the_vocabulary_size():
    ids = torch.randint(50, (3, 4))
    assert perplexity(lambda input_ids: torch.zeros(*input_ids.shape, 50), ids) == pytest.approx(50)


def test_perplexity_takes_every_form_of_output(tiny):
    ids = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(2))
    expected = perplexity(tiny, ids)

    class Wrapped(nn.Module):
        def forward(self, input_ids):
            return tiny(input_ids=input_ids).logits

    exported = torch.export.export(Wrapped(), (), kwargs={"input_ids": ids}).module()
    forms = [
        exported,
        lambda input_ids: (tiny(input_ids=input_ids).logits, "cache"),
        lambda input_ids: {"logits": tiny(input_ids=input_ids).logits},
    ]
    assert [perplexity(form, ids) for form in forms] == [pytest.approx(expected, rel=1e-5)] * 3


def test_perplexity_runs_in_evaluation_mode_and_gives_the_mode_back(tiny):
    ids = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(3))
    seen = []
    hook = tiny.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    tiny.train()
    try:
        perplexity(tiny, ids)
        assert tiny.training
    finally:
        tiny.eval()
        hook.remove()
    assert seen == [False]


def test_perplexity_refuses_what_has_no_next_token(tiny):
    with pytest.raises(ValueError, match="next token"):
        perplexity(tiny, torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(TypeError, match="logits"):
        perplexity(lambda input_ids: "text", torch.zeros(3, 2, dtype=torch.long))


# Latency


def test_paired_latency_interleaves_and_orders_its_interval():
    calls: list[str] = []
    dense, slim = (lambda name=name, **_: calls.append(name) for name in ("dense", "slim"))
    paired = paired_latency(dense, slim, {"input_ids": torch.zeros(1)}, rounds=3, min_run_s=0.0)
    assert isinstance(paired, Paired)
    assert paired.dense_ms > 0 and paired.slim_ms > 0
    assert 0 < paired.low <= paired.speedup <= paired.high
    order = [name for name, before in zip(calls, ["", *calls], strict=False) if name != before]
    # The warm-up of both, then D S S D three times; equal neighbours are one run here.
    assert order == ["dense", "slim"] + ["dense", "slim"] * 3 + ["dense"]


def test_paired_latency_runs_in_inference_mode():
    modes = []

    def model(**_: object) -> None:
        modes.append(torch.is_inference_mode_enabled())

    paired_latency(model, model, {}, rounds=1, min_run_s=0.0)
    assert modes and all(modes)
    assert not torch.is_inference_mode_enabled()


def test_paired_latency_refuses_no_rounds():
    with pytest.raises(ValueError, match="rounds"):
        paired_latency(print, print, {}, rounds=0)


def test_latency_rows_leave_out_a_missing_model(tiny, tmp_path):
    pruned = SimpleNamespace(model=None, graph_module=tiny)
    rows = latency_rows(tiny, pruned, 50, shapes=[(1, 2), (2, 3)], rounds=1)
    assert [(row.output, row.batch, row.tokens) for row in rows] == [
        ("graph_module", 1, 2),
        ("graph_module", 2, 3),
    ]
    assert latency_table(rows, "title").row_count == 2
    write_json(tmp_path / "new" / "latency.json", rows, {"ratio": 0.2})
    content = json.loads((tmp_path / "new" / "latency.json").read_text())
    assert content["rows"][0]["latency"].keys() == {"dense_ms", "slim_ms", "speedup", "low", "high"}
    assert content["environment"]["threads"] == torch.get_num_threads()


def test_latency_table_shows_the_interval():
    row = LatencyRow("model", 1, 64, Paired(12.34, 10.0, 1.234, 1.1, 1.3))
    cells = [next(iter(column.cells)) for column in latency_table([row], "title").columns]
    assert cells == ["model", "1", "64", "12.3", "10.0", "1.23x", "1.10 to 1.30"]


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_latency_command_prints_and_writes_when_asked(tiny, tmp_path, monkeypatch, flags):
    asked = {}

    def prune(model, data, **options):
        asked.update(options, data=data)
        return SimpleNamespace(model=model, graph_module=model)

    monkeypatch.setattr("fxprune.prune", prune, raising=False)
    monkeypatch.setattr(latency, "load_demo_model", lambda: (tiny, None))
    monkeypatch.setattr(latency, "RESULTS", tmp_path / "latency.json")
    outcome = CliRunner().invoke(latency.app, ["--rounds", "1", "--ratio", "0.1", *flags], catch_exceptions=False)
    assert outcome.exit_code == 0
    assert asked == {"data": None, "ratio": 0.1, "importance": "l2"}
    assert "torch:" in outcome.output and "10% of the parameters removed" in outcome.output
    assert (tmp_path / "latency.json").exists() == bool(flags)
    if flags:
        content = json.loads((tmp_path / "latency.json").read_text())
        assert len(content["rows"]) == 2 * len(latency.SHAPES)
        assert content["settings"]["ratio"] == 0.1
