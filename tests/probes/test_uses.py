"""What users do with a slim model: each use gives exactly what it should, for models of five kinds."""

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch.utils.data import DataLoader, Dataset

import fxprune
from fxprune.emit.snapshot import shapes_of
from tests.architectures.library import LIBRARY, stirred
from tests.exports import remember_exports
from tests.models import tiny
from tests.tiers import SLOW

KINDS = ("llama", "gpt2", "t5", "bert", "mixtral")
OPTIONS: dict[str, Any] = {"importance": "l2", "kinds": ("mlp", "head"), "ratio": 0.2, "ranking": "global"}
OPTIONS |= {"protect": ()}
IDS = torch.randint(3, 31, (2, 6), generator=torch.Generator().manual_seed(1))
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def dense(kind: str) -> Any:
    if kind in LIBRARY:
        return stirred(LIBRARY[kind]()[0])
    return tiny(kind, num_hidden_layers=2) if kind != "gpt2" else tiny(kind, n_layer=2)


def inputs(kind: str) -> dict[str, torch.Tensor]:
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS[:, :4]} if kind == "t5" else {})


def prune(kind: str, model: Any = None, **options: Any) -> fxprune.Result:
    """What is left of a model; all heads of an encoder-decoder, whose config gives them one number."""
    own: dict[str, Any] = {"kinds": ("mlp",), "ratio": 0.1} if kind == "t5" else {}
    own |= {"kinds": ("mlp", "layer"), "ratio": {"layer": 0.5, "mlp": 0.2}} if kind == "gpt2" else {}
    return fxprune.prune(model or dense(kind), example_inputs=inputs(kind), **{**OPTIONS, **own, **options})


@cache
def slim(kind: str) -> fxprune.Result:
    return prune(kind)


def copied(kind: str) -> Any:
    return copy.deepcopy(slim(kind).model)


def logits(model: Any, kind: str, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs(kind), **more).logits
    return found


def close(got: torch.Tensor, want: torch.Tensor, error: float = 1e-5) -> bool:
    return bool((got - want).abs().max() <= error * max(1.0, float(want.abs().max())))


class Rows(Dataset[torch.Tensor]):
    """A dataset whose workers run models, those that :func:`slim` gave."""

    def __init__(self, models: Sequence[Any]) -> None:
        self.models = models

    def __len__(self) -> int:
        return len(self.models)

    def __getitem__(self, index: int) -> torch.Tensor:
        torch.set_num_threads(1)
        return logits(self.models[index], KINDS[index])


def pruned_plans(kinds: Sequence[str]) -> list[str]:
    """The plans of prunes in a process of their own, which traces for itself."""
    torch.set_num_threads(1)
    remember_exports().fresh = True
    return [prune(kind).plan.to_json() for kind in kinds]


def in_threads(kind: str, tmp_path: Path) -> None:
    """Two threads prune at once."""
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(partial(prune, kind), (dense(kind), dense(kind))))
    for result in results:
        assert result.plan == slim(kind).plan and torch.equal(
            logits(result.model, kind), logits(slim(kind).model, kind)
        )
    assert not torch.nn.Linear(2, 2).weight.is_meta


def copies(kind: str, tmp_path: Path) -> None:
    model = slim(kind).model
    want, buffer = logits(model, kind), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert type(other) is type(model) and torch.equal(logits(other, kind), want)
        assert vars(other)["fxprune_plan"] == slim(kind).plan.digest


def shared(kind: str, tmp_path: Path) -> None:
    model = copied(kind).share_memory()
    assert all(p.is_shared() for p in model.parameters()) and torch.equal(
        logits(model, kind), logits(copied(kind), kind)
    )


