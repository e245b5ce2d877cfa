"""Recovery: what is trained, that it helps, that it leaves no trace, that it resumes, and what it refuses."""

import copy
import importlib
import json
import os
import random
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import fxprune
from fxprune.data.calibration import IGNORED, next_token_loss
from fxprune.errors import RecoveryError, VerificationError
from fxprune.graph.tensors import weights
from fxprune.recovery import Distillation, RecoverySettings
from fxprune.recovery.data import collate, read_training_data
from fxprune.recovery.lora import attach_lora, find_targets, merge_lora
from fxprune.recovery.run import Recovery, last_checkpoint, padding_id
from fxprune.recovery.train import distillation_sum
from tests import remembered
from tests.models import tiny, token_ids
from tests.tokens import character_tokenizer

ROOT = Path(__file__).parents[2]
SUMS = [{"instruction": f"Add {i} and 1.", "input": "", "output": f"It is {i + 1}."} for i in range(24)]
QUICK = RecoverySettings(
    batch=8, micro_batch=4, epochs=2, learning_rate=5e-3, held_out=4, evaluations=2, precision="float32"
)
TOKENIZER = character_tokenizer()


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture(scope="module")
def pruned(dense: PreTrainedModel) -> fxprune.Result:
    return remembered.pruned("llama", token_ids(4, 12), recipe="llm-pruner")


@pytest.fixture(scope="module")
def recovered(pruned: fxprune.Result) -> Recovery:
    measured = (("", "slim"), ("perplexity", "12.3"))
    told = replace(pruned, report=replace(pruned.report, measured=measured))
    return fxprune.recover(told, SUMS, TOKENIZER, settings=QUICK)


def losses_of(recovery: Recovery) -> list[float]:
    return [entry["loss"] for entry in recovery.history if "loss" in entry]


def slim_copy(pruned: fxprune.Result) -> fxprune.Result:
    return fxprune.apply(tiny("llama"), pruned.plan)


def test_the_held_out_loss_falls(recovered: Recovery) -> None:
    before, after = recovered.held_out
    assert after < before - 0.5
    assert recovered.steps == 6 and len(losses_of(recovered)) == 6
    assert recovered.notes == ()
    data = json.loads(recovered.to_json())
    assert data["held_out"] == list(recovered.held_out) and data["merge_error"] < 1e-4
    assert data["targets"]["modules"] == list(recovered.targets.modules)
    assert data["settings"]["learning_rate"] == 5e-3 and data["data"]["train"] == 20
    # the card of the trained model had the figures of the model before
    assert recovered.result is not None and recovered.result.report.measured == ()
    assert recovered.result.report.unmeasured == "it was trained after the prune"


def test_samples_have_no_more_tokens_than_model_and_teacher_have_positions() -> None:
    """It was an index error of torch, with the advice to check tokenizer and settings."""
    rows = [{"text": f"So it goes, and it went on {i} times. " * 3} for i in range(12)]
    short, teacher = (tiny("gpt2", n_layer=1, n_positions=positions) for positions in (48, 40))
    found = fxprune.recover(short, rows, TOKENIZER, settings=replace(QUICK, epochs=1), distil=teacher)
    assert found.settings.max_tokens == 40
    assert "samples have at most 40 tokens, as many as the model has positions" in found.notes


def test_only_the_weights_of_the_planned_projections_change(pruned: fxprune.Result, recovered: Recovery) -> None:
    slim, after = pruned.model, recovered.model
    assert type(after) is type(slim) and sum(p.numel() for p in after.parameters()) == pruned.report.parameters[1]
    assert [name for name, _ in after.named_modules()] == [name for name, _ in slim.named_modules()]
    assert set(vars(after)) == set(vars(slim)) and vars(after.config) == vars(slim.config)
    assert [p.requires_grad for p in after.parameters()] == [p.requires_grad for p in slim.parameters()]
    assert not after.training and all(p.grad is None for p in after.parameters())
    old, new = slim.state_dict(), after.state_dict()
    assert {k: v.shape for k, v in new.items()} == {k: v.shape for k, v in old.items()}
    changed = {name.removesuffix(".weight") for name in old if not torch.equal(old[name], new[name])}
    assert changed == set(recovered.targets.modules)


