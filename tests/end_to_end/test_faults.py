"""Whatever fails on the way, the user's model and files are as they were, or the new files are whole."""

import dataclasses
import functools
import gc
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter import _onnx_program

import fxprune
from fxprune.cli.output import write_result
from fxprune.evaluation.speed import Widths, write_widths
from fxprune.offload import files
from tests.export.small import tokenizer
from tests.faults import Fault, Snapshot, contents, disk, full_disk, in_child, ops, put_back, spread
from tests.models import tiny, token_ids
from tests.oracle import Net
from tests.tiers import SLOW
from tests.tokens import character_tokenizer

DISK = ("full", "forbidden", "full from then on", "interrupt", "no memory")
OPS = ("no memory", "interrupt", "no device memory")
WRITERS = ("save", "gguf", "pt2", "onnx", "command", "report", "dot", "page", "widths", "scores")
Write = Callable[[Path], object]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A pruned model, its graph of couplings, and its exports, which write nothing and take most of the time."""

    dense: Any
    result: fxprune.Result
    couplings: Any
    exports: dict[str, Any] = dataclasses.field(default_factory=dict)

    def once(self, name: str, export: Callable[..., Any]) -> Callable[..., Any]:
        """An exporter that runs once."""

        def run(*arguments: Any, **options: Any) -> Any:
            if name not in self.exports:
                self.exports[name] = export(*arguments, **options)
            return self.exports[name]

        return run


@pytest.fixture(scope="module")
def stage() -> Stage:
    dense = tiny("llama", num_hidden_layers=1)
    result = fxprune.prune(dense, importance="l1", recipe="fast", ratio=0.2)
    return Stage(dense, result, fxprune.dependency_graph(result.graph_module))


@pytest.fixture
def write(request: pytest.FixtureRequest, stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Write:
    """One of the functions that write files; it takes the folder to write into."""
    monkeypatch.setattr(torch.export, "export", stage.once("program", torch.export.export))
    monkeypatch.setattr(torch.onnx, "export", stage.once("onnx", torch.onnx.export))
    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 1000)  # weights go beside the model
    monkeypatch.setenv("FXPRUNE_WIDTHS", str(tmp_path / "root/widths.json"))
    result = stage.result
    writers: dict[str, Write] = {
        "save": lambda root: result.save_pretrained(root / "slim", tokenizer()),
        "gguf": lambda root: result.export(root / "new/x.gguf", tokenizer=tokenizer()),
        "pt2": lambda root: result.export(root / "x.pt2", verify=False),
        "onnx": lambda root: result.export(root / "x.onnx", verify=False),
        "command": lambda root: write_result(
            result, root / "x.onnx", None, {"verify": False}, run="ratio: 0.2\n", force=True
        ),
        "report": lambda root: result.write_report(root / "report.html"),
        "dot": lambda root: fxprune.write_dot(stage.couplings, root / "x.dot"),
        "page": lambda root: fxprune.write_dot(stage.couplings, root / "x.html"),
        "widths": lambda root: write_widths(Widths("device", {16: 1.0})),
        "scores": lambda root: result.scores.save(root / "x.safetensors"),
    }
    assert tuple(writers) == WRITERS
    return writers[request.param]


def starts(write: Write, root: Path) -> list[tuple[dict[str, bytes], dict[str, bytes]]]:
    """What a folder holds before and after a run: into nothing, and over older files."""
    root.mkdir()
    found = []
    for before in ({}, None):
        old = {name: b"{}" for name in found[0][1]} if before is None else before
        if any(name.startswith("slim/") for name in old):  # files of others alone are refused
            old = {**found[0][1], "slim/report.json": b"{}", "slim/notes": b"mine"}
        put_back(root, old)
        write(root)
        found.append((old, contents(root)))
        put_back(root, old)
        write(root)
        assert contents(root) == found[-1][1], "two runs write the same"
    return found


def some_and_all(few: int, many: int) -> list[Any]:
    """Two writers with a few faults, and all of them with many in the second tier."""
    return [("save", few), ("report", few), *(pytest.param(name, many, marks=SLOW) for name in WRITERS)]


@pytest.mark.parametrize(("write", "number"), some_and_all(6, 40), indirect=["write"])
def test_a_fault_of_the_disk_at_any_event_leaves_old_or_new(
    write: Write, number: int, stage: Stage, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    states, faults, kinds = starts(write, root), 0, cycle(DISK)
    models = Snapshot(stage.dense), Snapshot(stage.result.model), Snapshot(stage.result.graph_module)
    for before, after in states:
        put_back(root, before)
        with disk(counted := Fault(), root):
            write(root)
        for at in spread(counted.count, number // 2):
            put_back(root, before)
            fault = Fault(next(kinds), at)
            with disk(fault, root):
                error = fault.happens(lambda: write(root))
            found = contents(root)
            assert found == after or (error is not None and found == before), f"{fault}: {sorted(found)}"
            faults += bool(fault.place)
    gc.collect()  # destructors of what was interrupted
    for model in models:
        model.check()
    assert faults >= min(number, 10)


@pytest.mark.parametrize(("write", "number"), some_and_all(4, 12), indirect=["write"])
def test_a_disk_full_at_any_byte_leaves_the_old(write: Write, number: int, tmp_path: Path) -> None:
    """Writing a ``.pt2`` file ended the process."""
    root = tmp_path / "root"
    for before, after in starts(write, root):
        largest = max(map(len, after.values()))
        sizes = [*spread(largest - 1, number // 2 - 1), largest - max(1, largest // 500)]
        assert len(sizes) == number // 2
        for size in sizes:
            put_back(root, before)

            def act(size: int = size) -> None:
                with full_disk(size):
                    write(root)

            said = in_child(act)
            assert "cannot be written" in said, f"{size} bytes: {said}"
            assert contents(root) == before, f"{size} bytes"


@functools.cache
def net() -> Net:
    """Two layers, one of them partly frozen, and a norm with buffers in between, which alone is in evaluation."""
    torch.manual_seed(0)
    parts = {"up": nn.Linear(6, 12), "norm": nn.BatchNorm1d(12).eval(), "down": nn.Linear(12, 5)}
    parts["up"].bias.requires_grad_(False)
    return Net(lambda m, x: m.down(m.norm(m.up(x)).relu()), **parts)


INPUTS = {"example_inputs": {"x": torch.randn(4, 6)}, "verify": True}


def runs(name: str, track: Any = None) -> tuple[nn.Module, Callable[[], object]]:
    """A model, and a run on it."""
    options: dict[str, Any] = {"track": track} if track is not None else {}
    small: dict[str, Any] = {"ratio": 0.3, "recipe": "llm-pruner", "protect": (), **INPUTS, **options}
    if name == "weights":
        return net(), lambda: fxprune.prune(net(), importance="l1", **small)
    if name == "in place":
        return net(), lambda: fxprune.prune(net(), importance="l1", inplace=True, **small)
    if name == "plan":
        return net(), lambda: fxprune.apply(net(), plan(), **INPUTS, **options)
    passes: dict[str, dict[str, str]] = {
        "gradients": {"importance": "taylor{order=first}"},
        "fitted": {"importance": "wanda", "compensate": "least-squares"},
        "tuned": {"importance": "l1", "tune": "tune{epochs=1, batch=2}"},
    }
    return language_model(), lambda: fxprune.prune(
        language_model(), token_ids(6), ratio=0.2, recipe="llm-pruner", protect=(), **passes[name], **options
    )


@functools.cache
def plan() -> fxprune.Plan:
    return fxprune.prune(net(), importance="l1", ratio=0.3, recipe="llm-pruner", protect=(), **INPUTS).plan


@functools.cache
def language_model() -> Any:
    return tiny("llama", num_hidden_layers=1)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("weights", 12),
        *(pytest.param(name, 40, marks=SLOW) for name in ("weights", "in place")),
        pytest.param("plan", 30, marks=SLOW),
        *(pytest.param(name, 6, marks=SLOW) for name in ("gradients", "fitted", "tuned")),
    ],
)
def test_a_fault_of_any_op_leaves_the_model_as_it_was(name: str, number: int) -> None:
    """Without memory for it, a check of gradients said that they differ."""
    act = runs(name)[1]
    act()
    if name == "in place":
        net.cache_clear()
    with ops(counted := Fault()):
        act()
    faults, kinds = 0, cycle(OPS)
    for at in spread(counted.count, number):
        if name == "in place":  # it is another model by now
            net.cache_clear()
        state, fault = Snapshot(runs(name)[0], written=name == "in place"), Fault(next(kinds), at)
        with ops(fault):
            error = fault.happens(act)
        if error is not None or name != "in place":
            state.check(fault)
        faults += bool(fault.place)
    assert faults >= number - 3  # what is kept from run to run saves some


@pytest.mark.slow
def test_what_a_callback_raises_comes_out_and_leaves_the_model_as_it_was() -> None:
    counted = Fault("own")
    model, act = runs("fitted", counted.track)
    act()
    state = Snapshot(model)
    for at in spread(counted.count, 6):
        fault = Fault("own", at)
        assert fault.happens(runs("fitted", fault.track)[1]) is not None
        state.check(fault)
    assert counted.count >= 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "dense"
    language_model().save_pretrained(folder)
    return folder


def prune_folder(source: Path, root: Path) -> object:
    """From folder to folder, with all passes that keep intermediate results."""
    options: dict[str, Any] = {"importance": "taylor{order=first}", "compensate": "least-squares", "protect": ()}
    return fxprune.prune_checkpoint(
        source, root / "out", token_ids(4), ratio=0.2, recipe="llm-pruner", verify=False, **options
    )


@pytest.mark.slow
def test_a_fault_of_the_disk_leaves_a_folder_to_resume_from(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SMALLEST", 1 << 10)
    root = tmp_path / "root"
    root.mkdir()
    held = contents(source)
    prune_folder(source, root)
    after = contents(root)
    with disk(counted := Fault(), root):
        prune_folder(source, root)
    faults, kinds = 0, cycle(DISK)
    for at in spread(counted.count, 8):
        before = [{}, after][at % 2]
        put_back(root, before)
        fault = Fault(next(kinds), at)
        with disk(fault, root):
            error = fault.happens(lambda: prune_folder(source, root))
        found = contents(root)
        left = {name: content for name, content in found.items() if not name.startswith("out.unfinished/")}
        assert error is None or left == before, f"{fault}: {sorted(found)}"
        if left != found:  # a second run goes on from there
            prune_folder(source, root)
        assert {path.name for path in root.iterdir()} <= {"out"}, f"{fault}"
        if error is None or left != found:
            fxprune.from_pretrained(root / "out", verify=True)
        faults += bool(fault.place)
    assert contents(source) == held and faults >= 6


ROWS = [{"instruction": f"Add {i} and 1.", "input": "", "output": f"It is {i + 1}."} for i in range(12)]
TOKENIZER = character_tokenizer()


def train(root: Path) -> object:
    """Two steps, with a checkpoint after each."""
    options: dict[str, Any] = {"batch": 4, "micro_batch": 4, "epochs": 1, "held_out": 4, "precision": "float32"}
    arguments = {"use_cpu": True}
    return fxprune.recover(
        language_model(), ROWS, TOKENIZER, folder=root / "run", arguments=arguments, evaluations=2, **options
    )


@pytest.mark.slow
def test_a_fault_of_training_leaves_the_model_as_it_was_and_a_folder_to_resume_from(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with disk(counted := Fault(), root):
        train(root)
    largest, state, faults = max(map(len, contents(root).values())), Snapshot(language_model()), 0
    with ops(steps := Fault()):
        put_back(root, {})
        train(root)
    trials = [(disk, at, kind) for at, kind in zip(spread(counted.count, 5), cycle(DISK), strict=False)]
    trials += [(ops, at, kind) for at, kind in zip(spread(steps.count, 4), cycle(OPS[::2]), strict=False)]
    for way, at, kind in trials:
        put_back(root, {})
        fault = Fault(kind, at)
        with way(fault, root):
            fault.happens(lambda: train(root))
        state.check(fault)
        train(root)
        faults += bool(fault.place)
    for size in spread(largest - 1, 3):
        put_back(root, {})

        def act(size: int = size) -> None:
            with full_disk(size):
                train(root)

        said = in_child(act)
        assert said.startswith("RecoveryError: "), f"{size} bytes: {said}"
        train(root)
        faults += 1
    assert faults >= 10