def state(kind: str, tmp_path: Path) -> None:
    """Weights go to another model of the class and the config, one on meta too."""
    model = slim(kind).model
    again = type(model)(model.config).eval()
    assert shapes_of(again) == shapes_of(model)
    again.load_state_dict(model.state_dict())
    empty = copied(kind).to("meta")
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        empty.get_submodule(owner)._buffers[leaf] = buffer
    empty.tie_weights()
    save_model(model, str(tmp_path / "weights.safetensors"))
    third = type(model)(copy.deepcopy(model.config)).eval()
    load_model(third, tmp_path / "weights.safetensors")
    for other in (again, empty, third):
        assert torch.equal(logits(other, kind), logits(model, kind))


def disk(kind: str, tmp_path: Path) -> None:
    model = slim(kind).model
    slim(kind).save_pretrained(tmp_path / "slim")
    loaded = fxprune.from_pretrained(tmp_path / "slim", verify=True)
    model.save_pretrained(tmp_path / "plain")
    for other in (loaded, type(model).from_pretrained(tmp_path / "plain")):
        assert torch.equal(logits(other, kind), logits(model, kind)) and shapes_of(other) == shapes_of(model)
    assert shapes_of(type(loaded)(loaded.config)) == shapes_of(model)


def halves(kind: str, tmp_path: Path) -> None:
    """A model that was cast and saved is the one that is loaded in that dtype: frequencies stay exact in both."""
    want = logits(slim(kind).model, kind)
    slim(kind).save_pretrained(tmp_path / "slim")
    for dtype in (torch.bfloat16, torch.float16):
        model = copied(kind).to(dtype)
        got = logits(model, kind)
        assert got.dtype == dtype and bool(got.isfinite().all())
        assert float((got.float() - want).abs().amax(-1).median()) < 0.1 * float(want.abs().max())
        fxprune.save_pretrained(model, tmp_path / str(dtype))
        loaded = fxprune.from_pretrained(tmp_path / str(dtype), verify=True)
        cast = fxprune.from_pretrained(tmp_path / "slim", dtype=dtype)
        assert loaded.dtype == dtype
        if kind != "t5":  # whose class keeps a projection in float32, which the cast one has lost
            assert torch.equal(logits(loaded, kind), logits(cast, kind))


def compiled(kind: str, tmp_path: Path) -> None:
    model = copied(kind)
    want = logits(model, kind)
    assert close(logits(torch.compile(model, backend="eager"), kind), want)
    model.compile(backend="eager")
    assert close(logits(model, kind), want)
    torch.compiler.reset()


def checkpointing(kind: str, tmp_path: Path) -> None:
    """Gradients are those without recomputation, and every parameter has one."""
    found = []
    for recompute in (False, True):
        model = copied(kind).train()
        torch.manual_seed(0)
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**inputs(kind)).logits.float().square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    assert all(close(found[1][name], gradient) for name, gradient in found[0].items())


def adapters(kind: str, tmp_path: Path) -> None:
    """LoRA computes the same beside the weights and in them."""
    from peft import LoraConfig, get_peft_model

    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "t5": ["q", "wo"], "bert": ["query"]}
    model = copied(kind)
    before = logits(model, kind)
    config = LoraConfig(r=2, target_modules=targets.get(kind, ["q_proj"]), fan_in_fan_out=kind == "gpt2")
    adapted = get_peft_model(model, config).eval()
    assert torch.equal(logits(adapted, kind), before), "its second factor starts at zero"
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 if "lora_B" in name else 0)
    unmerged = logits(adapted, kind)
    assert not close(unmerged, before)
    merged = adapted.merge_and_unload()
    assert type(merged) is type(slim(kind).model) and close(logits(merged, kind), unmerged)
    fxprune.save_pretrained(merged, tmp_path / "merged")
    assert torch.equal(logits(fxprune.from_pretrained(tmp_path / "merged"), kind), logits(merged, kind))


def generation(kind: str, tmp_path: Path) -> None:
    """Beams and caches, dynamic and static, say what the model says without a cache."""
    model = slim(kind).model
    for beams in (1, 3):
        options = {**GREEDY, "num_beams": beams}
        plain = model.generate(IDS, **options, use_cache=False)
        assert torch.equal(model.generate(IDS, **options), plain)
    static = model.generate(IDS, **GREEDY, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, model.generate(IDS, **GREEDY, use_cache=False))


