"""Measuring and recovering: models, tokenizers, data and numbers that cannot be worked with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxprune
from fxprune.errors import EvaluationError
from fxprune.evaluation import perplexity
from fxprune.evaluation.comparison import compare_models
from fxprune.recovery.settings import RecoverySettings
from tests.bad_input.refusals import IDS, VOCABULARY, Net, check_clear, said
from tests.models import tiny

TEXT = "hello there " * 50
ROWS = [f"{number} {TEXT}" for number in range(20)]
NONSENSE: tuple[Any, ...] = (None, 3, "x", b"x", [], {}, object(), float("nan"), Net, torch.ones(2), True)


class Tokenizer:
    """Letters are tokens."""

    eos_token_id = pad_token_id = 0

    def __call__(self, text: str, **options: Any) -> Any:
        return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}


class Raising(Tokenizer):
    """Raises."""

    def __call__(self, text: str, **options: Any) -> Any:
        raise ValueError("no tokens today")


class Wordy(Tokenizer):
    """Gives text."""

    def __call__(self, text: str, **options: Any) -> Any:
        return {"input_ids": ["a"] * 100}


class Strange(Tokenizer):
    """Gives something else."""

    def __call__(self, text: str, **options: Any) -> Any:
        return "abc"


class Large(Tokenizer):
    """Belongs to another model."""

    def __call__(self, text: str, **options: Any) -> Any:
        return {"input_ids": [10**6] * 100}


class Mute(Net):
    """Gives no logits."""

    def forward(self, input_ids: torch.Tensor) -> Any:
        """Nothing of use."""
        return {"x": 3}


def undefined() -> Net:
    """A model whose loss is NaN."""
    model = Net()
    model.head.bias.data[:] = float("nan")
    return model


TOKENIZER = Tokenizer()
TOKENIZERS: tuple[Any, ...] = (Raising(), Wordy(), Strange(), Large(), Tokenizer)


def measure(**options: Any) -> Any:
    """Measure a small model, some of the arguments being others."""
    given = {"model": Net(), "tokenizer": TOKENIZER, "texts": {"a": TEXT}, "window": 8, **options}
    return fxprune.evaluate(given.pop("model"), given.pop("tokenizer"), **given)


MEASURES: list[tuple[str, tuple[Any, ...], str]] = [
    ("model", (*NONSENSE, Mute(), undefined(), Net().to("meta")), "."),
    ("tokenizer", (*NONSENSE[:-1], *TOKENIZERS), "."),
    ("texts", (None, 3, [], {}, [3], [None], {"a": 3}, {3: TEXT}, b"x", object()), "texts"),
    ("texts", ("nope", "wikitext", Path("nope.txt"), Path("/")), "unknown corpus"),
    ("texts", ({"a": "x y"}, {"a": "x\ny"}), "holds no window of 8"),
    ("window", (0, -1, 1, "8", None, 1.5, True, 10**9, float("nan")), "window"),
    ("stride", (0, -1, 99, "1", 0.5, True), "stride"),
    ("windows", (0, -1, "3", 1.5), "limit is"),
    ("questions", (0, -1, "3", 1.5), "questions is"),
    ("batch", (0, -1, "3", None, 1.5, True), "batch is"),
    ("tasks", (3, [3], {"a": 3}, object(), b"x"), "tasks is"),
]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [pytest.param(n, v, says, id=f"{n}={said(v)}") for n, values, says in MEASURES for v in values],
)
def test_measuring(name: str, value: Any, says: str, capfd: pytest.CaptureFixture[str]) -> None:
    check_clear(lambda: measure(**{name: value}), says, capfd)


WINDOWS = (None, 3, "x", IDS[0], IDS[:, :1], IDS[:0], IDS.float(), IDS + 100, IDS - 100, IDS.to("meta"), IDS.numpy())


@pytest.mark.parametrize("ids", [*WINDOWS, [[1, 2]]], ids=said)
def test_perplexity(ids: Any, capfd: pytest.CaptureFixture[str]) -> None:
    check_clear(lambda: perplexity(Net(), ids), "ids|IndexError", capfd, error=EvaluationError)


@pytest.mark.parametrize("models", [*NONSENSE, {"a": 3}, {"a": Net}], ids=said)
def test_comparing(models: Any, capfd: pytest.CaptureFixture[str]) -> None:
    check_clear(lambda: compare_models(models, TOKENIZER), "models", capfd, error=EvaluationError)


@pytest.fixture(scope="module")
def slim() -> Any:
    """A small Hugging Face model."""
    return tiny("llama")


SETTINGS: list[tuple[str, tuple[Any, ...]]] = [
    *[(name, (0, -1, "8", 1.5, None, True)) for name in ("rank", "batch", "micro_batch", "evaluations", "patience")],
    *[(name, (0, -1, "x", None, float("nan"), float("inf"))) for name in ("alpha", "learning_rate", "epochs", "clip")],
    *[(name, (1, -1, "x", None)) for name in ("dropout", "warmup")],
    ("max_tokens", (1, "x", 2.5)),
    ("held_out", (0, -1, "x", None, float("nan"))),
    ("schedule", ("nope", 3, None)),
    ("precision", ("fp16", 3, None)),
    ("data_format", ("nope", 3, None)),
    ("response_only", ("yes", None)),
    ("seed", (-1, "x", 1.5, None, 2**64)),
    ("nonsense", (1,)),
    ("settings", (3, {}, "x", RecoverySettings)),
    ("distil", (3, "x", Net(), TOKENIZER)),
    ("plan", (3, "x", {}, fxprune.Plan)),
    ("folder", (3, "", b"x", [])),
    ("inplace", ("yes", None)),
    ("arguments", (3, "x", {3: 4}, [], {"nonsense": 1})),
]


@pytest.mark.parametrize(
    ("name", "value"), [pytest.param(n, v, id=f"{n}={said(v)}") for n, values in SETTINGS for v in values]
)
def test_settings_of_recovery(name: str, value: Any, slim: Any, capfd: pytest.CaptureFixture[str]) -> None:
    check_clear(lambda: fxprune.recover(slim, ROWS, TOKENIZER, **{name: value}), name, capfd, model=slim)


DATA: list[Any] = [
    *[3, True, object(), b"x", {}, {"text": "a"}, list, torch.ones(3), np.ones(3)],
    *[[], [3], [None], [{}], [{"text": 3}], [{"text": ""}], ["a"], [{"instruction": "a"}], [{"messages": "x"}]],
    *[iter([]), Path("/"), Path("nope.txt"), "nope.json", "nope.jsonl"],
]


@pytest.mark.parametrize("data", DATA, ids=said)
def test_data_to_recover_with(data: Any, slim: Any, capfd: pytest.CaptureFixture[str]) -> None:
    check_clear(lambda: fxprune.recover(slim, data, TOKENIZER), ".", capfd, model=slim)


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "null", "[3]", '{"a": 1}', b"\xff\xfe"], ids=range(7))
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_files_to_recover_with(
    content: str | bytes, suffix: str, slim: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"data{suffix}"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    check_clear(lambda: fxprune.recover(slim, file, TOKENIZER), "data|UTF-8|JSON|rows", capfd, model=slim)


@pytest.mark.parametrize("tokenizer", [*NONSENSE, *TOKENIZERS, len], ids=said)
def test_tokenizers_to_recover_with(tokenizer: Any, slim: Any, capfd: pytest.CaptureFixture[str]) -> None:
    check_clear(lambda: fxprune.recover(slim, ROWS, tokenizer), ".", capfd, model=slim)


@pytest.mark.parametrize("model", [*NONSENSE, Net()], ids=said)
def test_models_to_recover(model: Any, capfd: pytest.CaptureFixture[str]) -> None:
    check_clear(lambda: fxprune.recover(model, ROWS, TOKENIZER), "pruned: .*no Hugging Face model", capfd)
