"""Saved models measured, timed, swept, trained and served, and text from them."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fxprune
import fxprune.cli.evaluate
import fxprune.data.built_in
from fxprune.checkpoint.manifest import read_manifest
from fxprune.cli import serve
from tests.cli.running import COMMAND, output_of, refused, run
from tests.export.small import tokenizer
from tests.models import tiny, token_ids
from tests.tokens import TEMPLATE


def test_slim_stands_beside_dense(models: Path, story: tuple[object, ...]) -> None:
    command = ("eval", models / "slim", "--compare", models / "dense", *story)
    output = output_of(*command)
    assert "┃ dense ┃ slim ┃" in output
    assert all(word in output for word in ("│ parameters │", "│ memory, MB │", "│ perplexity, story │"))
    assert "latency" not in output and "MACs" not in output, "these are not measured"
    dense, slim = json.loads(output_of(*command, "--no-answers", "--json"))["columns"]
    model = fxprune.from_pretrained(models / "slim")
    assert slim["parameters"] == sum(p.numel() for p in model.parameters()) < dense["parameters"]
    assert slim["evaluation"]["perplexities"]["story"]["window"] == 32
    assert (slim["name"], slim["macs"], slim["latency_ms"]) == ("slim", None, None)


@pytest.mark.slow
def test_weights_stay_on_disk_where_that_is_asked(models: Path, story: tuple[object, ...]) -> None:
    found = []
    for option in ((), ("--low-memory",)):
        output = output_of("eval", models / "slim", "--compare", models / "dense", *story, "--json", *option)
        found.append([c["evaluation"]["perplexities"]["story"]["value"] for c in json.loads(output)["columns"]])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_what_is_not_compared_is_told(models: Path, story: tuple[object, ...]) -> None:
    """Comparisons were left out in silence where weights are on disk."""
    command = ("eval", models / "slim", "--compare", models / "dense", "--low-memory", "--windows", 1, *story)
    note = "predictions and answers are not compared with those of dense: leave --low-memory out"
    assert output_of(*command).endswith(f"note: slim: {note}")
    dense, slim = json.loads(output_of(*command, "--json"))["columns"]
    assert (dense["evaluation"]["notes"], slim["evaluation"]["notes"]) == ([], [note])


def test_built_in_text_is_taken_in_part(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def measured(compared: object, loading: object, options: dict[str, Any], *_: object, **__: object) -> None:
        seen.update(options)
        raise fxprune.FxpruneError("seen")

    monkeypatch.setattr(fxprune.cli.evaluate, "_measure", measured)
    monkeypatch.setattr(fxprune.data.built_in, "offline_docstrings", lambda: "some text")
    refused("eval", models / "slim")
    assert seen.pop("texts") == {"docstrings of Python": "some text"} and seen.pop("windows") == 64
    refused("eval", models / "slim", "--windows", 3)
    assert seen["windows"] == 3


def test_tasks_in_a_file_are_asked(models: Path, tmp_path: Path) -> None:
    question = {"query": "Two and two is", "choices": [" four", " five"], "gold": 0}
    (tmp_path / "sums.jsonl").write_text(json.dumps(question))
    output = output_of("eval", models / "dense", models / "slim", "--tasks", tmp_path / "sums.jsonl")
    assert "│ sums, acc_norm │" in output and "│ retained │ 100.0%" in output and "perplexity" not in output


def test_a_model_without_a_tokenizer_has_that_of_the_dense_one(
    models: Path, story: tuple[object, ...], tmp_path: Path
) -> None:
    fxprune.save_pretrained(fxprune.from_pretrained(models / "slim"), tmp_path / "slim")
    more = (*story, "--no-answers", "--json")
    assert output_of("eval", tmp_path / "slim", "--compare", models / "dense", *more).startswith('{ "settings"')
    assert "its tokenizer cannot be read" in refused("eval", tmp_path / "slim", *more)


def test_texts_and_tasks_are_refused_before_a_model_is_loaded(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short.txt").write_text("a b")
    slim = models / "slim"
    assert "holds no window of 256" in refused("eval", slim, "--text", tmp_path / "short.txt")
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert "pip install 'fxprune[eval]'" in refused("eval", slim, "--tasks", "piqa")


@pytest.mark.slow
def test_the_nearest_task_is_suggested(models: Path) -> None:
    assert "Did you mean 'piqa'" in refused("eval", models / "slim", "--tasks", "arc_easy, piqqa")


def test_figures_are_written_into_the_folder(models: Path, story: tuple[object, ...], tmp_path: Path) -> None:
    """The weights stay, files of the user too, and the checkpoint is whole."""
    slim = tmp_path / "slim"
    shutil.copytree(models / "slim", slim)
    (slim / "notes").mkdir()
    (slim / "notes/mine.txt").write_text("mine")
    weights = (slim / "model.safetensors").stat().st_ino
    command = ("eval", slim, "--compare", models / "dense", *story, "--no-answers", "--write")
    assert "perplexity, story" in output_of(*command)
    assert [path.name for path in tmp_path.iterdir()] == ["slim"]
    assert (slim / "model.safetensors").stat().st_ino == weights
    assert (slim / "notes/mine.txt").read_text() == "mine"
    fxprune.from_pretrained(slim, verify=True)
    report = json.loads((slim / "report.json").read_text())
    measured = {row[0]: row for row in report["measured"]}
    assert report["quality"]["texts"][0]["text"] == "story" and "memory, MB" in measured
    cells = measured["perplexity, story"]
    assert " | ".join(cells) in (slim / "README.md").read_text() and cells[1] in (slim / "report.html").read_text()
    (slim / "README.md").write_text("my own card")
    output_of(*command)
    assert (slim / "README.md").read_text() == "my own card"
    (slim / "plan.json").write_text("{}")
    assert "its content was changed" in refused(*command)


def test_models_are_timed_side_by_side(models: Path) -> None:
    more = ("--prompt", 8, "--tokens", 3, "--rounds", 1)
    output = output_of("bench", models / "dense", models / "slim", *more)
    assert "┃ dense ┃ slim ┃" in output and output.count(" x) │") == 2 and "times as fast, by rounds" in output
    assert "batch 1, prompt of 8 tokens, then 3; medians of 1 rounds on cpu" in output
    found = json.loads(output_of("bench", models / "slim", *more, "--batch", 2, "--json"))["slim"]
    assert (found["batch"], found["prompt"], found["tokens"]) == (2, 8, 3) and found["peak"] is None


@pytest.mark.slow
def test_a_sweep_keeps_the_times_that_targets_of_speed_need(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dense = models / "dense"
    output = output_of("bench", dense, "--sweep", "--prompt", 8, "--tokens", 3, "--rounds", 1)
    assert "15% less" in output and "kept in" in output
    (table,) = (tmp_path / "cache").rglob("*.json")
    times = json.loads(table.read_text())
    for place, (name, decode_ms) in enumerate(zip(times, (8.0, 7.0, 6.0, 5.0), strict=False)):
        times[name] |= {"decode_ms": decode_ms, "parameters": int(times["dense"]["parameters"] * (1 - 0.15 * place))}
    table.write_text(json.dumps(times))  # times of models this small say nothing
    options = ("--importance", "l2", "--recipe", "llm-pruner", "--target", "1.1x decode")
    assert "Target 1.1x decode:" in output_of("prune", dense, "--out", tmp_path / "slim", *options)
    assert "is for one model" in refused("bench", dense, models / "slim", "--sweep")


L2 = ("--recipe", "llm-pruner", "--importance", "l2", "--protect", "0,0")


@pytest.mark.slow
def test_a_sweep_sets_size_against_quality(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    more = (*L2, "--ratio", "0.1,0.3", "--out", out, "--keep", "none")
    output = output_of("sweep", models / "dense", *more, "--at-most", "9x")
    assert "│ llm-pruner-0.1 │" in output and "│ llm-pruner-0.3 │" in output
    assert "measured on docstrings of Python: 12 windows" in output
    assert "perplexity at most 9 x: llm-pruner-0.3" in output
    assert {path.name for path in out.iterdir()} == {"sweep.json", "sweep.md", "sweep.svg"}
    code, output, line = run("sweep", models / "dense", *more, "--at-most", "0.01", "--json")
    assert code == 0 and "pruning" not in line and "perplexity:" not in line, "all of it was done"
    found = json.loads(output)
    assert found["recommended"] is None and [row["ratio"] for row in found["rows"]] == [0.1, 0.3]
    assert found["rows"] == json.loads((out / "sweep.json").read_text())["rows"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    rows = [{"instruction": f"What is {i} and one?", "output": f"It is {i + 1}."} for i in range(8)]
    path.write_text(json.dumps(rows))
    return path


FAST = ("--epochs", 1, "--batch", 4, "--learning-rate", "1e-3")


@pytest.mark.slow
def test_a_slim_model_comes_back_trained_with_its_plan(models: Path, rows: Path, tmp_path: Path) -> None:
    slim, out, folder = models / "slim", tmp_path / "out", tmp_path / "run"
    more = ("--data", rows, "--out", out, "--distil", models / "dense", "--folder", folder)
    output = output_of("recover", slim, *more, *FAST)
    assert "2 steps on 7 samples" in output and f"model written to {out}" in output
    assert run("plan", "diff", slim, out)[0] == 0
    before, after = read_manifest(slim), read_manifest(out)
    assert (after.plan_digest, after.source) == (before.plan_digest, before.source)
    assert (out / "report.json").read_text() == (slim / "report.json").read_text()
    assert json.loads((out / "recovery.json").read_text())["steps"] == 2
    old, new = (fxprune.from_pretrained(place) for place in (slim, out))
    moved = {name for name, tensor in new.state_dict().items() if not torch.equal(tensor, old.state_dict()[name])}
    assert moved and moved <= set(fxprune.Plan.from_json((slim / "plan.json").read_text()).kept)
    assert "note: resumed at step 2" in output_of("recover", slim, *more, *FAST)


@pytest.mark.slow
def test_a_dense_model_stays_a_stock_checkpoint_of_the_dtype_asked_for(
    models: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}
    recover = fxprune.recover
    monkeypatch.setattr(fxprune, "recover", lambda *given, **more: seen.update(more) or recover(*given, **more))
    more = ("--out", tmp_path / "out", "--rank", 2, "--dtype", "bfloat16", "--device", "cpu")
    output_of("recover", models / "dense", "--data", rows, *more, *FAST)
    assert seen["arguments"] == {"use_cpu": True}
    assert not (tmp_path / "out/plan.json").exists()
    with torch.no_grad():
        tuned, dense = (
            AutoModelForCausalLM.from_pretrained(place)(token_ids()).logits
            for place in (tmp_path / "out", models / "dense")
        )
    assert tuned.dtype == torch.bfloat16 and tuned.shape == dense.shape and not torch.equal(tuned, dense)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Answers of servers, each asked one question as soon as it has started, and then stopped."""
    answers: list[Any] = []
    start = serve.start_server

    def ask(*arguments: Any, **options: Any) -> Any:
        server = start(*arguments, **options)
        question = {"messages": [{"role": "user", "content": "so it"}], "max_tokens": 4, "temperature": 0}
        body = json.dumps(question).encode()
        url = f"{server.listening_address}/v1/chat/completions"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            answers.append(json.loads(answer.read()))
        return server

    monkeypatch.setattr(serve, "start_server", ask)
    monkeypatch.setattr(serve, "wait", lambda: None)
    return answers


