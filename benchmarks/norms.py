"""Norms over fewer units, as masked or averaged over the units that stay: `python -m benchmarks.norms`.

Both sides remove the same units. Width is measured on the demo model, by perplexity on held-out text. No model at hand
normalises latents, or all heads together: small ones are trained here, for a minute or two each, on the bytes of the
built-in text, and measured on held-out bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import fxprune
from benchmarks import common
from benchmarks.common import load_demo_model, split_calibration_heldout, write_results
from fxprune.cli.console import widened
from fxprune.data.built_in import offline_text
from fxprune.data.text import token_windows
from fxprune.evaluation import perplexity

RESULTS = common.RESULTS / "norms.json"

NORMS: tuple[Literal["sliced"], Literal["masked"]] = ("sliced", "masked")

_SMALL = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
}
_LATENT = {
    **_SMALL,
    "num_key_value_heads": 8,
    "q_lora_rank": 64,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
}
SMALL: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "latents": ("deepseek_v3", _LATENT, "mlp"),
    "heads under one norm": ("olmo2", {**_SMALL, "num_key_value_heads": 8}, "head"),
}
"""By name of the units removed: type of model, its sizes, and kind of the groups, of which a norm runs over some."""


@dataclass(frozen=True)
class NormRow:
    """Comparison of sliced and masked norms after the same removal.

    Attributes:
        what: Units removed, and from which model.
        removed: Fraction of them.
        fitted: Whether the rest was fitted by least squares.
        measure: Name of the figures.
        sliced: Figure with norms that average over the units that stay.
        masked: Figure with norms that divide by the old number of units, as masking does.
        dense: Figure of the dense model.
        models: Number of models that the figures are averaged over.
    """

    what: str
    removed: float
    fitted: bool
    measure: str
    sliced: float
    masked: float
    dense: float
    models: int = 1


def width_rows(ratios: tuple[float, ...], samples: int, windows: int) -> Iterator[NormRow]:
    """Perplexity of the demo model with channels of the residual stream removed, on held-out windows of 128 tokens."""
    model, tokenizer = load_demo_model()
    texts = split_calibration_heldout(offline_text())
    calibration, heldout = (
        token_windows(tokenizer, text, 128)[:limit] for text, limit in zip(texts, (samples, windows), strict=True)
    )
    options: dict[str, Any] = {"kinds": ["channel"], "protect": (), "recipe": "llm-pruner", "calibration": calibration}
    scored = fxprune.prune(model, **options, ratio=ratios[0], importance="taylor{order=second}", verify=False)
    scores = fxprune.facts_of(scored.graph_module)[fxprune.Removed].removal.scores
    reuse = fxprune.load_pass("load-scores", scores=scores)
    del scored
    dense = perplexity(model, heldout)
    for ratio in ratios:
        for fit in ("none", "least-squares{reach=stream}"):
            found: dict[str, float] = {}
            for norm in NORMS:
                result = fxprune.prune(model, **options, ratio=ratio, importance=reuse, compensate=fit, norm=norm)
                found[norm] = perplexity(result.model or result.graph_module, heldout)
            what = "width, SmolLM2-135M-Instruct"
            yield NormRow(what, ratio, fit != "none", "perplexity", found["sliced"], found["masked"], dense)


def small_rows(ratio: float, models: int, steps: int) -> Iterator[NormRow]:
    """Loss of small models with units removed that a norm runs over."""
    texts = split_calibration_heldout(offline_text(), 0.8)
    training, heldout = (_windows(text.encode(), count) for text, count in zip(texts, (4096, 256), strict=True))
    for what in SMALL:
        found: dict[str, list[list[float]]] = {}
        for seed in range(models):
            model = train_small(what, training, steps, seed)
            for criterion in ("random", "taylor{order=second}"):
                slim = _prune_both(what, model, training[:16], ratio, criterion, seed)
                losses = [byte_loss(each, heldout) for each in (model, *slim)]
                found.setdefault(criterion, []).append(losses)
        for criterion, several in found.items():
            dense, sliced, masked = (mean(column) for column in zip(*several, strict=True))
            name = f"{what}, {criterion.partition('{')[0]} scores"
            yield NormRow(name, ratio, False, "nats per byte", sliced, masked, dense, models)


def _windows(text: bytes, count: int) -> torch.Tensor:
    """Windows of 64 bytes, spread evenly over a text: `(windows, 64)`."""
    starts = torch.linspace(0, len(text) - 64, count).long()
    return torch.stack([torch.tensor(list(text[start : start + 64])) for start in starts.tolist()])


def _prune_both(
    what: str, model: PreTrainedModel, ids: torch.Tensor, ratio: float, criterion: str, seed: int
) -> Iterator[torch.nn.Module]:
    """Yield the model with the same units removed, with sliced and with masked norms."""
    kind = SMALL[what][2]
    groups = fxprune.find_groups(fxprune.dependency_graph(fxprune.trace(model)))
    names = {group.name for group in groups if group.renormalised and group.kind == kind}
    select = f"select-by-group-ratio{{group_ratio={ratio}}}"
    options: dict[str, Any] = {"kinds": [kind], "select": select, "protect": (), "importance": criterion}
    whole = fxprune.prune(model, ids, seed=seed, recipe="llm-pruner", norm="sliced", **options)
    members = {
        (member.name, member.axis)
        for group in fxprune.facts_of(whole.graph_module)[fxprune.Removed].removal.groups
        if group.name in names
        for member in group.members
    }
    kept = {
        name: {axis: index for axis, index in by_axis.items() if (name, axis) in members}
        for name, by_axis in whole.plan.kept.items()
    }
    plan = fxprune.Plan({name: by_axis for name, by_axis in kept.items() if by_axis})
    yield from (fxprune.apply(model, plan, norm=norm).graph_module for norm in NORMS)


def train_small(what: str, windows: torch.Tensor, steps: int, seed: int) -> PreTrainedModel:
    """Train a small model on windows of bytes; equal seeds give equal models."""
    kind, sizes, _ = SMALL[what]
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        batch = windows[torch.randint(len(windows), (16,))]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    return model


def byte_loss(model: Any, windows: torch.Tensor) -> float:
    """Mean loss of the next byte, in nats."""
    return math.log(perplexity(model, windows))


def main(
    ratios: Annotated[str, typer.Option(help="Fractions of the parameters, comma-separated.")] = "0.1,0.2",
    samples: Annotated[int, typer.Option(min=1, help="Samples of 128 tokens to score and fit by.")] = 32,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 128 tokens to measure on.")] = 32,
    models: Annotated[int, typer.Option(help="Small models of each type.")] = 2,
    steps: Annotated[int, typer.Option(help="Steps to train each of them.")] = 250,
    out: Annotated[Path, typer.Option(help="File to write.")] = RESULTS,
) -> None:
    """Compare sliced and masked norms, print a table and write it to a file."""
    rows: list[NormRow] = []
    table = Table("removed", "part", "fitted", "measure", "dense", "sliced", "masked")
    parts = tuple(float(part) for part in ratios.split(","))
    for row in chain(small_rows(0.25, models, steps), width_rows(parts, samples, windows)):
        rows.append(row)
        figures = (f"{value:.3f}" for value in (row.dense, row.sliced, row.masked))
        table.add_row(row.what, f"{row.removed:.0%}", "yes" if row.fitted else "no", row.measure, *figures)
    widened(Console()).print(table)
    write_results(out, {"samples": samples, "windows": windows, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    typer.run(main)
