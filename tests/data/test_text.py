"""Text and rows, from files, built in and by name: what is read of each form, windows of tokens, and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fxprune.passes.prepare import CalibratePass

import fxprune
from benchmarks.common import split_calibration_heldout
from fxprune.data.built_in import offline_text
from fxprune.data.calibration import Calibration
from fxprune.data.named import is_data_set, load_named
from fxprune.data.rows import TEMPLATE, TEMPLATE_WITH_INPUT, BadRow, Row, parse_row, read_rows
from fxprune.data.text import (
    RUN,
    calibration_text,
    is_text,
    paragraphs,
    read_text,
    text_samples,
    token_windows,
    unseen,
)
from fxprune.errors import CalibrationError, DataError
from fxprune.evaluation.perplexity import load_corpus, named_corpora
from fxprune.evaluation.tasks import LocalTask, read_questions
from fxprune.graph.facts import facts_of
from fxprune.trace import trace
from tests.models import tiny, token_ids
from tests.tokens import character_tokenizer


def characters(text: str, **_: object) -> dict[str, list[int]]:
    return {"input_ids": [ord(character) for character in text]}


def test_calibration_and_held_out_text_share_no_paragraph() -> None:
    text = offline_text()
    front, rest = split_calibration_heldout(text, calibration=0.3)
    assert not set(front.split("\n\n")) & set(rest.split("\n\n"))
    assert front + "\n\n" + rest == text and 0.29 < len(front) / len(text) < 0.32
    assert split_calibration_heldout("a\n\nb\n\na\n\nc", calibration=0.5) == ("a\n\nb", "c")
    for short, fraction in (("one paragraph", 0.5), ("a\n\na", 0.5), ("a\n\nb", 0), ("a\n\nb", 1)):
        with pytest.raises(DataError):
            split_calibration_heldout(short, calibration=fraction)
    assert list(paragraphs(" one\nline \n\n\n\n two\n\n")) == ["one\nline", "two"]


def test_read_text_reads_each_format_and_names_the_file_it_refuses(tmp_path: Path) -> None:
    good = (
        "one\n\ntwo",
        '{"text": "one"}\n\n{"text": "two"}\n',
        '["one", {"text": "two"}]',
        '{"text": "one\\n\\ntwo"}',
    )
    for name, content in zip(("a.txt", "a.jsonl", "a.json", "b.json"), good, strict=True):
        (tmp_path / name).write_text(content)
        assert read_text(tmp_path / name) == "one\n\ntwo"
    for name, content in (("a.csv", "text"), ("b.jsonl", '{"body": "one"}'), ("none.txt", None)):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=name):
            read_text(tmp_path / name)


def test_token_windows_follow_the_text_without_overlap() -> None:
    text = "abcdefghij"
    windows = token_windows(characters, text, tokens=3)
    assert windows.dtype == torch.int64
    assert ["".join(map(chr, window)) for window in windows.tolist()] == ["abc", "def", "ghi"]
    with pytest.raises(DataError):
        token_windows(characters, text, tokens=11)


def test_windows_are_spread_over_the_text() -> None:
    text = "".join(chr(i) for i in range(100))
    found = text_samples([text], characters, 3, 10)["input_ids"]
    assert found[:, 0].tolist() == [0, 30, 60] and found.shape == (3, 10)
    assert text_samples([text], characters, None, 10)["input_ids"].shape == (10, 10)
    assert text_samples(["ab" * 3000], characters, None, 2)["input_ids"].shape == (1024, 2)
    for samples, tokens in ((11, 10), (None, 101)):
        with pytest.raises(CalibrationError, match=r"the texts passed.*100 tokens are fewer than"):
            text_samples([text], characters, samples, tokens)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", "plain text", "plain text"),
        ("a.md", "plain text", "plain text"),
        ("bom.txt", "\ufeffred", "red"),
        ("bom.json", '\ufeff[{"text": "red"}]', "red"),
        ("a.json", json.dumps([{"text": "one"}, "two"]), "one\n\ntwo"),
        ("a.json", json.dumps({"rows": [{"instruction": "Add.", "output": "4"}]}), "### Response:\n4"),
        ("a.jsonl", json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"content": "Ho"}]}), "Hi\n\nHo"),
    ],
)
def test_what_recovery_reads_is_read_for_calibration(tmp_path: Path, name: str, content: str, text: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    found = calibration_text(tmp_path / name)
    assert found.endswith(text) and "\ufeff" not in found


def test_chats_are_written_in_the_template_that_the_model_knows(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ({"messages": chat}, {"messages": chat}, {"text": "one"})))
    tokenizer = character_tokenizer(chat=True)
    said = tokenizer.apply_chat_template(chat, tokenize=False)
    assert said not in ("", "Hi\n\nHo")
    assert calibration_text(path, tokenizer) == f"{said}{said}\n\none", "a template says itself how a chat ends"
    plain = "Hi\n\nHo\n\nHi\n\nHo\n\none"
    assert calibration_text(path, character_tokenizer()) == calibration_text(path) == plain
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalibrationError, match=r"line 1: .* template refuses it: roles must alternate"):
        calibration_text(path, tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"\x89PNG\r\n", "byte 0 is 0x89"),
        ("a.txt", "schön".encode("latin-1"), "not text in UTF-8: byte 3"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": 7}', "line 1: 'text' is not text, but int"),
        ("a.jsonl", b'{"messages": []}', "line 1: 'messages' is not a list of messages"),
        ("a.json", b'{"question": "a"}', "row 1: none of the known fields; its fields are .'question'"),
    ],
)
def test_files_without_text_are_refused_by_place(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    """Wrong uses of the command line have the rest."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises((CalibrationError, DataError), match=says):
        calibration_text(tmp_path / name)