def test_a_slim_folder_is_served_by_the_openai_api(models: Path, answers: list[Any]) -> None:
    """The same as the file that is exported of it."""
    assert "/v1; stop it with Ctrl-C" in output_of("serve", models / "slim", "--port", 0, "--context", 128)
    (answer,) = answers
    assert answer["choices"][0]["message"]["role"] == "assistant" and answer["usage"]["completion_tokens"] == 4


def test_a_draft_changes_no_token(models: Path, answers: list[Any]) -> None:
    """The dense model answers the same, and takes tokens from the slim one."""
    for more in ((), ("--draft", models / "slim"), ("--draft", models / "dense")):
        output_of("serve", models / "dense", "--port", 0, "--context", 128, *more)
    alone, slim, dense = answers
    texts = {answer["choices"][0]["message"]["content"] for answer in answers}
    assert len(texts) == 1 and "draft_n" not in alone["timings"]
    assert slim["timings"]["draft_n"] > 0
    assert dense["timings"]["draft_n_accepted"] == dense["timings"]["draft_n"] > 0


def test_a_file_that_cannot_be_served_and_a_missing_engine_are_reported(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    assert "no.gguf: it cannot be served" in refused("serve", tmp_path / "no.gguf", "--port", 0)
    assert "--quantization: " in refused("serve", tmp_path / "no.gguf", "--quantization", "q8_0")
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert "it is served by llama.cpp, which is not installed. pip install 'fxprune[llama]'" in refused(
        "serve", models / "slim"
    )


LOADING = """
import sys, time
from fxprune.cli import main, serve
def load(*arguments, **options):
    print("loading", flush=True)
    time.sleep(600)
serve.start_server = load
sys.argv = ["fxprune", "serve", sys.argv[1]]
main()
"""
"""The command with an engine that takes ten minutes to load a file."""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there are no such signals")
def test_a_signal_ends_it_while_the_engine_loads(models: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOADING, str(models / "slim")]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as it:
        assert it.stdout is not None
        assert any("loading" in line for line in it.stdout)
        it.send_signal(signal.SIGTERM)
        assert it.wait(60) == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("**/*.gguf"))


