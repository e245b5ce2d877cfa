"""Each public function refuses at its door what it cannot work with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import CheckpointError, EvaluationError, PlanError
from fxprune.evaluation import perplexity
from fxprune.evaluation.comparison import compare_models
from fxprune.recovery.settings import RecoverySettings
from fxprune.removal.removal import Scores
from tests.bad_input.refusals import IDS, VOCABULARY, Net, check_clear, check_table, each, net
from tests.models import tiny
from tests.remembered import model_of, pruned, traced

NONSENSE: tuple[Any, ...] = (None, 3, "x", b"x", [], {}, object(), float("nan"), Net, torch.ones(2), True, len)


@pytest.fixture(scope="module")
def result() -> fxprune.Result:
    return pruned(net, importance="l1", protect=())


@pytest.fixture(scope="module")
def graph() -> Any:
    return fxprune.dependency_graph(traced(net))


def document(kept: str, blocks: str = "[]", version: str = "1") -> str:
    return f'{{"version": {version}, "kept": {kept}, "removed_blocks": {blocks}}}'


TEXTS: list[tuple[Any, str]] = [
    *[(value, "^plan: ") for value in (None, 3, [], {}, object(), "", "{", "x", "3", "null", "[]", "\ud800", b"\xff")],
    ("[" * 100_000, "^plan: RecursionError"),
    (document('{"a":' * 100_000), "^plan: RecursionError"),
    (document("{}", version="9"), "version 9, this release reads 1"),
    (document("{}", version='"1"'), "version '1'"),
    (document("{}", version="true"), "version True"),
    ('{"version": 1}', "kept: it is None, not a mapping"),
    (document("3"), "kept: it is 3"),
    (document('{"a": 3}'), r"kept\['a'\]: it is 3"),
    (document('{"a": {"x": [1]}}'), "'x' is not the number of an axis"),
    (document('{"a": {"-1": [1]}}'), "'-1' is not the number of an axis"),
    (document('{"a": {"0": ["q"]}}'), r"kept\['a'\]\[0\]: .*not whole numbers"),
    (document('{"a": {"0": [1.5]}}'), "not whole numbers"),
    (document('{"a": {"0": [NaN]}}'), "not whole numbers"),
    (document('{"a": {"0": [Infinity]}}'), "not whole numbers"),
    (document('{"a": {"0": [1e400]}}'), "not whole numbers"),
    (document('{"a": {"0": [true]}}'), "not whole numbers"),
    (document('{"a": {"0": "12"}}'), "not whole numbers"),
    (document('{"a": {"0": null}}'), "not whole numbers"),
    (document('{"a": {"0": ' + "9" * 5000 + "}}"), "^plan: "),
    (document("{}", "3"), "removed_blocks: they are 3"),
    (document("{}", '"abc"'), "removed_blocks: they are 'abc'"),
    (document("{}", "[3]"), "removed_blocks"),
    (document("{}", "null"), "removed_blocks: they are None"),
]


def test_texts_of_plans(capfd: pytest.CaptureFixture[str]) -> None:
    check_table(fxprune.Plan.from_json, TEXTS, capfd, error=PlanError)


PLANS: list[tuple[Any, Any, str]] = [
    ({"nope": {0: [1]}}, (), r"nope\[0\]: the model has no such axis"),
    ({"up.weight": {7: [1]}}, (), r"up.weight\[7\]: the model has no such axis"),
    ({"up.weight": {-1: [1]}}, (), r"axis|number"),
    ({"up.weight": {"0": [1]}}, (), "number of an axis"),
    ({3: {0: [1]}}, (), "not a name"),
    ({"up.weight": {0: ["a"]}}, (), "not whole numbers"),
    ({"up.weight": {0: [0.5]}}, (), "not whole numbers"),
    ({"up.weight": {0: [True]}}, (), "not whole numbers"),
    ({"up.weight": {0: [[1]]}}, (), "not whole numbers"),
    ({"up.weight": {0: None}}, (), "not whole numbers"),
    ({"up.weight": {0: 3}}, (), "not whole numbers"),
    ({"up.weight": {0: torch.tensor([1])}}, (), "not whole numbers"),
    ({"up.weight": {0: []}}, (), "do not fit an axis of 12"),
    ({"up.weight": {0: [1, 1]}}, (), "do not fit"),
    ({"up.weight": {0: [10**30]}}, (), "do not fit"),
    ({"up.weight": {0: [1, 2]}}, (), r"up.bias\[0\]: shrinks with others but is not in the plan"),
    (None, (), "kept: it is None"),
    ([1], (), r"kept: it is \[1\]"),
    ({"up.weight": None}, (), "it is None"),
    ({}, None, "removed_blocks: they are None"),
    ({}, "abc", "removed_blocks: they are 'abc'"),
    ({}, (3,), "removed_blocks"),
    ({}, ("layers.9",), "layers.9: the model has no removable block"),
]


def test_plans_of_other_models(result: fxprune.Result, capfd: pytest.CaptureFixture[str]) -> None:
    kept = result.plan.kept
    of_five = {name: {axis: 5 for axis in axes} for name, axes in kept.items()}
    rows = [((kept, blocks), says) for kept, blocks, says in PLANS]
    rows.append(((kept, (), of_five), "the plan is for 5"))
    model = model_of(traced(net))
    check_table(lambda row: pruned(net, plan=fxprune.Plan(*row)), rows, capfd, model=model)


def test_scores_that_cannot_be_written_or_read(
    result: fxprune.Result, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert result.scores is not None
    places = [(where, ".") for where in (None, 3, [], "", "no/such/folder/x", "/", b"x")]
    check_table(result.scores.save, places, capfd, error=PlanError)
    for i, content in enumerate((b"", b"\xff" * 50, b"x" * 5000, b"\x02\0\0\0\0\0\0\0{}")):
        (tmp_path / str(i)).write_bytes(content)
        places.append((tmp_path / str(i), "cannot be read.*Scores.save"))
    check_table(Scores.load, places, capfd, error=PlanError)


def test_scores_of_other_models(capfd: pytest.CaptureFixture[str]) -> None:
    strange: list[Any] = [{}, {"a": np.ones(3)}, {"model/mlp": np.ones(3)}, {"model/mlp": "x"}, None]
    rows = [(value, ".") for value in (*map(Scores, strange), Scores, 3, "", "nope.safetensors")]
    model = model_of(traced(net))
    check_table(lambda scores: pruned(net, scores=scores, protect=()), rows, capfd, model=model)


GRAPHS: dict[str, Callable[[Any, Path], Any]] = {
    "dependency_graph": lambda value, _: fxprune.dependency_graph(value),
    "find_groups": lambda value, _: fxprune.find_groups(value),
    "explain": lambda value, _: fxprune.explain(value, ("up.weight", 0)),
    "write_dot": lambda value, folder: fxprune.write_dot(value, folder / "x.dot"),
    "facts_of": lambda value, _: fxprune.facts_of(value),
    "a pass": lambda value, _: fxprune.load_pass("find-groups")(value),
    "a pipeline": lambda value, _: fxprune.Pipeline("find-groups, l1")(value),
    "export_graph": lambda value, folder: fxprune.export_graph(value, folder / "x.pt2"),
    "Result.of": lambda value, _: fxprune.Result.of(value),
}


def test_other_objects_are_not_graphs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    values = (*NONSENSE, torch.fx.symbolic_trace(nn.ReLU()), Net())
    rows = [((name, value), "graph|traced") for name in GRAPHS for value in values]
    check_table(lambda row: GRAPHS[row[0]](row[1], tmp_path), rows, capfd)
    assert not list(tmp_path.iterdir())


MEMBERS = (*NONSENSE, "up.weight", ("up.weight",), ("up.weight", 9), ("up.weight", -1), ("up.weight", "0"), ("nope", 0))
MORE_MEMBERS = ((None, None), ("up.weight", 0, 1), (0, "up.weight"), ("head.bias", 0), ("input_ids", 0), ([], 0))


def test_axes_and_groups_to_explain(graph: Any, capfd: pytest.CaptureFixture[str]) -> None:
    says = "member is|unknown parameter|no axis|is in no such group"
    check_table(lambda member: fxprune.explain(graph, member), [(m, says) for m in (*MEMBERS, *MORE_MEMBERS)], capfd)
    groups = [(group, "group is") for group in NONSENSE[1:]]
    check_table(lambda group: fxprune.explain(graph, ("up.weight", 0), group), groups, capfd)


PICTURES: list[tuple[dict[str, Any], str]] = [
    *each("path", (None, 3, "", "a\0b", [], b"x", Path), "path is"),
    *each("path", ("no/such/folder/x.dot", "/proc/x.dot"), "cannot be written.*Choose a file"),
    *each("path", ("/", "/proc/x", "x.jpg", ".svg"), r"a picture cannot be written as.*\.dot.*\.html"),
    *each("layer", (99, -99, "nope", 0.5, [], True, b"x", object(), "--3", "²", "9" * 5000), "layer"),
    *each("group", ("nope", 3, [], True, object(), fxprune.Group), "group"),
    *each("everything", ("yes", None, 3), "everything is"),
    *each("fold", ("yes", None, 3), "fold is"),
    *each("plan", ("plan.json", 3, [], {}, True), "plan is"),
    ({"plan": fxprune.Plan({"nope.weight": {0: [1]}})}, "no such axis"),
]


def test_pictures(graph: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.dot"
    check_table(lambda options: fxprune.write_dot(graph, **{"path": path, **options}), PICTURES, capfd)
    assert not list(tmp_path.iterdir())


def test_rules(capfd: pytest.CaptureFixture[str]) -> None:
    names = (((), "names is"), ((3,), "names is 3"), ((None,), "names is None"), (("",), "names is ''"))
    rows: list[tuple[Any, str]] = [((name, {"notation": "x[a] -> out[a]"}), says) for name, says in names]
    rows.append((((torch.ops.aten.relu.default,), {"notation": "x[a] -> out[a]"}), "names is an OpOverload"))
    rows += [((("bad::q",), {"notation": text}), "bad::q") for text in ("x[a -> out", "", "x[a] -> out[b]")]
    rows.append(((("bad::q",), {"notation": 3}), "notation is 3"))
    rows += [((("bad::q",), {"values": value}), "unknown values") for value in ("nope", 3)]
    check_table(lambda row: fxprune.rule(*row[0], **row[1]), rows, capfd)
    check_clear(lambda: fxprune.rule("bad::q")(3), "rule is 3", capfd)  # type: ignore[type-var]


def test_stages_and_passes(capfd: pytest.CaptureFixture[str]) -> None:
    check_table(fxprune.pass_names, [(stage, "stage") for stage in (3, "nope", [], b"x", True, "")], capfd)
    early = ("l1, find-groups", "shrink", "make-report", "emit-model")
    rows = [(passes, "the fact .* is not known. Run") for passes in early]
    check_table(lambda passes: fxprune.Pipeline(passes)(traced(net)), rows, capfd)
    step = fxprune.load_pass("find-groups")
    flags = [(inplace, "inplace is") for inplace in ("yes", None, 3)]
    check_table(lambda inplace: step(traced(net), inplace=inplace), flags, capfd)


EXPORTS: list[tuple[dict[str, Any], str]] = [
    *each("path", (None, 3, "", b"x.pt2", [], "a\0.pt2"), "path is"),
    *each("path", ("x", "x.bin", "/"), "unknown suffix"),
    ({"path": "/proc/x.pt2"}, "export|/proc"),
    *each("example_inputs", (3, [], {}, IDS), "example_inputs is"),
    ({"example_inputs": {"foo": IDS}}, "unknown input of the graph 'foo'"),
    ({"example_inputs": {"input_ids": "x"}}, "."),
    ({"example_inputs": {"input_ids": None}}, "."),
    ({"example_inputs": {"input_ids": IDS + 100}}, "IndexError|out of range"),
    ({"example_inputs": {"input_ids": IDS.to("meta")}}, "on meta"),
    ({"verify": "yes"}, "verify is"),
    ({"verify": None}, "verify is"),
]


def test_uses_of_a_result(result: fxprune.Result, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.pt2"
    check_table(lambda bad: fxprune.export_graph(result.graph_module, **{"path": path, **bad}), EXPORTS, capfd)
    assert not list(tmp_path.iterdir())
    inputs: tuple[dict[str, Any], ...] = ({}, {"input_ids": IDS.float()}, {"input_ids": IDS + 100}, {"foo": IDS})
    check_table(lambda given: result(**given), [(given, "^inputs: ") for given in inputs], capfd)
    folders = [(folder, "no slim model.*Export the graph") for folder in (None, 3, "x")]
    check_table(result.save_pretrained, folders, capfd)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "whole"
    fxprune.save_pretrained(model, folder)
    return folder


def test_folders_that_hold_no_checkpoint(capfd: pytest.CaptureFixture[str]) -> None:
    rows = [(folder, "folder|nope") for folder in (None, 3, [], "", "/nope/nope", b"x", "a\0b", Path, "nope")]
    check_table(fxprune.from_pretrained, rows, capfd, error=CheckpointError)


def test_options_of_loading(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = {"verify": ("yes", 3), "model_class": (3, "LlamaForCausalLM", Net), "dtype": ("nonsense",)}
    bad |= {"device_map": (3.5,), "attn_implementation": ("nonsense",)}
    rows = [({name: value}, ".") for name, values in bad.items() for value in values]
    check_table(lambda options: fxprune.from_pretrained(saved, **options), rows, capfd)


SAVES: list[tuple[dict[str, Any], str]] = [
    *each("folder", (None, 3, [], "", b"x", "a\0b", Path), "folder is"),
    *each("max_shard_size", (0, -1, None, "", "5", "0GB", "x", 1.5, [], True), "max_shard_size is"),
    *each("tokenizer", (3, "x", [], object()), "tokenizer is"),
    *each("plan", (3, "x", {}, fxprune.Plan), "plan is"),
    *each("report", (3, "x", {}, fxprune.Report), "report is"),
    *each("model", (None, 3, "x", Net(), fxprune.Plan()), "model is"),
    ({"folder": "/proc/nope/nope"}, "cannot be written"),
]


def test_what_cannot_be_saved(model: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = {"model": model, "folder": tmp_path / "new"}
    check_table(lambda bad: fxprune.save_pretrained(**{**given, **bad}), SAVES, capfd, error=CheckpointError)
    assert not list(tmp_path.iterdir())


TEXT = "hello there " * 50
ROWS = [f"{number} {TEXT}" for number in range(20)]
STRANGE: tuple[Any, ...] = (None, 3, "x", b"x", [], {}, object(), float("nan"), Net, torch.ones(2), True)


class Tokenizer:
    """Letters are tokens, unless another function makes them."""

    eos_token_id = pad_token_id = 0

    def __init__(self, make: Callable[[str], Any] | None = None) -> None:
        self.make = make or (lambda text: {"input_ids": [ord(letter) % VOCABULARY for letter in text]})

    def __call__(self, text: str, **options: Any) -> Any:
        return self.make(text)


class Mute(Net):
    def forward(self, input_ids: torch.Tensor) -> Any:
        return {"x": 3}


def undefined() -> Net:
    model = Net()
    model.head.bias.data[:] = float("nan")
    return model


TOKENIZER = Tokenizer()
OF_ANOTHER = Tokenizer(lambda _: {"input_ids": [10**6] * 100})
RAISING, WORDY = Tokenizer(lambda _: int("no tokens today")), Tokenizer(lambda _: {"input_ids": ["a"] * 100})
TOKENIZERS: tuple[Any, ...] = (RAISING, WORDY, Tokenizer(lambda _: "abc"), OF_ANOTHER, Tokenizer)


def measure(**options: Any) -> Any:
    given = {"model": Net(), "tokenizer": TOKENIZER, "texts": {"a": TEXT}, "window": 8, **options}
    return fxprune.evaluate(given.pop("model"), given.pop("tokenizer"), **given)


MEASURES: list[tuple[str, tuple[Any, ...], str]] = [
    ("model", (*STRANGE, Mute(), undefined(), Net().to("meta")), "."),
    ("tokenizer", (*STRANGE[:-1], *TOKENIZERS), "."),
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
    models = [(models, "models") for models in (*STRANGE, {"a": 3}, {"a": Net})]
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
    rows += [({"tokenizer": tokenizer}, ".") for tokenizer in (*STRANGE, *TOKENIZERS, len)]
    rows += [
        ({"tokenizer": None}, "tokenizer is None"),
        ({"tokenizer": OF_ANOTHER}, "gives 1000000, the model knows 0 to"),
    ]
    given = {"pruned": slim, "data": ROWS, "tokenizer": TOKENIZER}
    check_table(lambda bad: fxprune.recover(**{**given, **bad}), rows, capfd, model=slim)
    models = [({"pruned": model}, "pruned: .*no Hugging Face model") for model in (*STRANGE, Net())]
    check_table(lambda bad: fxprune.recover(**{**given, **bad}), models, capfd)
