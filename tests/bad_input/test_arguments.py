"""Arguments and calibration data of every wrong type, shape or range are refused before any work."""

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
from fxprune.errors import CalibrationError, FxpruneError, RatioError, UnknownNameError
from fxprune.pipeline.arguments import spelled_fields
from fxprune.pipeline.registry import pass_class
from tests.bad_input.refusals import (
    IDS,
    INPUTS,
    NO_NUMBERS,
    NOT_NUMBERS,
    Net,
    check_clear,
    check_table,
    each,
    net,
)
from tests.remembered import traced
from tests.tokens import character_tokenizer

NOT_FLAGS = ("yes", "", 2, 0.0, [], torch.tensor([True, False]))
NOT_WHOLE = (*NOT_NUMBERS, *NO_NUMBERS, 1.5, "3", np.array([1, 2]))


class Stranger:
    """What is no argument of anything."""


VALUES: list[tuple[str, tuple[Any, ...], str]] = [
    ("ratio", (*NOT_NUMBERS[1:], *NO_NUMBERS, -0.1, 1, 1.0), "ratio is .*Pass a number"),
    ("ratio", (2, 10**400, np.array([0.1, 0.2])), "ratio is .*Pass a number"),
    ("group_ratio", (*NOT_NUMBERS[1:], *NO_NUMBERS, -0.1, 1), "group_ratio is .*Pass a number"),
    ("round_to", (*NOT_WHOLE[1:], 0, -4), "round_to is .*Pass a.* number"),
    ("seed", (*NOT_WHOLE, -1, 2**64), "seed is .*whole number"),
    ("protect", ((1, 2, 3), (1,), 4, True, "4", "42", b"42", (-1, 0), (1.5, 2), ("1", "2"), (True, False)), "protect"),
    ("protect", ((None, None), [float("nan"), 1], {1, 2}, {1: 2, 3: 4}, torch.ones(2, 2), Stranger()), "protect is"),
    ("kinds", ((), "", [], "mpl", "mlp,head", ("mlp", "mpl"), 3, ["mlp", None], [["mlp"]], b"mlp", object()), "kind"),
    ("importance", ("tailor", "", 3, True, [], {}, "taylor}", "l1, l2", "L1", lambda x: x), "importance"),
    ("importance", ("select-by-ratio", "shrink"), "unknown importance.*Known: .*l1, l2"),
    ("importance", (pass_class("l1"), pass_class("taylor")), "importance is the class .*load_pass"),
    ("importance", (fxprune.load_pass("shrink"), fxprune.load_pass("select-by-ratio")), "importance is the pass"),
    ("importance", ("taylor{", "taylor{order=}", "taylor{=mix}"), "name{key=value"),
    ("importance", ("taylor{order}", "taylor{order=mixed}", "taylor{order=3}"), "order"),
    ("importance", ("taylor{order=[mix]}", "taylor{order=None}"), "order"),
    ("importance", ("taylor{order=mix}}",), "order|no value"),
    ("importance", ("taylor{memory=-1}", "taylor{memory=0}", "taylor{memory=True}"), "memory is"),
    ("importance", ("taylor{memory=abc}",), "memory is|unknown memory"),
    ("memory", ("little", 0.5, True), "memory"),
    ("importance", ("taylor{ordr=mix}", "l1{order=mix}"), "unknown argument of pass"),
    ("importance", ("random{seed=-1}", "random{seed=x}"), "seed is"),
    ("importance", ("l1{kinds=mpl}", "l1{kinds=[]}"), "kind"),
    ("importance", ("taylor{track=3}", "taylor{track=None}"), "argument of pass taylor 'track'"),
    ("importance", ("tailor",), "unknown importance 'tailor'.*Did you mean 'taylor'"),
    ("importance", ("taylor{order=secnd}",), r"unknown order 'secnd'\. Did you mean 'second'"),
    ("importance", ("taylor{ordre=mix}",), "Did you mean 'order'"),
    ("importance", ("score-in-steps{steps=0}",), "of 1 or more"),
    ("kinds", (("heads",),), "Did you mean 'head'"),
    ("budget", ("parms", "bytes@q8"), "Did you mean '(params|q8_)"),
    ("taylor", ("mixed", 3, True, "", ["mix"]), "order"),
    ("reduction", ("summ", "", 3, sum, ["sum"]), "reduction"),
    ("ranking", ("locale", "", 3, ["local"]), "ranking"),
    ("uniform", NOT_FLAGS, "uniform is .*True or False"),
    ("select", ("select-by-ratoi", 3, "l1", [], pass_class("select-by-ratio"), fxprune.load_pass("l1")), "select"),
    ("select", ("select-by-ratio{ratio=2}", "select-by-ratio{ratio=x}", "select-by-ratio{ratio=None}"), "ratio is"),
    ("select", ("plan-from-json", "plan-from-json{file=''}"), "no plan.*text"),
    ("compensate", ("least-sqaures", "", 3, True, "l1", [], pass_class("least-squares")), "compensat"),
    ("compensate", ("least-squares{damping=-1}", "least-squares{damping=0}", "least-squares{damping=x}"), "damping is"),
    ("compensate", ("least-squares{batch=0}", "least-squares{batch=1.5}", "least-squares{batch=None}"), "batch is"),
    ("tune", ("tuna", "", 3, True, "l1", "record-teacher{kept=0}", pass_class("tune")), "tun|kept"),
    ("tune", ("tune{epochs=0}", "tune{rate=x}"), "epochs is|rate is"),
    ("recipe", ("balance", 3, True, [], "", "no-such-file.txt", "find-groups, l3"), "recipe|no-such-file|unknown pass"),
    ("tokenizer", (3, "gpt2", [], Stranger), "tokenizer is"),
    ("verify", NOT_FLAGS, "verify is .*True or False"),
    ("inplace", NOT_FLAGS, "inplace is .*True or False"),
    ("track", (3, "bar", True, []), "track is"),
]
OPTIONS = [
    *(row for name, values, says in VALUES for row in each(name, values, says)),
    ({"taylor": "mix", "importance": "l1"}, "taylor.*importance=.*Leave taylor out"),
    ({"uniform": True, "protect": (1, 1)}, "uniform.*protect"),
    ({"uniform": True, "ranking": "global"}, "uniform.*ranking"),
]


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments are refused before anything is traced."""
    monkeypatch.setattr("fxprune.api.trace", lambda *_: pytest.fail("traced before its arguments were checked"))


def test_options_of_a_prune(untraced: None, capfd: pytest.CaptureFixture[str]) -> None:
    model = Net()
    check_table(lambda options: fxprune.prune(model, IDS, **options), OPTIONS, capfd, model=model)


def test_options_of_a_pipeline(capfd: pytest.CaptureFixture[str]) -> None:
    kinds: dict[type[Exception], tuple[Any, ...]] = {
        RatioError: (({"ratio": "0.2"}, "ratio"),),
        UnknownNameError: (({"kinds": "mpl"}, "kind"), ({"ranking": "locale"}, "ranking")),
        ValueError: (({"seed": -1}, "seed is -1"),),
        FxpruneError: (({"verify": "no"}, "verify"), ({"plan": "{}"}, "plan")),
    }
    for kind, rows in kinds.items():
        check_table(lambda options: fxprune.prune_pipeline(IDS, **options), rows, capfd, error=kind)


def test_every_argument_of_every_pass(capfd: pytest.CaptureFixture[str]) -> None:
    """A bad value is refused as the pass is made, or before a pipeline runs its first pass; so is an unknown name."""
    known = [(name, field.name) for name in fxprune.pass_names() for field in spelled_fields(pass_class(name))]
    rows = [((name, at), rf"\b{at}|{at.removesuffix('s')} is|cannot read a Stranger") for name, at in known]
    rows += [((name, "nonsense"), f"argument of pass {name} 'nonsense'") for name in fxprune.pass_names()]
    check_table(lambda row: fxprune.load_pass(row[0], **{row[1]: Stranger()}).check_arguments(), rows, capfd)


def test_scalars_of_other_libraries_are_numbers() -> None:
    """They are taken where they say exactly what a number of Python would."""
    given = {
        "ratio": np.float32(0.25),
        "round_to": torch.tensor(8),
        "protect": np.array([1, 2]),
        "uniform": np.bool_(0),
    }
    made = fxprune.load_pass("select-by-ratio", **given)
    assert str(made) == "select-by-ratio{protect=[1, 2], round_to=8, ratio=0.25}"


APPLY = [
    *each("plan", (None, "plan.json", "{}", {}, 3, fxprune.Plan, Stranger()), "plan is .*Plan"),
    *each("compensate", ("least-sqaures", 3), "compensat", plan=fxprune.Plan()),
    *each("verify", ("yes", 3), "verify is", plan=fxprune.Plan()),
    *each("inplace", ("yes", 3), "inplace is", plan=fxprune.Plan()),
]


def test_options_of_applying(untraced: None, capfd: pytest.CaptureFixture[str]) -> None:
    model = Net()
    check_table(lambda options: fxprune.apply(model, example_inputs=INPUTS, **options), APPLY, capfd, model=model)


PIPELINES = [
    ("", "no pass"),
    ("# nothing", "no pass"),
    ([], "no pass"),
    (None, "passes is None"),
    (3, "passes is 3"),
    ([3], "3"),
    ([None], "None"),
    ([pass_class("l1")], "the class L1ImportancePass"),
    (pass_class("l1"), "the class L1ImportancePass"),
    ("find-groups, l3", "unknown pass 'l3'.*l1"),
    ("find-groups l1", "unknown pass|key=value"),
    ("find-groups, l1{reduction=summ}", "Did you mean 'sum'"),
    ("find-groups, l1{reduction}", "reduction is True"),
    ("find-groups, l1{", "closing brace"),
    ("find-groups, (l1", "not closed"),
    ("find-groups, l1{kinds=[mlp}", "not closed|no closing"),
    ("find-groups, l1{kinds='mlp}", "not closed|no closing"),
    ("find-groups, l1{kinds=mlp} x", "behind the closing brace"),
    ("find-groups, select-by-ratio{ratio=1+}", "no value"),
    ("find-groups, select-by-ratio{ratio=__import__('os')}", "no value"),
    ("find-groups, select-by-ratio{ratio=" + "[" * 5000 + "]" * 5000 + "}", "ratio|deep"),
    ("find-groups, select-by-ratio{ratio=1e999}", "ratio is inf"),
    ("(find-groups, l1), (select-by-ratoi)", "Did you mean 'select-by-ratio'"),
    ("()", "no pass"),
]


def test_texts_of_pipelines_and_names_of_passes(capfd: pytest.CaptureFixture[str]) -> None:
    check_table(fxprune.Pipeline, PIPELINES, capfd)
    check_table(fxprune.load_pass, [(name, "pass") for name in (None, 3, "", "l3", ["l1"], b"l1", "l1{}")], capfd)
    check_clear(lambda: fxprune.Pipeline("l1", on_pass=3), "on_pass is 3", capfd)  # type: ignore[arg-type]


class Broken(Dataset[Any]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        raise OSError("the disk is gone")


class NoIterator:
    """Says that it can be iterated over, and cannot."""

    def __iter__(self) -> Any:
        return 3


def stopping() -> Iterator[torch.Tensor]:
    yield IDS
    raise ValueError("the stream broke")


def batch(**fields: Any) -> dict[str, Any]:
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
    known = set(map(type, fxprune.facts_of(graph)))
    rows = [(data, f"^(?=calibration|pass calibrate).*{says}") for data, says in (*WHOLE, *BATCHES)]
    check_table(lambda data: fxprune.load_pass("calibrate", data=data)(graph), rows, capfd, error=CalibrationError)
    assert set(map(type, fxprune.facts_of(graph))) == known


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
