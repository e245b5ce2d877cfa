"""The prune command on a small model folder, and runs that repeat from their `run.yaml`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from transformers import AutoModelForCausalLM

import fxprune
from fxprune.recipes import read_recipe
from tests.cli.running import invoked, output_of, refused, run
from tests.data.test_calibration import write_image
from tests.export.small import tokenizer
from tests.models import tiny, token_ids

L2 = ("--recipe", "llm-pruner", "--importance", "l2")
"""By weights alone, without a fit and tuning."""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options that :func:`fxprune.prune` was called with, which refuses."""
    found: dict[str, Any] = {}

    def prune(model: object, data: object, **options: object) -> None:
        found.update(options, data=data)
        raise fxprune.FxpruneError("seen")

    monkeypatch.setattr(fxprune, "prune", prune)
    return found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kinds", "head", "--ratio", "0.1"), "head: 3 to 2 units in 3 groups"),
        (("--uniform", "--ratio", "0.2"), "any transformers loads it"),
    ],
)
def test_equal_widths_save_a_stock_model(folder: Path, out: Path, options: tuple[str, ...], words: str) -> None:
    output = output_of("prune", folder, "--out", out, *L2, *options, "--no-eval")
    assert "model, plan and report written" in output and words in output
    assert "with --uniform" not in output
    report = json.loads((out / "report.json").read_text())
    assert f"{report['achieved']:.2%} of the parameters removed" in output and (out / "tokenizer.json").exists()
    plan = fxprune.Plan.from_json((out / "plan.json").read_text())
    with torch.no_grad():
        slim = AutoModelForCausalLM.from_pretrained(out).eval()(token_ids()).logits
        expected = fxprune.apply(tiny("llama"), plan)(input_ids=token_ids()).logits
    torch.testing.assert_close(slim, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_differing_widths_save_a_checkpoint_of_ours(folder: Path, out: Path) -> None:
    """With weights on disk the plan is the same; an earlier checkpoint is replaced."""
    options = (*L2, "--kinds", "mlp", "--ratio", "0.05", "--protect", 1, 1)
    output = output_of("prune", folder, "--out", out, *options)
    assert "mlp: 88 to" in output and "in 1 group" in output
    assert "fxprune.from_pretrained loads it" in output and "with --uniform, layers" in output
    text = (out / "plan.json").read_text()
    assert {name.split(".")[2] for name in fxprune.Plan.from_json(text).kept} == {"1"}
    with torch.no_grad():
        slim = fxprune.from_pretrained(out)(token_ids()).logits
        expected = fxprune.apply(tiny("llama"), fxprune.Plan.from_json(text))(input_ids=token_ids()).logits
    torch.testing.assert_close(slim, expected, atol=1e-5, rtol=1e-4)
    assert "fxprune.from_pretrained loads it" in output_of("prune", folder, "--out", out, *options, "--low-memory")
    assert (out / "plan.json").read_text() == text and [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.slow
def test_widths_that_the_config_refuses_save_a_checkpoint_of_ours(folder: Path, out: Path) -> None:
    """A config may validate itself as it is saved."""
    assert "fxprune.from_pretrained loads it" in output_of("prune", folder, "--out", out, *L2, "--kinds", "channel")
    assert fxprune.from_pretrained(out).config.hidden_size < 48


def test_the_samples_that_were_used_are_reported(folder: Path, out: Path) -> None:
    """A card listed `samples=64, written=64` where 4 of a file were used, and named no file."""
    path = out.with_name("words.txt")
    path.write_text("red green blue\n" * 8)
    options = ("--recipe", "fast", "--tune=none", "--compensate=none", "--ratio=0.05", "--protect=0,0", "--no-eval")
    text = ("--calibration", path, "--tokens", 6, "--samples", 4)
    used = "words.txt: 6 samples, 2 of them written by the model, 36 tokens, 6 each"
    assert f"calibrated on {used}" in output_of("prune", folder, "--out", out, *text, *options)
    report = json.loads((out / "report.json").read_text())
    assert report["calibration"] == {
        **{"source": "words.txt", "samples": 6, "written": 2, "tokens": 36, "lengths": [6, 6]}
    }
    for name in ("report.html", "README.md"):
        text = (out / name).read_text()
        assert f"Calibrated on {used}." in text and "written=" not in text, name


@pytest.mark.slow
def test_without_a_slim_model_the_graph_is_saved(folder: Path, out: Path) -> None:
    output = output_of("prune", folder, "--out", out, *L2, "--kinds", "head_dim", "--ratio", "0.05")
    assert "torch.export.load" in output
    assert {path.name for path in out.iterdir()} == {
        *("model.pt2", "plan.json", "report.json", "report.html", "run.yaml")
    }


CUT = "find-groups,l2,select-by-ratio{ratio=0.1},shrink"


def test_a_result_leaves_nothing_of_an_earlier_one_of_another_form(folder: Path, out: Path) -> None:
    """A model.pt2 stayed beside the checkpoint that took its place, and a run.yaml that did not give what is there."""
    graph = {*("model.pt2", "plan.json", "report.json", "report.html", "run.yaml")}
    mine = {"notes.txt", "README.md"}
    output_of("prune", folder, "--out", out, "--recipe", CUT, "--no-eval")
    assert {path.name for path in out.iterdir()} == graph
    for name in mine:
        (out / name).write_text("mine")
    output_of("prune", folder, "--out", out, "--recipe", f"{CUT},emit-model", "--no-eval")
    checkpoint = {path.name for path in out.iterdir()}
    assert "model.pt2" not in checkpoint and checkpoint > {*mine, "model.safetensors", "fxprune.json", "run.yaml"}
    assert fxprune.from_pretrained(out).num_parameters() < tiny("llama").num_parameters()
    output_of("prune", folder, "--out", out, "--recipe", CUT, "--no-eval")
    assert {path.name for path in out.iterdir()} == graph | mine
    plan = out.with_name("plan.json")
    plan.write_text((out / "plan.json").read_text())
    output_of("apply", folder, plan, "--out", out)
    assert {path.name for path in out.iterdir()} == checkpoint - {"run.yaml"}
    assert all((out / name).read_text() == "mine" for name in mine)


def test_a_recipe_without_a_slim_model_is_not_blamed_on_the_class(folder: Path, out: Path) -> None:
    """The output said that there is no slim model of this class, and weights on disk were pruned before the refusal."""
    output = output_of("prune", folder, "--out", out, "--recipe", CUT, "--no-eval")
    assert "note: the recipe has no emit-model, the pass that builds the slim model" in output
    assert "there is no slim model, torch.export.load runs model.pt2" in output
    for options in (("--out", out, "--low-memory"), ("--out", out.with_suffix(".gguf"))):
        line = refused("prune", folder, "--recipe", CUT, *options)
        assert line.startswith("--recipe: it has no pass of the stage emit. Add one"), line


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_samples_come_from_a_file(folder: Path, out: Path, suffix: str, seen: dict[str, Any]) -> None:
    lines = ["red green blue"] * 8
    path = out.with_name(f"calibration{suffix}")
    path.write_text("\n".join(lines if suffix == ".txt" else (json.dumps({"text": one, "n": 7}) for one in lines)))
    refused("prune", folder, "--out", out, "--calibration", path, "--samples", 4, "--tokens", 6)
    assert seen["data"]["input_ids"].tolist() == [[1, 2, 3, 1, 2, 3]] * 4


def test_options_reach_the_library_as_python_has_them(folder: Path, out: Path, seen: dict[str, Any]) -> None:
    values = {"importance": "taylor{order=first}", "reduction": "max", "ranking": "global", "budget": "macs"}
    values |= {"seed": 7, "compensate": "least-squares", "tune": "none", "recipe": "fast", "norm": "masked"}
    values |= {"tensor_parallel": 1, "memory": "low", "select": "select-by-ratio"}
    flags = [item for name, value in values.items() for item in (f"--{name.replace('_', '-')}", value)]
    more = ("--protect", 0.1, 0.2, "--in-place", "--round-to", "mlp=4,head=1")
    line = refused("prune", folder, "--out", out, *more, "--ratio", "mlp=0.3, head=0.1", *flags)
    assert line == "seen"
    assert callable(seen.pop("track")) and callable(seen.pop("tokenizer")) and seen.pop("data") is None
    values |= {"protect": (0.1, 0.2), "inplace": True, "round_to": {"mlp": 4, "head": 1}}
    assert seen == {**values, "ratio": {"mlp": 0.3, "head": 0.1}}


def test_deprecated_options_are_replaced_with_a_warning(folder: Path, out: Path, seen: dict[str, Any]) -> None:
    code, _, lines = run("prune", folder, "--out", out, "--taylor", "first", "--group-ratio", 0.3)
    assert code == 2 and "warning: --taylor is deprecated: write --importance 'taylor{order=first}'" in lines
    assert seen["importance"] == "taylor{order=first}"
    assert seen["select"] == "select-by-group-ratio{group_ratio=0.3}"
    assert "--taylor" not in invoked("prune", "--help").stdout


def test_a_gguf_file_has_sliced_norms_and_widths_in_blocks(
    folder: Path, tmp_path: Path, seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxprune.export.gguf.write.check_gguf", lambda *_, **__: None)
    refused("prune", folder, "--out", tmp_path / "slim.gguf", *L2)
    assert seen["norm"] == "sliced" and seen["round_to"] == {"mlp": 32}
    refused("prune", folder, "--out", tmp_path / "slim.gguf", *L2, "--norm", "masked", "--round-to", 4)
    assert seen["norm"] == "masked" and seen["round_to"] == 4


def test_a_recipe_is_edited_as_text(folder: Path, out: Path) -> None:
    text = str(read_recipe("llm-pruner"))
    assert output_of("recipes", "llm-pruner").split() == text.split()
    mine = out.with_name("mine.txt")
    mine.write_text(text.replace("\ntaylor\n", "\nl1{kinds=[mlp]}\n").replace("ratio\n", "ratio{kinds=[mlp]}\n"))
    options = ("--recipe", mine, "--protect=0,0", "--ratio=0.1", "--no-eval")
    output = output_of("prune", folder, "--out", out, *options)
    assert "mlp: 88 to" in output and "head" not in output


@pytest.mark.usefixtures("here")
def test_a_run_repeats_from_its_file(folder: Path) -> None:
    """Options win over the file; --json prints the report, and notes of others in the folder are kept.

    A name that looks like a number stays as it was given.
    """
    Path("007").symlink_to(folder)
    Path("slim").mkdir()
    Path("slim/notes").write_text("mine")
    options = (*L2, "--kinds", "mlp,head", "--ratio", 0.1, "--protect", 1, 0, "--no-eval")
    assert "--force" in refused("prune", "007", "--out", "slim", *options)
    code, printed, lines = run("prune", "007", "--out", "slim", *options, "--force", "--verbose")
    assert code == 0 and "find-groups: " in lines and "of the parameters removed" in printed, lines
    assert Path("slim/notes").read_text() == "mine"
    assert yaml.safe_load(Path("slim/run.yaml").read_text()) == {
        **{"model": "007", "out": "slim", "recipe": "llm-pruner", "importance": "l2", "kinds": "mlp,head"},
        **{"ratio": 0.1, "protect": [1, 0], "eval": False},
    }
    plan = Path("slim/plan.json").read_text()
    report = json.loads(output_of("prune", "--config", "slim/run.yaml", "--out", "again", "--json", "--quiet"))
    assert report["out"] == "again" and report["ratio"] == 0.1
    assert Path("again/plan.json").read_text() == plan
    assert run("prune", "--config", "slim/run.yaml", "--ratio", 0.2, "--quiet") == (0, "", "")
    assert json.loads(Path("slim/report.json").read_text())["ratio"] == 0.2
    assert Path("slim/notes").read_text() == "mine"


SPELLED: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (("--protect", "1,1"), {"protect": (1, 1)}),
    (("--protect=(0.1, 0.1)",), {"protect": (0.1, 0.1)}),
    (("--protect", "()"), {"protect": (0, 0)}),
    (("--protect", "1", "0", "--ratio", "None"), {"protect": (1, 0), "ratio": None}),
    (("--ratio", "{'mlp': 0.3, 'head': 0.1}"), {"ratio": {"mlp": 0.3, "head": 0.1}}),
    (("--kinds", "[mlp, head]", "--round-to", "{'mlp': 8}"), {"kinds": ("mlp", "head"), "round_to": {"mlp": 8}}),
]


@pytest.mark.parametrize(("options", "values"), SPELLED)
def test_values_are_read_as_messages_spell_them(
    options: tuple[str, ...], values: dict[str, Any], folder: Path, out: Path, seen: dict[str, Any]
) -> None:
    """`--protect 1,1` was refused by an option whose message asks for (first, last)."""
    assert refused("prune", folder, "--out", out, *L2, *options) == "seen"
    assert {name: seen.get(name) for name in values} == values


ENTRIES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"kinds": ["mlp", "expert"], "round_to": {"mlp": 4}}, {"kinds": ["mlp", "expert"], "round_to": {"mlp": 4}}),
    ({"uniform": True, "ranking": None, "tensor_parallel": 1}, {"uniform": True}),
    *(({"protect": pair}, {"protect": (1, 2)}) for pair in ("1, 2", [1, 2], "(1, 2)")),
    ({"protect": []}, {"protect": (0, 0)}),
]