def test_graph_model_and_saved_model_agree_and_generate(recovered: Recovery, tmp_path: Path) -> None:
    result = recovered.result
    assert result is not None and result.model is recovered.model
    result.save_pretrained(tmp_path / "model", TOKENIZER)
    with torch.no_grad():
        for same in (result, fxprune.from_pretrained(tmp_path / "model")):
            assert torch.allclose(same(token_ids()).logits, recovered.model(token_ids()).logits, atol=1e-5)
    storages = {tensor.data_ptr() for tensor in recovered.model.state_dict().values()}
    assert {t.data_ptr() for name, t in weights(result.graph_module) if name.endswith("weight")} <= storages
    assert recovered.model.generate(token_ids(1, 5), max_new_tokens=3, do_sample=False).shape == (1, 8)


def test_the_model_passed_is_unchanged_unless_asked(pruned: fxprune.Result) -> None:
    own = slim_copy(pruned)
    before = {name: value.clone() for name, value in own.model.state_dict().items()}
    random.seed(5)
    torch.manual_seed(5)
    fxprune.recover(own, SUMS, TOKENIZER, settings=QUICK, epochs=0.4)
    draws = random.random(), float(torch.rand(1))
    random.seed(5)
    torch.manual_seed(5)
    assert draws == (random.random(), float(torch.rand(1))), "the caller's random numbers go on"
    assert all(torch.equal(value, before[name]) for name, value in own.model.state_dict().items())
    recovery = fxprune.recover(own, SUMS, TOKENIZER, settings=QUICK, epochs=0.4, inplace=True)
    assert recovery.model is own.model and recovery.result is own
    assert any(not torch.equal(value, before[name]) for name, value in own.model.state_dict().items())
    with torch.no_grad():
        assert torch.allclose(own(token_ids()).logits, own.model(token_ids()).logits, atol=1e-5)


def test_padding_is_an_id_that_the_model_knows(pruned: fxprune.Result) -> None:
    """A token may have been added without resizing the embedding; padding is masked, and any id will do."""
    rows = pruned.model.get_input_embeddings().weight.shape[0]
    for pad, end, expected in ((rows + 7, 2, 2), (None, None, 0), (5, 2, 5)):
        assert padding_id(SimpleNamespace(pad_token_id=pad, eos_token_id=end), pruned.model) == expected


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_linear_maps_that_shrank_are_trained_and_merge_exactly(family: str) -> None:
    result = remembered.pruned(family, importance="l2", protect=(1, 0))
    model = copy.deepcopy(result.model)
    targets = find_targets(model, result.plan)
    dense = {name: module.weight.shape for name, module in tiny(family).named_modules() if hasattr(module, "weight")}
    slim = dict(model.named_modules())
    shrank = [n for n, shape in dense.items() if slim[n].weight.shape != shape and slim[n].weight.dim() == 2]
    assert list(targets.modules) == shrank and shrank and not targets.skipped
    assert not any(".0." in name for name in shrank)
    keys = list(model.state_dict())
    wrapped = attach_lora(model, targets, RecoverySettings(rank=4))
    for name, parameter in wrapped.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    moved = (wrapped.eval()(token_ids()).logits - result.graph_module(token_ids()).logits).abs().max()
    merged, error = merge_lora(wrapped, {"input_ids": token_ids()})
    assert moved > 0.01 and error < 1e-4 and list(merged.state_dict()) == keys


def test_merging_that_changes_the_logits_is_refused(pruned: fxprune.Result, monkeypatch: pytest.MonkeyPatch) -> None:
    own = slim_copy(pruned)
    wrapped = attach_lora(own.model, find_targets(own.model, own.plan), RecoverySettings())
    monkeypatch.setattr(wrapped, "merge_and_unload", lambda safe_merge: tiny("llama"))
    with pytest.raises(VerificationError, match="merging moved the logits"):
        merge_lora(wrapped, {"input_ids": token_ids()})


