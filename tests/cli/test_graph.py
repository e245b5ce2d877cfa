"""The commands that look at groups, and GGUF files that go in and come out."""

import dataclasses
import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

import fxprune
from benchmarks.engines.llama_cpp import LlamaServer
from fxprune.export.gguf.write import most_common_type
from tests.cli.running import invoked, output_of, refused
from tests.export.small import even, tokenizer
from tests.models import VOCABULARY, tiny, token_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The config of a tiny model, without weights."""
    path = tmp_path_factory.mktemp("model")
    tiny("llama").config.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def result() -> fxprune.Result:
    """A slim model with layers of different widths."""
    model = tiny("llama")
    options = {"importance": "random", "kinds": "mlp", "ranking": "global"}
    return fxprune.prune(model, ratio=0.2, protect=(0, 0), recipe="fast", **options)


def test_groups_and_frozen_axes_are_listed_without_weights(folder: str) -> None:
    """Names were broken at 80 characters where the table goes to a pipe, and could be neither searched nor copied."""
    lines = invoked("graph", folder).stdout.splitlines()
    output = " ".join(" ".join(lines).split())
    assert "post_attention_layernorm.weight[0]" in output and max(map(len, lines)) <= 200
    assert "│ model/channel │ 1 │ 48 │ exact, norms as masked │" in output
    assert "│ model.layers.*/head │ 3 │ 3 │ exact │" in output
    assert "│ model.layers.*/head.2 │ 3 │ 2 │ exact │ q_proj.weight[0], o_proj.weight[1] │" in output
    assert "│ model.layers.*/layer │ 3 │ 1 │ exact │ all parameters │" in output
    assert "frozen lm_head.weight[0]: an output of the model" in output
    assert "│ model/channel │ 1 │ 48 │ renormalised │" in output_of("graph", folder, "--norm", "sliced")


def test_groups_and_frozen_axes_as_data(folder: str) -> None:
    data = json.loads(output_of("graph", folder, "--json"))
    assert data["norm"] == "masked" and data["blocks"] == [f"model.layers.{i}" for i in range(3)]
    groups = {group["name"]: group for group in data["groups"]}
    mlp = groups["model.layers.1/mlp"]
    assert (mlp["kind"], mlp["units"], mlp["removal"], mlp["block"]) == ("mlp", 88, "exact", "model.layers.1")
    assert mlp["members"] == [f"model.layers.1.mlp.{m}" for m in ("gate_proj.weight[0]", "up_proj.weight[0]", DOWN)]
    assert mlp["trigger"] == mlp["members"][0] and groups["model/channel"]["removal"] == "masked"
    assert groups["model.layers.0/layer"]["trigger"] is None
    frozen = {entry["axis"]: entry for entry in data["frozen"]}
    assert frozen["lm_head.weight[0]"]["reason"] == "an output of the model" and frozen["lm_head.weight[0]"]["node"]


DOWN = "down_proj.weight[1]"


def test_a_slim_model_has_its_own_widths(result: fxprune.Result, tmp_path: Path) -> None:
    """They were those of the stock config, which knows one width for all layers."""
    result.save_pretrained(tmp_path / "slim")
    for weights in (tmp_path / "slim").glob("*.safetensors"):
        weights.unlink()
    data = json.loads(output_of("graph", tmp_path / "slim", "--json"))
    groups = {group["name"]: group["units"] for group in data["groups"]}
    for name, (_, slim) in result.report.widths.items():
        assert groups[name] == slim
    assert len({slim for _, slim in result.report.widths.values()}) > 1


def test_pictures_of_a_layer_a_group_and_the_whole_model(folder: str, tmp_path: Path) -> None:
    def drawn(name: str, *options: str) -> str:
        output_of("graph", folder, "--dot", tmp_path / name, *options)
        return (tmp_path / name).read_text()

    text = drawn("layer.dot", "--layer", "model.layers.1.mlp")
    assert text.startswith("digraph") and "layers.1.mlp.up_proj" in text and "self_attn" not in text
    assert "trigger: " in drawn("group.gv", "--group", "layers.0/mlp")
    page = drawn("whole.html", "--everything")
    assert "3 blocks, of which 1 drawn" in page and "the same in model.layers.0 to 2" in page
    assert "model.layers.2.mlp" in drawn("each.dot", "--everything", "--no-fold")


def test_a_plan_is_laid_over_with_its_own_norm(folder: str, result: fxprune.Result, tmp_path: Path) -> None:
    def drawn(plan: str) -> str:
        output_of("graph", folder, "--dot", tmp_path / "plan.dot", "--everything", "--plan", tmp_path / plan)
        return (tmp_path / "plan.dot").read_text()

    for norm, described in (("masked", "exact, norms as masked"), ("sliced", "renormalised")):
        (tmp_path / "plan.json").write_text(dataclasses.replace(result.plan, norm=norm).to_json())
        text = drawn("plan.json")
        assert "stays" in text and "% that stays in block" in text and described in text
    result.save_pretrained(tmp_path / "slim")
    assert "% that stays in block" in drawn("slim")


def test_svg_needs_graphviz(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("dot") is not None:
        output_of("graph", folder, "--dot", tmp_path / "a.svg", "--layer", "-1")
        assert "model.layers.2" in (tmp_path / "a.svg").read_text()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "program dot is not installed" in refused("graph", folder, "--dot", tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_an_axis_is_explained_by_its_short_name(folder: str) -> None:
    output = output_of("explain", folder, "model.layers.0.mlp.down_proj.weight", "1")
    described = "mlp.down_proj.weight[1] is in group model.layers.0/mlp: mlp, 88 units; exact: the same as masking"
    assert output.startswith(f"model.layers.0.{described} model.layers.0.mlp.gate_proj.weight[0] -> ")
    assert "aten.silu.default" in output and output.count(" (at ") == 4 and "sums i" in output
    for short in (("layers.0.mlp.down_proj", "1"), ("0.mlp.down_proj.weight[1]",), ("layers.0.mlp.down_proj[1]",)):
        assert output_of("explain", folder, *short) == output
    assert "is the trigger of its group" in output_of("explain", folder, "layers.0.mlp.gate_proj", "0")
    output = output_of("explain", folder, "layers.0.self_attn.o_proj", "1", "--group", "head_dim")
    assert "model.layers.0.self_attn.v_proj.weight[0] -> " in output
    assert "and in model.layers.0/head, model.layers.0/head.2: select one with --group" in output


def test_what_norms_make_of_a_removal_is_explained(folder: str) -> None:
    lm_head = ("explain", folder, "lm_head", "1")
    assert "exact: norms over the units are kept as with these masked" in output_of(*lm_head)
    output = output_of(*lm_head, "--norm", "sliced")
    assert "renormalised: " in output and "take a statistic over the units" in output


def test_a_group_is_explained_with_all_its_axes(folder: str) -> None:
    output = output_of("explain", folder, "layers.1/mlp")
    assert output.startswith("group model.layers.1/mlp: mlp, 88 units; exact")
    assert "gate_proj.weight[0] the trigger" in output
    assert "down_proj.weight[1] by aten.linear.default, aten.silu.default, aten.mul.Tensor, aten.linear" in output
    output = output_of("explain", folder, "layers.1/layer")
    assert "the whole block" in output and "model.layers.1.mlp.up_proj.weight" in output


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "dense.gguf"
    model = even("llama", hidden_size=64, intermediate_size=128, num_attention_heads=8, num_key_value_heads=4)
    return fxprune.export_model(model, path, tokenizer=tokenizer(), quantization="q8_0")


def test_a_gguf_file_goes_in_and_a_smaller_one_comes_out(dense: Path, tmp_path: Path) -> None:
    """It has the type and the tokenizer of the one that was read, and computes what the plan makes of the model."""
    out = tmp_path / "slim.gguf"
    options = ("--recipe", "llm-pruner", "--importance", "l2", "--kinds", "mlp", "--ratio", 0.1, "--protect", 1, 0)
    written = f"written to {out}: `fxprune serve` and programs that read GGUF files run it"
    assert written in output_of("prune", dense, "--out", out, *options)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("slim.gguf", "slim.plan.json", "slim.report.json", "slim.report.html", "slim.run.yaml")
    }
    assert 0.05 < json.loads((tmp_path / "slim.report.json").read_text())["achieved"] < 0.15
    before, after = gguf.GGUFReader(dense).fields, gguf.GGUFReader(out).fields
    assert after["general.architecture"].contents() == "deci"
    assert after["deci.feed_forward_length"].contents() == [128, 96]
    copied = [name for name in before if name.startswith("tokenizer.")]
    assert len(copied) > 5 and all(before[name].contents() == after[name].contents() for name in copied)
    assert most_common_type(out) == "q8_0"
    model = AutoModelForCausalLM.from_pretrained(dense.parent, gguf_file=dense.name)
    plan = fxprune.Plan.from_json((tmp_path / "slim.plan.json").read_text())
    ids = token_ids(1, 9)
    with torch.no_grad():
        want = fxprune.apply(model, plan)(input_ids=ids).logits[0, -1].log_softmax(-1)
    got = LlamaServer(out).log_probabilities(ids[0].tolist(), VOCABULARY)
    torch.testing.assert_close(got, want, atol=0.05, rtol=0)


def test_a_model_that_the_format_cannot_hold_is_refused_before_it_is_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    even("gpt_neox").save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(fxprune, "prune", lambda *_, **__: pytest.fail("it was pruned"))
    line = refused("prune", tmp_path / "dense", "--out", tmp_path / "slim.gguf", "--importance", "l2")
    assert "the format cannot express this model" in line
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_folder_becomes_a_file(tmp_path: Path) -> None:
    even("llama").save_pretrained(tmp_path / "stock")
    tokenizer().save_pretrained(tmp_path / "stock")
    output = output_of("export", tmp_path / "stock", tmp_path / "slim.gguf", "--quantization", "f32")
    assert output.endswith("written: `fxprune serve` and programs that read GGUF files run it")
    output_of("export", tmp_path / "stock", tmp_path / "again.gguf", "--like", tmp_path / "slim.gguf")
    names = [name for name in gguf.GGUFReader(tmp_path / "slim.gguf").fields if name.startswith("tokenizer.")]
    assert set(names) <= set(gguf.GGUFReader(tmp_path / "again.gguf").fields)
