"""Norms over fewer units, as masking has them and as an average of those that stay: `python -m benchmarks.norms`.

Both sides remove the same units. Width is measured on the demo model, by the perplexity of held-out text. No model at
hand has trained weights and latents under a norm, or heads under a norm over all of them: there the weights are random,
and what is measured is how far the predictions move, as a Kullback-Leibler divergence.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import fxprune
from benchmarks.demo_model import load_demo_model
from benchmarks.environment import environment
from benchmarks.perplexity import perplexity
from benchmarks.text import offline_text, split_calibration_heldout, token_windows

__all__ = ["RANDOM", "Row", "app", "divergence", "random_model", "random_rows", "width_rows"]

RESULTS = Path(__file__).parent / "results" / "norms.json"

NORMS = ("sliced", "masked")

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
RANDOM: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "latents": ("deepseek_v3", _LATENT, "mlp"),
    "heads under one norm": ("olmo2", {**_SMALL, "num_key_value_heads": 8}, "head"),
    "width": ("llama", {**_SMALL, "num_key_value_heads": 8}, "channel"),
}
"""By what is removed: a type of model, its sizes, and the kind of groups; of these, those that a norm runs over."""

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Row:
    """One comparison: the same units removed, norms one way and the other.

    Attributes:
        what: what is removed, and from what.
        removed: the fraction of it.
        fitted: whether what stays was fitted by least squares.
        measure: what the figures are.
        sliced: with an average of the units that stay.
        masked: as masking has it.
        error: of the two, one standard error of their difference over models; None where there is one model.
    """

    what: str
    removed: float
    fitted: bool
    measure: str
    sliced: float
    masked: float
    error: float | None = None


def width_rows(ratios: tuple[float, ...], samples: int, windows: int) -> Iterator[Row]:
    """Perplexity of the demo model with channels of the residual stream removed.

    Args:
        ratios: fractions of the parameters.
        samples: of calibration text, to score and to fit by.
        windows: of held-out text, of 128 tokens.
    """
    model, tokenizer = load_demo_model()
    texts = split_calibration_heldout(offline_text())
    calibration, heldout = (
        token_windows(tokenizer, text, 128, limit) for text, limit in zip(texts, (samples, windows), strict=True)
    )
    options: dict[str, Any] = {"kinds": ["channel"], "protect": (), "recipe": "llm-pruner", "calibration": calibration}
    scored = fxprune.prune(model, **options, ratio=ratios[0], taylor="second", verify=False)
    scores = fxprune.facts_of(scored.graph_module)[fxprune.Removed].removal.scores
    del scored
    for ratio in ratios:
        for fit in ("none", "least-squares{reach=stream}"):
            found = {}
            for norm in NORMS:
                result = fxprune.prune(model, **options, ratio=ratio, scores=scores, compensate=fit, norm=norm)
                found[norm] = perplexity(result.model or result.graph_module, heldout)
            yield Row("width, SmolLM2-135M-Instruct", ratio, fit != "none", "perplexity", **found)


def random_rows(ratio: float, models: int) -> Iterator[Row]:
    """How far the predictions of random models move, for each way in which a norm is over what goes.

    Args:
        ratio: fraction of the units of each group.
        models: how many of each type, with other random weights.
    """
    for what, (_, _, kind) in RANDOM.items():
        for criterion in ("random", "taylor{order=second}"):
            pairs = [_distances(what, kind, ratio, criterion, seed) for seed in range(models)]
            gaps = [sliced - masked for sliced, masked in pairs]
            sliced, masked = (mean(column) for column in zip(*pairs, strict=True))
            error = stdev(gaps) / models**0.5 if models > 1 else None
            told = f"{what}, {models} random models, {criterion.partition('{')[0]} scores"
            yield Row(told, ratio, False, "nats per token", sliced, masked, error)


def _distances(what: str, kind: str, ratio: float, criterion: str, seed: int) -> tuple[float, float]:
    """The divergence of one random model with the same units removed, norms sliced and masked."""
    model = random_model(what, seed)
    ids = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(seed))
    under = fxprune.find_groups(fxprune.dependency_graph(fxprune.trace(model)))
    names = {group.name for group in under if group.renormalised and group.kind == kind}
    options: dict[str, Any] = {"kinds": [kind], "group_ratio": ratio, "protect": (), "importance": criterion}
    whole = fxprune.prune(model, ids[:8], seed=seed, recipe="llm-pruner", **options)
    kept = _only(whole, names)
    found = [fxprune.apply(model, kept, norm=norm).graph_module for norm in NORMS]
    sliced, masked = (divergence(model, slim, ids[8:]) for slim in found)
    return sliced, masked


def _only(result: fxprune.Result, names: set[str]) -> fxprune.Plan:
    """The plan of a prune, of the groups of these names alone."""
    removal = fxprune.facts_of(result.graph_module)[fxprune.Removed].removal
    members = {
        (member.name, member.axis) for group in removal.groups if group.name in names for member in group.members
    }
    plan = result.plan
    kept = {
        name: {axis: index for axis, index in by_axis.items() if (name, axis) in members}
        for name, by_axis in plan.kept.items()
    }
    return fxprune.Plan({name: by_axis for name, by_axis in kept.items() if by_axis})


def random_model(what: str, seed: int) -> PreTrainedModel:
    """A model with random weights, norms too; the same for the same seed."""
    kind, sizes, _ = RANDOM[what]
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.5 + torch.rand_like(parameter))
            else:
                parameter.mul_(4)  # as built, blocks add next to nothing to the stream
    return model


@torch.no_grad()
def divergence(dense: Any, slim: Any, ids: torch.Tensor) -> float:
    """The mean Kullback-Leibler divergence of predictions, in nats per token.

    Args:
        dense: a model.
        slim: a model or a graph of one.
        ids: token ids `(samples, tokens)`.
    """
    want, got = (run(input_ids=ids).logits.log_softmax(-1) for run in (dense, slim))
    return float((want.exp() * (want - got)).sum(-1).mean())


@app.command()
def main(
    ratios: Annotated[str, typer.Option(help="Fractions of the parameters, comma-separated.")] = "0.1,0.2",
    samples: Annotated[int, typer.Option(help="Samples of 128 tokens to score and fit by.")] = 32,
    windows: Annotated[int, typer.Option(help="Windows of 128 tokens to measure on.")] = 48,
    models: Annotated[int, typer.Option(help="Random models of each type.")] = 4,
    out: Annotated[Path, typer.Option(help="File to write.")] = RESULTS,
) -> None:
    """Measure both ways of keeping norms, print a table and write it to a file."""
    rows: list[Row] = []
    table = Table("removed", "part", "fitted", "measure", "sliced", "masked")
    parts = tuple(float(part) for part in ratios.split(","))
    for row in (*random_rows(0.25, models), *width_rows(parts, samples, windows)):
        rows.append(row)
        error = "" if row.error is None else f" (difference ± {row.error:.3f})"
        fitted = "yes" if row.fitted else "no"
        table.add_row(
            row.what, f"{row.removed:.0%}", fitted, row.measure, f"{row.sliced:.3f}", f"{row.masked:.3f}{error}"
        )
        print(row, flush=True)
    Console().print(table)
    told = {"environment": environment(), "samples": samples, "windows": windows, "rows": [asdict(r) for r in rows]}
    out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