@pytest.mark.slow
def test_a_model_in_fp16_with_its_plan_is_trained_in_another_dtype(pruned: fxprune.Result, recovered: Recovery) -> None:
    half = copy.deepcopy(pruned.model).half()
    half.model.rotary_emb.inv_freq = pruned.model.model.rotary_emb.inv_freq.clone()  # as it is when loaded in fp16
    recovery = fxprune.recover(half, SUMS, TOKENIZER, settings=QUICK, plan=pruned.plan, epochs=0.4)
    assert recovery.result is None and recovery.targets == recovered.targets
    assert {p.dtype for p in recovery.model.parameters()} <= {torch.bfloat16, torch.float32}
    assert recovery.model.model.rotary_emb.inv_freq.dtype == torch.float32, "positions were rounded to bfloat16"
    assert any("fp16" in note for note in recovery.notes)
    assert {p.dtype for p in half.parameters()} == {torch.float16}


def test_loss_mixes_both_over_the_counted_tokens(dense: PreTrainedModel, pruned: fxprune.Result) -> None:
    """One batch, one step, nothing learnt yet: the loss logged is that of a computation by hand."""
    teacher = Distillation(dense, weight=0.25, temperature=3.0)
    quick = {"batch": 20, "micro_batch": 20, "epochs": 1, "dropout": 0.0}
    recovery = fxprune.recover(pruned, SUMS, TOKENIZER, settings=QUICK, distil=teacher, **quick)
    batch = collate(read_training_data(SUMS, TOKENIZER, QUICK).train, padding=0)
    labels = batch.pop("labels")
    with torch.no_grad():
        ours, theirs = pruned.model(**batch).logits[:, :-1], dense(**batch).logits[:, :-1]
        counted = labels[:, 1:] != IGNORED
        cross = next_token_loss(pruned.model(**batch).logits, labels)
        mean = distillation_sum(ours[counted], theirs[counted], 3.0) / counted.sum()
    assert losses_of(recovery)[0] == pytest.approx(float(0.75 * cross + 0.25 * mean), rel=1e-4)
    parts = fxprune.recover(pruned, SUMS, TOKENIZER, settings=QUICK, distil=teacher, **{**quick, "micro_batch": 5})
    assert losses_of(parts) == pytest.approx(losses_of(recovery), rel=1e-4), "accumulated over four parts"


@pytest.mark.slow
def test_a_teacher_in_lower_precision_draws_the_student_to_it(dense: PreTrainedModel, pruned: fxprune.Result) -> None:
    half = copy.deepcopy(dense).bfloat16()
    before = {name: value.clone() for name, value in half.state_dict().items()}
    teacher = Distillation(half, weight=1.0, temperature=1.0)
    recovery = fxprune.recover(pruned, SUMS, TOKENIZER, settings=QUICK, distil=teacher, epochs=4)
    losses = losses_of(recovery)
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in half.state_dict().items())


def test_divergence_is_reported_and_leaves_the_model_whole(pruned: fxprune.Result) -> None:
    own = slim_copy(pruned)
    keys = list(own.model.state_dict())
    with pytest.raises(RecoveryError, match=r"step \d+: training diverged: .*Lower learning_rate \(now 1000"):
        fxprune.recover(own, SUMS, TOKENIZER, settings=QUICK, learning_rate=1e3, epochs=10, inplace=True)
    assert list(own.model.state_dict()) == keys
    assert own.model.generate(token_ids(1, 5), max_new_tokens=2).shape == (1, 7)


@pytest.mark.slow
def test_the_best_weights_are_kept_and_a_missing_gain_is_reported(pruned: fxprune.Result) -> None:
    recovery = fxprune.recover(pruned, SUMS, TOKENIZER, settings=QUICK, learning_rate=0.05, epochs=4)
    judged = [entry["eval_loss"] for entry in recovery.history if "eval_loss" in entry]
    assert recovery.held_out == (judged[0], min(judged[1:])) and len(judged) > 2
    idle = fxprune.recover(pruned, SUMS, TOKENIZER, settings=QUICK, learning_rate=1e-30, patience=1)
    assert idle.notes[0] == "stopped early at step 3 of 6" and "did not fall" in idle.notes[1]