def test_a_window_with_a_run_of_a_sample_was_seen() -> None:
    windows = torch.arange(400).view(4, 100)
    sample = torch.full((1, 50), 999)
    sample[0, 10 : 10 + RUN] = torch.arange(250, 250 + RUN)
    assert unseen(windows, [sample]).tolist() == [True, True, False, True]
    sample[0, 10] = 999  # one token fewer in a row
    assert unseen(windows, [sample]).all()
    assert unseen(windows, []).all()


@pytest.mark.parametrize(("sample", "expected"), [([5, 6, 7], [False, True]), ([7, 6, 5], [True, True])])
def test_short_samples_and_windows_are_compared_whole(sample: list[int], expected: list[bool]) -> None:
    assert unseen(torch.arange(40).view(2, 20), [torch.tensor([sample])]).tolist() == expected
    assert unseen(torch.arange(20).view(2, 10), [torch.arange(30)[None]]).tolist() == [False, False]


ROWS = [{"text": "one"}, {"text": "two"}]
LINES = "\n".join(map(json.dumps, ROWS))


@pytest.mark.parametrize(
    ("row", "wanted", "kind"),
    [
        ({"instruction": "a", "output": "b"}, "auto", "instruction"),
        ({"messages": []}, "auto", "chat"),
        ({"text": "a", "output": None}, "auto", "text"),
        ({"prompt": "a", "completion": "b"}, "auto", "completion"),
        ({"prompt": [{"role": "user"}], "completion": [{"role": "assistant"}]}, "auto", "chat"),
        ({"messages": None, "conversations": [{"from": "human", "value": "a"}]}, "auto", "chat"),
        ([{"role": "user", "content": "a"}], "auto", "chat"),
        ([], "auto", "not an object, but list"),
        ([1, 2], "auto", "not an object, but list"),
        ("a", "text", "text"),
        ("a", "chat", "plain text, not chat"),
        ({"text": "a"}, "chat", "no 'messages'; its fields are ['text']"),
        ({"text": "a", "conversations": [{"from": "human", "value": "a"}]}, "text", "text"),
        ({"question": "a"}, "auto", "none of the known fields; its fields are ['question']"),
        (3, "auto", "not an object, but int"),
    ],
)
def test_the_kind_is_told_by_the_fields(row: Any, wanted: str, kind: str) -> None:
    found = parse_row("row 1", row, wanted)
    assert found.where == "row 1" and (found.kind if isinstance(found, Row) else found.why) == kind


def test_chats_of_each_form_are_read_as_messages() -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "tool", "content": "c"}]
    shared = [
        {"from": {"user": "human", "assistant": "gpt"}.get(one["role"], one["role"]), "value": one["content"]}
        for one in chat
    ]
    forms: list[Any] = [
        chat,
        tuple(chat),
        {"messages": chat},
        {"conversations": chat},
        {"id": 3, "conversations": shared},
    ]
    forms += [{"prompt": chat[:1], "completion": chat[1:]}]
    for form in forms:
        (row,) = read_rows([form])
        assert isinstance(row, Row) and row.kind == "chat" and list(row.fields["messages"]) == chat, form
        assert is_text([form])


def test_sources_of_each_form_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "d.parquet")
    forms = (
        ("a.json", json.dumps(ROWS), "row"),
        ("b.json", json.dumps({"data": ROWS}), "row"),
        ("c.json", LINES, "line"),
        ("d.jsonl", LINES, "line"),
        ("d.parquet", None, "row"),
    )
    for name, content, place in forms:
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        expected = [Row(f"{place} {number}", "text", row) for number, row in enumerate(ROWS, start=1)]
        assert list(read_rows(path)) == list(read_rows(str(path))) == expected
    assert list(read_rows(iter(ROWS))) == [Row("row 1", "text", ROWS[0]), Row("row 2", "text", ROWS[1])]
    (tmp_path / "a.txt").write_text("\ufeffone", encoding="utf-8")
    assert list(read_rows(tmp_path / "a.txt")) == [Row("a.txt", "text", {"text": "one"})]


