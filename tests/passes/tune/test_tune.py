"""Tuning: parameters are folded in exactly, never end worse, and an interrupted run resumes."""

import dataclasses
import math
import re
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from fxprune.passes.tune import RecordTeacherPass, TunePass
from fxprune.passes.tune import trained as trained_module
from fxprune.passes.tune.teacher import Teacher
from fxprune.passes.tune.trained import StoredWeights, TrainedVectors, TrainedWeights, VectorsRun
from fxprune.passes.tune.tune import Training
from torch import fx, nn

import fxprune
from fxprune.data.calibration import Calibration, Sample
from fxprune.errors import ArgumentError, CalibrationError
from fxprune.graph.facts import Notes, facts_of, fork
from fxprune.graph.tensors import get_tensor, set_tensor, weights
from fxprune.masking.compare import Verified
from fxprune.masking.masked_run import TrainingRun, UntouchedRun
from fxprune.masking.teacher import TeacherBatches, TeacherLogits, divergence, rejection, run_logits
from fxprune.offload import files, prefetch
from fxprune.offload.files import offload_to
from fxprune.offload.prefetch import GatheringPrefetcher, offer_prefetcher
from fxprune.offload.ranks import world_size
from fxprune.pipeline.arguments import MEMORY
from fxprune.pipeline.contract import tracking
from fxprune.removal.removal import Removed
from tests.forked import in_processes
from tests.tiers import tiers
from tests.tokens import character_tokenizer