def test_an_interrupted_run_resumes_and_ends_with_the_same_losses(
    pruned: fxprune.Result, recovered: Recovery, tmp_path: Path
) -> None:
    def interrupt(items: Any, what: str, total: int) -> Any:
        for number, item in enumerate(items):
            if number == 5:
                raise KeyboardInterrupt
            yield item

    own = slim_copy(pruned)
    keys = list(own.model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        fxprune.recover(own, SUMS, TOKENIZER, settings=QUICK, folder=tmp_path, track=interrupt, inplace=True)
    assert list(own.model.state_dict()) == keys, "no update is left in the model"
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    (tmp_path / "checkpoint-4").mkdir()  # what a kill in the middle of writing one leaves
    resumed = fxprune.recover(pruned, SUMS, TOKENIZER, settings=QUICK, folder=tmp_path)
    assert "resumed at step 3" in resumed.notes
    assert losses_of(resumed) == losses_of(recovered) and resumed.held_out == recovered.held_out
    state = recovered.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.model.state_dict().items())
    with pytest.raises(RecoveryError, match="another run: settings differ"):
        fxprune.recover(pruned, SUMS, TOKENIZER, settings=QUICK, folder=tmp_path, learning_rate=1e-3)
    with pytest.raises(RecoveryError, match="another run: data differ"):
        fxprune.recover(pruned, SUMS[1:], TOKENIZER, settings=QUICK, folder=tmp_path)
    with torch.no_grad():  # no update is trained there, and yet the run would be another one
        own.model.model.embed_tokens.weight.mul_(2)
    with pytest.raises(RecoveryError, match="another run: weights differ"):
        fxprune.recover(own, SUMS, TOKENIZER, settings=QUICK, folder=tmp_path)


def test_a_run_resumes_only_with_its_own_teacher(
    pruned: fxprune.Result, dense: PreTrainedModel, tmp_path: Path
) -> None:
    """The rest of a run learnt from whichever teacher was given."""
    settings = replace(QUICK, batch=20, epochs=1)
    fxprune.recover(pruned, SUMS, TOKENIZER, settings=settings, folder=tmp_path, distil=dense)
    with pytest.raises(RecoveryError, match="another run: distil differ"):
        fxprune.recover(pruned, SUMS, TOKENIZER, settings=settings, folder=tmp_path, distil=slim_copy(pruned).model)


SPREAD = """
    import json, os, sys, torch
    torch.set_num_threads(1)
    import fxprune
    from tests.recovery.test_recover import QUICK, SUMS, TOKENIZER

    slim = fxprune.from_pretrained(f"{sys.argv[1]}/slim")
    plan = fxprune.Plan.from_json(open(f"{sys.argv[1]}/slim/plan.json").read())
    for name, arguments in json.loads(sys.argv[2]).items():
        folder = os.path.join(sys.argv[1], name)
        done = fxprune.recover(
            slim, SUMS, TOKENIZER, plan=plan, settings=QUICK, dropout=0.0, folder=folder, arguments=arguments
        )
        open(os.path.join(folder, f"rank{os.environ['RANK']}.json"), "w").write(done.to_json())
"""


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
ACCELERATE = ("accelerate.commands.launch", "--num_machines=1", "--num_processes=2", "--main_process_port=0")


def launch(launcher: tuple[str, ...], script: str, folder: Path, *more: str) -> None:
    """Run a script in two processes; its arguments are a folder and what is given beside it."""
    (folder / "train.py").write_text(textwrap.dedent(script))
    command = [sys.executable, "-m", *launcher, str(folder / "train.py"), str(folder), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "arguments"),
    [
        (TORCHRUN, {"copies": {}, "sharded": {"fsdp": True, "fsdp_config": {"version": 2}}}),
        ((*ACCELERATE, "--use_fsdp", "--fsdp_version=2"), {"launched": {}}),
    ],
    ids=["torchrun", "accelerate"],
)
def test_two_processes_train_what_one_does(
    pruned: fxprune.Result, launcher: tuple[str, ...], arguments: dict[str, Any], tmp_path: Path
) -> None:
    """Of layers that are not alike."""
    layers = [dict(layer.named_parameters()) for layer in pruned.model.model.layers]
    assert len({tuple(value.shape for value in layer.values()) for layer in layers}) > 1
    pruned.save_pretrained(tmp_path / "slim")
    launch(launcher, SPREAD, tmp_path, json.dumps(arguments))
    alone = fxprune.recover(pruned, SUMS, TOKENIZER, settings=QUICK, dropout=0.0)
    for name in arguments:
        assert (tmp_path / name / "adapter").exists() == (name != "copies"), "gathered where it was sharded"
        for rank in (0, 1):
            spread = json.loads((tmp_path / name / f"rank{rank}.json").read_text())
            assert spread["held_out"] == pytest.approx(alone.held_out, rel=1e-2)
            assert spread["steps"] == alone.steps and spread["merge_error"] < 1e-4


