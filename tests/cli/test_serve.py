"""Text from saved models: generated, served by the OpenAI API, and in chats."""

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
from click.testing import CliRunner
from transformers import AutoTokenizer

import fxprune
from fxprune.cli import serve
from tests.cli.running import COMMAND, refused, run


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
    code, output, line = run("serve", models / "slim", "--port", 0, "--context", 128)
    assert code == 0 and "/v1; stop it with Ctrl-C" in output, line
    (answer,) = answers
    assert answer["choices"][0]["message"]["role"] == "assistant" and answer["usage"]["completion_tokens"] == 4


def test_a_draft_changes_no_token(models: Path, answers: list[Any]) -> None:
    """The dense model answers the same, and takes tokens from the slim one."""
    for more in ((), ("--draft", models / "slim"), ("--draft", models / "dense")):
        code, _, line = run("serve", models / "dense", "--port", 0, "--context", 128, *more)
        assert code == 0, line
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
    code, output, line = run("generate", *more, "--json")
    assert code == 0, line
    want = greedy(models / "slim", prompt, 6)
    assert json.loads(output) == {"slim": want} or " ".join(want.split()) in output
    assert run("generate", *more)[1] == " ".join(want.split())


def test_two_models_answer_one_after_the_other(models: Path) -> None:
    code, output, _ = run("generate", models / "slim", "so it", "--compare", models / "dense", "--max-new-tokens", 4)
    assert code == 0 and output.startswith("dense:") and "slim:" in output


def test_samples_follow_their_seed(models: Path) -> None:
    more = ("generate", models / "slim", "so it", "--temperature", 2, "--max-new-tokens", 8)
    first, again, other = (run(*more, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other
