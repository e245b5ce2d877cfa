"""Measuring and recovering: models, tokenizers, data and numbers that cannot be worked with."""

from __future__ import annotations

from collections.abc import Callable
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
from tests.bad_input.refusals import IDS, VOCABULARY, Net, check_table, each
from tests.models import tiny

TEXT = "hello there " * 50
ROWS = [f"{number} {TEXT}" for number in range(20)]
NONSENSE: tuple[Any, ...] = (None, 3, "x", b"x", [], {}, object(), float("nan"), Net, torch.ones(2), True)


class Tokenizer:
    """Letters are tokens, unless another function makes them."""

    eos_token_id = pad_token_id = 0

    def __init__(self, make: Callable[[str], Any] | None = None) -> None:
        self.make = make or (lambda text: {"input_ids": [ord(letter) % VOCABULARY for letter in text]})

    def __call__(self, text: str, **options: Any) -> Any:
        return self.make(text)


class Mute(Net):
    """Gives no logits."""

    def forward(self, input_ids: torch.Tensor) -> Any:
        return {"x": 3}


def undefined() -> Net:
    """A model whose loss is NaN."""
    model = Net()
    model.head.bias.data[:] = float("nan")
    return model


TOKENIZER = Tokenizer()
OF_ANOTHER = Tokenizer(lambda _: {"input_ids": [10**6] * 100})
RAISING, WORDY = Tokenizer(lambda _: int("no tokens today")), Tokenizer(lambda _: {"input_ids": ["a"] * 100})
TOKENIZERS: tuple[Any, ...] = (RAISING, WORDY, Tokenizer(lambda _: "abc"), OF_ANOTHER, Tokenizer)


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
    ("windows", (0, -1, "3", 1.5), "windows is"),
    ("questions", (0, -1, "3", 1.5), "questions is"),
    ("batch", (0, -1, "3", None, 1.5, True), "batch is"),
    ("tasks", (3, [3], {"a": 3}, object(), b"x"), "tasks is"),
]


def test_measuring(capfd: pytest.CaptureFixture[str]) -> None:
    rows = [row for name, values, says in MEASURES for row in each(name, values, says)]
    check_table(lambda options: measure(**options), rows, capfd)


WINDOWS = (None, 3, "x", IDS[0], IDS[:, :1], IDS[:0], IDS.float(), IDS + 100, IDS - 100, IDS.to("meta"), IDS.numpy())


def test_perplexity_and_comparisons(capfd: pytest.CaptureFixture[str]) -> None:
    rows = [(ids, "ids|IndexError") for ids in (*WINDOWS, [[1, 2]])]
    check_table(lambda ids: perplexity(Net(), ids), rows, capfd, error=EvaluationError)
    models = [(models, "models") for models in (*NONSENSE, {"a": 3}, {"a": Net})]
    check_table(lambda value: compare_models(value, TOKENIZER), models, capfd, error=EvaluationError)


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


def test_settings_of_recovery(capfd: pytest.CaptureFixture[str]) -> None:
    slim = tiny("llama", num_hidden_layers=1)
    rows = [row for name, values in SETTINGS for row in each(name, values, name.replace("_", "."))]
    check_table(lambda options: fxprune.recover(slim, ROWS, TOKENIZER, **options), rows, capfd, model=slim)


DATA: list[Any] = [
    *[3, True, object(), b"x", {}, {"text": "a"}, list, torch.ones(3), np.ones(3)],
    *[[], [3], [None], [{}], [{"text": 3}], [{"text": ""}], ["a"], [{"instruction": "a"}], [{"messages": "x"}]],
    *[iter([]), Path("/"), Path("nope.txt"), "nope.json", "nope.jsonl"],
]


def test_what_recovery_cannot_work_with(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    slim = tiny("llama", num_hidden_layers=1)
    rows = [({"data": data}, ".") for data in DATA]
    for i, content in enumerate((b"", b"{", b"[" * 100_000, b"null", b"[3]", b'{"a": 1}', b"\xff\xfe")):
        for file in (tmp_path / f"{i}.json", tmp_path / f"{i}.jsonl"):
            file.write_bytes(content)
            rows.append(({"data": file}, "data|UTF-8|JSON|rows"))
    rows += [({"tokenizer": tokenizer}, ".") for tokenizer in (*NONSENSE, *TOKENIZERS, len)]
    rows += [
        ({"tokenizer": None}, "tokenizer is None"),
        ({"tokenizer": OF_ANOTHER}, "gives 1000000, the model knows 0 to"),
    ]
    given = {"pruned": slim, "data": ROWS, "tokenizer": TOKENIZER}
    check_table(lambda bad: fxprune.recover(**{**given, **bad}), rows, capfd, model=slim)
    models = [({"pruned": model}, "pruned: .*no Hugging Face model") for model in (*NONSENSE, Net())]
    check_table(lambda bad: fxprune.recover(**{**given, **bad}), models, capfd)
