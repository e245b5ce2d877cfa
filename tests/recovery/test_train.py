"""Training data, settings, updates beside weights, the loop, and what is put around it."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from torch import nn

import fxprune.cli
import fxprune.recovery.train as distil
from fxprune.data.calibration import IGNORED
from fxprune.data.rows import TEMPLATE, TEMPLATE_WITH_INPUT, BadRow, Row, parse_row
from fxprune.errors import DataError, RecoveryError, VerificationError
from fxprune.recipes import option_table
from fxprune.recovery.data import (
    Example,
    Formatter,
    TrainingData,
    collate,
    read_training_data,
)
from fxprune.recovery.lora import attach_lora, find_targets
from fxprune.recovery.run import (
    checkpoint_folder,
    claim_folder,
    copy_for_training,
    last_checkpoint,
    restored_state,
)
from fxprune.recovery.settings import RecoverySettings, settings_from
from fxprune.recovery.train import Distillation, _EarlyStopping, _Progress, distillation_sum, divide_batch, make_trainer
from fxprune.removal.plan import Plan
from tests.models import tiny
from tests.tokens import character_tokenizer


def watched(entries: list[dict[str, float]], **settings: Any) -> bool:
    """Whether training stops after these log entries."""
    state = SimpleNamespace(log_history=entries, global_step=len(entries), max_steps=99)
    control = SimpleNamespace(should_training_stop=False)
    watch = _EarlyStopping(RecoverySettings(**settings), 100)
    watch.on_log(None, state, control)
    watch.on_evaluate(None, state, control)
    return control.should_training_stop


def test_training_ends_when_the_held_out_loss_has_not_fallen_for_a_while() -> None:
    falling = [{"eval_loss": value} for value in (4.0, 3.0, 2.0, 2.1, 2.2)]
    assert not watched(falling, patience=3)
    assert watched(falling, patience=2)
    assert not watched([*falling, {"eval_loss": 1.9}], patience=2)
    assert not watched([{"eval_loss": value} for value in (2.0, 2.5, 2.4, 2.3)], patience=3), "it is falling again"


def test_a_loss_that_diverges_is_an_error_and_one_that_starts_high_is_not() -> None:
    start = [{"loss": 2.0}, {"loss": 2.1}]
    for entry, name in (({"loss": math.nan}, "training"), ({"eval_loss": math.inf}, "held-out")):
        with pytest.raises(RecoveryError, match=f"the {name} loss became"):
            watched([*start, entry])
    with pytest.raises(RecoveryError, match=r"rose from 2\.00 to 9\.00"):
        watched([*start, {"loss": 8.0}, {"loss": 7.0}, {"loss": 9.0}])
    assert not watched([*start, {"loss": 8.0}, {"loss": 3.0}, {"loss": 9.0}])
    assert not watched([{"loss": value} for value in (11.0, 12.0, 11.5, 11.0, 10.0)])


@pytest.mark.parametrize(
    ("batch", "most", "devices", "parts"),
    [(8, 4, 1, (4, 2)), (6, 4, 1, (3, 2)), (8, 16, 2, (4, 1)), (7, 4, 1, (1, 7))],
)
def test_the_batch_comes_out_exactly(
    monkeypatch: pytest.MonkeyPatch, batch: int, most: int, devices: int, parts: tuple[int, int]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(devices))
    assert divide_batch(RecoverySettings(batch=batch, micro_batch=most), use_cpu=True) == parts
    monkeypatch.setenv("WORLD_SIZE", str(batch + 1))
    with pytest.raises(RecoveryError, match="samples do not divide over"):
        divide_batch(RecoverySettings(batch=batch), use_cpu=True)


@pytest.fixture(scope="module")
def data() -> TrainingData:
    rows = [{"instruction": f"Say {i}.", "output": f"{i}"} for i in range(9)]
    return read_training_data(rows, character_tokenizer(), RecoverySettings(held_out=2))


def test_the_recipe_reaches_the_trainer(data: TrainingData, tmp_path: Any) -> None:
    settings = RecoverySettings(batch=2, micro_batch=1, epochs=2, warmup=0.25, seed=7, precision="float32")
    model = tiny("llama", num_hidden_layers=1)
    trainer = make_trainer(model, data, settings, tmp_path, padding=0, arguments={"use_cpu": True})
    made = trainer.args
    steps = -(-len(data.train) // 2) * 2
    assert (made.per_device_train_batch_size, made.gradient_accumulation_steps) == (1, 2)
    assert made.warmup_steps == -(-steps // 4) and made.seed == made.data_seed == 7
    assert made.report_to == [] and made.load_best_model_at_end
    with pytest.raises(RecoveryError, match="fp16 loses small updates"):
        make_trainer(model, data, settings, tmp_path, padding=0, arguments={"use_cpu": True, "fp16": True})
    with pytest.raises(RecoveryError, match=r"arguments: .*no_such"):
        make_trainer(model, data, settings, tmp_path, padding=0, arguments={"no_such": 1})


def test_progress_counts_the_steps_that_are_left_and_ends_early() -> None:
    seen: list[Any] = []

    def track(items: range, what: str, total: int) -> Any:
        seen.append((what, total))
        for item in items:
            yield item
            seen.append(item)

    shown, state = _Progress(track), SimpleNamespace(global_step=2, max_steps=6)
    shown.on_train_begin(None, state, None)
    assert seen == [("training", 4)]
    shown.on_step_end(None, state, None)
    assert seen[1:] == [2]
    shown.on_train_end(None, state, None)
    assert seen[1:] == [2, 3, 4, 5]


def test_divergence_is_that_of_a_computation_by_hand_also_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = torch.randn(7, 5), torch.randn(7, 5)
    soft = [(logits / 2.0).double().softmax(-1) for logits in (student, teacher)]
    expected = 4.0 * sum(float(p * math.log(p / q)) for p, q in zip(soft[1].flatten(), soft[0].flatten(), strict=True))
    for size in (distil._CPU_SLICE, 3, 7):
        monkeypatch.setattr(distil, "_CPU_SLICE", size)
        assert float(distillation_sum(student, teacher, 2.0)) == pytest.approx(expected, rel=1e-4)
        assert float(distillation_sum(teacher, teacher, 2.0)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient_is_that_of_autograd(dtype: torch.dtype, temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = ((3 * torch.randn(9, 11)).to(dtype).requires_grad_() for _ in range(2))
    before = student.detach().clone(), teacher.detach().clone()
    (0.3 * distillation_sum(student, teacher, temperature)).backward()
    assert student.grad is not None and student.grad.dtype == dtype and teacher.grad is None
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
    plain = before[0].clone().requires_grad_()
    student_log, wanted = ((logits.double() / temperature).log_softmax(-1) for logits in (plain, before[1]))
    (
        0.3 * temperature**2 * torch.nn.functional.kl_div(student_log, wanted, reduction="sum", log_target=True)
    ).backward()
    assert plain.grad is not None
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    assert torch.allclose(student.grad.double(), plain.grad.double(), **tolerance)


def test_a_teacher_knows_the_same_tokens_and_is_another_model() -> None:
    dense = tiny("llama", num_hidden_layers=1)
    Distillation(dense).check(tiny("llama", num_hidden_layers=1))
    with pytest.raises(RecoveryError, match="the teacher is the student"):
        Distillation(dense).check(dense)
    with pytest.raises(RecoveryError, match="knows 131 tokens, the student 50"):
        Distillation(dense).check(tiny("llama", num_hidden_layers=1, vocab_size=50))
    for numbers in ({"weight": 0.0}, {"weight": 1.5}, {"temperature": 0.0}):
        with pytest.raises(RecoveryError, match=next(iter(numbers))):
            Distillation(dense, **numbers)


def test_targets_are_the_linear_maps_that_shrank() -> None:
    model = tiny("llama", num_hidden_layers=2, tie_word_embeddings=True)
    names = ("model.layers.2.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight")
    kept = {name: {1: [0]} for name in names} | {"model.layers.2.input_layernorm.weight": {0: [0]}}
    targets = find_targets(model, Plan(kept, ("model.layers.1",)))
    assert targets.modules == ("model.layers.1.mlp.up_proj",), "named as in the slim model"
    assert "tied" in targets.skipped["lm_head.weight"] and "Embedding" in targets.skipped["model.embed_tokens.weight"]
    with pytest.raises(RecoveryError, match=r"no projection to train \(model\.embed_tokens\.weight: Embedding has no"):
        find_targets(model, Plan({"model.embed_tokens.weight": {1: [0]}}))
    with pytest.raises(RecoveryError, match="no projection to train"):
        find_targets(model, Plan({"model.norm.weight": {0: [0]}}))
    untied = tiny("llama", num_hidden_layers=2)
    linear = [name for name, module in untied.named_modules() if isinstance(module, nn.Linear)]
    for plan in (None, Plan({}, ("model.layers.1",))):
        assert list(find_targets(untied, plan).modules) == linear[:-1], "all except the output"


def test_updates_of_a_model_whose_config_stock_classes_refuse_are_kept(tmp_path: Path) -> None:
    """PEFT read the config in the folder that the model came from, and training stopped at its first checkpoint."""
    model = tiny("llama", num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 5}))
    model.name_or_path = str(tmp_path)
    wrapped = attach_lora(model, find_targets(model, None), RecoverySettings(rank=2))
    wrapped.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "trainer_state.json").write_text("{}")
    return path


def test_a_model_comes_back_as_it_was_whatever_happens() -> None:
    model = tiny("llama", num_hidden_layers=1)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    cache = model.config.use_cache
    with pytest.raises(KeyError), restored_state(model):
        model.train()
        model.requires_grad_(True)
        model.config.use_cache = not cache
        model.left_behind = 1
        raise KeyError
    assert not model.training and not hasattr(model, "left_behind") and model.config.use_cache == cache
    assert not frozen.requires_grad and list(model.parameters())[1].requires_grad
    copied, result = copy_for_training(model, None)
    assert copied is not model and result is None
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in model.parameters()}
    with pytest.raises(VerificationError, match="names or shapes"), restored_state(copied):
        copied.model.norm.weight = nn.Parameter(torch.ones(2))


def test_a_folder_is_the_callers_or_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with checkpoint_folder(tmp_path / "a" / "b") as path:
        assert path == tmp_path / "a" / "b"
        with pytest.raises(RecoveryError, match="another run uses"), checkpoint_folder(path):
            raise AssertionError("it began")
    assert path.is_dir()
    assert list(path.iterdir()) == []
    with checkpoint_folder(None) as path:
        assert path.is_dir()
    assert not path.exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecoveryError, match="several processes"), checkpoint_folder(None):
        pass


def test_a_folder_with_checkpoints_belongs_to_one_run(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    claim_folder(tmp_path, {"seed": 0, "data": "a"})
    claim_folder(tmp_path, {"seed": 1, "data": "a"})
    checkpoint(tmp_path, 3)
    claim_folder(tmp_path, {"seed": 1, "data": "a"})
    with pytest.raises(RecoveryError, match="another run: data differ"):
        claim_folder(tmp_path, {"seed": 1, "data": "b"})
    newest = checkpoint(tmp_path, 10)
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == newest, "the newest that is whole"


def test_the_command_has_the_options_that_are_declared() -> None:
    """Names, defaults and types come from the settings, and a value is the one that they check."""
    command = typer.main.get_command(fxprune.cli.app).commands["recover"]  # type: ignore[attr-defined]
    help_of = {one.name: one for one in command.params}
    for name, (_, declared) in option_table(RecoverySettings).items():
        assert (name in help_of) == bool(declared.panel), name
        assert not declared.panel or f"(default: {declared.default})" in help_of[name].help
    context = command.make_context("recover", ["m", "--data", "d", "--out", "o", "--learning-rate", "2e-4"])
    assert context.params["learning_rate"] == 2e-4 and context.params["rank"] is None


SUMS = [{"instruction": f"Add {i} and 1.", "input": "", "output": f"It is {i + 1}."} for i in range(40)]
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
SETTINGS = RecoverySettings(held_out=5, max_tokens=400)
TOKENIZER = character_tokenizer()


def read(data: Any, **changes: Any) -> TrainingData:
    return read_training_data(data, TOKENIZER, settings_from(SETTINGS, changes))


def counted_text(example: Example) -> str:
    return TOKENIZER.decode([label for label in example.labels if label != IGNORED])


@pytest.mark.parametrize("given", ["", "3"])
@pytest.mark.parametrize("response_only", [True, False])
def test_an_instruction_counts_its_response_and_the_end_or_whole(given: str, response_only: bool) -> None:
    row = {"instruction": "Add.", "input": given, "output": "Four"}
    example = Formatter(TOKENIZER, 1000, response_only).example(Row("row 1", "instruction", row))
    assert isinstance(example, Example) and not example.cut
    prompt = (TEMPLATE_WITH_INPUT if given else TEMPLATE).format(**row)
    assert TOKENIZER.decode(example.ids) == f"{prompt}Four</s>"
    assert counted_text(example) == ("Four</s>" if response_only else f"{prompt}Four</s>")


def test_a_completion_counts_and_its_prompt_has_no_template() -> None:
    row = {"prompt": "Two and two are ", "completion": "four"}
    read_row = parse_row("row 1", row)
    assert isinstance(read_row, Row)
    example = Formatter(TOKENIZER, 1000, response_only=True).example(read_row)
    assert isinstance(example, Example)
    assert TOKENIZER.decode(example.ids) == "Two and two are four</s>" and counted_text(example) == "four</s>"
    (bad,) = read([*SUMS, {**row, "completion": " "}]).report.bad
    assert bad.why == "'completion' is empty"


def test_chat_counts_every_answer_and_no_question() -> None:
    tokenizer = character_tokenizer(chat=True)
    turns = [("user", "2?"), ("assistant", "two"), ("user", "3?"), ("assistant", "three")]
    row = Row("row 1", "chat", {"messages": [{"role": role, "content": content} for role, content in turns]})
    example = Formatter(tokenizer, 200, response_only=True).example(row)
    assert isinstance(example, Example)
    assert tokenizer.decode(example.ids) == "<u>2?</s><a>two</s><u>3?</s><a>three</s>"
    assert counted_text(example) == "two</s>three</s>"
    tokenizer.chat_template = "{{ raise_exception('only questions') }}"
    bad = Formatter(tokenizer, 100, True).example(row)
    assert isinstance(bad, BadRow) and "refuses it" in bad.why and "only questions" in bad.why


def test_text_is_packed_into_windows_that_hold_all_of_it() -> None:
    texts = [{"text": f"{letter * 30}."} for letter in "abcdefghijkl"]
    data = read(texts, max_tokens=50, held_out=2)
    assert all(len(example.ids) == 50 for example in data.train[:-1])
    joined = TOKENIZER.decode([token for example in data.train for token in example.ids])
    kept = [row["text"] for row in texts if row["text"] in joined]
    assert len(kept) == 10 and joined == "".join(f"{text}</s>" for text in joined.split("</s>")[:-1])
    assert all(example.labels == example.ids for example in data.train)
    assert data.report.formats == {"text": 12}


def test_bad_rows_are_counted_and_named(tmp_path: Path) -> None:
    rows = [*SUMS[:20], {"instruction": "no answer"}, {"instruction": "x", "output": "  "}, 7, {"messages": []}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*map(json.dumps, [*rows, SUMS[0]]), '{"instruction": broken', json.dumps(SUMS[21])]))
    data = read(path)
    found = {row.where: row.why for row in data.report.bad}
    assert found.keys() == {"line 21", "line 22", "line 23", "line 24", "line 26"}
    assert found["line 22"] == "'output' is empty" and found["line 26"].startswith("not JSON")
    assert "none of the known fields" in found["line 21"] and "instruction" in found["line 21"]
    assert data.report.rows == 27 and data.report.duplicates == 1
    assert data.report.train + data.report.held_out == 21
    notes = " ".join(data.report.notes())
    assert "5 of 27 rows left out" in notes and "line 22" in notes and "1 rows left out that repeat" in notes
    rows = [*SUMS, {"text": "plain"}]
    assert not read(rows).report.bad
    (bad,) = read(rows, data_format="instruction").report.bad
    assert bad.why == "no 'instruction'; its fields are ['text']"


def test_long_samples_are_cut_and_counted() -> None:
    rows = [*SUMS, {"instruction": "Go on.", "output": "on " * 200}, {"instruction": "word " * 100, "output": "yes"}]
    data = read(rows, max_tokens=250)
    assert [row.why for row in data.report.bad] == ["no response within 250 tokens"]
    assert data.report.cut == 1 and max(len(example.ids) for example in data.train + data.held_out) == 250
    assert data.report.notes()[1:] == ("1 samples cut at the longest length",)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the data set is empty"),
        ([{"question": "a", "answer": "b"}] * 2, r"none of 2 rows .*its fields are \['answer', 'question'\]"),
        (SUMS[:1], "0 samples to train on and 1 held out"),
        ([{"instruction": "Add.", "output": 3}], "'output' is not text, but int"),
        ([CHAT], "none of 1 rows can be used: a chat, but the tokenizer has no chat template"),
    ],
)
def test_data_that_cannot_be_used_is_refused(rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(rows)


def test_parts_share_no_row_and_no_paragraph(tmp_path: Path) -> None:
    words = [f"Paragraph number {i} says {random.Random(i).random()}" for i in range(400)]
    repeated = "\n\n".join(words + words[:50])
    numbered = [{"id": i, **SUMS[i % 40]} for i in range(80)]
    data = read([repeated, *numbered], held_out=0.2)
    text = [TOKENIZER.decode([t for e in part for t in e.ids]) for part in (data.train, data.held_out)]
    marks = [word.split(" says ")[1] for word in words]
    assert not [mark for mark in marks if mark in text[0] and mark in text[1]]
    assert not {example.ids for example in data.train} & {example.ids for example in data.held_out}
    assert data.report.duplicates == 40, "rows that differ in a field that is not read give the same sample"
    path = tmp_path / "book.txt"
    path.write_text("\n \n".join(f"Line {i}. " + "word " * 60 for i in range(60)))  # no blank lines: split by lines
    data = read(path, max_tokens=100)
    parts = [{line for x in side for line in counted_text(x).split("\n")} for side in (data.train, data.held_out)]
    assert data.report.formats == {"text": 1} and data.report.held_out > 1 and len(data.train) > 1
    assert not {line for line in parts[0] & parts[1] if line.startswith("Line")}
    report = read(None, max_tokens=256, held_out=0.1).report
    assert report.train > 500 and report.held_out > 50, "the built-in text"


def test_the_split_depends_on_the_seed_alone() -> None:
    first, same, other = (read(SUMS, seed=seed) for seed in (0, 0, 1))
    assert first == same and first.report.digest != other.report.digest
    assert len(first.held_out) == 5 and len(read(SUMS, held_out=0.25).held_out) == 10


def test_a_batch_is_padded_at_its_end() -> None:
    batch = collate([Example((5, 6, 7), (IGNORED, 6, 7)), Example((8,), (8,))], padding=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