def padding(kind: str, tmp_path: Path) -> None:
    """Masked padding on either side changes no logits of the tokens."""
    model, zeros = slim(kind).model, torch.zeros(2, 3, dtype=torch.long)
    wanted = logits(model, kind)
    for left in (False, True):
        ids = torch.cat((zeros, IDS) if left else (IDS, zeros), 1)
        mask = torch.cat((zeros, zeros.new_ones(2, 6)) if left else (zeros.new_ones(2, 6), zeros), 1)
        given: dict[str, Any] = {**inputs(kind), "input_ids": ids, "attention_mask": mask}
        if kind not in ("t5",):
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            got = model(**given).logits
        got = got if kind == "t5" else got[:, 3:] if left else got[:, :6]
        assert close(got, wanted), left


def vocabulary(kind: str, tmp_path: Path) -> None:
    """More rows of the embedding leave the logits of the old tokens; the model is saved and pruned again."""
    model = copied(kind)
    rows, want = model.get_input_embeddings().weight.shape[0], logits(model, kind)
    model.resize_token_embeddings(rows + 5, mean_resizing=False)
    assert close(logits(model, kind)[..., :rows], want)
    fxprune.save_pretrained(model, tmp_path / "larger")
    loaded = fxprune.from_pretrained(tmp_path / "larger", verify=True)
    assert torch.equal(logits(loaded, kind), logits(model, kind))
    assert shapes_of(type(model)(model.config)) == shapes_of(model)


def twice(kind: str, tmp_path: Path) -> None:
    """A slim model is pruned again, as it was emitted; and what remains is saved and loaded."""
    first = copied(kind)
    before = logits(first, kind)
    second = prune(kind, first, ratio=0.05, kinds=("mlp",))
    assert torch.equal(logits(first, kind), before) and second.model is not None, second.report.model_reasons
    assert 0 < second.model.num_parameters() < first.num_parameters()
    assert second.report.verification_error is None or second.report.verification_error < 1e-4
    second.save_pretrained(tmp_path / "second")
    loaded = fxprune.from_pretrained(tmp_path / "second", verify=True)
    assert torch.equal(logits(loaded, kind), logits(second.model, kind))
    assert close(second(**inputs(kind)).logits, logits(second.model, kind))
    assert shapes_of(type(loaded)(loaded.config)) == shapes_of(loaded)


Use = Callable[[str, Path], None]
USES: tuple[Use, ...] = (
    *(copies, shared, state, disk, halves, compiled, checkpointing),
    *(adapters, generation, padding, vocabulary, twice, in_threads),
)
LEFT_OUT: dict[Use, tuple[str, ...]] = {
    generation: ("bert",),  # an encoder does not generate
}
FIRST_TIER: dict[Use, tuple[str, ...]] = {vocabulary: ("t5",), compiled: (), copies: (), twice: ()}
"""Kinds that uses are tried on in the first tier, other than one."""


def table() -> Iterator[Any]:
    for use in USES:
        for kind in KINDS:
            marks = () if kind in FIRST_TIER.get(use, ("llama",)) else (SLOW,)
            if kind not in LEFT_OUT.get(use, ()):
                yield pytest.param(use, kind, marks=marks, id=f"{use.__name__}-{kind}")


@pytest.mark.parametrize(("use", "kind"), list(table()))
def test_a_use_gives_what_it_should(use: Use, kind: str, tmp_path: Path) -> None:
    use(kind, tmp_path)


@SLOW
def test_a_spawned_worker_gets_models_by_pickle() -> None:
    models = [slim(kind).model for kind in KINDS]
    loader = DataLoader(Rows(models), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    for kind, found in zip(KINDS, loader, strict=True):
        assert torch.equal(found, logits(slim(kind).model, kind))


@SLOW
def test_two_processes_prune_at_once() -> None:
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        for found in pool.map(pruned_plans, (KINDS, KINDS)):
            assert found == [slim(kind).plan.to_json() for kind in KINDS]