IDS = torch.randint(20, (12, 9), generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A norm, two maps with biases around a ReLU, and a third without one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.c(self.b(self.a(self.norm(x)).relu()))  # type: ignore[no-any-return]


class Language(nn.Module):
    """Two blocks between an embedding and a readout that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.table(ids)) @ self.table.weight.T  # type: ignore[no-any-return]


STEPS = "find-groups, l2{kinds=[mlp]}, select-by-ratio{kinds=[mlp], ratio=0.3, protect=[]}"


def cut(model: nn.Module, data: Any = IDS, example: Any = None, teacher: Any = "record-teacher") -> fx.GraphModule:
    """The slim graph of a model, verified, with what the dense one predicted."""
    dense = fxprune.trace(model, example or {"ids": IDS[:2]}).graph_module
    calibrate = fxprune.load_pass("calibrate", data=data)
    steps = [calibrate, fxprune.Pipeline(STEPS), teacher, fxprune.Pipeline("shrink{verify}")]
    return fxprune.Pipeline(steps)(dense).graph_module


@pytest.fixture(scope="module")
def slim() -> fx.GraphModule:
    torch.manual_seed(3)
    model = Language().eval()
    for block in model.blocks:
        nn.init.normal_(block.b.bias)  # type: ignore[union-attr, arg-type]
    return cut(model)


def tune(graph_module: fx.GraphModule, seen: list[int], stop: int = -1, **settings: Any) -> fx.GraphModule:
    """The tuned graph; the numbers of its steps go to ``seen``, and it is interrupted once there are ``stop``."""

    def track(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
        for item in items:
            if len(seen) == stop:
                raise Stopped
            seen.append(item)
            yield item

    with tracking(track):
        return TunePass(**settings)(graph_module).graph_module


def heldout(graph_module: fx.GraphModule, lessons: fx.GraphModule, error: Any = divergence) -> float:
    """The error of a graph on what was held out, without any vectors."""
    (batch,) = TeacherBatches(facts_of(lessons)[Teacher].heldout, lessons, 64)
    with torch.no_grad():
        return float(error(run_logits(UntouchedRun(graph_module), batch.inputs), batch))


def test_what_the_dense_model_said_is_its_likeliest_classes(slim: fx.GraphModule) -> None:
    teacher = facts_of(slim)[Teacher]
    assert (len(teacher.train), len(teacher.heldout)) == (11, 1)
    assert teacher.heldout_from == "calibration samples held out"
    held = teacher.heldout[0].sample.inputs["ids"]
    assert all(not torch.equal(one.sample.inputs["ids"], held) for one in teacher.train)
    one = teacher.train[0]
    assert one.classes.shape == (9, 20) and one.likelihoods.shape == (9, 21)
    assert torch.allclose(one.likelihoods.float().exp().sum(-1), torch.ones(9), atol=1e-2)
    given = facts_of(RecordTeacherPass(samples=5, heldout=IDS[:3], kept=2)(fork(slim)).graph_module)[Teacher]
    assert (len(given.train), len(given.heldout)) == (5, 3) and given.train[0].classes.shape == (9, 2)


@pytest.mark.parametrize(("everywhere", "rank"), [(False, 0), (True, 0), (True, 3)])
def test_folding_gives_what_the_vectors_gave(slim: fx.GraphModule, everywhere: bool, rank: int) -> None:
    removal = facts_of(slim)[fxprune.Removed].removal
    vectors = TrainedVectors.of(slim, removal, everywhere, rank)
    kinds = [kind for kind, _ in vectors.sizes]
    assert kinds.count("down") == kinds.count("up") == (6 if rank else 0)
    assert kinds.count("own") == 8 and kinds.count("in") == kinds.count("out") == (6 if everywhere else 4)
    numbers = torch.randn(vectors.count, generator=torch.Generator().manual_seed(4))
    folded = fork(slim)
    with torch.no_grad():
        wanted = VectorsRun(slim, vectors, numbers).run(IDS)
        for name, value in vectors.folded([numbers], slim):
            set_tensor(folded, name, nn.Parameter(value))
        assert torch.allclose(folded(IDS), wanted, atol=1e-4)
        assert not torch.allclose(slim(IDS), wanted, atol=1e-1)
        assert torch.equal(VectorsRun(slim, vectors, torch.zeros(vectors.count)).run(IDS), slim(IDS))


def test_weights_are_folded_one_at_a_time(slim: fx.GraphModule) -> None:
    """All were held at once: a second copy of the model."""
    vectors = TrainedVectors.of(slim, facts_of(slim)[fxprune.Removed].removal, True)
    made = []
    for name, value in vectors.folded([torch.ones(vectors.count)], slim):
        made.append((name, weakref.ref(value)))
        alive = [one for one, there in made if there() is not None and get_tensor(slim, one).dim() == 2]
        assert len(alive) <= 1
        del value
    assert len({name for name, _ in made}) == len(made) == len(vectors.products) + 8


def test_processes_end_with_the_weights_of_the_first(
    slim: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kept what it had trained, whether it had stopped earlier or computed on another machine."""

    def work(rank: int) -> tuple[str, float]:
        if rank:
            run = Training.run
            monkeypatch.setattr(Training, "run", lambda one: dataclasses.replace(run(one), errors=(1e9,), kept=()))
        tuned = TunePass(epochs=3, rate=0.02)(slim).graph_module
        return facts_of(tuned)[Notes].lines[-1], sum(float(w.double().square().sum()) for _, w in weights(tuned))

    first, second = in_processes(work, 2, tmp_path)
    assert first == second and "nothing was better" not in first[0]


@pytest.mark.parametrize("how", [{}, {"weights": True}, {"rank": 2, "truth": 0.3, "batch": 5}])
def test_processes_tune_what_one_tunes_alone(slim: fx.GraphModule, tmp_path: Path, how: dict[str, Any]) -> None:
    """Each ran all samples. Three processes have fewer samples than there are in some of the batches."""
    tune = TunePass(epochs=3, rate=0.02, precision="float32", **how)
    named = {name: tensor.detach() for name, tensor in weights(tune(slim).graph_module)}
    samples = list[int]()

    def work(rank: int) -> dict[str, Any]:
        run = Training._loss
        monkeypatch = pytest.MonkeyPatch()
        monkeypatch.setattr(Training, "_loss", lambda one, b: samples.append(round(b.share * 60)) or run(one, b))
        tuned = tune(slim).graph_module
        found = {name: tensor.detach().numpy() for name, tensor in weights(tuned)}
        return found | {"samples": sum(samples), "notes": facts_of(tuned)[Notes].lines[-1]}

    first, *others = in_processes(work, 3, tmp_path)
    for name, tensor in named.items():
        assert float((torch.from_numpy(first[name]) - tensor).norm()) <= 1e-5 * float(tensor.norm()), name
        assert all((first[name] == other[name]).all() for other in others), "bit for bit"
    assert all(other["notes"] == first["notes"] for other in others) and "nothing was better" not in first["notes"]
    assert max(one["samples"] for one in (first, *others)) < 0.67 * sum(one["samples"] for one in (first, *others))


def test_parts_that_run_again_give_the_same_in_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """All activations were kept, and their bytes grew with the number of layers."""

    class Deep(Language):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(Block() for _ in range(12)))

    slim = cut(Deep())
    kept = list[int]()
    step = Training._step

    def counted(one: Training, *given: Any) -> None:
        sizes = dict[int, int]()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step(one, *given)
        kept.append(sum(sizes.values()))

    tuned = {memory: TunePass(memory=memory, precision="float32", rate=0.02)(slim).graph_module for memory in MEMORY}
    for name, tensor in weights(tuned["fast"]):
        assert torch.equal(tensor, get_tensor(tuned["auto"], name))
        assert torch.allclose(tensor, get_tensor(tuned["low"], name), atol=1e-6)
    assert "nothing was better" not in facts_of(tuned["low"])[Notes].lines[-1]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10))
    monkeypatch.setattr(Training, "_step", counted)
    for memory in ("auto", "fast"):
        TunePass(memory=memory, precision="float32")(slim)
    assert max(kept[: len(kept) // 2]) < 0.3 * min(kept[len(kept) // 2 :])


def test_a_tuned_model_is_nearer_to_the_dense_one_and_has_its_shapes(slim: fx.GraphModule) -> None:
    tuned = TunePass(epochs=20, rate=0.02)(slim).graph_module
    assert heldout(tuned, slim) < heldout(slim, slim) * 0.9
    assert [(n, w.shape) for n, w in weights(tuned)] == [(n, w.shape) for n, w in weights(slim)]
    assert torch.equal(get_tensor(tuned, "table.weight"), get_tensor(slim, "table.weight"))
    assert Teacher not in facts_of(tuned) and Verified in facts_of(tuned)
    note = facts_of(tuned)[Notes].lines[-1]
    assert re.match(r"tuned: \d+ numbers, 11 samples; divergence from the dense model from 0.0\d+ to", note)
    assert all(w.grad is None for _, w in weights(tuned))


def test_a_draft_is_tuned_for_the_tokens_that_are_accepted(slim: fx.GraphModule) -> None:
    tuned = TunePass(epochs=20, rate=0.02, objective="acceptance", precision="float32")(slim).graph_module
    before, after = heldout(slim, slim, rejection), heldout(tuned, slim, rejection)
    assert after < 0.95 * before
    said = re.search(r"tokens accepted as a draft from ([\d.]+)% to ([\d.]+)%", facts_of(tuned)[Notes].lines[-1])
    assert said and [float(one) for one in said.groups()] == pytest.approx(
        [100 - 100 * before, 100 - 100 * after], abs=0.1
    )


@pytest.fixture(scope="module")
def scaled(slim: fx.GraphModule) -> float:
    """The divergence after tuning scales alone."""
    return heldout(TunePass(epochs=20, rate=0.02, patience=8)(slim).graph_module, slim)


@pytest.mark.parametrize("settings", tiers([{"rate": 0.02, "rank": 2}, {"rate": 0.05, "weights": True}]))
def test_updates_and_weights_learn_more_than_scales(
    slim: fx.GraphModule, scaled: float, settings: dict[str, Any]
) -> None:
    tuned = TunePass(epochs=20, patience=8, **settings)(slim).graph_module
    assert heldout(tuned, slim) < scaled < heldout(slim, slim)
    assert all(w.grad is None for _, w in weights(tuned))


@pytest.mark.parametrize("everywhere", [False, True])
def test_weights_are_learned_themselves(slim: fx.GraphModule, everywhere: bool) -> None:
    learned = TrainedWeights.of(slim, facts_of(slim)[fxprune.Removed].removal, everywhere)
    assert len(learned.sizes) == 8 + (6 if everywhere else 4) and "table.weight" not in learned.sizes
    numbers = learned.initial(slim)
    assert learned.count == sum(n.numel() for n in numbers)
    with torch.no_grad():
        assert torch.equal(learned.run(slim, numbers).run(IDS), slim(IDS))
        for n in numbers:
            n.add_(0.3 * torch.randn(n.shape, generator=torch.Generator().manual_seed(4)))
        folded = fork(slim)
        for name, value in learned.folded(numbers, slim):
            set_tensor(folded, name, nn.Parameter(value))
        assert torch.equal(folded(IDS), learned.run(slim, numbers).run(IDS))
    sizes = [float(get_tensor(slim, name).detach().square().mean().sqrt()) for name in learned.sizes]
    assert learned.rates(slim) == pytest.approx([0.2 * size for size in sizes])


@pytest.mark.slow
def test_weights_are_trained_where_there_is_room(
    slim: fx.GraphModule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Twice their gradients, moments, selves and best so far; of weights in files on the disk; else vectors are."""
    step = TunePass(epochs=0.1, weights="auto", rank=2)
    count = sum(TrainedWeights.of(slim, facts_of(slim)[Removed].removal, True).sizes.values())

    def trained(free: int) -> str:
        monkeypatch.setattr("fxprune.passes.tune.tune.free_bytes", lambda device: free)
        return facts_of(step(slim).graph_module)[Notes].lines[-1].split(",")[0]

    assert trained(2 * 5 * 4 * count) == f"tuned: {count} weights"
    assert re.fullmatch(r"tuned: \d+ numbers", trained(2 * 5 * 4 * count - 1))
    with offload_to(tmp_path):
        monkeypatch.setattr("fxprune.passes.tune.tune.free_disk", lambda: 2 * 5 * 4 * count)
        assert trained(0) == f"tuned: {count} weights"
        monkeypatch.setattr("fxprune.passes.tune.tune.free_disk", lambda: 2 * 5 * 4 * count - 1)
        assert re.fullmatch(r"tuned: \d+ numbers", trained(1 << 60))
    assert (TrainedWeights.rate, TrainedVectors.rate) == (0.008, 0.005)
    with pytest.raises(ArgumentError, match="Pass True, False or 'auto'"):
        TunePass(weights="car")  # type: ignore[arg-type]


def test_weights_in_files_are_assembled_one_after_the_other(slim: fx.GraphModule) -> None:
    """All of them at once, in float32, are more than a process holds."""
    trained = TrainedWeights.of(slim, facts_of(slim)[Removed].removal, True)
    assembled = []

    def kept() -> Iterator[tuple[str, torch.Tensor]]:
        for name in trained.sizes:
            assembled.append(name)
            yield name, get_tensor(slim, name)

    stored: Any = SimpleNamespace(kept=kept, weights=trained.sizes)
    folded = dataclasses.replace(trained, stored=stored).folded((), slim)
    assert [(next(folded)[0], len(assembled)) for _ in range(2)] == [(list(trained.sizes)[i], i + 1) for i in range(2)]


@pytest.mark.parametrize("batch", [4, 2])
def test_weights_in_files_learn_what_they_learn_in_memory(
    slim: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """Vectors were trained in their place, which learn less. One process, and several that share the elements.

    Of two samples in a step the third process has none.
    """
    monkeypatch.setattr(files, "SMALLEST", 0)
    monkeypatch.setattr(prefetch, "SMALLEST", 0)
    tune = TunePass(epochs=3, rate=0.02, precision="float32", weights=True, batch=batch)
    named = {name: tensor.detach() for name, tensor in weights(tune(slim).graph_module)}
    alive = list[int]()
    update = StoredWeights.update

    def watched(one: StoredWeights, name: str, gradient: torch.Tensor) -> None:
        update(one, name, gradient)
        gradients[name] = weakref.ref(gradient)
        del gradient
        alive.append(sum(there() is not None for there in gradients.values()))

    gradients: dict[str, Any] = {}
    monkeypatch.setattr(StoredWeights, "update", watched)

    def work(rank: int) -> dict[str, Any]:
        gathering = GatheringPrefetcher(torch.device("cpu")) if world_size() > 1 else None
        folder = tmp_path / f"files {rank}"
        folder.mkdir(exist_ok=True)
        with offload_to(folder), offer_prefetcher(gathering):
            tuned = tune(slim).graph_module
        found = {name: tensor.detach().numpy().copy() for name, tensor in weights(tuned)}
        return found | {"notes": facts_of(tuned)[Notes].lines[-1]}

    alone = work(0)
    assert alive and max(alive) < len(gradients) == 6, "a gradient is used, and freed, where it is made"
    for found in (alone, *in_processes(work, 3, tmp_path)):
        assert "and nothing was" not in found["notes"] and "weights" in found["notes"]
        for name, tensor in named.items():
            assert float((torch.from_numpy(found[name]) - tensor).norm()) <= 1e-5 * float(tensor.norm()), name
    assert not list((tmp_path / "files 0").iterdir())


def test_steps_in_bfloat16_learn_as_well(slim: fx.GraphModule) -> None:
    settings: dict[str, Any] = {"epochs": 20, "rate": 0.02, "patience": 8, "weights": True}
    narrow = TunePass(**settings, precision="bf16")(slim).graph_module
    wide = TunePass(**settings, precision="float32")(slim).graph_module
    first = heldout(slim, slim)
    assert heldout(narrow, slim) < 0.95 * first and abs(heldout(narrow, slim) - heldout(wide, slim)) < 0.05 * first
    assert all(w.dtype == torch.float32 for _, w in weights(narrow))


def test_it_never_ends_worse_than_it_began(slim: fx.GraphModule) -> None:
    tuned = TunePass(rate=50.0, epochs=3)(slim)
    assert not tuned.modified
    assert all(torch.equal(get_tensor(slim, name), value) for name, value in weights(tuned.graph_module))
    note = facts_of(tuned.graph_module)[Notes].lines[-1]
    assert re.search("training did not help on .*, and nothing was changed", note)


class Stopped(KeyboardInterrupt):
    """Raised in the middle of a run, as by Ctrl-C."""


@pytest.mark.parametrize("weighty", tiers([False, True], False))
def test_it_resumes_where_it_stopped(slim: fx.GraphModule, tmp_path: Path, weighty: bool) -> None:
    seen: list[int] = []
    settings: dict[str, Any] = {"epochs": 8, "measurements": 4, "patience": 9, "weights": weighty}
    whole = TunePass(**settings)(slim).graph_module
    settings["folder"] = str(tmp_path)
    with pytest.raises(Stopped):
        tune(slim, seen, 15, **settings)
    tuned = tune(slim, seen, **settings)
    assert seen == [*range(15), *range(12, 24)]
    assert all(torch.equal(get_tensor(whole, name), value) for name, value in weights(tuned))
    seen.clear()
    tune(slim, seen, **settings | {"seed": 1})
    assert seen == list(range(24)), "another run starts from the beginning"
    (tmp_path / "tuning.safetensors").write_bytes(b"half a file")
    seen.clear()
    tune(slim, seen, **settings)
    assert seen == list(range(24))


@pytest.mark.parametrize("processes", tiers([1, 2], 1))
def test_it_resumes_from_the_cache_of_an_unfinished_run(
    slim: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """A killed run trained anew, for hours where weights are in files: without ``folder`` nothing was saved."""
    monkeypatch.setattr(files, "SMALLEST", 0)
    monkeypatch.setattr(prefetch, "SMALLEST", 0)
    settings: dict[str, Any] = {"epochs": 8, "measurements": 4, "patience": 9, "weights": True, "precision": "float32"}

    def work(place: int, name: str, stop: int = -1) -> tuple[list[int], list[Any], set[str]]:
        seen: list[int] = []
        gathering = GatheringPrefetcher(torch.device("cpu")) if world_size() > 1 else None
        folder = tmp_path / f"{name} {place}"
        folder.mkdir(exist_ok=True)
        with offload_to(folder, tmp_path / name), offer_prefetcher(gathering):
            try:
                tuned = tune(slim, seen, stop, **settings)
            except Stopped:
                return seen, [], {path.name for path in (tmp_path / name).glob("*")}
        return seen, [tensor.detach().numpy().copy() for _, tensor in weights(tuned)], set()

    def run(name: str, stop: int = -1) -> list[tuple[list[int], list[Any], set[str]]]:
        if processes == 1:
            return [work(0, name, stop)]
        return in_processes(lambda rank: work(rank, name, stop), processes, tmp_path / f"{name} {stop}")

    whole = run("whole")
    for seen, _, left in run("stopped", 15):
        assert seen == list(range(15)) and left == {"tuning.safetensors", "weights-12"}, "of the last measurement"
    for (seen, resumed, _), (_, wanted, _) in zip(run("stopped"), whole, strict=True):
        assert seen == list(range(12, 24))
        assert all((one == other).all() for one, other in zip(resumed, wanted, strict=True))
    if processes == 1:
        monkeypatch.setattr(trained_module, "free_disk", lambda: 0)
        (_, _, left) = work(0, "full", 15)
        assert not left, "no room for a copy of what is trained"


def test_progress_of_another_teacher_or_other_weights_is_not_resumed(slim: fx.GraphModule, tmp_path: Path) -> None:
    """Only the number of batches was compared, and what another run had found was folded in as this one's."""
    steps: list[int] = []

    def tuned(graph_module: fx.GraphModule) -> fx.GraphModule:
        seen: list[int] = []
        found = tune(graph_module, seen, epochs=2, folder=str(tmp_path))
        steps.append(len(seen))
        return found

    first = tuned(slim)
    tuned(slim)
    teacher, other = facts_of(slim)[Teacher], fork(slim)
    train = tuple(dataclasses.replace(one, likelihoods=one.likelihoods - 0.1) for one in teacher.train)
    facts_of(other).put(dataclasses.replace(teacher, train=train))
    tuned(other)
    facts_of(first).put(teacher)
    tuned(first)
    assert steps == [6, 0, 6, 6]


@pytest.mark.parametrize(
    ("settings", "first", "share"),
    [
        ({"weights": True}, 0.25, 0.25),
        ({"weights": True}, 1.5, 1.0),
        ({"weights": True, "rate": 0.008}, 0.25, 1.0),
        ({"weights": True, "objective": "acceptance"}, 0.25, 1.0),
        ({}, 0.25, 1.0),
    ],
)
def test_weights_near_the_dense_model_move_less(
    slim: fx.GraphModule, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], first: float, share: float
) -> None:
    """At a rate that suits a model far from the dense one, a long tuning of a near one had done harm when it ended."""
    rates: list[float] = []
    step = Training._step

    def observed(training: Training, *arguments: Any) -> None:
        step(training, *arguments)
        rates.append(training.adam.param_groups[0]["lr"] / training.adam.param_groups[0]["highest"])

    monkeypatch.setattr(Training, "_step", observed)
    monkeypatch.setattr(Training, "_measure", lambda _: first)
    TunePass(epochs=20, batch=999, measurements=1, **settings)(slim)
    assert max(rates) == pytest.approx(share, rel=0.03) and rates[-1] < 0.05 * share


@pytest.mark.parametrize(
    ("errors", "measured"),
    [
        ([5, 9, 8, 7, 6, 4, 3, 2, 1], 9),  # an error above that of the start ended a run at its highest rates
        ([5, math.nan, 8, 7, 6, 4, 3, 2, 1], 9),
        ([5, 6, 7, 8, 0, 0, 0, 0, 0], 4),
        ([5, 4, 6, 6, 6, 0, 0, 0, 0], 5),
        ([5, 4, 6, 7, 5, 5, 5, 0, 0], 7),
    ],
)
def test_tuning_stops_where_the_error_is_not_falling(
    slim: fx.GraphModule, monkeypatch: pytest.MonkeyPatch, errors: list[float], measured: int
) -> None:
    left = list(errors)
    monkeypatch.setattr(Training, "_measure", lambda _: left.pop(0))
    tuned = TunePass(epochs=8, batch=999, measurements=8, patience=3)(slim).graph_module
    assert len(errors) - len(left) == measured
    note, best = facts_of(tuned)[Notes].lines[-1], min(errors[:measured])
    assert ("did not help" in note) == (best == errors[0]) and (f"to {best:.3f}" in note or best == errors[0])


@pytest.mark.slow
def test_a_run_that_patience_ended_does_not_resume(slim: fx.GraphModule, tmp_path: Path) -> None:
    """A second run with the same folder went on behind the end, to other weights."""
    steps: list[int] = []
    settings: dict[str, Any] = {"epochs": 12, "measurements": 12, "patience": 1, "rate": 2.0, "folder": str(tmp_path)}
    ended, again = (tune(slim, steps, **settings) for _ in range(2))
    assert 0 < len(steps) < 36 and steps == [*range(len(steps))]
    assert all(torch.equal(get_tensor(ended, name), value) for name, value in weights(again))


def test_in_place_the_tensors_themselves_change() -> None:
    """A run in place on a graph that shares its tensors with the model leaves it sharing them."""
    torch.manual_seed(3)
    model = Language().eval()
    dense = fxprune.trace(model, {"ids": IDS[:2]}).graph_module
    steps = f"{STEPS}, record-teacher, shrink{{verify}}, tune{{epochs=8}}"
    tuned = fxprune.Pipeline([fxprune.load_pass("calibrate", data=IDS), fxprune.Pipeline(steps)])(dense, inplace=True)
    tuned = tuned.graph_module
    assert torch.equal(model(IDS), tuned(IDS))
    assert get_tensor(tuned, "blocks.0.b.weight") is model.blocks[0].b.weight  # type: ignore[union-attr]


class Several(Language):
    """It takes a flag and a mask, too."""

    def forward(self, flag: bool, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x = super().forward(ids) * mask[..., None]
        return x if flag else -x


def test_a_graph_that_takes_more_than_ids_is_tuned_with_a_tokenizer_too() -> None:
    """Held-out windows of ids alone were refused as calibration samples, and a flag has no device."""
    torch.manual_seed(3)
    data = {"ids": IDS, "mask": torch.ones_like(IDS)}
    example = {"flag": True, **{name: value[:2] for name, value in data.items()}}
    slim = cut(Several().eval(), data, example, fxprune.load_pass("record-teacher", tokenizer=character_tokenizer()))
    assert facts_of(slim)[Teacher].heldout_from == "calibration samples held out"
    tuned = TunePass(epochs=8)(slim).graph_module
    assert "divergence from the dense model from" in " ".join(facts_of(tuned)[Notes].lines)


def test_built_in_text_is_as_long_as_most_samples(slim: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.passes.tune.teacher.offline_docstrings", lambda: "some text " * 100)

    def letters(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 20 for letter in text]}

    def held(lengths: list[int]) -> Teacher:
        other = fork(slim)
        samples = [Sample({"ids": IDS[:1, :n].expand(1, -1)}, IDS[:1, :n]) for n in lengths]
        facts_of(other).put(Calibration(tuple(samples)))
        return facts_of(RecordTeacherPass(tokenizer=letters)(other).graph_module)[Teacher]

    assert {_ids(one).shape[-1] for one in held([2, 9, 9, 9]).heldout} == {9}


def test_the_tokens_of_the_text_count_as_much_as_is_said(slim: fx.GraphModule) -> None:
    settings = TunePass(truth=0.3, weights=True)
    training = Training(
        settings, slim, TrainedWeights.of(slim, facts_of(slim)[Removed].removal, True), facts_of(slim)[Teacher]
    )
    batch = training.batches[0]
    with torch.no_grad():
        logits = run_logits(UntouchedRun(slim), batch.inputs)
        said = logits[:, :-1].log_softmax(-1).gather(-1, batch.labels[:, 1:, None])
        assert torch.equal(batch.labels, batch.inputs["ids"])
        assert torch.allclose(training._loss(batch), divergence(logits, batch) - 0.3 * said.mean(), atol=1e-5)
        none = dataclasses.replace(batch, labels=torch.full_like(batch.labels, -100), counted=0.0)
        assert torch.equal(training._loss(none), divergence(training._logits(none), none))


def test_attention_is_in_float32_where_its_gradient_is_due() -> None:
    def attention(q: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.scaled_dot_product_attention.default(q, 2 * q, -q)

    graph_module = fx.symbolic_trace(attention)
    q = torch.randn(1, 2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = TrainingRun(graph_module).run(q)
    assert torch.equal(found, attention(q.float()).bfloat16()) and found.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(found.float().sum(), q)
    assert gradient.isfinite().all() and gradient.dtype == torch.bfloat16


class Surrounded(Language):
    """Reads the tokens around each, before it and behind, as models that fill in masks do."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        return self.blocks(x + x.mean(1, keepdim=True)) @ self.table.weight.T  # type: ignore[no-any-return]


class Halved(Language):
    """Says something of every other token alone."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids)[:, ::2]


@pytest.mark.parametrize(("kind", "counts"), [(Language, True), (Surrounded, False), (Halved, False)])
def test_the_text_counts_for_models_that_say_next_tokens_alone(kind: type[Language], counts: bool) -> None:
    torch.manual_seed(3)
    slim = cut(kind().eval())
    plain = TunePass(epochs=2, rate=0.02)(fork(slim)).graph_module
    tuned = TunePass(epochs=2, rate=0.02, truth=0.5)(fork(slim)).graph_module
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), slim.parameters(), strict=True))
    same = all(torch.equal(a, b) for a, b in zip(tuned.parameters(), plain.parameters(), strict=True))
    assert same != counts
    notes = (facts_of(tuned).get(Notes) or Notes()).lines
    assert any("the text itself was not counted" in note for note in notes) != counts


def _ids(one: TeacherLogits) -> torch.Tensor:
    ids: torch.Tensor = next(iter(one.sample.inputs.values()))
    return ids


def test_copies_with_noise_are_learned_from_and_nothing_held_out_is_changed(
    slim: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = facts_of(RecordTeacherPass(samples=8)(fork(slim)).graph_module)[Teacher]
    noisy = facts_of(RecordTeacherPass(samples=8, copies=3, noise=0.9)(fork(slim)).graph_module)[Teacher]
    assert (len(plain.train), len(noisy.train)) == (7, 21)
    ids, before = ([_ids(one) for one in teacher.train] for teacher in (noisy, plain))
    changed = [not torch.equal(after, before[i % 7]) for i, after in enumerate(ids)]
    assert any(changed) and not all(changed)
    number = changed.index(True)
    one, other = noisy.train[number], plain.train[number % 7]
    assert not torch.equal(one.likelihoods, other.likelihoods), "the dense model says what it says of the copy"
    for one, two in zip(noisy.heldout, plain.heldout, strict=True):
        assert torch.equal(_ids(one), _ids(two))
    monkeypatch.setattr("fxprune.passes.tune.teacher.token_input", lambda _: None)
    without = facts_of(RecordTeacherPass(samples=8, copies=3, noise=0.9)(fork(slim)).graph_module)
    assert len(without[Teacher].train) == 7 and any("looks up no token" in note for note in without[Notes].lines)


def test_one_sample_and_arguments_that_do_not_fit_each_other_are_refused(slim: fx.GraphModule) -> None:
    with pytest.raises(CalibrationError, match="one sample is too few"):
        RecordTeacherPass(samples=1)(fork(slim))
    with pytest.raises(ArgumentError, match="without noise are all alike"):
        RecordTeacherPass(copies=2)
    with pytest.raises(ArgumentError, match="take no low-rank update"):
        TunePass(weights=True, rank=2)