@pytest.mark.parametrize(("entries", "values"), ENTRIES)
def test_a_run_may_have_lists_mappings_underscores_and_pairs_in_any_form(
    entries: dict[str, Any], values: dict[str, Any], folder: Path, here: Path, seen: dict[str, Any]
) -> None:
    run_of = {"model": str(folder), "out": "new", "recipe": "llm-pruner", **entries}
    (here / "mine.yaml").write_text(yaml.safe_dump(run_of))
    assert refused("prune", "--config", "mine.yaml", "--importance", "l2") == "seen"
    assert {name: seen[name] for name in values} == values
    assert seen["importance"] == "l2" and "ranking" not in seen


def test_a_prune_ends_with_its_quality(models: Path, out: Path) -> None:
    """It is in the output, in all that is written, and agrees with `eval` on the same text."""
    output = output_of("prune", models / "dense", "--out", out, *L2)
    assert "│ perplexity, docstrings of Python │" in output and "What is the capital of France?" in output
    used = "docstrings of Python: 12 windows of 256 tokens"
    assert f"measured on {used}" in output
    found = json.loads((out / "report.json").read_text())["quality"]["texts"][0]
    for name in ("report.html", "README.md"):
        text = (out / name).read_text()
        assert f"Measured on {used}" in text and "{:.3f} ± {:.3f}".format(*found["ratio"]) in text, name
    output = output_of("eval", out, "--compare", models / "dense", "--no-answers", "--windows", 24, "--json")
    other = json.loads(output)["columns"][1]["evaluation"]["perplexities"]["docstrings of Python"]["divergence"]
    for name, (value, error) in (("mean", found["divergence"]), ("agreement", found["agreement"])):
        assert abs(value - other[name]) < 3 * (error + other[f"{name}_error"]), name