def test_a_broken_line_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text"\n{"text": "two"}\n')
    first, broken, last = read_rows(path)
    assert (first.where, broken.where, last.where) == ("line 1", "line 3", "line 4")
    assert isinstance(broken, BadRow) and broken.why.startswith("not JSON")


@pytest.mark.parametrize(
    ("data", "content", "says"),
    [
        (7, None, "cannot read 7"),
        ({"text": "one"}, None, "cannot read .'text'"),
        ("rows.json", '{"a": ', "rows.json: not JSON"),
        ("rows.csv", "a,b", r"rows.csv: a \.csv file"),
        ("none.json", None, "none.json: there is no such file"),
        ("rows.txt", "schön", "rows.txt: not UTF-8 text"),
    ],
)
def test_sources_that_hold_no_rows_are_refused(tmp_path: Path, data: Any, content: str | None, says: str) -> None:
    if isinstance(data, str):
        data = tmp_path / data
    if content is not None:
        data.write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=says):
        read_rows(data)


def test_a_row_gives_its_text() -> None:
    instruction = {"instruction": "Add.", "output": "4"}
    prompts = (TEMPLATE.format(**instruction), TEMPLATE_WITH_INPUT.format(**instruction, input="1 and 3"))
    for given, prompt in ((" ", prompts[0]), ("1 and 3", prompts[1])):
        assert Row("", "instruction", {**instruction, "input": given}).text() == f"{prompt}4"
    assert Row("", "text", {"text": "a"}).text() == "a"
    assert Row("", "completion", {"prompt": "a ", "completion": "b"}).text() == "a b"
    assert Row("", "chat", {"messages": [{"content": "a"}, {"content": "b"}]}).text() == "a\n\nb"
    for kind, fields in (
        ("instruction", {"instruction": ["a"], "output": "b"}),
        ("chat", {"messages": [{"content": 3}]}),
        ("chat", {"messages": 3}),
        ("text", {"text": 0}),
        ("completion", {"prompt": "a", "completion": ["b"]}),
    ):
        bad = Row("row 1", kind, fields).text()
        assert isinstance(bad, BadRow) and bad.where == "row 1" and "not" in bad.why


