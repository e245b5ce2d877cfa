"""Shared parts of the benchmarks: models, environment, memory readings, worker processes and result files."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fxprune.cli.demo import demo_checkpoint, demo_entry, load_gguf
from fxprune.data.rows import json_lines
from fxprune.data.text import calibration_texts, paragraphs
from fxprune.errors import DataError
from fxprune.evaluation import LocalTask
from fxprune.evaluation.perplexity import load_corpus
from fxprune.pipeline.arguments import refuse

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def load_demo_model(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the demo model in evaluation mode, and its tokenizer.

    Args:
        dtype: Type of the parameters; the 4-bit blocks of the file are dequantised in float32 first.

    Raises:
        FxpruneError: The package that carries the model is not installed.
    """
    folder = demo_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_named(folder: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Load the model in a folder or a GGUF file, its tokenizer and its name; the demo model if none is given."""
    if folder is None:
        return *load_demo_model(), demo_entry()["name"]
    if folder.suffix == ".gguf":
        return *load_gguf(folder), folder.stem
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), folder.name


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model: `hidden` is the width of the stream, `ffn` that of the MLP."""

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int

    @classmethod
    def of_width(cls, hidden: int, ffn: int, layers: int) -> Shape:
        """A shape with heads of 64 dimensions, eight of which share keys and values."""
        return cls("", hidden, ffn, layers, hidden // 64, max(1, hidden // 512))

    def config(self, **options: Any) -> LlamaConfig:
        """The config of this shape, with the 32,000 tokens of Llama."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=32000,
            tie_word_embeddings=False,
            **options,
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("125m", 768, 3072, 12, 12, 12),
        Shape("7b", 4096, 11008, 32, 32, 32),
        Shape("70b", 8192, 28672, 80, 64, 8),
        Shape("405b", 16384, 53248, 126, 128, 8),
    )
}


def write_random(folder: Path, config: PreTrainedConfig, shard_bytes: int = 500_000_000) -> int:
    """Write a causal language model of random weights shard by shard; return the bytes of its weights.

    Args:
        folder: New folder for the model.
        config: Config of the model; weights of experts are written one by one, as Qwen's are.
        shard_bytes: Most bytes of a file, unless a single tensor is larger.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    shapes = dict(_file_shapes(model))
    folder.mkdir(parents=True)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    total = held = 0
    generator = torch.Generator().manual_seed(0)

    def flush() -> None:
        name = f"model-{len(set(index.values())):05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        value = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
        if shard and held + value.nbytes > shard_bytes:
            flush()
            held = 0
        shard[name] = value
        held, total = held + value.nbytes, total + value.nbytes
    flush()
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return total


def _file_shapes(model: torch.nn.Module) -> Iterator[tuple[str, torch.Size]]:
    """Names and shapes of the weights as they are stored, with those of each expert apart."""
    for name, tensor in model.named_parameters():
        layer, _, kind = name.rpartition("experts.")
        if not layer or "." in kind:
            yield name, tensor.shape
            continue
        for expert, (rows, columns) in enumerate([tensor.shape[1:]] * len(tensor)):
            parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
            for part in parts:
                yield f"{layer}experts.{expert}.{part}.weight", torch.Size([rows // len(parts), columns])


def split_corpus(data: Path, others: Iterable[str] = ("wikitext2/test.txt",)) -> tuple[list[str], dict[str, str]]:
    """Four fifths of the rows of c4_sample.jsonl to calibrate on; by name the rest and other texts, to measure on."""
    rows = calibration_texts(data / "c4_sample.jsonl")
    counted = 4 * len(rows) // 5
    texts = {"c4_sample.jsonl, the rest": "\n\n".join(rows[counted:])}
    return rows[:counted], texts | {name: load_corpus(data / name) for name in others}


def environment() -> dict[str, str | int]:
    """Versions, processor and thread count of this process, for a report."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """Name of the processor, and the instruction set that torch uses on it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.processor() or "unknown")
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def write_results(path: Path, content: Mapping[str, Any], versions: Mapping[str, str] | None = None) -> None:
    """Write results as JSON, after the environment that they were measured in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {"environment": {**environment(), **(versions or {})}, **content}
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def reset_peak_memory() -> None:
    """Reset the peak of resident memory that the kernel records; does nothing outside Linux."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def memory_bytes(field: Literal["VmHWM", "VmRSS", "RssAnon"]) -> float:
    """Memory of this process in bytes, as Linux reports it; 0 on other systems.

    Args:
        field: `VmHWM` for the peak of resident memory, `VmRSS` for resident memory now, `RssAnon` for the part of it
            that is not backed by files.
    """
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith(field)), 0.0)


@contextmanager
def watch_memory(interval: float = 0.005) -> Iterator[list[float]]:
    """Yield a list that holds the highest anonymous memory so far, sampled every `interval` seconds by a thread."""
    highest, done = [memory_bytes("RssAnon")], threading.Event()

    def sample() -> None:
        while not done.wait(interval):
            highest[0] = max(highest[0], memory_bytes("RssAnon"))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield highest
    finally:
        done.set()
        thread.join()


def run_worker(module: str, task: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
    """Run `python -m MODULE --worker TASK` in a new process; return the JSON on the last line that it prints.

    On Linux a process starts from the peak memory of its parent, so the parent should stay small.

    Raises:
        RuntimeError: The process failed; holds the end of its standard error.
    """
    command = [sys.executable, "-m", module, "--worker", json.dumps(task)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} failed on {task}: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def local_tasks(files: Iterable[Path], half: str) -> dict[str, LocalTask]:
    """Tasks from files of multiple-choice questions, by name of the file.

    Args:
        files: JSONL of questions.
        half: `first` half of each file (to choose settings by), `second` (to report), or `both`.
    """
    tasks = {}
    for path in files:
        middle = sum(1 for _ in json_lines(path.read_text(encoding="utf-8"))) // 2
        start, stop = (middle if half == "second" else 0), (middle if half == "first" else None)
        tasks[path.stem] = LocalTask(path, suffix="\nAnswer:", start=start, stop=stop)
    return tasks


def split_calibration_heldout(text: str, calibration: float = 0.5) -> tuple[str, str]:
    """Split a text into calibration and held-out text that share no character and no paragraph.

    The text is cut at the first paragraph border after the given fraction of its characters. Paragraphs of the
    calibration text that are repeated after the cut are left out of the held-out text.
    """
    if not 0 < calibration < 1:
        raise refuse("calibration", calibration, "a fraction between 0 and 1", DataError)
    parts = list(paragraphs(text))
    wanted = calibration * sum(map(len, parts))
    front: list[str] = []
    taken = 0
    for paragraph in parts:
        if taken >= wanted:
            break
        front.append(paragraph)
        taken += len(paragraph)
    seen = set(front)
    rest = [paragraph for paragraph in parts[len(front) :] if paragraph not in seen]
    if not front or not rest:
        what = f"{len(parts)} paragraphs leave no held-out text after {calibration:.0%} for calibration"
        raise DataError(what, where="text", remedy="Give a longer text, with blank lines between its paragraphs")
    return "\n\n".join(front), "\n\n".join(rest)
