"""A model of twice the memory that is allowed, pruned from folder to folder: `python -m benchmarks.low_memory`.

The model is a random Llama of a given shape, written shard by shard. A process prunes it with Taylor scores and least
squares under a limit that the kernel enforces, in a memory cgroup of its own, which takes root. Prints the peak that
the kernel recorded, page cache included; no file of the model is in it at first.

`--demo` takes the demo model and the default recipe, with the text that it writes and tuning: once in memory, and once
with the weights in files, and half the memory of them beside what Python, its packages and a prune of a tiny model with
as many layers take. Prints the perplexity of both on held-out text, and on each text of `--text`.

`--experts 128 --hidden 1024 --ffn 256 --layers 16 --share 0.25` takes a mixture whose experts are stored one by one,
`--processes 4 --recipe balanced --share 0.6` four processes with a limit each.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig

import fxprune
from benchmarks.common import Shape, load_demo_model, write_random
from benchmarks.demo import demo_samples
from fxprune.evaluation import perplexity

_CHILD = """
import json, logging, os, sys, time, torch, fxprune
logging.basicConfig(format="%(message)s")
logging.getLogger("fxprune").setLevel(logging.INFO)  # each pass: a run that is killed shows how far it came
source, out, samples, tokens, options = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
if os.environ["WORLD_SIZE"] != "1":
    torch.distributed.init_process_group("gloo")
ids = torch.randint(32000, (samples, tokens), generator=torch.Generator().manual_seed(0))
begin = time.perf_counter()
result = fxprune.prune_checkpoint(source, out, ids, **json.loads(options))
seconds = time.perf_counter() - begin
if os.environ["RANK"] == "0":
    print(f"pruned in {seconds:.0f} s: {result.report.parameters[0]:,} to {result.report.parameters[1]:,} parameters")
    print(f"verified: masked and slim outputs differ by at most {result.report.verification_error:.1e}")
"""

_PASSES = {
    "recipe": "llm-pruner",
    "importance": "taylor{order=mix}",
    "compensate": "least-squares{reach=stream}",
}

_TINY_CHILD = """
import sys, fxprune
from benchmarks.common import Shape, memory_bytes
from fxprune.checkpoint.read import load_tokenizer
from fxprune.data.built_in import built_in_samples
from transformers import LlamaForCausalLM
samples = built_in_samples(load_tokenizer(sys.argv[1]), 128, 256)[:8] % 99
model = LlamaForCausalLM(Shape.of_width(64, 128, 30).config())
fxprune.prune(model, samples[:, :8], ratio=0.1, recipe="llm-pruner", protect=())
print(memory_bytes("RssAnon"))
"""

_DEMO_CHILD = """
import logging, sys, time, fxprune
from benchmarks.demo import demo_samples
from fxprune.checkpoint.read import load_tokenizer
logging.basicConfig(format="%(asctime)s %(message)s")
logging.getLogger("fxprune").setLevel(logging.INFO)
source, out, samples, recipe = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
tokenizer = load_tokenizer(source)
calibration = demo_samples(tokenizer, samples, 1)[0] if samples else None
options = {"ratio": 0.2, "recipe": recipe, "tokenizer": tokenizer}
begin = time.perf_counter()
if "--in-memory" in sys.argv:
    result = fxprune.prune(source, calibration, eval=False, **options)
    result.save_pretrained(out)
else:
    result = fxprune.prune_checkpoint(source, out, calibration, **options)