SHARDED = """
    import gc, json, sys, torch
    torch.set_num_threads(1)
    import fxprune
    from fxprune.checkpoint.read import load_model
    from fxprune.offload.ranks import process_group, rank
    from tests.models import token_ids
    from tests.recovery.test_recover import QUICK, SUMS, TOKENIZER

    def held():
        gc.collect()
        found = (one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and not one.is_meta)
        sizes = {}
        for own in (getattr(one, "_local_tensor", one) for one in found):
            size = min(own.nbytes, own.untyped_storage().nbytes())  # shards are views of mapped files
            place = own.untyped_storage().data_ptr()
            sizes[place] = max(size, sizes.get(place, 0))
        return sum(sizes.values())

    def track(items, what, total):
        for item in items:
            sizes.append(held())
            yield item

    def train(name):
        sizes.clear()
        slim, dense = (load_model(f"{folder}/{name}", sharded=True) for name in ("slim", "dense"))
        slim(token_ids())  # what ran before has gathered weights, and knows that they are not frozen
        plan = fxprune.Plan.from_json(open(f"{folder}/slim/plan.json").read())
        done = fxprune.recover(
            slim, SUMS, TOKENIZER, plan=plan, distil=dense, settings=QUICK, batch=10, dropout=0.0, inplace=True,
            folder=folder, arguments={"use_cpu": True}, track=track,
        )
        shards = sum(value._local_tensor.nbytes for model in (slim, dense) for value in model.parameters())
        assert done.model is slim
        fxprune.save_pretrained(slim, f"{folder}/recovered", plan=plan)
        record = {"sizes": sizes, "shards": shards, "trained": done.trained, "notes": done.notes}
        open(f"{folder}/{name}{rank()}.json", "w").write(json.dumps(record))

    folder, sizes = sys.argv[1], []
    with process_group():
        train("first")
        train("again")
"""


@pytest.mark.slow
def test_a_process_holds_its_shards_of_student_and_teacher_alone(
    pruned: fxprune.Result, dense: PreTrainedModel, tmp_path: Path
) -> None:
    """It held three whole copies of the student, and a whole teacher."""
    pruned.save_pretrained(tmp_path / "slim")
    dense.save_pretrained(tmp_path / "dense")
    launch(TORCHRUN, SHARDED, tmp_path)
    assert pruned.model is not None
    whole = sum(value.nbytes for model in (pruned.model, dense) for value in model.parameters())
    for name in ("first", "again"):  # from the last checkpoint
        for rank in (0, 1):
            found = json.loads((tmp_path / f"{name}{rank}.json").read_text())
            assert found["shards"] == pytest.approx(whole / 2, rel=0.01)
            assert any("resumed" in note for note in found["notes"]) == (name == "again")
            updates = 3 * 4 * found["trained"]  # with the moments of the optimizer
            assert all(size < whole / 2 + updates + 0.1 * whole for size in found["sizes"]), (whole, found)
    alone = fxprune.recover(
        pruned, SUMS, TOKENIZER, settings=QUICK, batch=10, distil=dense, dropout=0.0, arguments={"use_cpu": True}
    )
    loaded = fxprune.from_pretrained(tmp_path / "recovered").state_dict()
    before = pruned.model.state_dict()
    for name, value in alone.model.state_dict().items():
        assert (loaded[name] - value).norm() <= 1e-3 * (value - before[name]).norm(), name


def test_accelerate_has_the_options_that_the_documentation_gives_it() -> None:
    launch: Any = importlib.import_module("accelerate.commands.launch")
    (command,) = re.findall(r"`accelerate launch (.*?)`", (ROOT / "docs/scale.md").read_text(encoding="utf-8"))
    chosen = launch.launch_command_parser().parse_args(shlex.split(command))
    assert chosen.use_fsdp and chosen.fsdp_version == "2" and chosen.training_script == "train.py"
