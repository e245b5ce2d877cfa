"""Write docs/families.md: `make families`. What it says of each family is measured by what the tests use."""

import argparse
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

import fxprune
from tests.emitted import (
    EVERY_FAMILY,
    distance,
    greedy,
    logits,
    padding_error,
    reloaded,
    through_disk,
    uneven,
    uniform,
    widths,
)

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
HEADER = ("family", "mlp", "head", "widths of their own", "`uniform=True`", "generates", "notes")
INTRODUCTION = f"""# Families

Written by `make families` from tiny random models, with transformers {transformers.__version__}. A third of the MLP
channels and of the heads goes, at random from all layers, so that layers differ in width. The tests ask the same of
every family, and more of some.

- **mlp**, **head**: units of a layer, dense and slim. A head is a key/value head with its query heads where there are
  several, else a query head.
- **widths of their own**: how the checkpoint of that model loads in transformers: *stock*, or with the modelling file
  saved beside it (`trust_remote_code=True`). `fxprune.from_pretrained` loads both.
- **`uniform=True`**: what goes if every layer is to have the same widths and stock classes are to load the checkpoint.
- **generates**: the same greedy tokens with and without cache, and after saving and loading; the logits of the graph
  and of the emitted model, and those of a prompt with and without padding on the left, are less than 1e-4 apart.

"""


def row(family: str) -> tuple[str, ...]:
    """One line of the table."""
    result, even = uneven(family), uniform(family)
    whole = [kind for kind in ("mlp", "head") if not widths(result, kind)]
    equal = [kind for kind in ("mlp", "head") if widths(even, kind)]
    loads = "stock" if through_disk(even).stock else "modelling file"
    notes = [f"stays whole: {', '.join(whole)}"] if whole else []
    if result.model.fxprune_overrides.inputs:
        notes.append("each layer takes its rows of the position biases")
    notes += [note for note in even.report.notes if "whole" in note]
    return (
        family,
        _span(result, "mlp"),
        _span(result, "head"),
        "stock" if reloaded(family).stock else "modelling file",
        f"{loads}: {', '.join(equal)}" if equal else "-",
        "yes" if generates(family) else "no",
        "; ".join(notes),
    )


def generates(family: str) -> bool:
    """Whether the slim model is right and says the same in every way it is asked."""
    model, read = uneven(family).model, reloaded(family).model
    said = greedy(model)
    same = all(torch.equal(said, other) for other in (greedy(model, use_cache=False), greedy(read)))
    return same and max(distance(logits(model), logits(uneven(family))), padding_error(model)) < 1e-4


def _span(result: fxprune.Result, kind: str) -> str:
    found = widths(result, kind).values()
    if not found:
        return "-"
    slim = sorted({after for _, after in found})
    dense = sorted({before for before, _ in found})
    return f"{_range(dense)} → {_range(slim)}"


def _range(sizes: list[int]) -> str:
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def page(families: Iterable[str]) -> str:
    """The page as Markdown."""
    lines = [HEADER, ("---",) * len(HEADER)]
    for family in families:
        lines.append(row(family))
        print(*lines[-1], sep=" | ", flush=True)
    return INTRODUCTION + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", help="print the lines of these alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    text = page(given.families or EVERY_FAMILY)
    if not given.families:
        PAGE.write_text(text, encoding="utf-8")
