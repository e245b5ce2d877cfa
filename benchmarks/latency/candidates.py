"""The models that are compared, each saved in a folder of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fxprune
from benchmarks.engines import Engine, Source
from benchmarks.latency.work import Work, work_of

__all__ = ["SELECT", "Candidate", "candidates"]

SELECT = "select-by-ratio{protect=[0.07, 0.04], first=[mlp], ratio=%s, round_to=[[mlp, %s]]}"
"""As the default recipe selects. Which units go makes no difference to speed, so that scores need no data here."""

_ALONE = "transformers"
"""The engine that models of other makes are compared in."""


@dataclass(frozen=True)
class Candidate:
    """A model that is measured.

    Attributes:
        name: `dense`, `slim 20%`, and the like.
        ratio: Fraction of the parameters that went; 0 for the dense one.
        source: Where it is.
        work: What its sizes say.
        everywhere: Whether it is measured in every engine, or beside the others in transformers alone.
    """

    name: str
    ratio: float
    source: Source
    work: Work
    everywhere: bool = True

    def runs_in(self, engine: type[Engine]) -> bool:
        """Whether it is measured in an engine."""
        return self.everywhere or engine.name == _ALONE


def candidates(
    dense: Any, tokenizer: Any, ratios: Iterable[float], round_to: int, lengths: Iterable[int], folder: Path
) -> Iterator[Candidate]:
    """Save and count the dense model, ours at each ratio, and of other makes what is to be compared with.

    Torch-Pruning cuts the dense model to the widths of ours where no heads went. The stock one has the same width in
    each layer, and a class that every program knows.

    Args:
        dense: The model, which stays as it is.
        tokenizer: Its tokenizer.
        ratios: Fractions of the parameters to remove.
        round_to: Widths of MLPs are multiples of it.
        lengths: Of the sequences that will be read.
        folder: Where to.
    """
    lengths = list(lengths)
    source = Source(folder / "dense")
    dense.save_pretrained(source.folder)
    tokenizer.save_pretrained(source.folder)
    traced = fxprune.trace(dense).graph_module
    yield Candidate("dense", 0.0, source, work_of(dense, traced, lengths))

    def pruned(**options: Any) -> fxprune.Result:
        pipeline = fxprune.prune_pipeline(importance="l2", verify=False, **options)
        return fxprune.Result.of(pipeline(traced).graph_module)

    for ratio in ratios:
        slim = pruned(select=SELECT % (ratio, round_to))
        here = folder / f"slim-{ratio}"
        slim.save_pretrained(here, tokenizer)
        work = work_of(slim.model, slim.graph_module, lengths)
        yield Candidate(f"slim {ratio:.0%}", ratio, Source(here), work)
        if all(name.endswith("/mlp") for name in slim.report.widths):
            cut = Source(source.folder, widths_of=here)
            yield Candidate(f"Torch-Pruning {ratio:.0%}", ratio, cut, work, everywhere=False)
        uniform = pruned(ratio=ratio, uniform=True, round_to=round_to)
        here = folder / f"stock-{ratio}"
        uniform.save_pretrained(here, tokenizer)
        work = work_of(uniform.model, uniform.graph_module, lengths)
        yield Candidate(f"stock {ratio:.0%}", ratio, Source(here), work, everywhere=False)