def test_a_line_feed_alone_ends_a_line_of_json(tmp_path: Path) -> None:
    """Strings may hold other line breaks as they are."""
    path = tmp_path / "rows.jsonl"
    texts = ["two\u2028parts", "a\u2029b", "c\x85d", "plain"]
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_text("\ufeff" + lines + "\n\n", encoding="utf-8", newline="")
    assert [row.text() for row in read_rows(path) if isinstance(row, Row)] == texts
    assert read_text(path) == calibration_text(path) == "\n\n".join(texts)
    questions = ({"query": text, "choices": ["a", "b"], "gold": 0} for text in texts)
    path.write_text("\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in questions), encoding="utf-8")
    assert [row["query"] for row in read_questions(LocalTask(path))] == texts
    assert len(read_questions(LocalTask(path, start=1, stop=3))) == 2


TEXTS = ["one two three " * 20, "four five six " * 20]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was asked of the hub, whose data sets are all the same texts."""
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None = None, *, split: str, **options: Any) -> Any:
        asked.append((path, name, split, *options))
        return datasets.Dataset.from_dict({"sentence" if "ptb" in path else "text": TEXTS})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


def test_names_files_and_texts_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "here").write_text("a text")
    assert [name for name in ("c4", "wikitext2", "owner/name", "owner/name:small") if not is_data_set(name)] == []
    for name in ("c5", "owner/here", "owner/name.txt", "owner/name.parquet", "/owner/name", "a/b/c", "../c4", "a text"):
        assert not is_data_set(name), name
    assert not is_data_set(Path("owner/name"))
    for text in ("a/" + "b" * 5000, "some words\n" * 1000):  # the system refuses to look for files of such names
        assert not is_data_set(text)


def test_the_same_reader_serves_calibration_training_and_evaluation(asked: list[tuple[Any, ...]]) -> None:
    import datasets

    whole = "\n\n".join(TEXTS)
    for source in ("wikitext2", "ptb", "c4", "owner/name:small", TEXTS, datasets.Dataset.from_dict({"text": TEXTS})):
        assert calibration_text(source) == whole
        assert [row.fields["text"] for row in read_rows(source)] == TEXTS  # type: ignore[union-attr]
        assert load_corpus(source) == whole
    assert [(path, split) for path, _, split, *_ in asked] == [
        *(("Salesforce/wikitext", split) for split in ("train", "train", "test")),
        *(("ptb-text-only/ptb_text_only", split) for split in ("train", "train", "validation")),
        *(("allenai/c4", split) for split in ("train", "train", "validation")),
        *(("owner/name", split) for split in ("train", "train", "test")),
    ]
    assert {name for path, name, *_ in asked if path == "owner/name"} == {"small"}
    assert list(named_corpora(["c4", "owner/name", "a/b.txt"])) == ["c4", "owner/name", "b"]
    assert load_corpus(named_corpora({"mine": TEXTS})["mine"]) == whole
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    for texts in (rows, rows.to_iterable_dataset(), rows.to_list(), [[{"content": text}] for text in TEXTS]):
        assert load_corpus(named_corpora(texts)["text"]) == whole
    assert named_corpora(datasets.DatasetDict(train=rows)) == {"train": rows}


def test_a_data_set_is_read_no_further_than_a_prune_needs(
    asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxprune.data.text._MOST_TEXT", 10)
    assert calibration_text("c4") == TEXTS[0] and calibration_text(TEXTS) == TEXTS[0]


def test_text_calibrates_as_the_windows_of_it_do(asked: list[tuple[Any, ...]], tmp_path: Path) -> None:
    import datasets

    tokenizer = character_tokenizer()
    model = tiny("llama", vocab_size=300, num_hidden_layers=1)
    graph_module = trace(model, {"input_ids": token_ids(2, 8)}).graph_module
    file, rows = tmp_path / "a.txt", datasets.Dataset.from_dict({"text": TEXTS})
    file.write_text("\n\n".join(TEXTS))
    want = text_samples(["\n\n".join(TEXTS)], tokenizer, 3, 20)["input_ids"]
    sources: list[tuple[Any, str]] = [("c4", "c4"), (file, "a.txt"), (str(file), "a.txt")]
    streams = (
        rows.to_iterable_dataset(),
        datasets.IterableDataset.from_generator(lambda: ({"text": t} for t in TEXTS)),
    )
    sources += [(texts, "the texts passed") for texts in (TEXTS, rows, rows["text"], *streams)]
    for source, name in sources:
        CalibratePass(data=source, tokenizer=tokenizer, samples=3, tokens=20)(graph_module)
        found = facts_of(graph_module)[Calibration]
        assert torch.equal(torch.cat([one.inputs["input_ids"] for one in found.samples]), want)
        assert found.source == name
    assert is_text(datasets.DatasetDict(train=rows))
    with pytest.raises(DataError, match="one of its splits: train"):
        read_rows(datasets.DatasetDict(train=rows))
    tokenised = datasets.Dataset.from_dict({"input_ids": want.tolist(), "text": ["a", "b", "c"]})
    others = (tokenised, tokenised.to_iterable_dataset(), want, [{"input_ids": [1, 2]}], [])
    assert not any(map(is_text, others))
    CalibratePass(data=tokenised)(graph_module)
    assert len(facts_of(graph_module)[Calibration].samples) == 3


def test_a_prune_takes_texts_and_says_what_they_lack() -> None:
    model, tokenizer = tiny("llama", vocab_size=300, num_hidden_layers=2), character_tokenizer()
    options: dict[str, Any] = {"recipe": "llm-pruner", "importance": "wanda", "ratio": 0.1, "protect": (0, 0)}
    texts = [text * 10 for text in TEXTS]
    result = fxprune.prune(model, texts, tokenizer=tokenizer, **options)
    assert str(result.report.calibration) == "the texts passed: 10 samples, 1,280 tokens, 128 each"
    short = fxprune.prune(
        model, TEXTS, tokenizer=tokenizer, **options
    )  # the recipe's ten samples are the most it takes
    assert str(short.report.calibration) == "the texts passed: 4 samples, 512 tokens, 128 each"
    for calibration, says in (
        (["one"], "3 tokens are fewer than 1 sample of 128. Give a longer text, or samples of fewer tokens"),
        ([""], "it has no text"),
        ([{"question": "who"}], r"row 1: none of the known fields.*\['question'\]"),
        ("nowhere.txt", "nowhere.txt"),
    ):
        with pytest.raises((CalibrationError, DataError), match=says):
            fxprune.prune(model, calibration, tokenizer=tokenizer, **options)


def test_a_data_set_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", offline)
    for name in ("c4", "owner/name"):
        with pytest.raises(DataError, match=r"cannot be loaded: ConnectionError: offline. Give a path ending in"):
            load_named(name)