def test_a_chat_has_its_earlier_turns(models: Path) -> None:
    asked = ("chat", str(models / "slim"), "--max-new-tokens", "5", "--system", "be")
    result = CliRunner().invoke(COMMAND, [*asked], input="so it\n\nand so\n")
    assert result.exit_code == 0, result.output
    model: Any = fxprune.from_pretrained(models / "slim")
    tokenizer = AutoTokenizer.from_pretrained(models / "slim", config=model.config)
    messages = [{"role": "system", "content": "be"}]
    for said in ("so it", "and so"):
        messages.append({"role": "user", "content": said})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        found = model.generate(**ids, max_new_tokens=5)[0, ids["input_ids"].shape[1] :]
        answer = tokenizer.decode(found, skip_special_tokens=True)
        assert answer.strip() in result.output
        messages.append({"role": "assistant", "content": answer})


def test_a_model_without_a_template_does_not_chat(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "dense", tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    assert "its tokenizer has no chat template. `fxprune generate` continues" in refused("chat", tmp_path / "plain")


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_slim_model_that_predicts_no_next_token_generates_none(
    family: str, models: Path, tmp_path: Path, story: tuple[object, ...]
) -> None:
    """It was run all the same, and ended in advice about weights that are not finite, or in a perplexity."""
    sizes: dict[str, dict[str, int]] = {
        "bert": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
        "t5": {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 8, "d_kv": 8},
    }
    classes = {
        "bert": (transformers.BertConfig, transformers.BertForMaskedLM),
        "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
    }
    config, model = classes[family]
    fxprune.save_pretrained(model(config(vocab_size=512, **sizes[family])).eval(), tmp_path / "it", tokenizer())
    words = f"it: it holds a {model.__name__}; this command is for models that predict the next token. `fxprune prune`"
    rows = tmp_path / "rows.txt"
    rows.write_text("so it")
    for command in (
        ("generate", tmp_path / "it", "so it"),
        ("eval", tmp_path / "it", *story),
        ("eval", tmp_path / "it", *story, "--low-memory"),
        ("eval", models / "dense", *story, "--compare", tmp_path / "it"),
        ("recover", tmp_path / "it", "--data", rows, "--out", tmp_path / "out"),
    ):
        assert words in refused(*command), command


def test_a_generation_beyond_the_positions_of_a_model_is_refused(tmp_path: Path) -> None:
    """It ended in an IndexError, with advice about weights that are not finite; a chat in a traceback."""
    chats = copy.copy(tokenizer())
    chats.chat_template = TEMPLATE
    model = tiny("gpt2", n_positions=16, n_layer=1, vocab_size=len(chats))
    model.generation_config.eos_token_id = None
    for saved in (model, chats):
        saved.save_pretrained(tmp_path / "it")
    words = "tokens at once, and the model has 16 positions. Give a shorter prompt, or fewer --max-new-tokens"
    asked = ("generate", tmp_path / "it", "so it", "--raw", "--json", "--max-new-tokens")
    assert words in refused(*asked, 40) and json.loads(output_of(*asked, 4))
    result = CliRunner().invoke(COMMAND, ["chat", str(tmp_path / "it")], input="so it\n")
    assert result.exit_code == 2 and words in " ".join(result.stderr.split())


def test_a_chat_with_weights_that_are_not_finite_is_refused(models: Path, tmp_path: Path) -> None:
    """It answered with the first tokens of the vocabulary, and generate ended well."""
    shutil.copytree(models / "dense", tmp_path / "it")
    weights = load_file(tmp_path / "it/model.safetensors")
    weights["model.norm.weight"][:] = torch.nan
    save_file(weights, tmp_path / "it/model.safetensors", metadata={"format": "pt"})
    result = CliRunner().invoke(COMMAND, ["chat", str(tmp_path / "it")], input="so it\n")
    words = "cannot generate: its logits are not finite. Check its weights for values that are not finite"
    assert result.exit_code == 2 and words in " ".join(result.stderr.split())


def greedy(folder: Path, prompt: str, tokens: int) -> str:
    model: Any = fxprune.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, config=model.config)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize(("options", "prompt"), [(("--raw",), "so it"), ((), "<u>so it</s><a>")])
def test_the_likeliest_text_comes_after_the_prompt_or_the_turn(
    models: Path, options: tuple[str, ...], prompt: str
) -> None:
    more = (models / "slim", "so it", "--max-new-tokens", 6, *options)
    output = output_of("generate", *more, "--json")
    want = greedy(models / "slim", prompt, 6)
    assert json.loads(output) == {"slim": want} or " ".join(want.split()) in output
    assert output_of("generate", *more) == " ".join(want.split())


def test_two_models_answer_one_after_the_other(models: Path) -> None:
    output = output_of("generate", models / "slim", "so it", "--compare", models / "dense", "--max-new-tokens", 4)
    assert output.startswith("dense:") and "slim:" in output


def test_samples_follow_their_seed(models: Path) -> None:
    more = ("generate", models / "slim", "so it", "--temperature", 2, "--max-new-tokens", 8)
    first, again, other = (output_of(*more, "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other
