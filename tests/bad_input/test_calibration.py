"""Calibration data of every wrong shape, dtype and kind is refused with the sample or item at fault."""

from __future__ import annotations

import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fxprune
from fxprune.data.calibration import Calibration
from fxprune.errors import CalibrationError
from tests.bad_input.refusals import IDS, Net, check_table, facts_left, net
from tests.remembered import traced
from tests.tokens import character_tokenizer


class Broken(Dataset[Any]):
    """A data set that cannot be read."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        raise OSError("the disk is gone")


class NoIterator:
    """Says that it can be iterated over, and cannot."""

    def __iter__(self) -> Any:
        return 3


def stopping() -> Iterator[torch.Tensor]:
    """A stream that breaks."""
    yield IDS
    raise ValueError("the stream broke")


def used_up() -> Iterator[torch.Tensor]:
    """An iterator that has nothing left."""
    items = iter([IDS])
    list(items)
    return items


def batch(**fields: Any) -> dict[str, Any]:
    """A batch of ids with more beside them."""
    return {"input_ids": IDS, **fields}


FLOATS, EMPTY = IDS.float(), torch.zeros(0, 6, dtype=torch.long)
TEXT, KIND, WORDS = "Tokenise the text first", "Pass token ids", "Pass tokenizer, or token ids"

WHOLE: list[tuple[Any, str]] = [
    (EMPTY, "the calibration data is empty"),
    (IDS[:, :0], "sample 0: fewer than two tokens"),
    (IDS[:, :1], "sample 0: fewer than two tokens"),
    (IDS[0], rf"int64 tensor of shape \(6,\).*{KIND}"),
    (IDS[None], r"of shape \(1, 4, 6\)"),
    (torch.tensor(3), "calibration: 3"),
    (FLOATS, "torch.float32 tensor"),
    (IDS.bool(), "torch.bool tensor"),
    (IDS.to(torch.complex64), "torch.complex64"),
    (IDS.to("meta"), "on meta"),
    (IDS.to_sparse(), "sparse_coo"),
    (IDS + 100, "sample 0: input_ids holds 1.., the model knows 0 to 10.*Tokenise with"),
    (IDS - 100, "sample 0: input_ids holds -"),
    (torch.full((2, 6), 2**63 - 1), "input_ids holds 9223372036854775807"),
    (np.zeros((0, 6), dtype=int), "data is empty"),
    (np.zeros((2, 6)), "float64 array"),
    (np.array([["a", "b"]]), "<U1 array"),
    (np.array([[1, None]], dtype=object), "object array"),
    (np.zeros(6, dtype=int), r"array of shape \(6,\)"),
    (np.array(3), "calibration: 3"),
    (np.zeros((2, 3), dtype="datetime64[s]"), "datetime64"),
    (np.full((2, 6), 2**64 - 1, dtype=np.uint64), "input_ids holds 9223372036854775807"),
    (np.full((2, 6), 99, dtype=">i8"), "input_ids holds 99"),
    (np.full((2, 6), 99)[:, ::-1], "input_ids holds 99"),
    ("some text", f"text needs the tokenizer of the model.*{WORDS}"),
    (b"some text", f"cannot read bytes.*{TEXT}"),
    (Path("data.json"), f"text needs the tokenizer of the model.*{WORDS}"),
    (3, "cannot read 3"),
    (True, "cannot read True"),
    (object(), "cannot read an object"),
    (list, "cannot read the class list"),
    (torch, "cannot read a module"),
    (len, "cannot read a builtin_function"),
    (Broken(), "cannot read a Broken"),
    (NoIterator(), "item 0 cannot be read: TypeError"),
    ({1, 2}, "item 0: input_ids is the single number"),
    (range(5), "item 0: input_ids is the single number 0"),
    ([], "the calibration data is empty"),
    ((), "the calibration data is empty"),
    ({}, "item 0: a sample without 'input_ids'"),
    ({"ids": IDS}, r"without 'input_ids', only \['ids'\]"),
    ({1: IDS}, "without 'input_ids'"),
    ([None], "item 0: input_ids is None"),
    ([1, 2, 3], "item 0: input_ids is the single number 1"),
    ([[0.5, 0.2]], "sample 0: input_ids is a torch.float32"),
    (["a", "b"], f"text needs the tokenizer of the model.*{WORDS}"),
    ([["a"]], "item 0: input_ids is text"),
    ([b"abc"], "item 0: input_ids is text"),
    ([[1, 2, [3]]], "item 0: input_ids is .*not a tensor"),
    ([{}], "item 0: a sample without 'input_ids'"),
    ([[]], "sample 0: input_ids is"),
    ([torch.tensor(3)], "item 0: input_ids is the single number 3"),
    ([IDS[0], "x"], "item 1: input_ids is text"),
    ([{1, 2}], "item 0: input_ids is {1, 2}"),
    ([{"input_ids": {"a": 1}}], "item 0: input_ids is {'a': 1}"),
    ([[10**30, 1]], "item 0: input_ids is .*not a tensor"),
    ([[True, False]], "sample 0: input_ids is a torch.bool"),
    ([[1j, 2]], "item 0: input_ids is a torch.complex64"),
    ([[None, 1]], r"item 0: input_ids is \[None, 1\]"),
    ([object()], "item 0: input_ids is an object"),
    ([int], "item 0: input_ids is the class int"),
    (bytearray(b"ab"), "item 0: input_ids is the single number 97"),
    (array.array("i", [1, 2]), "item 0: input_ids is the single number 1"),
    (iter([{"input_ids": "abc"}]), "item 0: input_ids is text"),
    (stopping(), "item 1 cannot be read: ValueError: the stream broke"),
    (iter(()), "the calibration data is empty"),
    (used_up(), "the calibration data is empty"),
    (DataLoader(Broken()), "item 0 cannot be read: OSError: the disk is gone"),
    (DataLoader(["a", "b"]), "item 0: input_ids is text"),  # type: ignore[arg-type]
    (DataLoader([{"text": "a"}]), "item 0: a sample without 'input_ids'"),  # type: ignore[arg-type]
    (DataLoader(TensorDataset(FLOATS)), "sample 0: input_ids is a torch.float32"),
    (DataLoader(TensorDataset(FLOATS, FLOATS)), "item 0: 2 tensors without names"),
    (DataLoader([]), "the calibration data is empty"),  # type: ignore[arg-type]
]

BATCHES: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": None}, "input_ids is None"),
    ({"input_ids": "text"}, "input_ids is text"),
    ({"input_ids": ["some", "text"]}, "input_ids is text"),
    ({"input_ids": [[1, 2, 3], [1, 2]], "labels": IDS[:2]}, r"labels are .* shape \(1, 6\), and input_ids"),
    (batch(labels=IDS[:2]), r"labels is a torch.int64 tensor of shape \(2, 6\) beside 4 samples"),
    (batch(labels=FLOATS), "labels are a torch.float32"),
    (batch(labels=IDS[:, 0]), "labels are"),
    (batch(labels=IDS[..., None]), "labels are"),
    (batch(labels=IDS[:, :3]), r"labels are .* shape \(1, 3\), and input_ids .* \(1, 6\).*as many labels as tokens"),
    (batch(labels=IDS.repeat(1, 2)), r"labels are .* shape \(1, 12\)"),
    (batch(labels="text"), "labels is text"),
    (batch(labels=["a"] * 4), "labels is text"),
    (batch(labels=3), "labels"),
    (batch(labels=object()), "labels is an object"),
    (batch(labels=torch.full_like(IDS, -100)), "all labels are -100"),
    (batch(attention_mask=torch.ones(4, 3)), r"attention_mask is of shape \(1, 3\) beside input of shape \(1, 6\)"),
    (batch(attention_mask=torch.ones(2, 6)), "attention_mask is .* beside 4 samples"),
    (batch(attention_mask=torch.ones(4, 1, 6, 6)), "attention_mask is of shape"),
    (batch(attention_mask=torch.zeros(4, 6)), "fewer than two tokens"),
    (batch(attention_mask=torch.eye(4, 6)), "fewer than two tokens"),
    (batch(attention_mask=torch.full((4, 6), float("nan"))), "attention_mask has values that are not finite"),
    (batch(attention_mask="x"), "attention_mask is text"),
]


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    """A traced model; reading calibration data changes its facts alone."""
    return traced(net)


def test_data(graph: fx.GraphModule, capfd: pytest.CaptureFixture[str]) -> None:
    known = facts_left(graph)
    rows = [(data, f"^(?=calibration|pass calibrate).*{says}") for data, says in (*WHOLE, *BATCHES)]
    check_table(lambda data: fxprune.load_pass("calibrate", data=data)(graph), rows, capfd, error=CalibrationError)
    assert facts_left(graph) == known


def test_text_in_place_of_its_path(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A whole text, too long for a file name or with bytes that are 0, is refused by all that takes a path."""
    tokenizer, model = character_tokenizer(), Net()
    calls: list[Callable[[str], Any]] = [
        lambda text: fxprune.load_pass("calibrate", data=text, tokenizer=tokenizer)(traced(net)),
        lambda text: fxprune.prune(model, IDS, tokenizer=tokenizer, eval_text=text),
        lambda text: fxprune.prune_checkpoint(tmp_path, tmp_path / "slim", text, tokenizer=tokenizer),
        lambda text: fxprune.prune(model, importance="l2", recipe="llm-pruner", budget=f"decode@{text}"),
        lambda text: fxprune.recover(model, text, tokenizer),
        fxprune.prune,
        fxprune.from_pretrained,
        lambda text: fxprune.evaluate(model, tokenizer, texts=(), tasks=[text]),
    ]
    for text in ("# A page\n\n" + 4000 * "of many words ", 3000 * "/x", "a\0b"):
        check_table(lambda call, text=text: call(text), [(call, "") for call in calls], capfd)