def test_quality_is_left_out_on_request(folder: Path, out: Path) -> None:
    output = output_of("prune", folder, "--out", out, *L2, "--no-eval")
    assert "quality not measured: it was not asked for" in output
    assert "fxprune eval out --compare path/to/dense --write" in (out / "README.md").read_text()
    assert yaml.safe_load((out / "run.yaml").read_text())["eval"] is False
    assert "it was not asked for" in output_of("prune", "--config", out / "run.yaml", "--force")


def test_a_calibration_text_is_measured_where_it_was_not_used(
    folder: Path, out: Path, seen: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("red green blue\n" * 8)
    options = ("--calibration", tmp_path / "mine.txt", "--tokens", 6)
    refused("prune", folder, "--out", out, *options, "--samples", 2)
    assert seen["eval_text"] == str(tmp_path / "mine.txt")
    (tmp_path / "other.txt").write_text("blue")
    refused("prune", folder, "--out", out, *options, "--eval-text", tmp_path / "other.txt")
    assert seen["eval_text"] == str(tmp_path / "other.txt")


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
FAST = ("--ratio", "0.1", "--recipe", "fast", "--protect", "0", "0")


def save_classifier(folder: Path) -> None:
    """A tiny image classifier with its processor, and images in a folder for each class."""
    names = {"label2id": {"cat": 0, "dog": 1}, "id2label": {0: "cat", 1: "dog"}}
    config = hf.ViTConfig(**SIZES, image_size=16, patch_size=4, **names)
    hf.ViTForImageClassification(config).save_pretrained(folder / "vit")
    hf.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    for i in range(12):
        write_image(folder / "images" / ("cat", "dog")[i % 2] / f"{i}.png", shade=20 * i)


@pytest.mark.slow
def test_an_image_classifier_is_pruned_on_a_folder_of_images(here: Path) -> None:
    save_classifier(here)
    assert "there are no samples of that" in refused("prune", "vit", "--out", "slim")
    output = output_of("prune", "vit", "--calibration", "images", "--dry-run", *FAST)
    assert "what to expect" in output, "it took samples for token ids, and divided by their number"
    output = output_of("prune", "vit", "--calibration", "images", "--out", "slim", *FAST)
    assert "accuracy, 3 samples" in output and "9 samples" in output
    slim = hf.AutoModelForImageClassification.from_pretrained("slim", trust_remote_code=True)
    pixels = hf.AutoImageProcessor.from_pretrained("slim")(torch.zeros(3, 20, 20), return_tensors="pt").pixel_values
    assert slim(pixels).logits.shape == (1, 2) and slim.num_parameters() < 11_450
    output = output_of("eval", "slim", "--compare", "vit", "--data", "images")
    assert "accuracy, 12 samples" in output and "cosine of the outputs" in output
    assert json.loads(Path("slim/report.json").read_text())["measured"][1][0] == "accuracy, 3 samples"


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_an_encoder_is_pruned_on_text_and_measured_by_what_it_gives() -> None:
    words = tokenizer()
    hf.BertModel(hf.BertConfig(**SIZES, vocab_size=len(words))).save_pretrained("bert")
    words.save_pretrained("bert")
    Path("some.txt").write_text("red green blue " * 120)
    options = ("--calibration", "some.txt", "--tokens", "16", "--out", "slim")
    code, output, lines = run("prune", "bert", *options, *FAST)
    assert code == 0 and "cosine of the outputs" in output and "perplexity" not in output + lines, lines


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_an_image_with_text_decides_what_a_model_is_traced_with() -> None:
    words = tokenizer()
    text = hf.LlamaConfig(**SIZES, vocab_size=len(words))
    tower = hf.CLIPVisionConfig(**SIZES, image_size=8, patch_size=4)
    config = hf.LlavaConfig(text_config=text, vision_config=tower, image_token_index=len(words) - 1)
    hf.LlavaForConditionalGeneration(config).save_pretrained("llava")
    rows = [
        {"input_ids": [len(words) - 1] * 4 + [5, 6 + i], "pixel_values": torch.rand(3, 8, 8).tolist()}
        for i in range(10)
    ]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words.save_pretrained("llava")
    output = output_of("prune", "llava", "--calibration", "rows.jsonl", "--out", "slim", *FAST)
    assert "8 samples" in output and "same first class" in output
    slim = fxprune.from_pretrained("slim")
    assert slim.model.vision_tower.num_parameters() < hf.AutoModel.from_config(tower).num_parameters()
