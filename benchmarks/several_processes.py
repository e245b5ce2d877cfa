"""Time and bytes of each pass of a prune by several processes: `python -m benchmarks.several_processes`.

The model is a random Llama, in memory or with `--files` in files. Processes are forks on this machine, which exchange
tensors by gloo. Bytes are those of the tensors and objects that one process gives to collectives, pass by pass; on the
link an all-reduce of `n` processes sends `2 (n - 1) / n` of them from each. Of files, those that one process has read
at least once in the pass, by the pages that Linux marks as referenced.
"""

from __future__ import annotations

import io
import pickle
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import fxprune
from fxprune.checkpoint.low_memory import load_mapped
from fxprune.offload.files import offload_to
from fxprune.offload.prefetch import offer_prefetcher, prefetcher_to

Cost = tuple[str, float, int, int, int]
"""Of one pass: its name, seconds, calls of collectives, bytes given to them and read; or all but the last before it."""


def _read(folder: Path | None) -> int:
    """Bytes of the files in a folder that this process has read since the last call."""
    if folder is None:
        return 0
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.partition(" ")[0]:
            inside = str(folder) in line
        elif inside and line.startswith("Referenced:"):
            found += 1024 * int(line.split()[1])
    Path("/proc/self/clear_refs").write_text("1")
    return found


COLLECTIVES = (
    *("all_reduce", "all_gather", "reduce_scatter", "broadcast"),
    *("all_gather_object", "broadcast_object_list"),
)


def counted(name: str, note: Callable[[str, int], None]) -> Callable[..., Any]:
    """A collective of torch that tells ``note`` its name and the bytes that it is given."""
    true: Callable[..., Any] = getattr(dist, name)

    def collective(given: Any, *more: Any, **options: Any) -> Any:
        sent = more[0] if name in ("all_gather", "all_gather_object") else given
        note(name, sent.nbytes if isinstance(sent, torch.Tensor) else _bytes_of(sent))
        return true(given, *more, **options)

    return collective


def _bytes_of(value: Any) -> int:
    """Bytes of an object: pickled, and of tensors on ``meta`` in it those that they stand for."""
    found: list[int] = []

    class Sizes(pickle.Pickler):
        def persistent_id(self, one: Any) -> int | None:
            if isinstance(one, torch.Tensor) and one.is_meta:
                found.append(one.nbytes)
                return 0
            return None

    file = io.BytesIO()
    Sizes(file).dump(value)
    return sum(found) + file.tell()


def _prune(
    rank: int, count: int, place: Path, source: Path | None, model: Any, ids: torch.Tensor, recipe: str, queue: Any
) -> None:
    dist.init_process_group("gloo", f"file://{place / 'meeting'}", world_size=count, rank=rank)
    calls = Counter[str]()
    for name in COLLECTIVES:
        setattr(dist, name, counted(name, lambda _, size: calls.update(calls=1, bytes=size)))
    seen: list[Cost] = []

    def mark(step: Any) -> None:
        read = _read(source)  # in the pass before
        seen.append((step.name if step else "", time.perf_counter(), calls["calls"], calls["bytes"], read))

    passes = fxprune.prune_pipeline(ids, recipe=recipe, ratio=0.2).passes
    pipeline = fxprune.Pipeline([p for p in passes if p.stage not in ("emit", "report")], on_pass=mark)
    with ExitStack() as stack:
        if source is not None:
            stack.enter_context(offload_to(place))
            stack.enter_context(offer_prefetcher(prefetcher_to(None, torch.device("cpu"), in_files=True)))
            model = load_mapped(source, place)
        pipeline(fxprune.trace(model).graph_module)
    mark(None)
    if rank == 0:
        queue.put([(a[0], b[1] - a[1], b[2] - a[2], b[3] - a[3], b[4]) for a, b in pairwise(seen)])
    dist.barrier()


def measure(count: int, model: Any, ids: torch.Tensor, recipe: str, source: Path | None = None) -> list[Cost]:
    """The cost of each pass in the first of ``count`` processes; of a model in files, of those in ``source``."""
    context = mp.get_context("fork")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as place:
        given = (count, Path(place), source, model, ids, recipe, queue)
        processes = [context.Process(target=_prune, args=(rank, *given)) for rank in range(count)]
        for process in processes:
            process.start()
        found: list[Cost] = queue.get()
        for process in processes:
            process.join()
    return found


def main(
    processes: Annotated[str, typer.Option(help="Numbers of processes.")] = "1,2,4",
    recipe: Annotated[str, typer.Option(help="The recipe.")] = "balanced",
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 8,
    width: Annotated[int, typer.Option(help="Its width.")] = 128,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 64,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 64,
    files: Annotated[bool, typer.Option("--files", help="Leave the weights in files.")] = False,
) -> None:
    """Prune one model by several numbers of processes, and print what each pass takes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    heads = max(1, width // 32)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(1000, (samples, tokens))
    size = sum(parameter.nbytes for parameter in model.parameters())
    numbers = [int(count) for count in processes.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "dense" if files else None
        if source is not None:
            model.save_pretrained(source)
        found = [measure(count, model, ids, recipe, source) for count in numbers]
    table = Table("pass", *(f"{count}: s, calls, MB sent{', read' if files else ''}" for count in numbers))
    for rows in zip(*found, strict=True):
        cells = (
            f"{s:.1f}, {calls:,}, {sent / 1e6:.1f}" + (f", {read / 1e6:.1f}" if files else "")
            for _, s, calls, sent, read in rows
        )
        table.add_row(rows[0][0], *cells)
    Console().print(f"{size / 1e6:.1f} MB of weights, {samples} samples of {tokens} tokens", table)


if __name__ == "__main__":
    typer.run(main)