def test_labels_that_do_not_fit_the_logits(graph: fx.GraphModule, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [
        (IDS + 100, "labels hold .*, the model gives logits for 0 to 10.*-100"),
        (IDS - 50, "labels hold -"),
    ]

    def score(labels: torch.Tensor) -> None:
        calibrate = fxprune.load_pass("calibrate", data=batch(labels=labels))
        fxprune.Pipeline([calibrate, "find-groups", "taylor"])(graph)

    check_table(score, rows, capfd, error=CalibrationError)


def test_unusual_data_that_is_clear_is_taken(graph: fx.GraphModule) -> None:
    big_endian, backwards, unsigned = IDS.numpy().astype(">i8"), IDS.numpy()[:, ::-1], IDS.numpy().astype(np.uint64)
    beside = batch(labels=None, attention_mask=None)
    ragged = {"input_ids": [[1, 2, 3], [4, 5]], "attention_mask": [[1, 1, 1], [1, 1]]}  # a tokenizer without padding
    lists: list[Any] = [{(1, 2, 3), (4, 5)}, [[1, 2], IDS[1]], ragged, [ragged]]
    for data in (IDS.to(torch.uint8), big_endian, backwards, unsigned, beside, *lists):
        fxprune.load_pass("calibrate", data=data)(graph)
        samples = fxprune.facts_of(graph)[Calibration].samples
        fxprune.facts_of(graph).drop(Calibration, "test")
        assert all(0 <= int(s.labels.min()) <= int(s.labels.max()) < 11 for s in samples) and len(samples) > 1
