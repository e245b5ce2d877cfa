"""A model of twice the memory that is allowed, pruned from folder to folder: `python -m benchmarks.low_memory`.

The model is a random Llama of a given shape, written shard by shard. A process prunes it with Taylor scores and least
squares under a limit that the kernel holds, in a memory cgroup of its own, for which it takes root. Prints the peak
that the kernel counted, page cache included.
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
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["app", "limited", "llama", "write_gguf", "write_random"]

app = typer.Typer(add_completion=False)

_CHILD = """
import sys, time, torch, fxprune
source, out, samples, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
ids = torch.randint(32000, (samples, tokens), generator=torch.Generator().manual_seed(0))
begin = time.perf_counter()
result = fxprune.prune_checkpoint(
    source, out, ids, taylor="mix", kinds="mlp", ratio=0.2, compensate="least-squares{reach=stream}"
)
took = time.perf_counter() - begin
print(f"pruned in {took:.0f} s: {result.report.parameters[0]:,} to {result.report.parameters[1]:,} parameters")
print(f"verified: masked and slim outputs differ by {result.report.verification_error:.1e} at most")
"""


def llama(hidden: int, ffn: int, layers: int) -> LlamaConfig:
    """A config with heads of 64 numbers, eight of which share keys and values."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 512),
        vocab_size=32000,
        tie_word_embeddings=False,
    )


def write_random(folder: Path, config: LlamaConfig, shard_bytes: int = 500_000_000) -> int:
    """Write a model of random weights shard by shard; returns the bytes of its weights.

    Args:
        folder: where to.
        config: of the model.
        shard_bytes: of a file, at most, but for a tensor that is larger.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).named_parameters()}
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
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


def write_gguf(folder: Path, config: LlamaConfig) -> tuple[Path, int]:
    """Write a model of random weights as a GGUF file of half precision, with the tokenizer of the demo model.

    Args:
        folder: of the file; the model is in memory meanwhile.
        config: of the model, which gets as many tokens as that tokenizer has.

    Returns:
        The file, and the bytes of the weights once they are unpacked to float32.
    """
    import fxprune
    from benchmarks.demo_model import load_demo_model

    source, file, (_, tokenizer) = folder / "unpacked", folder / "dense.gguf", load_demo_model()
    config.vocab_size = len(tokenizer)
    total = write_random(source, config)
    fxprune.export_model(LlamaForCausalLM.from_pretrained(source), file, tokenizer=tokenizer, quantization="f16")
    shutil.rmtree(source)
    return file, total


@contextmanager
def limited(limit: int) -> Iterator[tuple[list[str], Path]]:
    """Yield what to put before a command so that it has so many bytes of memory, and the file with its peak.

    Raises:
        OSError: no group can be made.
    """
    root, first = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory").is_dir()
    group = (root / "memory" if first else root) / f"fxprune-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
        into = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        yield ["sh", "-c", into, "sh"], group / ("memory.max_usage_in_bytes" if first else "memory.peak")
    finally:
        group.rmdir()


@app.command()
def main(
    hidden: Annotated[int, typer.Option(help="Width.")] = 2048,
    ffn: Annotated[int, typer.Option(help="Channels of an MLP.")] = 5632,
    layers: Annotated[int, typer.Option(help="Layers.")] = 22,
    share: Annotated[float, typer.Option(help="Memory allowed, of the bytes of the weights.")] = 0.5,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens of one.")] = 64,
    gguf: Annotated[bool, typer.Option("--gguf", help="Prune from a GGUF file of half precision.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Where there is room for both models; else temporary.")] = None,
) -> None:
    """Write a model, prune it with half the memory, and load what came out."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        source, out = Path(place) / "dense", Path(place) / "slim"
        if gguf:
            source, total = write_gguf(Path(place), llama(hidden, ffn, layers))
            said = f"{total / 1e9:.2f} GB unpacked, {source.stat().st_size / 1e9:.2f} GB in the GGUF file"
        else:
            total = write_random(source, llama(hidden, ffn, layers))
            said = f"{total / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} files"
        limit = int(share * total)
        print(f"weights: {said}")
        print(f"memory allowed: {limit / 1e9:.2f} GB", flush=True)
        begin = time.perf_counter()
        with limited(limit) as (before, peak):
            command = [*before, sys.executable, "-c", _CHILD, str(source), str(out), str(samples), str(tokens)]
            done = subprocess.run(command, check=False)
            most = int(peak.read_text())
        print(f"ended with {done.returncode} after {time.perf_counter() - begin:.0f} s")
        print(f"peak, page cache included: {most / 1e9:.2f} GB")
        if done.returncode == 0:
            _load(out)
        raise typer.Exit(done.returncode)


def _load(out: Path) -> None:
    import fxprune

    model = fxprune.from_pretrained(out)
    logits = model(torch.arange(8)[None]).logits
    print(f"loads: logits {tuple(logits.shape)}, all finite: {bool(logits.isfinite().all())}")


if __name__ == "__main__":
    app()
