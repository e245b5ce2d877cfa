"""The paper's method beside its reference implementation: `python -m benchmarks.reference --data FOLDER`.

LLM-Pruner's own code removed a quarter of the MLP channels of the demo model, in all layers except the first four and
the last two, scored on the first 64 tokens of the first ten texts of C4 that have as many. Perplexity was measured on
the first 60 windows of 128 tokens of WikiText-2's test text. Here `fxprune` does the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import fxprune
from benchmarks import common
from benchmarks.common import load_demo_model, write_results
from fxprune.data.text import calibration_texts, read_text, token_windows
from fxprune.evaluation import perplexity

RESULTS = common.RESULTS / "reference.json"

REFERENCE = {"vector": 98.2, "first": 90.2, "second": 77.0, "mix": 90.3}
"""Perplexity after pruning by LLM-Pruner's own code, by the order of its Taylor expansion."""


@dataclass(frozen=True)
class ReferenceRow:
    """Perplexities of one order of the Taylor expansion.

    Attributes:
        order: Name of the order.
        reference: After pruning by LLM-Pruner's own code.
        found: After pruning by `recipe="llm-pruner"`.
    """

    order: str
    reference: float
    found: float

    def __str__(self) -> str:
        off = self.found / self.reference - 1
        return f"{self.order}: {self.found:.1f}, reference {self.reference:.1f} ({off:+.1%})"


def first_tokens(tokenizer: Any, texts: Iterable[str], samples: int, tokens: int) -> torch.Tensor:
    """The first `tokens` ids of each of the first texts that have as many: `(samples, tokens)`.

    Raises:
        ValueError: Fewer texts are long enough.
    """
    ids = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts)
    found = [row[:tokens] for row in ids if len(row) >= tokens][:samples]
    if len(found) < samples:
        raise ValueError(f"{len(found)} texts have {tokens} tokens; {samples} are needed")
    return torch.tensor(found)


def reference_rows(model: Any, samples: torch.Tensor, heldout: torch.Tensor, **options: Any) -> Iterator[ReferenceRow]:
    """Rows of each order, scored on token ids `(samples, tokens)` and measured on others `(windows, tokens)`."""
    for order, reference in REFERENCE.items():
        result = fxprune.prune(model, samples, recipe="llm-pruner", importance=f"taylor{{order={order}}}", **options)
        yield ReferenceRow(order, reference, float(perplexity(result.model or result.graph_module, heldout)))


def main(
    data: Annotated[Path, typer.Option(help="Folder with c4_sample.jsonl and wikitext2/test.txt.")],
    json_: Annotated[bool, typer.Option("--json", help=f"Also write results/{RESULTS.name}.")] = False,
) -> None:
    """Prune the demo model as the paper's reference implementation did, and compare perplexities."""
    console = Console(soft_wrap=True)
    model, tokenizer = load_demo_model()
    samples = first_tokens(tokenizer, calibration_texts(data / "c4_sample.jsonl"), samples=10, tokens=64)
    heldout = token_windows(tokenizer, read_text(data / "wikitext2" / "test.txt"), 128)[:60]
    dense = float(perplexity(model, heldout))
    console.print(f"dense: {dense:.1f}", highlight=False)
    rows = []
    select = "select-by-group-ratio{group_ratio=0.25}"
    for row in reference_rows(model, samples, heldout, select=select, kinds=["mlp"], protect=(4, 2)):
        console.print(str(row), highlight=False)
        rows.append(asdict(row))
    if json_:
        write_results(RESULTS, {"dense": dense, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