print(f"pruned in {time.perf_counter() - begin:.0f} s")
print(*result.report.notes, sep="\\n")
"""


def _write_gguf(folder: Path, config: LlamaConfig) -> tuple[Path, int]:
    """Write a random model as a GGUF file in half precision; return it and the bytes of its weights in float32.

    It gets the tokenizer of the demo model, and as many tokens. The whole model is in memory meanwhile.
    """
    source, file, (_, tokenizer) = folder / "unpacked", folder / "dense.gguf", load_demo_model()
    config.vocab_size = len(tokenizer)
    total = write_random(source, config)
    fxprune.export_model(LlamaForCausalLM.from_pretrained(source), file, tokenizer=tokenizer, quantization="f16")
    shutil.rmtree(source)
    return file, total


def _evict(place: Path) -> None:
    """Drop the pages of the files in a folder, or of a file: they count for the process that reads them first."""
    for path in place.iterdir() if place.is_dir() else [place]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _memory_limit(limit: int, number: int = 0) -> Iterator[tuple[list[str], Path]]:
    """Yield a command prefix that limits a process to `limit` bytes of memory, and the file with its peak.

    Raises:
        OSError: No cgroup can be created.
    """
    root, version_1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory").is_dir()
    group = (root / "memory" if version_1 else root) / f"fxprune-{os.getpid()}-{number}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(limit))
        enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        yield ["sh", "-c", enter, "sh"], group / ("memory.max_usage_in_bytes" if version_1 else "memory.peak")
    finally:
        group.rmdir()


def _run_limited(command: list[str], limit: int, processes: int) -> tuple[list[int], list[int]]:
    """Run processes in one group, each with a limit of its own; return their exit codes and peaks of memory."""
    with ExitStack() as stack:
        groups = [stack.enter_context(_memory_limit(limit, rank)) for rank in range(processes)]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "WORLD_SIZE": str(processes)}
        running = [
            subprocess.Popen([*prefix, *command], env={**os.environ, **shared, "RANK": str(rank)})
            for rank, (prefix, _) in enumerate(groups)
        ]
        codes = [process.wait() for process in running]
        return codes, [int(peak.read_text()) for _, peak in groups]


def _compare_demo(share: float, samples: int, recipe: str, texts: list[Path], folder: Path | None) -> None:
    """Prune the demo model in memory and in files, and print the perplexity of both."""
    model, tokenizer = load_demo_model()
    total = sum(parameter.nbytes for parameter in model.parameters())
    _, windows = demo_samples(tokenizer, 1, 20)
    heldout = {"held-out text": windows}
    for path in texts:
        tokens = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
        heldout[path.name] = tokens[: 60 * 128].view(-1, 128)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        source, outs = Path(place) / "dense", [Path(place) / "in-files", Path(place) / "in-memory"]
        model.save_pretrained(source, max_shard_size="50MB")
        tokenizer.save_pretrained(source)
        del model
        tiny = subprocess.check_output([sys.executable, "-c", _TINY_CHILD, str(source)], text=True)
        limit = int(float(tiny.split()[-1]) + share * total)
        print(f"weights: {total / 1e9:.2f} GB; a prune of a tiny model: {float(tiny) / 1e9:.2f} GB", flush=True)
        _evict(source)
        for out in outs:
            command = [sys.executable, "-c", _DEMO_CHILD, str(source), str(out), str(samples), recipe, f"--{out.name}"]
            if out.name == "in-memory":
                subprocess.run(command, check=True)
            else:
                with _memory_limit(limit) as (prefix, peak_file):
                    print(f"memory allowed: {limit / 1e9:.2f} GB", flush=True)
                    subprocess.run([*prefix, *command], check=True)
                    print(f"peak, page cache included: {int(peak_file.read_text()) / 1e9:.2f} GB")
            slim = fxprune.from_pretrained(out)
            for name, windows in heldout.items():
                print(f"perplexity, {out.name}, {name}: {perplexity(slim, windows):.3f}", flush=True)


def main(
    hidden: Annotated[int, typer.Option(help="Width.")] = 2048,
    ffn: Annotated[int, typer.Option(help="Channels of an MLP.")] = 5632,
    layers: Annotated[int, typer.Option(help="Layers.")] = 22,
    share: Annotated[float, typer.Option(help="Memory allowed, as a fraction of the bytes of the weights.")] = 0.5,
    samples: Annotated[int, typer.Option(min=0, help="Calibration samples; 0 for none of `--demo`.")] = 16,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a sample.")] = 64,
    experts: Annotated[int, typer.Option(help="Experts of each layer; 0 for a model without.")] = 0,
    recipe: Annotated[
        str, typer.Option(help="Recipe; by default Taylor scores and least squares; `--demo`: balanced.")
    ] = "",
    processes: Annotated[int, typer.Option(min=1, help="Processes, each with its own limit.")] = 1,
    kinds: Annotated[str, typer.Option(help="What goes: mlp, or expert where there are some.")] = "mlp",
    gguf: Annotated[bool, typer.Option("--gguf", help="Prune from a GGUF file in half precision.")] = False,
    demo: Annotated[bool, typer.Option("--demo", help="The demo model, tuned, in memory and in files.")] = False,
    text: Annotated[list[Path] | None, typer.Option(help="Texts to measure perplexity on, with `--demo`.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder with room for both models; else a temporary one.")] = None,
) -> None:
    """Write a model, prune it with half the memory of its weights, and load the result."""
    if demo:
        _compare_demo(share, samples, recipe or "balanced", text or [], folder)
        return
    with tempfile.TemporaryDirectory(dir=folder) as place:
        source, out = Path(place) / "dense", Path(place) / "slim"
        config: Any = Shape.of_width(hidden, ffn, layers).config()
        if experts:
            sizes = {"num_experts": experts, "moe_intermediate_size": ffn, "decoder_sparse_step": 1}
            config = Qwen3MoeConfig(**{**config.to_dict(), **sizes, "model_type": "qwen3_moe"})
        if gguf:
            source, total = _write_gguf(Path(place), config)
            print(f"weights: {total / 1e9:.2f} GB unpacked, {source.stat().st_size / 1e9:.2f} GB in the GGUF file")
        else:
            total = write_random(source, config)
            print(f"weights: {total / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} files")
        limit = int(share * total)
        _evict(source)
        print(f"memory allowed: {limit / 1e9:.2f} GB", flush=True)
        begin = time.perf_counter()
        options = json.dumps({"kinds": kinds, "ratio": 0.2, **({"recipe": recipe} if recipe else _PASSES)})
        command = [sys.executable, "-c", _CHILD, str(source), str(out), str(samples), str(tokens), options]
        codes, peaks = _run_limited(command, limit, processes)
        code = max(map(abs, codes))
        print(f"ended with {code} after {time.perf_counter() - begin:.0f} s")
        print(f"peak, page cache included: {', '.join(f'{peak / 1e9:.2f}' for peak in peaks)} GB")
        if code == 0:
            logits = fxprune.from_pretrained(out)(torch.arange(8)[None]).logits
            print(f"loads: logits {tuple(logits.shape)}, all finite: {bool(logits.isfinite().all())}")
        raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
