"""Passes, tokenizer and samples of a prune, checked before any weight is read.

A dry run prepares as a prune does, so that both refuse the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fxprune
from fxprune.cli.models import is_config_alone, load_words
from fxprune.errors import ArgumentError


@dataclass(frozen=True)
class CalibrationText:
    """The calibration text of a command; None for built-in text and for the defaults of the recipe."""

    source: str | None
    samples: int | None
    tokens: int | None

    def check(self) -> None:
        """Refuse numbers without a text, and a text that cannot be read."""
        from fxprune.data.text import calibration_text

        if self.source is not None:
            calibration_text(self.source)
        for option, value in (("--samples", self.samples), ("--tokens", self.tokens)):
            if self.source is None and value is not None:
                remedy = "Give --calibration, or leave it out"
                raise ArgumentError("applies to a calibration text, and there is none", where=option, remedy=remedy)

    def read(self, tokenizer: Any, most: int | None = None) -> Any:
        """The samples and their source, at most ``most`` unless a number was given; None if there is no text."""
        from fxprune.data.text import TOKENS, text_samples

        if self.source is None:
            return None
        return text_samples(self.source, tokenizer, self.samples or most, self.tokens or TOKENS)


@dataclass(frozen=True)
class Prepared:
    """Inputs of a prune besides the model."""

    passes: tuple[Any, ...]
    tokenizer: Any
    samples: Any


def prepare(
    model: str,
    gguf_file: str | None,
    text: CalibrationText,
    options: Mapping[str, Any],
    *,
    needs_tokenizer: bool,
    dry_run: bool,
) -> Prepared:
    """Build the passes of a prune, and load tokenizer and samples; in a dry run a bare config needs no tokenizer."""
    from fxprune.recipes.recipe import needs_samples

    bare = fxprune.prune_pipeline(None, **options).passes  # only a file in the recipe gives these samples
    for stage in ("select", "shrink"):
        if all(step.stage != stage for step in bare):
            remedy = "Add one; `fxprune recipes fast` prints a whole pipeline"
            raise ArgumentError(f"it has no pass of the stage {stage}", where="--recipe", remedy=remedy)
    built_in = reader_of(bare) is None and any(map(needs_samples, bare))
    wanted = built_in or text.source is not None or needs_tokenizer
    needed = wanted and not (dry_run and is_config_alone(model, gguf_file))
    instead = "; a prune by weights alone, as with --importance l2, needs none" if built_in else ""
    tokenizer = load_words(model, gguf_file, needed=needed, instead=instead)
    stand_in = tokenizer or (len if wanted else None)  # any callable: it is not called
    data = None if text.source is None else ()  # passes with data are not told apart by their samples
    passes = tuple(fxprune.prune_pipeline(data, tokenizer=stand_in, **options).passes)
    reader = reader_of(passes)
    samples = None
    if tokenizer is not None:
        samples = text.read(tokenizer, getattr(reader, "samples", None) or getattr(reader, "built_in", None))
    for step in passes:
        if step is not reader or data is None:
            step.check_arguments()
    return Prepared(passes, tokenizer, samples)


def reader_of(passes: Sequence[Any]) -> Any:
    """The pass that reads the samples; None if there is none."""
    from fxprune.data.calibration import Calibration

    return next((step for step in passes if Calibration in step.gives), None)
